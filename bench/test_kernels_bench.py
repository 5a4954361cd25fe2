"""Kernel speed for each table: `pytest bench/test_kernels_bench.py`. The name of a time gives its unit.

Decoding: GB/s of weights or cache, and percent of a plain read (of more bytes than the CPU caches have) in the same
run; prefill: GMAC/s (VNNI's own limit: 64 multiply-adds an instruction, 32 on ymm, two a cycle). Shapes
are those of a 135M model: K = 576, 30 layers of 4608 rows and a head of 49152 rows make one decoded token.
"""

from __future__ import annotations

import numpy as np
import pytest

native = pytest.importorskip("edgeformer._native")
testing = native.testing
ISAS = [isa for isa in native.isas() if isa != "scalar"]
K, LAYER, HEAD = 576, 4608, 49152
WIDE = {"q8x128": 640}  # columns of kinds that K does not fit
SPANS = {"q4x64": 64, "q8x128": 128}  # columns that share an activation scale, where they are not 32
KINDS = ["q4a", "q4", "q4x64", "q8", "q8x16", "q8x128"]


def packed(kind: str, n: int, k: int):
    rng = np.random.default_rng(0)
    block = 16 if kind == "q8x16" else SPANS.get(kind, 32)
    scale = np.full((n, k // block), 0.0078125, np.float32)
    nibbles = kind in ("q4a", "q4", "q4x64")
    q = rng.integers(0, 256, n * k // 2, dtype=np.uint8) if nibbles else rng.integers(-127, 128, (n, k), dtype=np.int8)
    weights = testing.Packed(kind, n, k)
    weights.pack(q, scale, scale if kind == "q4a" else None, block)
    return weights


@pytest.fixture(scope="module")
def limit():
    """threads -> GB/s of a plain read, measured on first use."""
    found: dict[int, float] = {}

    def of(threads: int) -> float:
        if threads not in found:
            found[threads] = (1 << 28) / testing.memory_read(threads, 1 << 28) / 1e9
        return found[threads]

    return of


def note(benchmark, **values: float) -> None:
    """Adds measured values to the printed name and the JSON."""
    benchmark.extra_info.update(values)
    benchmark.stats.name += "".join(f"  {value:g} {name.replace('_', ' ')}" for name, value in values.items())


@pytest.fixture(scope="module")
def model():
    """kind -> the matrices of one decoded token."""
    made: dict[str, list] = {}

    def of(kind: str) -> list:
        if kind not in made:
            made.clear()  # one set at a time in memory
            k = WIDE.get(kind, K)
            made[kind] = [packed(kind, LAYER, k) for _ in range(30)] + [packed(kind, HEAD, k)]
        return made[kind]

    return of


def activations(table, m: int, kind: str):
    k = WIDE.get(kind, K)
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    return table.quantize(x, k, SPANS.get(kind, 32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_linears(benchmark, model, limit, kind: str, isa: str, rows: int, threads: int) -> None:
    weights, table = model(kind), testing.Table(isa)
    x = activations(table, rows, kind)
    # the C++ side times itself: starting the pool is not part of it
    seconds = min(table.time_linear(weights, x, threads, 8, 3) / 3 for _ in range(5))
    benchmark.pedantic(table.time_linear, (weights, x, threads, 8, 1), rounds=3)
    speed = sum(w.bytes for w in weights) / seconds / 1e9
    share = round(100 * speed / limit(threads))
    note(benchmark, ms=round(seconds * 1e3, 3), GB_a_second=round(speed, 1), percent_of_a_plain_read=share)


@pytest.mark.parametrize("distance", [0, 1024, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_prefetch_distance(benchmark, kind: str, rows: int, distance: int) -> None:
    """Shows the best distance for csrc/engine/dispatch.cpp: the best table, one thread, one matrix in huge pages."""
    k = WIDE.get(kind, K)
    weights, table = [packed(kind, 24 * LAYER, k)], testing.Table()
    table.prefetch = (distance, distance)
    x = activations(table, rows, kind)
    seconds = min(table.time_linear(weights, x, 1, 64, 1) for _ in range(5))
    benchmark.pedantic(table.time_linear, (weights, x, 1, 64, 1), rounds=3)
    note(benchmark, GB_a_second=round(weights[0].bytes / seconds / 1e9, 1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_linears(benchmark, kind: str, isa: str, threads: int) -> None:
    weights, table, rows = [packed(kind, LAYER, WIDE.get(kind, K))], testing.Table(isa), 512
    x = activations(table, rows, kind)
    seconds = min(table.time_linear(weights, x, threads, 4, 2) / 2 for _ in range(5))
    benchmark.pedantic(table.time_linear, (weights, x, threads, 4, 1), rounds=3)
    note(benchmark, GMAC_a_second=round(rows * LAYER * WIDE.get(kind, K) / seconds / 1e9, 1))


@pytest.mark.parametrize("kv", ["int8", "float32"])
@pytest.mark.parametrize(("length", "tokens"), [(1024, 1), (8192, 1), (512, 512)])
@pytest.mark.parametrize("isa", ISAS)
def test_attention(benchmark, isa: str, length: int, tokens: int, kv: str) -> None:
    """3 KV heads of 3 query heads of 64: one layer, one thread."""
    heads, group, dim = 3, 3, 64
    rng, table = np.random.default_rng(0), testing.Table(isa)
    cache = testing.KvCache(kv, 1, heads, dim, dim, length)
    cache.reserve(length)
    k = rng.standard_normal((length, heads * dim)).astype(np.float32)
    table.kv_append(cache, 0, k, k)
    cache.advance(length)
    queries = testing.Queries()
    queries.q = rng.standard_normal((tokens, heads * group * dim)).astype(np.float32)
    queries.end = np.arange(length - tokens + 1, length + 1, dtype=np.int32)
    queries.begin = np.zeros(tokens, np.int32)
    queries.group, queries.scale = group, 0.125
    benchmark(table.attention, cache, 0, queries)
    seconds = benchmark.stats.stats.min
    note(benchmark, ns_a_query_key_pair=round(seconds * 1e9 / (int(queries.end.sum()) * heads * group), 2))
    if tokens == 1:
        note(benchmark, GB_a_second=round(cache.bytes / seconds / 1e9, 1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ["silu", "gelu", "gelu_tanh", "tanh", "exp"])
def test_unary(benchmark, isa: str, op: str) -> None:
    x = np.random.default_rng(0).standard_normal(1 << 15).astype(np.float32)
    y, table = np.empty_like(x), testing.Table(isa)
    benchmark(table.unary, op, x, y)
    note(benchmark, ns_an_element=round(benchmark.stats.stats.min * 1e9 / x.size, 3))


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_a_row(benchmark, isa: str) -> None:
    x, table = np.random.default_rng(0).standard_normal((64, K)).astype(np.float32), testing.Table(isa)
    benchmark(table.quantize, x, K)
    note(benchmark, ns_a_row=round(benchmark.stats.stats.min * 1e9 / 64, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_empty_phase(benchmark, threads: int) -> None:
    pool = testing.ThreadPool(threads)
    benchmark.pedantic(pool.seconds, (1, 1000, 2, 0), rounds=20)
    note(benchmark, ns_a_phase=round(benchmark.stats.stats.min * 1e6))
