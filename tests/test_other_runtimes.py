"""Bundles in other runtimes, without edgeformer: Optimum in Python, transformers.js and onnxruntime-web.

The last two run in Node.js and on a page in Chromium. The tests install Optimum, which needs an older transformers,
into `.venv-optimum` in this tree (with the torch of the environment that runs the tests), and the JavaScript packages
into `build/elsewhere`. Both are kept.
"""

from __future__ import annotations

import json
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from support import browser, tiny
from support.npm import npm_folder, run

import edgeformer
from edgeformer.export.options import ExportOptions
from edgeformer.export.pipeline import export
from edgeformer.export.sources.hub.heads import encoder_source
from edgeformer.export.sources.hub.hub import language_model

ROOT = Path(__file__).resolve().parent.parent
OPTIMUM = ("optimum", "optimum-onnx", "transformers==4.57.6", "tokenizers<0.23", "huggingface-hub<1", "onnx")
JAVASCRIPT = ("@huggingface/transformers@4.3.1", "onnxruntime-web@1.27.0")
TEXTS = ["hello world, what is the time?", "the time"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bundles of three tasks, with edgeformer's outputs for their inputs."""
    folder = tmp_path_factory.mktemp("other-runtimes")
    torch.manual_seed(0)
    letters = folder / "letters"
    letters.mkdir()
    size = tiny.tokenizer(letters)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    files = {name: (letters / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    llama = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=size, num_key_value_heads=2, initializer_range=0.3, eos_token_id=2, **sizes)
    )
    bert = tf.BertConfig(vocab_size=size, max_position_embeddings=64, initializer_range=0.2, **sizes)
    classifier = tf.BertConfig(**bert.to_diff_dict() | {"id2label": {0: "calm", 1: "loud"}})
    sources = {
        "text-generation": language_model(llama, "a small decoder", files=files),
        "feature-extraction": encoder_source(tf.BertModel(bert), "a small encoder", files=files),
        "text-classification": encoder_source(
            tf.BertForSequenceClassification(classifier), "a small classifier", "text-classification", files
        ),
    }
    expected = {}
    for task, source in sources.items():
        export(ExportOptions(source=task, output=folder / task, quantize="q8"), traced=source)
        model = edgeformer.load(folder / task, engine="cpu")
        if task == "text-generation":
            ids = [model.tokenizer.encode(text) for text in TEXTS]
            new = [model.generate(text, max_new_tokens=8, ignore_eos=True).ids for text in ids]
            assert len({tuple(answer) for answer in new}) == 2, "the answers do not depend on the prompts"
            expected[task] = {"ids": ids, "new": new}
        elif task == "feature-extraction":
            expected[task] = model.embed(TEXTS, pooling="mean", normalize=True).tolist()
        else:
            ranked = model.classify(TEXTS)
            expected[task] = [{label.label: label.score for label in labels} for labels in ranked]
    (folder / "expected.json").write_text(json.dumps({"texts": TEXTS, **expected}))
    return folder


# ------------------------------------------------------------------------------------------------------------- Optimum

PYTHON = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from optimum.onnxruntime import (
    ORTModelForCausalLM, ORTModelForFeatureExtraction, ORTModelForSequenceClassification)

folder = Path(sys.argv[1])
expected = json.loads((folder / "expected.json").read_text())
found = {}
tokenizer = AutoTokenizer.from_pretrained(folder / "text-generation")
model = ORTModelForCausalLM.from_pretrained(folder / "text-generation", use_cache=True, use_io_binding=False)
found["new"] = []
for ids in expected["text-generation"]["ids"]:
    output = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                            max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    found["new"].append(output[0, len(ids):].tolist())
model = ORTModelForFeatureExtraction.from_pretrained(folder / "feature-extraction", use_io_binding=False)
found["vectors"] = []
for text in expected["texts"]:
    batch = tokenizer(text, return_tensors="pt")
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    states = model(**batch).last_hidden_state
    found["vectors"].append(torch.nn.functional.normalize(states.mean(1))[0].tolist())
model = ORTModelForSequenceClassification.from_pretrained(folder / "text-classification", use_io_binding=False)
found["labels"] = []
for text in expected["texts"]:
    batch = tokenizer(text, return_tensors="pt")
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    scores = model(**batch).logits.softmax(-1)[0]
    found["labels"].append({model.config.id2label[i]: float(score) for i, score in enumerate(scores)})
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def optimum_python():
    """The interpreter of an environment with Optimum."""
    place = ROOT / ".venv-optimum"
    python, stamp = place / "bin" / "python", place / ".packages"
    if not stamp.exists() or stamp.read_text() != repr(OPTIMUM):
        venv.create(place, clear=True, with_pip=True)
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", *OPTIMUM)
        borrowed = sysconfig.get_paths()["purelib"]
        own = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        (Path(own) / "borrowed.pth").write_text(borrowed + "\n")  # after its own packages, so these win
        stamp.write_text(repr(OPTIMUM))
    return python


def close(found, folders):
    expected = json.loads((folders / "expected.json").read_text())
    assert found["new"] == expected["text-generation"]["new"]
    assert np.abs(np.array(found["vectors"]) - np.array(expected["feature-extraction"])).max() < 0.03
    cosines = (np.array(found["vectors"]) * np.array(expected["feature-extraction"])).sum(-1)
    assert cosines.min() > 0.999
    for labels, wanted in zip(found["labels"], expected["text-classification"], strict=True):
        assert labels == pytest.approx(wanted, abs=0.02)


def test_optimum_runs_bundles_of_three_tasks(folders, optimum_python):
    output = run(optimum_python, "-c", PYTHON, folders, cwd=folders)
    close(json.loads(output.partition("RESULT")[2]), folders)


# ---------------------------------------------------------------------------------------------------------- JavaScript

# One source for both places: how a bundle is opened, and what is asked of it.
THREE_TASKS = """
export default async function work(tf, expected, options) {
  const found = { new: [], vectors: [], labels: [] };
  const model = await tf.AutoModelForCausalLM.from_pretrained('text-generation', options);
  for (const ids of expected['text-generation'].ids) {
    const input_ids = new tf.Tensor('int64', BigInt64Array.from(ids.map(BigInt)), [1, ids.length]);
    const attention_mask = tf.ones_like(input_ids);
    const output = await model.generate({ input_ids, attention_mask, max_new_tokens: 8, min_new_tokens: 8,
                                          do_sample: false });
    found.new.push(output.tolist()[0].slice(ids.length).map(Number));
  }
  const extractor = await tf.pipeline('feature-extraction', 'feature-extraction', options);
  for (const text of expected.texts) {
    const vector = await extractor(text, { pooling: 'mean', normalize: true });
    found.vectors.push(vector.tolist()[0]);
  }
  const classifier = await tf.pipeline('text-classification', 'text-classification', options);
  for (const text of expected.texts) {
    const labels = await classifier(text, { top_k: 2 });
    found.labels.push(Object.fromEntries(labels.map((l) => [l.label, l.score])));
  }
  return found;
}
"""

GENERATE = """
export default async function work(ort, prompts, graph, weights, manifest) {
  const externalData = [{ path: 'model.onnx.data', data: weights }];
  const session = await ort.InferenceSession.create(graph, { externalData, executionProviders: ['wasm'] });
  const caches = Object.entries(manifest.graphs.model.inputs).filter(([name]) => name.startsWith('past_key_values'));
  const numbers = (list) => new ort.Tensor('int64', BigInt64Array.from(list.map(BigInt)), [1, list.length]);
  const answers = [];
  for (const prompt of prompts) {
    let step = prompt, length = 0;
    let past = Object.fromEntries(caches.map(([name, port]) =>
      [name, new ort.Tensor('float32', new Float32Array(0), [1, port.shape[1], 0, port.shape[3]])]));
    const answer = [];
    while (answer.length < 8) {
      const positions = numbers(step.map((_, i) => length + i));
      const outputs = await session.run({ input_ids: numbers(step), position_ids: positions, ...past });
      length += step.length;
      const [, rows, size] = outputs.logits.dims;
      const last = outputs.logits.data.slice((rows - 1) * size, rows * size);
      step = [last.indexOf(Math.max(...last))];
      answer.push(step[0]);
      past = Object.fromEntries(caches.map(([name]) => [name, outputs[name.replace('past_key_values', 'present')]]));
    }
    answers.push(answer);
  }
  return answers;
}
"""

NODE_THREE_TASKS = """
import { readFileSync } from 'node:fs';
import * as tf from '@huggingface/transformers';
import work from './three_tasks.mjs';

const folder = process.argv[2];
tf.env.allowRemoteModels = false;
tf.env.localModelPath = folder + '/';
const options = { dtype: 'fp32', device: 'cpu', subfolder: '', model_file_name: 'model',
                  session_options: { intraOpNumThreads: 1 } };
const found = await work(tf, JSON.parse(readFileSync(`${folder}/expected.json`, 'utf8')), options);
console.log('RESULT' + JSON.stringify(found));
"""

NODE_GENERATE = """
import { readFileSync } from 'node:fs';
import * as ort from 'onnxruntime-web';
import work from './generate.mjs';

ort.env.wasm.numThreads = 1;
const folder = process.argv[2];
const json = (name) => JSON.parse(readFileSync(`${folder}/${name}`, 'utf8'));
const file = (name) => readFileSync(`${folder}/text-generation/${name}`);
const answers = await work(ort, json('expected.json')['text-generation'].ids, file('model.onnx'),
                           file('model.onnx.data'), json('text-generation/edgeformer.json'));
console.log('RESULT' + JSON.stringify(answers));
"""

PAGE_THREE_TASKS = """
import * as tf from '@huggingface/transformers';
import three_tasks from '/scripts/three_tasks.mjs';

export default async function work() {
  tf.env.allowRemoteModels = false;
  tf.env.allowLocalModels = true;
  tf.env.useBrowserCache = false;
  tf.env.localModelPath = '/bundles/';
  tf.env.backends.onnx.wasm.wasmPaths = '/packages/@huggingface/transformers/node_modules/onnxruntime-web/dist/';
  // A page cannot look into a folder: it must be told the name of the weights' file.
  const options = { dtype: 'fp32', device: 'wasm', subfolder: '', model_file_name: 'model',
                    session_options: { externalData: [{ path: 'model.onnx.data', data: 'model.onnx.data' }] } };
  return three_tasks(tf, await (await fetch('/bundles/expected.json')).json(), options);
}
"""

PAGE_GENERATE = """
import * as ort from 'onnxruntime-web';
import generate from '/scripts/generate.mjs';

export default async function work() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = '/packages/onnxruntime-web/dist/';
  const json = async (name) => (await fetch(`/bundles/${name}`)).json();
  const { ids } = (await json('expected.json'))['text-generation'];
  const place = '/bundles/text-generation/';
  return generate(ort, ids, place + 'model.onnx', place + 'model.onnx.data',
                  await json('text-generation/edgeformer.json'));
}
"""


@pytest.fixture(scope="module")
def node_folder():
    """A folder with the JavaScript packages, where modules can be run."""
    place = npm_folder("elsewhere", JAVASCRIPT)
    (place / "scripts").mkdir(exist_ok=True)
    scripts = {"three_tasks": THREE_TASKS, "generate": GENERATE, "node_three": NODE_THREE_TASKS, "node": NODE_GENERATE}
    for name, text in scripts.items():
        (place / "scripts" / f"{name}.mjs").write_text(text)
    return place


def node(folder: Path, name: str, *arguments):
    return json.loads(run("node", f"scripts/{name}.mjs", *arguments, cwd=folder).partition("RESULT")[2])


def test_transformers_js_runs_bundles_of_three_tasks(folders, node_folder):
    close(node(node_folder, "node_three", folders), folders)


def test_onnxruntime_web_generates_the_same_tokens(folders, node_folder):
    expected = json.loads((folders / "expected.json").read_text())["text-generation"]["new"]
    assert node(node_folder, "node", folders) == expected


# ------------------------------------------------------------------------------------------------- a page in a browser

IMPORTS = {  # what a bundler would look up
    "@huggingface/transformers": "/packages/@huggingface/transformers/dist/transformers.web.js",
    "onnxruntime-common": "/packages/@huggingface/transformers/node_modules/onnxruntime-common/dist/esm/index.js",
    "onnxruntime-web": "/packages/onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/webgpu": (
        "/packages/@huggingface/transformers/node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs"
    ),
}


def page(module: str, folders: Path, node_folder: Path, profile: Path):
    served = {"packages": node_folder / "node_modules", "scripts": node_folder / "scripts", "bundles": folders}
    return browser.visit(module, IMPORTS, served, profile)


def test_transformers_js_runs_bundles_of_three_tasks_on_a_page(folders, node_folder, tmp_path):
    close(page(PAGE_THREE_TASKS, folders, node_folder, tmp_path), folders)


def test_onnxruntime_web_generates_the_same_tokens_on_a_page(folders, node_folder, tmp_path):
    expected = json.loads((folders / "expected.json").read_text())["text-generation"]["new"]
    assert page(PAGE_GENERATE, folders, node_folder, tmp_path) == expected


def test_a_page_that_fails_says_why(node_folder, tmp_path):
    with pytest.raises(AssertionError, match="no such bundle"):
        page("export default async () => { throw new Error('no such bundle'); }", tmp_path, node_folder, tmp_path)
