"""Engines with wrong numbers are recorded and not taken: at the export, and at the first load on a machine."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

import transformers as tf
from support import architectures

import edgeformer
from edgeformer import disk_cache as cache
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.errors import EdgeformerWarning, EngineUnavailable, ParityError
from edgeformer.export import ExportOptions, export
from edgeformer.export.check import one_graph, parity
from edgeformer.export.graphs import trace_model
from edgeformer.export.sources.hub.hub import language_model

FLOAT = {"quantize": "none", "tokens": 0}


def late(fault):
    """An engine that is wrong from the 129th token on, by `fault` of the range: as in the cache's second chunk."""

    class Late(NativeEngine):
        def forward(self, batch):
            results = super().forward(batch)
            for (_, state), outputs in zip(batch, results, strict=True):
                if state.length > 128 and "logits" in outputs:
                    outputs["logits"] = outputs["logits"] + np.float32(fault) * np.ptp(outputs["logits"])
            return results

    return Late


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


@pytest.mark.parametrize(
    ("fault", "word"), [(late(2e-3), "139 tokens at once"), (Off, "off by"), (Broken, "no kernel")]
)
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


def quantized(scheme, folder, traced):
    """The parity results of the engines of an export."""
    calibration = "none" if "4" in scheme else None
    options = ExportOptions("x", folder, quantize=scheme, tokens=0, calibration=calibration)
    return export(options, traced=traced)["parity"]["engines"]


@pytest.mark.parametrize("scheme", ["q8", "q4a"])
def test_the_bound_of_a_quantized_engine_is_what_its_rounding_moves(long_decoder, scheme, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("edgeformer.engines.choose.NativeEngine", Off)
        engines = quantized(scheme, tmp_path / "b", long_decoder)
    assert engines["native"]["passed"] is False
    assert engines["cpu"]["passed"] is True
    assert engines["cpu"]["worst"] > parity.TOLERANCE, "its int8 activations show"
    assert engines["cpu"]["tolerance"] < 0.05


@pytest.mark.parametrize("scheme", ["q8", "q4a"])
def test_a_fault_below_the_worst_values_bound_shows_in_the_rows(long_decoder, scheme, tmp_path, monkeypatch):
    """From the 129th token on, by three times what rounding does to one row in fifty."""
    right = quantized(scheme, tmp_path / "right", long_decoder)["native"]
    assert right["passed"] is True
    bounds = right["rows"]
    assert [one["quantile"] for one in bounds] == list(parity.QUANTILES)
    assert all(one["worst"] < one["tolerance"] < right["tolerance"] / 2 for one in bounds)
    fault = 1.5 * bounds[-1]["tolerance"]
    assert fault < right["tolerance"] - right["worst"], "the bound of the worst value does not see it"

    monkeypatch.setattr("edgeformer.engines.choose.NativeEngine", late(fault))
    found = quantized(scheme, tmp_path / "wrong", long_decoder)
    assert found["native"]["passed"] is False
    assert "of all rows are off by" in found["native"]["problem"]
    assert found["cpu"]["passed"] is True


def test_the_bound_of_float16_is_what_rounding_to_it_moves(long_decoder, tmp_path, monkeypatch):
    """An engine that is off by a tenth of the least that 11 bits could excuse passes; by one percent it does not."""

    def engines(name, fault):
        with monkeypatch.context() as patch:
            patch.setattr("edgeformer.engines.choose.NativeEngine", late(fault))
            manifest = export(ExportOptions("x", tmp_path / name, dtype="float16", **FLOAT), traced=long_decoder)
        return manifest["parity"]

    right = engines("right", 2**-11 / 10)
    for one in (right["float16"], right["engines"]["cpu"], right["engines"]["native"]):
        assert parity.TOLERANCE < one["worst"] < one["tolerance"] < 6e-3
    for one in (right["engines"]["cpu"], right["engines"]["native"]):
        assert all(row["worst"] < row["tolerance"] < 4e-3 for row in one["rows"])
    wrong = engines("wrong", 1e-2)["engines"]
    assert wrong["native"]["passed"] is False
    assert wrong["cpu"]["passed"] is True


def test_rounding_moves_a_text_in_one_piece_as_it_does_in_pieces(long_decoder, tmp_path, monkeypatch):
    """But for the unit: the logits of one token have a smaller range than those of a text, here by up to a tenth."""

    once = quantized("q8", tmp_path / "once", long_decoder)["cpu"]["tolerance"]
    monkeypatch.setattr(one_graph.OneGraphExpected, "in_one_piece", lambda expected: expected)
    in_pieces = quantized("q8", tmp_path / "in pieces", long_decoder)["cpu"]["tolerance"]
    assert once <= in_pieces <= 1.1 * once


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
