"""The benchmark: the tests of llama-bench, the tokens that reach the engine, tables and JSON."""

from __future__ import annotations

import json
import re

import pytest

from edgeformer.engines.native.profile import Profile
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import EngineUnavailable, InputError
from edgeformer.model import load
from edgeformer.tools import bench as module
from edgeformer.tools.bench import Row, Workload, bench

CPU = EngineOptions("cpu")


@pytest.fixture(scope="module")
def result(q8):
    return bench(q8, Workload([32, 8], [6], [0, 20], 3), CPU, threads=[1, 2])


def test_every_test_is_a_row_for_every_depth_and_thread_count(result):
    tests = ["pp32", "pp8", "tg6", "pp32 @ d20", "pp8 @ d20", "tg6 @ d20"]
    assert [(row.test, row.threads) for row in result.rows] == [(t, n) for n in (1, 2) for t in tests]
    assert all(len(row.rates) == 3 and min(row.rates) > 0 for row in result.rows)


def test_the_table_reads_as_markdown(result):
    lines = result.markdown().splitlines()
    assert lines[0].startswith("| model")
    assert re.fullmatch(r"\|(-+:?\|)+", lines[1])
    assert len({len(line) for line in lines[:14]}) == 1
    assert "pp32 @ d20" in lines[5]
    assert "onnxruntime" in lines[-1]


def test_json_holds_every_rate(result):
    facts = json.loads(json.dumps(result.as_dict()))
    assert len(facts["rows"]) == 12
    assert facts["rows"][0]["rates"] == list(result.rows[0].rates)
    assert facts["bundle"]["scheme"] == "q8"
    assert facts["machine"]["cpu"]
    assert facts["peak_bytes"] > 10 << 20


def test_median_and_spread():
    row = Row("pp8", "cpu", 1, (10.0, 20.0, 12.0))
    assert row.median == 12.0
    assert row.spread == pytest.approx(10 / 2 / 12)


def test_what_is_run_is_what_the_row_says(q8, monkeypatch):
    """Counts the tokens that reach the engine: depth once, then warm-up and repetitions on forks of it."""
    made, calls = module.load, []

    def counting(*args, **kwargs):
        model = made(*args, **kwargs)
        forward = model.engine.forward

        def count(batch):
            ((inputs, state),) = batch
            calls.append((inputs["input_ids"].shape[1], state.length, int(inputs["logits_to_keep"])))
            return forward(batch)

        monkeypatch.setattr(model.engine, "forward", count)
        return model

    monkeypatch.setattr(module, "load", counting)
    bench(q8, Workload([8], [3], [5], 2), CPU, threads=[1])
    steps = [(1, 5, 1), (1, 6, 1), (1, 7, 1)]
    assert calls == [(5, 0, 1), *[(8, 5, 1)] * 3, (5, 0, 1), *steps * 3]


def test_progress_counts_to_the_end(q8):
    seen = []
    workload = Workload(prompts=[4], generated=[], repetitions=2)
    bench(q8, workload, CPU, threads=[1], progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]
    assert seen[-1] == ("", 3, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompts": [500]}, r"needs 500 positions, the limit is 256 \(max_position"),
        ({"prompts": [200], "depths": [100]}, "needs 300 positions"),
        ({"prompts": [0]}, "prompts is"),
        ({"depths": [-1]}, "depths is"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"prompts": [], "generated": []}, "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_refused(q8, options, expected):
    with pytest.raises(InputError, match=expected):
        bench(q8, Workload(**({"prompts": [4], "generated": [2]} | options)), CPU)


def test_a_model_without_tokens_is_refused(bundles):
    with pytest.raises(InputError, match="is a forecasting model"):
        bench(bundles / "forecast", engine=CPU)


def test_an_engine_without_a_profile_says_so(q8):
    with pytest.raises(EngineUnavailable, match="cpu engine has no profile"):
        module.profile(load(q8, "cpu"))


def test_the_native_engines_profile_is_printed(q8):
    pytest.importorskip("edgeformer._native")
    model = load(q8, "native", threads=1)
    text = module.profile(model, Workload([6], [3], [4]))
    head, prompt, generated = text.split("\n\n")
    assert re.match(rf"1 thread, {model.engine.isa} kernels; a plain read of memory: \d+\.\d GB/s", head)
    assert re.match(r"pp6 @ d4: \S+ tokens/s, 1 passes of 6 tokens\n", prompt)
    assert re.match(r"tg3 @ d4: \S+ tokens/s, 3 passes of 1 tokens\n", generated)
    for table in (prompt, generated):
        assert table.splitlines()[1].split() == ["operation", "count", "us/pass", "share", "GB/s", "limit", "GMAC/s"]
        assert any(line.startswith("linear q8") and "%" in line for line in table.splitlines())
        assert table.splitlines()[-1].startswith("total")


def test_a_profile_counts_bytes_and_multiply_adds(q8):
    pytest.importorskip("edgeformer._native")
    engine = load(q8, "native", threads=1).engine
    report = Profile(engine.program, [1000] * len(engine.program.ops), runs=2)
    linears = [op for op in engine.program.ops if op.kind == "linear"]
    weights = engine.program.weights
    rows = dict.fromkeys(engine.program.symbols, 1) | {engine.program.row_symbols[1]: 7}
    for op in linears:
        packed = [weights[w] for w in op.weights]
        assert report.weight_bytes(op) == sum(-(-w.n // 16) * -(-w.k // 32) * 544 for w in packed), (
            "16 rows x 32 + scales"
        )
    head = max(linears, key=lambda op: sum(weights[w].n for w in op.weights))
    layer = next(op for op in linears if op is not head)
    assert report.products(head, rows) == sum(weights[w].n * weights[w].k for w in head.weights), "one row is kept"
    assert report.products(layer, rows) == 7 * sum(weights[w].n * weights[w].k for w in layer.weights)
