"""Exports from PyTorch to a bundle: parity for different architectures, refusals, and no partly written bundles."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("transformers", reason="the toolchain needs transformers")
ort = pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

import onnx_ir as ir
from support import architectures

import edgeformer
from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import BundleError, ExportError, ParityError
from edgeformer.export import ExportOptions, export, read_recipe
from edgeformer.export.check import parity
from edgeformer.export.sources.load import load_source
from edgeformer.export.sources.tokenizer_export import compact_tokenizer

PROMPTS = ([1, 17, 33, 90, 5], [1, 4], [1, 110, 3, 3, 3, 64, 12])


@pytest.mark.parametrize("scheme", ["none", "q4a"])
@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_every_architecture_is_exported_by_the_same_pipeline(name, scheme, traced, tmp_path):
    shared = traced(name)
    manifest = export(ExportOptions(name, tmp_path / name, quantize=scheme, tokens=64), traced=shared)
    assert manifest["parity"]["float"]["worst"] <= 1e-4
    assert (manifest["parity"]["dequantized"] or {"worst": 0})["worst"] <= 1e-4
    long = parity.long_pieces(67)  # the longest that fits in 128 positions; at once, with three logits kept, in pieces
    assert len(manifest["parity"]["float"]["steps"]) == 3 + 2 * 5 + 2 + len(long)
    assert {name: found["passed"] for name, found in manifest["parity"]["engines"].items() if name != "cuda"} == {
        "native": True,
        "cpu": True,
    }
    model = edgeformer.load(tmp_path / name, engine="cpu")
    for prompt in PROMPTS:
        found = model.logits(prompt)
        with torch.no_grad():
            expected = shared.source.module(torch.tensor([prompt])).logits[0].numpy()
        span = expected.max() - expected.min()
        assert np.abs(found - expected).max() <= (1e-4 if scheme == "none" else 0.25) * span
        if scheme == "none":
            reference = shared.source.module.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
            assert model.generate(prompt, max_new_tokens=12, ignore_eos=True).ids == reference


@pytest.mark.parametrize("scheme", ["q4", "q4a", "q8"])
def test_onnxruntime_fuses_every_quantized_linear(scheme, traced, tmp_path):
    """Each linear ran as one MatMulNBits: an unfused one gives the same numbers, fifteen times slower."""
    shared = traced("qwen3")
    export(ExportOptions("x", tmp_path / "b", quantize=scheme, tokens=0), traced=shared)
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(tmp_path / "b" / "model.onnx", options, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, 2, 0, 16), np.float32)
    feeds = {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    session.run(None, {"input_ids": np.array([[5]]), "position_ids": np.array([[0]]), **feeds})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [
        event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and "op_name" in event.get("args", {})
    ]
    linears = 2 * 7 + 1
    assert ran.count("MatMulNBits") == linears
    # q4a's second product on the block sums stays a float MatMul; nothing else does.
    assert sum(op in ("MatMul", "Gemm", "FusedMatMul") for op in ran) == (linears if scheme == "q4a" else 0)


def test_the_file_is_plain_onnx(traced, tmp_path):
    export(ExportOptions("x", tmp_path / "b", tokens=0), traced=traced("gemma2"))
    model = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert not model.functions
    for tensor in model.graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert int(facts.get("offset", 0)) % 64 == 0
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"model.layers.0.self_attn.q_proj.weight.q", "model.layers.1.mlp.down_proj.weight.minimum"} <= names
    onnx.checker.check_model(str(tmp_path / "b" / "model.onnx"), full_check=True)


@pytest.mark.parametrize("head", ["tied", "q4a", "q4", "q8", "none"])
def test_a_tied_head_may_have_its_own_form(head, traced, tmp_path):
    manifest = export(ExportOptions("x", tmp_path / "b", head=head, tokens=0), traced=traced("gemma2"))
    assert manifest["quantization"]["head"] == {"none": "float32"}.get(head, head)
    assert manifest["parity"]["dequantized"]["worst"] <= 1e-4


def test_tying_a_head_that_is_not_tied_is_refused(traced, tmp_path):
    with pytest.raises(ExportError, match="weight of its own"):
        export(ExportOptions("x", tmp_path / "b", head="tied"), traced=traced("qwen3"))
    assert list(tmp_path.iterdir()) == []


def test_float16_bundles_have_float16_caches(traced, tmp_path):
    export(ExportOptions("x", tmp_path / "b", quantize="none", dtype="float16", tokens=64), traced=traced("qwen3"))
    inputs = Bundle.open(tmp_path / "b").manifest["graphs"]["model"]["inputs"]
    assert inputs["past_key_values.0.key"]["dtype"] == "float16"
    assert (
        len(edgeformer.load(tmp_path / "b", engine="cpu").generate([1, 5, 9], max_new_tokens=4, ignore_eos=True).ids)
        == 4
    )


# ---------------------------------------------------------------------------------------- the gate


def test_a_wrong_float_graph_writes_nothing(traced, tmp_path):
    shared = traced("qwen3")
    model = shared.models["model"].clone()
    attributes = next(node for node in model.graph if node.op_type == "Attention").attributes
    attributes["scale"] = ir.AttrFloat32("scale", attributes["scale"].value * 1.05)
    wrong = dataclasses.replace(shared, models={"model": model})
    with pytest.raises(ParityError, match=r"logits\[\d+, \d+, \d+\].*allowed 1e-04"):
        export(ExportOptions("x", tmp_path / "b", quantize="none"), traced=wrong)
    assert list(tmp_path.iterdir()) == []


def test_quantization_does_not_excuse_a_wrong_graph(traced, tmp_path, monkeypatch):
    """The integers of one weight are changed after quantization: only the check of the quantized graph can see it."""
    from edgeformer.export.quantize import plan

    original = plan.quantize_linears

    def sabotage(model, blocks_of):
        original(model, blocks_of)
        value = model.graph.initializers["model.layers.1.self_attn.o_proj.weight.q"]
        q = value.const_value.numpy().copy()
        q[0, 0] = 7 if int(q[0, 0]) < 0 else -8
        value.const_value = ir.Tensor(q, dtype=value.dtype, name=value.name)

    monkeypatch.setattr(plan, "quantize_linears", sabotage)
    with pytest.raises(ParityError, match="logits"):
        export(ExportOptions("x", tmp_path / "b"), traced=traced("qwen3"))
    assert list(tmp_path.iterdir()) == []


def test_compare_refuses_shape_nan_and_difference():
    reference = {"y": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert parity.compare_outputs("x", reference, reference).worst == 0
    with pytest.raises(ParityError, match="shape"):
        parity.compare_outputs("x", reference, {"y": np.zeros((2, 2))})
    with pytest.raises(ParityError, match="nothing"):
        parity.compare_outputs("x", reference, {})
    off = reference["y"].copy()
    off[1, 2] += 0.01
    assert parity.compare_outputs("x", reference, {"y": off}).worst == pytest.approx(0.01 / 5, rel=1e-3)
    off[0, 0] = np.nan
    with pytest.raises(ParityError, match=r"y\[0, 0\]"):
        parity.gate(iter([parity.compare_outputs("x", reference, {"y": off})]))


# ---------------------------------------------------------------------------------------- user-defined modules

OWN = """
import torch
from torch import nn

class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 48)
        self.out = nn.Linear(48, 2)
    def forward(self, x):
        return self.out(torch.relu(self.inner(x)))

class Frozen(Good):
    def forward(self, x):
        return torch.stack([self.out(torch.relu(self.inner(x[:, i]))) for i in range(x.shape[1])], 1)

class Branch(Good):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)

def good(): return Good()
def frozen(): return Frozen()
def branch(): return Branch()
def fails(): raise RuntimeError("no such file")
def number(): return 3
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(OWN))
    return path


SPEC = ("x=float32[batch,sequence,4]",)


def test_a_user_defined_module_with_safetensors_weights(own, tmp_path):
    from safetensors.torch import save_file

    source = load_source(ExportOptions(f"{own}:good", tmp_path / "b", input=SPEC))
    save_file(source.module.state_dict(), tmp_path / "w.safetensors")
    options = ExportOptions(
        f"{own}:good", tmp_path / "b", quantize="q8", input=SPEC, weights=tmp_path / "w.safetensors"
    )
    manifest = export(options)
    assert manifest["graphs"]["model"]["inputs"] == {"x": {"dtype": "float32", "shape": ["batch", "sequence", 4]}}
    assert manifest["quantization"]["tensors"] == {"q8": 1}, "a layer of four inputs is narrower than a block"
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    found = edgeformer.load(tmp_path / "b", engine="cpu")(x=x)["output"]
    expected = source.module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=0.02 * np.ptp(expected))


@pytest.mark.parametrize(
    ("factory", "inputs", "message"),
    [
        ("good", (), r"inputs of unknown shape: x.*--input x=float32\[batch,sequence,3\]"),
        ("good", ("x=float32",), "cannot be read"),
        ("good", (*SPEC, "z=float32[batch]"), "no argument z"),
        ("frozen", SPEC, r"'sequence'.*was frozen|Python number"),
        ("branch", SPEC, r"branches on the values of a tensor.*torch.where"),
        ("fails", SPEC, "the factory failed: RuntimeError: no such file"),
        ("number", SPEC, "returned a int"),
        ("missing", SPEC, "missing"),
    ],
)
def test_a_module_that_cannot_be_exported_is_explained(own, tmp_path, factory, inputs, message):
    with pytest.raises(ExportError, match=message):
        export(ExportOptions(f"{own}:{factory}", tmp_path / "b", input=inputs, quantize="none"))
    assert not (tmp_path / "b").exists()


def test_a_pickle_is_never_run(own, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "w.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ExportError, match="safetensors"):
        load_source(ExportOptions(f"{own}:good", tmp_path / "b", input=SPEC, weights=tmp_path / "w.pt"))
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------- sources, recipes


def test_a_hugging_face_folder_with_and_without_a_tokenizer(tmp_path):
    architectures.make("mistral").save_pretrained(tmp_path / "hf")
    export(ExportOptions(str(tmp_path / "hf"), tmp_path / "b", tokens=0))
    model = edgeformer.load(tmp_path / "b", engine="cpu")
    assert len(model.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True).ids) == 3
    with pytest.raises(edgeformer.EdgeformerError, match="tokenizer"):
        model.generate("text")


@pytest.mark.parametrize("bytewise", [True, False], ids=["no token holds a space", "tokens hold spaces"])
def test_a_compact_tokenizer_is_the_same_tokenizer(bytewise):
    text = "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer" * 3
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    if bytewise:
        whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        whole.decoder = tokenizers.decoders.ByteLevel()
    whole.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False))
    data = whole.to_str(pretty=True).encode()
    assert any(" " in token for token in whole.get_vocab()) is not bytewise
    compact = compact_tokenizer(data)
    assert len(compact) < 0.6 * len(data)
    merges = json.loads(compact)["model"]["merges"]
    assert merges and all(isinstance(pair, str) is bytewise for pair in merges)
    assert json.loads(tokenizers.Tokenizer.from_str(compact.decode()).to_str()) == json.loads(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder/x.gguf", "does not exist"),
        (".", "config.json"),
        ("someone/not-a-model-anyone-has", "hub did not return it"),
        ("no.such.module:factory", "No module named"),
    ],
)
def test_a_source_that_does_not_exist_is_refused(source, message, tmp_path):
    if source == ".":
        source = str(tmp_path)
    with pytest.raises(ExportError, match=message):
        export(ExportOptions(source, tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_keep_is_for_gguf_only(traced, tmp_path):
    with pytest.raises(ExportError, match="keep is for GGUF"):
        export(ExportOptions("x", tmp_path / "b", quantize="keep"), traced=traced("qwen3"))


def test_an_existing_bundle_is_kept_unless_overwritten(traced, tmp_path):
    options = ExportOptions("x", tmp_path / "b", tokens=0)
    export(options, traced=traced("qwen3"))
    before = (tmp_path / "b" / "edgeformer.json").read_bytes()
    with pytest.raises(BundleError, match="exists"):
        export(options, traced=traced("qwen3"))
    assert (tmp_path / "b" / "edgeformer.json").read_bytes() == before
    export(ExportOptions("x", tmp_path / "b", quantize="q8", tokens=0, overwrite=True), traced=traced("qwen3"))
    assert Bundle.open(tmp_path / "b").manifest["quantization"]["scheme"] == "q8"


def test_a_recipe_holds_all_options_and_flags_win(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = tmp_path / "small.toml"
    recipe.write_text('source = "model"\nquantize = "q8"\nblock = 64\ninput = ["x=float32[batch,4]"]\n')
    options = read_recipe(recipe, quantize="q4", output=None)
    assert (options.source, options.quantize, options.block) == (str(tmp_path / "model"), "q4", 64)
    assert str(options.output) == "small" and options.input == ("x=float32[batch,4]",)
    recipe.write_text('source = "x"\nquantise = "q8"\n')
    with pytest.raises(ExportError, match="unknown quantise"):
        read_recipe(recipe)
    with pytest.raises(ExportError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "value"), [("quantize", "q2"), ("block", 48), ("head", "x"), ("dtype", "int8"), ("tokens", -1)]
)
def test_options_out_of_range_are_refused(name, value, tmp_path):
    with pytest.raises(ExportError, match=name):
        ExportOptions("x", tmp_path / "b", **{name: value})
