"""The parity gate refuses wrong numbers: one planted fault of each kind, in the graph or in an engine."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

import onnx_ir as ir
import transformers as tf
from onnx_ir.tape import Tape
from support import architectures
from torch import nn

import edgeformer
from edgeformer import disk_cache as cache
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.errors import EdgeformerWarning, EngineUnavailable, ParityError
from edgeformer.export import ExportOptions, export, module_source
from edgeformer.export.check import one_graph, parity
from edgeformer.export.graphs import trace_model
from edgeformer.export.inputs import Input
from edgeformer.export.passes.edit import constant, nodes
from edgeformer.export.sources.hub.heads import encoder_source
from edgeformer.export.sources.hub.hub import language_model

FLOAT = {"quantize": "none", "tokens": 0}


class Scan(nn.Module):
    """Sums along the width, divided by the width: both sizes and their order matter. `bias` is added where `on`."""

    def __init__(self):
        super().__init__()
        image = "float32[batch,height,width]"
        self.input_spec = {"x": image, "bias": image, "on": "bool[batch,height]"}

    def forward(self, x, bias, on):
        return torch.cumsum(x, 2) / x.shape[2] + torch.where(on[..., None], bias, 0 * bias)


def made(name):
    """The traced float graph of one of the sources that faults are planted into."""
    if name == "decoder":
        return trace_model(language_model(architectures.make("mistral"), "tiny"))
    if name == "own":
        return trace_model(module_source(Scan(), ExportOptions("x", "x"), "Scan"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.BertModel(tf.BertConfig(vocab_size=60, max_position_embeddings=64, **sizes))
    return trace_model(encoder_source(model, "tiny", "feature-extraction", {}))


@pytest.fixture(scope="module")
def sources():
    return {name: made(name) for name in ("decoder", "encoder", "own")}


def weight(model, *parts):
    """The one initializer whose name has all `parts`."""
    (found,) = [v for name, v in model.graph.initializers.items() if all(part in name for part in parts)]
    return found


def replace_values(value, array):
    value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)


def other_input(model, op, index, make):
    """Input `index` of every `op` becomes what `make(tape, input)` gives."""
    for node in nodes(model, op):
        tape = Tape()
        new = make(tape, node.inputs[index])
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, new)


def instead_of(model, name, make):
    """All readers of the input `name` read what `make(tape, input)` gives."""
    (given,) = [value for value in model.graph.inputs if value.name == name]
    readers = [use.node for use in given.uses()]
    tape = Tape()
    new = make(tape, given)
    for node in readers:
        node.replace_input_with(list(node.inputs).index(given), new)
    model.graph.insert_before(next(node for node in model.graph if node in readers), tape.nodes)


def dropped_mask(model):
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, None)


def ignored_tokens(model):
    """All token types count as 0."""
    zero = constant(model, "zero", np.array(0, np.int64))
    instead_of(model, "token_type_ids", lambda tape, given: tape.op("Mul", [given, zero]))


def ignored_positions(model):
    """Positions count from 0 again, whatever `position_ids` says."""
    instead_of(
        model,
        "position_ids",
        lambda tape, given: tape.op("Sub", [given, tape.op("ReduceMin", [given], {"keepdims": 1})]),
    )


def zeroed_head(model):
    value = weight(model, "layers.1.", "o_proj")
    array = value.const_value.numpy().copy()
    axis = 1 if array.shape[0] == 64 else 0
    np.moveaxis(array, axis, 0)[16:32] = 0
    replace_values(value, array)


def exchanged_layers(model):
    one, other = (weight(model, f"layers.{i}.", "up_proj") for i in (0, 1))
    before = one.const_value.numpy()
    replace_values(one, other.const_value.numpy())
    replace_values(other, before)


def wider_window(model):
    """Each query sees one key more: the mask is made of a window of 6 instead of 5."""
    (window,) = [v for v in model.graph.initializers.values() if v.shape == [] and v.const_value.numpy() == 5]
    replace_values(window, np.array(6, np.int64))


def fewer_logits(model):
    """`logits_to_keep` keeps one row more than it says; 0 still keeps all."""
    other_input(
        model,
        "Neg",
        0,
        lambda tape, keep: tape.op(
            "Add",
            [keep, tape.op("Cast", [tape.op("Cast", [keep], {"to": 9})], {"to": 7})],  # + 1 where it is not 0
        ),
    )


def swapped_height_and_width(model):
    for node in nodes(model, "CumSum"):
        node.replace_input_with(1, constant(model, "height", np.array(1, np.int64)))


def frozen_size(model):
    other_input(model, "Div", 1, lambda *_: constant(model, "size", np.array(5, np.float32)))


def ignored_bool(model):
    for node in nodes(model, "Where"):
        true = constant(model, "true", np.array([[[True]]]))
        node.replace_input_with(0, true)


FAULTS = {
    "encoder": (dropped_mask, ignored_tokens),
    "decoder": (ignored_positions, zeroed_head, exchanged_layers, wider_window, fewer_logits),
    "own": (swapped_height_and_width, frozen_size, ignored_bool),
}


@pytest.mark.parametrize(
    ("name", "fault"), [(n, f) for n, faults in FAULTS.items() for f in faults], ids=lambda v: getattr(v, "__name__", v)
)
def test_a_planted_fault_is_refused(sources, name, fault, tmp_path):
    right = sources[name]
    wrong = dataclasses.replace(right, models={"model": right.models["model"].clone()})
    fault(wrong.models["model"])
    with pytest.raises(ParityError):
        export(ExportOptions(name, tmp_path / "b", **FLOAT), traced=wrong)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", FAULTS)
def test_without_a_fault_every_engine_passes(sources, name, tmp_path):
    manifest = export(ExportOptions(name, tmp_path / "b", **FLOAT), traced=sources[name])
    engines = manifest["parity"]["engines"]
    assert [n for n, found in engines.items() if found["passed"]] == ["native", "cpu"]
    assert all(engines[n]["tolerance"] == parity.TOLERANCE for n in ("native", "cpu"))


# --------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_covers_the_range_of_its_input(seed):
    sizes = {"batch": 3, "sequence": 8}
    ids = Input("ids", torch.int64, ("batch", "sequence"), high=1000).sample(sizes, seed)
    assert (ids.min(), ids.max()) == (0, 999)
    flags = Input("flags", torch.bool, ("batch", "sequence")).sample(sizes, seed)
    assert flags.any()
    assert not flags.all()
    mask = Input("attention_mask", torch.int64, ("batch", "sequence")).sample(sizes, seed)
    assert mask[0].all()
    assert mask.any(1).all()
    padded = mask[1:][~mask[1:].all(1).bool()]
    assert all(row[-1 if seed % 2 else 0] == 1 for row in padded), "the padding is on one side"


def test_every_axis_of_a_sample_has_its_own_size(sources):
    for sample in one_graph.samples(sources["own"].source):
        batch, height, width = sample.feeds["x"].shape
        assert len({height, width, batch}) == 3


@pytest.mark.parametrize("length", [37, 67, 139, 267, 523, 1100])
def test_pieces_step_across_every_border(length):
    pieces = parity.long_pieces(length)
    assert sum(pieces) == length
    assert min(pieces) >= 1
    ends = set(np.cumsum(pieces))
    crossed = [border for border in (129, 257, 513) if border + 7 < length]
    assert all({border - 1, border, border + 1} <= ends for border in crossed)
    assert {length - 1, length} <= ends


# ---------------------------------------------------------------------------------------------------- engines


class Late(NativeEngine):
    """Wrong from the 129th token on, by a thousandth of the logits: as a fault of the cache's second chunk would be."""

    def forward(self, batch):
        results = super().forward(batch)
        for (_, state), outputs in zip(batch, results, strict=True):
            if state.length > 128 and "logits" in outputs:
                outputs["logits"] = outputs["logits"] + np.float32(2e-3) * np.ptp(outputs["logits"])
        return results


class Off(NativeEngine):
    """Wrong by a tenth."""

    def forward(self, batch):
        return [{name: value * np.float32(1.1) for name, value in out.items()} for out in super().forward(batch)]


class Broken(NativeEngine):
    """Fails when it runs."""

    def forward(self, batch):
        raise ValueError("no kernel for this")


@pytest.fixture(scope="module")
def long_decoder():
    sizes = architectures._COMMON | {"max_position_embeddings": 200}
    torch.manual_seed(0)
    return trace_model(language_model(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval(), "tiny"))


@pytest.mark.parametrize(("fault", "word"), [(Late, "139 tokens at once"), (Off, "off by"), (Broken, "no kernel")])
def test_an_engine_with_wrong_numbers_is_recorded_and_not_taken(long_decoder, fault, word, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("edgeformer.engines.choose.NativeEngine", fault)
        manifest = export(ExportOptions("x", tmp_path / "b", **FLOAT), traced=long_decoder)
    native = manifest["parity"]["engines"]["native"]
    assert native["passed"] is False
    assert word in native["problem"]
    model = edgeformer.load(tmp_path / "b")
    assert model.engine.name == "cpu"
    assert native["problem"] in model.explain().reasons["native"]
    with pytest.raises(EngineUnavailable, match="failed the parity check"):
        edgeformer.load(tmp_path / "b", engine="native")


@pytest.mark.parametrize("scheme", ["q8", "q4a"])
def test_the_bound_of_a_quantized_engine_is_what_its_rounding_moves(long_decoder, scheme, tmp_path, monkeypatch):
    options = ExportOptions(
        "x", tmp_path / "b", quantize=scheme, tokens=0, calibration="none" if "4" in scheme else None
    )
    with monkeypatch.context() as patch:
        patch.setattr("edgeformer.engines.choose.NativeEngine", Off)
        engines = export(options, traced=long_decoder)["parity"]["engines"]
    assert engines["native"]["passed"] is False
    assert engines["cpu"]["passed"] is True
    assert engines["cpu"]["worst"] > parity.TOLERANCE, "its int8 activations show"
    assert engines["cpu"]["tolerance"] < 0.05


@pytest.mark.parametrize("scheme", ["q8", "q4a"])
def test_a_fault_below_the_worst_values_bound_shows_in_the_rows(long_decoder, scheme, tmp_path, monkeypatch):
    """From the 129th token on, as large as one row in a hundred is by rounding alone, times three."""

    def engines(name):
        calibration = "none" if "4" in scheme else None
        options = ExportOptions("x", tmp_path / name, quantize=scheme, tokens=0, calibration=calibration)
        return export(options, traced=long_decoder)["parity"]["engines"]

    right = engines("right")["native"]
    assert right["passed"] is True
    bounds = right["rows"]
    assert [one["quantile"] for one in bounds] == list(parity.QUANTILES)
    assert all(one["worst"] < one["tolerance"] < right["tolerance"] / 2 for one in bounds)
    fault = 1.5 * bounds[-1]["tolerance"]
    assert fault < right["tolerance"] - right["worst"], "the bound of the worst value does not see it"

    class LateBy(NativeEngine):
        def forward(self, batch):
            results = super().forward(batch)
            for (_, state), outputs in zip(batch, results, strict=True):
                if state.length > 128:
                    outputs["logits"] = outputs["logits"] + np.float32(fault) * np.ptp(outputs["logits"])
            return results

    monkeypatch.setattr("edgeformer.engines.choose.NativeEngine", LateBy)
    found = engines("wrong")
    assert found["native"]["passed"] is False
    assert "of all rows are off by" in found["native"]["problem"]
    assert found["cpu"]["passed"] is True


def test_rounding_moves_a_text_in_one_piece_as_it_does_in_pieces(long_decoder, tmp_path, monkeypatch):
    """But for the unit: the logits of one token have a smaller range than those of a text, here by up to a tenth."""

    def bound(name):
        manifest = export(ExportOptions("x", tmp_path / name, quantize="q8", tokens=0), traced=long_decoder)
        return manifest["parity"]["engines"]["cpu"]["tolerance"]

    once = bound("once")
    monkeypatch.setattr(one_graph.OneGraphExpected, "in_one_piece", lambda expected: expected)
    assert once <= bound("in pieces") <= 1.1 * once


def comparisons(rows):
    """As many single rows as steps of a text, and the rest at once."""
    rows = np.asarray(rows, np.float64)
    parts = [*rows[:20, None], rows[20:]]
    return [parity.Comparison(f"step {i}", float(part.max()), "y[0]", (part,)) for i, part in enumerate(parts)]


def test_the_quantiles_see_what_one_unstable_row_hides():
    """Rounding moves one row of 400 by half of the range, as on SmolLM2, and the others by 1 to 3 %."""
    rng = np.random.default_rng(0)
    rounding = rng.uniform(0.01, 0.03, 400)
    rounding[70] = 0.5
    found = parity.quantiles(comparisons(rounding))
    bounds = {q: 2 * value for q, value in found.items()}
    tolerance = parity.Tolerance(5 * rounding.max(), bounds)
    another = rng.uniform(0.01, 0.03, 700)
    another[[3, 200]] = 0.9, 0.3  # other unstable rows
    report = parity.gate(iter(comparisons(another)), tolerance)
    assert report["worst"] == 0.9
    assert [one["worst"] < one["tolerance"] < 0.07 for one in report["rows"]] == [True] * 3
    for share in (0.03, 0.2, 1.0):
        wrong = another.copy()
        wrong[-int(share * 700) :] += 0.06
        with pytest.raises(ParityError, match="of all rows are off by"):
            parity.gate(iter(comparisons(wrong)), tolerance)
    with pytest.raises(ParityError, match="step 5"):
        parity.gate(iter(comparisons(np.where(np.arange(700) == 5, 2.6, another))), tolerance)


@pytest.mark.parametrize("rows", [1, parity.LEAST_ROWS - 1])
def test_few_rows_have_no_quantiles(rows):
    few = [parity.Comparison("a", 0.5, "", (np.linspace(0.0, 0.5, rows),))]
    assert parity.quantiles(few) == {}
    assert "rows" not in parity.gate(iter(few), parity.Tolerance(1.0, {0.5: 1e-9}))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_each_row_has_its_largest_difference(shape):
    rng = np.random.default_rng(len(shape))
    expected = rng.standard_normal(shape).astype(np.float32)
    found = expected + rng.standard_normal(shape).astype(np.float32)
    one = parity.compare_outputs("x", {"y": expected}, {"y": found})
    span = float(np.ptp(expected)) or 1.0
    wanted = np.abs(found.astype(np.float64) - expected) / span
    (rows,) = one.rows
    np.testing.assert_allclose(rows, np.atleast_1d(wanted).max(-1).ravel(), rtol=1e-12)
    assert one.worst == rows.max()


def test_an_export_without_any_right_engine_is_refused(long_decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeformer.engines.choose.NativeEngine", Off)
    monkeypatch.setattr("edgeformer.export.engine_gate.ORDER", ("native",))
    with pytest.raises(ParityError, match="no engine gives PyTorch's numbers"):
        export(ExportOptions("x", tmp_path / "b", **FLOAT), traced=long_decoder)
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------ the first load here


@pytest.mark.usefixtures("cache_folder")
def test_the_first_load_moves_auto_on_and_warns(lm, monkeypatch):
    monkeypatch.setattr("edgeformer.engines.choose.NativeEngine", Off)
    with pytest.warns(EdgeformerWarning, match="native engine differs from"):
        model = edgeformer.load(lm)
    assert model.engine.name == "cpu"
    assert "differs from this bundle" in str(model.explain())
    with pytest.raises(EngineUnavailable, match="differs from this bundle"):
        edgeformer.load(lm, engine="native")


def test_verify_shows_the_numbers_of_an_engine_that_load_refuses(lm, monkeypatch):
    from edgeformer.tools.verify import verify

    monkeypatch.setattr("edgeformer.engines.choose.NativeEngine", Off)
    assert not verify(lm, "native").passed


@pytest.mark.usefixtures("cache_folder")
@pytest.mark.parametrize("engine", ["native", "cpu"])
def test_a_machine_is_checked_once(lm, engine, monkeypatch):
    runs = []
    real = edgeformer.engines.self_check.checks
    monkeypatch.setattr("edgeformer.engines.self_check.checks", lambda *given: runs.append(given) or real(*given))
    for _ in range(3):
        edgeformer.load(lm, engine=engine)
    assert len(runs) == 1
    monkeypatch.setattr("edgeformer.engines.self_check.cpu_name", lambda: "another CPU")
    edgeformer.load(lm, engine=engine)
    assert len(runs) == 2


@pytest.mark.usefixtures("cache_folder")
def test_other_weights_are_checked_anew(lm, copy_of, reseal):
    edgeformer.load(lm, engine="cpu")
    damaged = copy_of(lm)
    with np.load(damaged / "reference.npz") as file:
        arrays = dict(file)
    arrays["bundle.logits"] = arrays["bundle.logits"] * 1.1
    np.savez(damaged / "reference.npz", **arrays)
    reseal(damaged)
    with pytest.raises(EngineUnavailable, match=r"allowed 0\.001"):
        edgeformer.load(damaged, engine="cpu")


def test_a_damaged_cache_entry_of_the_check_is_made_again(lm, cache_folder):
    edgeformer.load(lm, engine="cpu")
    (entry,) = cache_folder.glob("*.parity")
    entry.write_bytes(b"damaged")
    assert cache.read(entry.name) is None
    edgeformer.load(lm, engine="cpu")
    assert cache.read(entry.name) == b""


def test_a_bundle_without_a_reference_loads(lm, copy_of, edit_manifest):
    plain = copy_of(lm)
    edit_manifest(plain, lambda manifest: manifest.update(reference=None))
    assert edgeformer.load(plain, engine="cpu").engine.name == "cpu"
    assert json.loads((plain / "edgeformer.json").read_text())["reference"] is None
