"""Commands for vectors, labels, speech and translation; which command is for which bundle."""

from __future__ import annotations

import io
import json
import sys
import wave

import numpy as np
import pytest
from support import tiny

torch = pytest.importorskip("torch", reason="the toolchain needs torch")

import transformers as tf

from edgeformer.export.options import ExportOptions
from edgeformer.export.pipeline import export
from edgeformer.model import load

TEXTS = ["hello world", "what is the [time]?"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
RATE = 16000
PREPROCESSOR = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_rescale": True}


def models(size):
    """task -> a random model; `size` is its vocabulary."""
    text = {"vocab_size": size, "max_position_embeddings": 64, "initializer_range": 0.3, **SIZES}
    labels = {"id2label": {0: "calm", 1: "loud", 2: "O"}}
    t5 = {"vocab_size": size, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    audio = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 40, "max_source_positions": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    quiet = {"begin_suppress_tokens": None, "suppress_tokens": None, "max_target_positions": 16, "init_std": 0.3}
    return {
        "embed": tf.BertModel(tf.BertConfig(**text)),
        "classify": tf.BertForSequenceClassification(tf.BertConfig(**text, **labels)),
        "words": tf.BertForTokenClassification(tf.BertConfig(**text, **labels)),
        "pictures": tf.ViTForImageClassification(
            tf.ViTConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.3, id2label={0: "cat", 1: "dog"})
        ),
        "translate": tf.T5ForConditionalGeneration(tf.T5Config(**t5, decoder_start_token_id=0, pad_token_id=0)),
        "speech": tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(vocab_size=size, **audio, **heads, **tokens, **quiet)
        ),
    }


@pytest.fixture(scope="module")
def task_bundles(tmp_path_factory):
    """A folder with a bundle for each of `models`."""
    folder = tmp_path_factory.mktemp("tasks")
    letters = folder / "letters"
    letters.mkdir()
    torch.manual_seed(0)
    for name, model in models(tiny.tokenizer(letters)).items():
        source = folder / f"{name}-source"
        model.eval().save_pretrained(source)
        for file in letters.iterdir() if name != "pictures" else ():
            (source / file.name).write_bytes(file.read_bytes())
        if name == "pictures":
            (source / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        if name == "speech":
            tf.WhisperFeatureExtractor(feature_size=40, chunk_length=1).save_pretrained(source)
        export(ExportOptions(source=str(source), output=folder / name, quantize="none"))
    return folder


def test_embed_prints_json_lines_or_writes_an_array(edgeformer, task_bundles, stdin, tmp_path):
    expected = load(task_bundles / "embed", "cpu").embed(TEXTS)
    code, out, err = edgeformer("embed", task_bundles / "embed", *TEXTS, "-e", "cpu")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err, [line["item"] for line in lines]) == (0, "", TEXTS)
    np.testing.assert_allclose([line["vector"] for line in lines], expected, rtol=1e-6, atol=1e-7)
    stdin("\n".join([*TEXTS, ""]))
    code, out, err = edgeformer(
        "embed", task_bundles / "embed", "-", "-o", tmp_path / "v.npy", "-e", "cpu", "--no-normalize"
    )
    assert (code, out) == (0, "")
    assert "float32[2, 32]" in err
    found = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(found, load(task_bundles / "embed", "cpu").embed(TEXTS, normalize=False), rtol=1e-6)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).min() > 0.01
    first = edgeformer("embed", task_bundles / "embed", TEXTS[0], "--pooling", "cls", "-e", "cpu")[1]
    np.testing.assert_allclose(
        json.loads(first)["vector"],
        load(task_bundles / "embed", "cpu").embed(TEXTS[:1], pooling="cls")[0],
        rtol=1e-6,
        atol=1e-7,
    )


def test_classify_shows_labels_with_scores(edgeformer, task_bundles):
    expected = load(task_bundles / "classify", "cpu").classify(TEXTS)
    code, out, _ = edgeformer("classify", task_bundles / "classify", *TEXTS, "-e", "cpu", "--top", 2, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, [line["item"] for line in lines]) == (0, TEXTS)
    for line, labels in zip(lines, expected, strict=True):
        assert line["labels"] == [{"label": label.label, "score": pytest.approx(label.score)} for label in labels[:2]]
    code, out, _ = edgeformer("classify", task_bundles / "classify", *TEXTS, "-e", "cpu")
    rows = [row.split() for row in out.splitlines()]
    assert code == 0
    assert rows[0] == ["item", "label", "score"]
    assert rows[1][-2:] == [expected[0][0].label, f"{expected[0][0].score:.4f}"]
    assert TEXTS[1] in out, "brackets are no markup"
    assert len(rows) == 7


def test_classify_labels_words_and_pictures(edgeformer, task_bundles, tmp_path):
    entities = load(task_bundles / "words", "cpu").classify_tokens(TEXTS)
    out = edgeformer("classify", task_bundles / "words", *TEXTS, "-e", "cpu", "--json")[1]
    found = [
        [(word["text"], word["label"], word["start"]) for word in json.loads(line)["labels"]]
        for line in out.splitlines()
    ]
    assert found == [[(word.text, word.label, word.start) for word in words] for words in entities]
    assert any(found), "nothing is labelled"
    out = edgeformer("classify", task_bundles / "words", *TEXTS, "-e", "cpu")[1]
    assert out.splitlines()[0].split() == ["item", "words", "label", "score"]
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    code, out, _ = edgeformer("classify", task_bundles / "pictures", tmp_path / "a.png", "-e", "cpu", "--json")
    best = load(task_bundles / "pictures", "cpu").classify([str(tmp_path / "a.png")])[0][0]
    assert (code, json.loads(out)["labels"][0]) == (0, {"label": best.label, "score": pytest.approx(best.score)})
    code, out, err = edgeformer("classify", task_bundles / "pictures", tmp_path / "no.png", "-e", "cpu")
    assert (code, out) == (2, "")
    assert "no.png" in err


def test_transcribe_writes_what_is_said(edgeformer, task_bundles, tmp_path):
    for name, pitch in (("a", 200), ("b", 900)):
        samples = np.sin(np.arange(RATE) * pitch / RATE * 6.28) * 0.3
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", "NONE"))
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    model = load(task_bundles / "speech", "cpu")
    expected = model.transcribe(tmp_path / "a.wav")
    code, out, _ = edgeformer("transcribe", task_bundles / "speech", tmp_path / "a.wav", "-e", "cpu")
    assert (code, out) == (0, expected.text + "\n")
    files = [tmp_path / "a.wav", tmp_path / "b.wav"]
    out = edgeformer("transcribe", task_bundles / "speech", *files, "-e", "cpu", "--json", "--beams", 2)[1]
    found = [(json.loads(line)["file"], json.loads(line)["ids"]) for line in out.splitlines()]
    assert found == [(str(file), model.transcribe(file, num_beams=2).ids) for file in files]
    code, _, err = edgeformer(
        "transcribe", task_bundles / "speech", tmp_path / "a.wav", "--language", "de", "-e", "cpu"
    )
    assert code == 2
    assert "no tokens for languages" in err


def test_run_translates_and_searches_beams(edgeformer, task_bundles, lm):
    options = ["-n", 6, "-e", "cpu", "--ignore-eos"]
    model = load(task_bundles / "translate", "cpu")
    code, out, err = edgeformer("run", task_bundles / "translate", TEXTS[0], *options)
    greedy = model.generate(TEXTS[0], max_new_tokens=6, ignore_eos=True)
    assert (code, out) == (0, greedy.text + "\n")
    assert "6 new tokens" in err
    best = model.generate(TEXTS[0], max_new_tokens=6, num_beams=4, ignore_eos=True)
    assert edgeformer("run", task_bundles / "translate", TEXTS[0], *options, "--beams", 4)[1] == best.text + "\n"
    assert (
        json.loads(edgeformer("run", task_bundles / "translate", TEXTS[0], *options, "--beams", 4, "--json")[1])["ids"]
        == best.ids
    )
    beamed = load(lm, "cpu").generate("hello", max_new_tokens=6, num_beams=3, ignore_eos=True)
    assert edgeformer("run", lm, "hello", *options, "--beams", 3)[1] == beamed.text + "\n"
    drawn = [edgeformer("run", lm, "hello", *options, "--beams", 3, "--temperature", 1, "--seed", 5) for _ in range(2)]
    assert drawn[0][:2] == drawn[1][:2] and drawn[0][0] == 0


def test_run_searches_as_the_bundle_says(edgeformer, task_bundles, copy_of, reseal):
    bundle = copy_of(task_bundles / "translate")
    path = bundle / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 3}))
    reseal(bundle)
    out = edgeformer("run", bundle, TEXTS[0], "-n", 6, "-e", "cpu")[1]
    assert out == load(task_bundles / "translate", "cpu").generate(TEXTS[0], max_new_tokens=6, num_beams=3).text + "\n"


def test_inspect_prints_the_programs_of_both_graphs(edgeformer, task_bundles, lm):
    code, out, _ = edgeformer("inspect", task_bundles / "translate", "--program")
    assert code == 0
    encoder, decoder = out.split("graph encoder:")[1].split("graph decoder:")
    assert encoder.count(" attend ") == 1
    assert decoder.count(" attend ") == 2, "of the answer, and of the source"
    assert "graph model" not in edgeformer("inspect", lm, "--program")[1]


WRONG = [  # command, bundle, the command that is right (before and after the bundle's path)
    ("run", "embed", "embed", '"text"'),
    ("run", "speech", "transcribe", "speech.wav"),
    ("chat", "classify", "classify", '"text"'),
    ("embed", "classify", "classify", '"text"'),
    ("embed", "translate", "run", '"text"'),
    ("classify", "embed", "embed", '"text"'),
    ("classify", "LM", "run", '"text"'),
    ("classify", "PLAIN", "run", "--ids 1,2,3"),
    ("transcribe", "translate", "run", '"text"'),
    ("embed", "pictures", "classify", "picture.png"),
    ("embed", "FORECAST", "run", "--inputs arrays.npz"),
    ("run", "FORECAST", "run", "--inputs arrays.npz"),
]


@pytest.mark.parametrize(("command", "name", "right", "arguments"), WRONG)
def test_the_wrong_command_says_what_the_bundle_is_and_which_runs_it(
    edgeformer, task_bundles, bundles, lm, command, name, right, arguments
):
    tiny_ones = {"LM": lm, "PLAIN": bundles / "plain", "FORECAST": bundles / "forecast"}
    path = tiny_ones.get(name, task_bundles / name)
    code, out, err = edgeformer(command, path, *(["x"] if command != "chat" else []))
    assert (code, out) == (2, "")
    assert "is a " in err and " model (" in err
    assert f"edgeformer {right} {path} {arguments}" in err


def test_nothing_to_read_is_said(edgeformer, task_bundles, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    code, _, err = edgeformer("embed", task_bundles / "embed", "-e", "cpu")
    assert code == 2
    assert "nothing to read" in err
    code, _, err = edgeformer("embed", task_bundles / "embed", "x", "-o", "vectors.txt", "-e", "cpu")
    assert code == 2
    assert "ending in .npy" in err
