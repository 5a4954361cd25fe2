"""The int8 KV cache: what it costs is measured, and layers where it costs too much are float32."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")
native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support import outliers

import edgeformer
from edgeformer.bundle.cache_cost import NEGLIGIBLE, CacheCost
from edgeformer.bundle.manifest import manifest_problems
from edgeformer.cli.inspect import print_bundle
from edgeformer.cli.verify import _show
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.errors import BundleError, EngineUnavailable
from edgeformer.export import ExportOptions, export, module_source
from edgeformer.export.__main__ import _summary
from edgeformer.export.cache_choice import CacheChoice, warning
from edgeformer.export.check.accuracy import Score, Text
from edgeformer.export.progress import Silent
from edgeformer.tools.verify import verify

IDS = np.random.default_rng(0).integers(3, 90, (1, 150))


def exported(folder, layers, **more):
    model, config = outliers.decoder(layers)
    options = ExportOptions("tiny", folder, **{"quantize": "q8", "tokens": 384} | more)
    return export(options, traced=module_source(model, options, "tiny", config.to_dict()))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{layers with outliers: (the bundle, its manifest)}"""
    folder = tmp_path_factory.mktemp("outliers")
    return {layers: (folder / f"b{len(layers)}", exported(folder / f"b{len(layers)}", layers)) for layers in ((), (1,))}


def test_the_outliers_do_not_change_the_function():
    ids = torch.from_numpy(IDS)
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        plain, large = (outliers.decoder(layers)[0](ids, positions) for layers in ((), (0, 2)))
    assert (plain - large).abs().max() <= 1e-5 * (plain.max() - plain.min())


def test_an_ordinary_model_keeps_int8(made):
    path, manifest = made[()]
    cost = CacheCost.of(manifest)
    assert manifest["kv_cache"]["float32_layers"] == []
    assert manifest["kv_cache"]["auto"] == manifest["kv_cache"]["int8"]
    assert cost.of_int8 <= cost.limit
    assert warning(manifest) == ""
    model = edgeformer.load(path, "native", 1)
    assert model.engine.int8_layers == (0, 1, 2, 3)
    assert f"int8 cache: its weights are quantized; {cost.described('int8')}" in str(model.explain())


def test_a_layer_with_outliers_has_a_float32_cache_and_the_cost_is_gone(made):
    path, manifest = made[(1,)]
    cost = CacheCost.of(manifest)
    assert cost.of_int8 > 10 * cost.float32
    assert cost.of_int8 > 100 * CacheCost.of(made[()][1]).of_int8
    assert manifest["kv_cache"]["float32_layers"] == [1]
    assert cost.of_auto <= cost.limit
    model = edgeformer.load(path, "native", 1)
    assert model.engine.int8_layers == (0, 2, 3)
    told = str(model.explain())
    assert f"int8 cache but float32 in layer 1: its weights are quantized; {cost.described('auto')}" in told
    assert f"int8 in all layers would add {cost.of_int8:.2g}" in told
    forced = NativeEngine.from_bundle(path, threads=1, kv="int8")
    assert forced.int8_layers == (0, 1, 2, 3)
    assert forced.cache == f"int8 cache: kv='int8'; {cost.described('int8')}"
    # Far from the reference: the check at the first load refuses it, as it did with "auto" before there was a choice.
    with pytest.raises(EngineUnavailable, match="differs from this bundle's reference") as refused:
        edgeformer.load(path, "native", 1, kv="int8")
    assert forced.cache in str(refused.value)


def test_the_logits_are_near_those_of_a_float32_cache_only_with_the_choice(made):
    path = made[(1,)][0]
    found = {}
    for kv in ("auto", "int8", "float32"):
        engine = NativeEngine.from_bundle(path, threads=1, kv=kv)
        found[kv] = engine.forward([({"input_ids": IDS}, engine.new_state())])[0]["logits"]
    span = np.ptp(found["float32"])
    far = {kv: np.abs(found[kv] - found["float32"]).mean() / span for kv in ("auto", "int8")}
    assert 0 < far["auto"] < far["int8"] / 5


def test_memory_and_fingerprints_are_those_of_the_mixed_cache(made):
    path = made[(1,)][0]
    engines = {kv: NativeEngine.from_bundle(path, threads=1, kv=kv) for kv in ("auto", "int8", "float32")}
    for tokens in (1, 128, 129, 192):  # the four layers are of one size
        auto, int8, float32 = (engine.kv_bytes(tokens) for engine in engines.values())
        assert 4 * auto == 3 * int8 + float32
    assert engines["auto"].memory(192).kv == engines["auto"].kv_bytes(192)
    state = engines["auto"].new_state()
    engines["auto"].forward([({"input_ids": IDS}, state)])
    assert state.nbytes == engines["auto"].kv_bytes(IDS.shape[1])
    assert len({engine.fingerprint for engine in engines.values()}) == 3
    limit = engines["auto"].memory().total - 1
    with pytest.raises(EngineUnavailable, match=f"{engines['auto'].memory().kv:,} of cache"):
        NativeEngine.from_bundle(path, threads=1, memory_limit=limit)


@pytest.mark.parametrize("isa", native.isas())
def test_every_isa_gives_the_same_bits_with_a_mixed_cache(made, isa):
    found = []
    for kind, threads, steps in (("scalar", 1, (150,)), (isa, 2, (140, 1, 1, 3, 5))):
        engine = NativeEngine.from_bundle(made[(1,)][0], threads=threads, isa=kind)
        state, at, logits = engine.new_state(), 0, []
        for step in steps:
            logits.append(engine.forward([({"input_ids": IDS[:, at : at + step]}, state)])[0]["logits"])
            at += step
        found.append(np.concatenate(logits, 1).tobytes())
    assert found[0] == found[1]


def test_export_inspect_and_verify_say_what_the_cache_costs(made, capsys):
    for layers, (path, manifest) in made.items():
        cost = CacheCost.of(manifest)
        _summary(path, manifest)
        printed = "".join(capsys.readouterr().err.split())
        assert "".join(cost.described("int8").split()) in printed
        assert ("warning:anint8KVcachewouldadd" in printed) == bool(layers)
        print_bundle(path, hashes=False, as_json=False)
        printed = "".join(capsys.readouterr().out.split())
        assert "".join(cost.described("int8").split()) in printed
        assert ("float32layers1;" in printed) == bool(layers)
        report = verify(path, "native", 1)
        rows = [check for check in report.checks if check.reference == "float32 cache"]
        assert report.passed
        assert [row.run for row in rows] == ["in one run, int8 cache", "step by step, int8 cache"]
        assert all(0 < row.worst < 0.05 and row.tolerance is None for row in rows)
        _show(report)
        assert "".join(cost.described("auto").split()) in "".join(capsys.readouterr().out.split())
    assert not [check for check in verify(path, "cpu", 1).checks if check.reference == "float32 cache"]


def test_what_was_not_measured_is_said(made, tmp_path, monkeypatch, capsys):
    text = Text(IDS[0], "some ids", 100)

    def refuses(*_):
        raise EngineUnavailable("no extension today")

    monkeypatch.setattr(NativeEngine, "create", refuses)
    choice = CacheChoice(made[()][0] / "model.onnx", ["input_ids", "position_ids"], text)
    monkeypatch.undo()
    entry = choice.report({}, text, lambda *_: None, Silent())
    assert entry == {"unmeasured": "the native engine cannot run it here: no extension today"}
    manifest = exported(tmp_path / "b", (), tokens=0)
    assert manifest["kv_cache"] == {"unmeasured": "the export measured no accuracy (--tokens 0)"}
    _summary(tmp_path / "b", manifest)
    assert "its cost was not measured: the export measured no accuracy" in " ".join(capsys.readouterr().err.split())
    assert "its cost was not measured" in str(edgeformer.load(tmp_path / "b", "native", 1).explain())


class Planned(CacheChoice):
    """Costs by layer that do not quite add up: `more` comes on top while an int8 layer with a cost is left."""

    def __init__(self, costs, more):
        self._layers, self.costs, self.more, self.problem, self.graphs, self.runs = tuple(costs), costs, more, "", {}, 0

    def _run(self, options):
        left = [c for layer, c in self.costs.items() if layer not in (options.float32_layers or ())]
        if options.kv == "float32":
            return 0.0
        return sum(left) + (self.more if len(left) > 1 and any(left) else 0.0)


class Counted(Text):
    def score(self, reference, graphs, progress):
        return {name: scored(cost) for name, cost in graphs.items()}


def scored(cost, own=0.01):
    return Score(tokens=100, kl=100 * (own + cost))


@pytest.mark.parametrize(
    ("costs", "more", "chosen"),
    [
        ({0: 0.001, 1: 0.002, 2: 0.003, 3: 0.0}, 0.0, []),  # together less than the weights
        ({0: 0.001, 1: 0.5, 2: 0.003, 3: 0.0}, 0.0, [1]),
        ({0: 0.001, 1: 0.5, 2: 0.003, 3: 0.2}, 0.0, [1, 3]),
        ({0: 0.009, 1: 0.5, 2: 0.008, 3: 0.2}, 0.0, [0, 1, 3]),  # what is left costs 0.008
        ({0: 0.001, 1: 0.5, 2: 0.003, 3: 0.0, 4: 0.0}, 0.008, [1, 2]),  # measured: too much, so twice as many
        ({0: 0.001, 1: 0.5, 2: 0.003, 3: 0.0, 4: 0.0}, 0.02, [0, 1, 2, 3]),
        ({0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}, 0.0, [0, 1, 2, 3]),
    ],
)
def test_the_fewest_layers_are_taken_that_bring_the_cost_below_the_weights(costs, more, chosen):
    choice, text = Planned(costs, more), Counted(np.arange(100), "text", 100)
    scores = {"float32": scored(0.0), "int8": scored(sum(costs.values()) + more)}
    entry = choice.report(scores, text, lambda *_: None, Silent())
    assert entry["float32_layers"] == chosen
    cost = CacheCost.of({"kv_cache": entry})
    assert cost.of_auto <= cost.limit
    assert bool(warning({"kv_cache": entry})) == bool(chosen)


def test_a_negligible_cost_is_no_reason_for_a_float32_cache():
    nothing = CacheCost(float32=1e-6, int8=1e-6 + 0.9 * NEGLIGIBLE)
    assert not nothing.too_much
    assert CacheCost(float32=1e-6, int8=1e-6 + 1.1 * NEGLIGIBLE).too_much


def test_logits_that_are_not_finite_measure_nothing():
    broken = Score(tokens=10, kl=float("nan"))
    text = Counted(np.arange(100), "text", 100)
    entry = Planned({0: 1.0}, 0.0).report({"float32": scored(0.0), "int8": broken}, text, lambda *_: None, Silent())
    assert entry == {"unmeasured": "the native engine's logits are not finite"}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (7, "kv_cache is a whole number, expected an object or null"),
        ({"unmeasured": 3}, "kv_cache.unmeasured is a whole number, expected text"),
        ({}, "kv_cache.float32.mean_kl is None, expected a number"),
        ({"int8": {"mean_kl": "x"}}, "kv_cache.int8.mean_kl is 'x', expected a number"),
        ({"float32_layers": [True]}, "kv_cache.float32_layers is [True], expected a list of layers from 0 on"),
        ({"float32_layers": [-1]}, "kv_cache.float32_layers is [-1], expected a list of layers from 0 on"),
    ],
)
def test_a_damaged_entry_of_the_manifest_is_refused(made, entry, problem):
    manifest = made[()][1]
    assert manifest_problems(manifest) == []
    assert any(problem in told for told in manifest_problems({**manifest, "kv_cache": entry}))


def test_a_layer_that_the_graph_does_not_have_is_refused(made, copy_of, edit_manifest):
    damaged = copy_of(made[(1,)][0])
    edit_manifest(damaged, lambda manifest: manifest["kv_cache"].update(float32_layers=[1, 4]))
    with pytest.raises(BundleError, match=r"float32_layers has 4, but model.onnx has 4 caches"):
        edgeformer.load(damaged, "native", 1)
