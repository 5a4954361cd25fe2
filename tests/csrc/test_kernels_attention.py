"""Attention and the KV cache: a dense float64 softmax as reference; the same bits from all tables, splits and forks."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_reference import U, assert_same_bits, assert_within

native = pytest.importorskip("edgeformer._native")
testing = native.testing
ISAS = native.isas()
CHUNK = testing.CHUNK_TOKENS
# heads of keys, query heads of each, head_dim, value_dim
SHAPES = [(1, 1, 4, 4), (3, 3, 64, 64), (2, 1, 30, 17), (1, 9, 80, 48), (2, 4, 128, 128), (1, 20, 20, 16)]


class Case:
    """Queries at the end of a cache of `length` tokens, causal, with an optional window, softcap and mask."""

    def __init__(self, shape, length: int, tokens: int, window: int = 0, softcap: float = 0.0, mask: bool = False):
        self.heads, self.group, self.dim, self.value_dim = shape
        rng = np.random.default_rng([*shape, length, tokens])
        self.length, self.tokens, self.softcap = length, tokens, softcap
        self.k = rng.standard_normal((length, self.heads * self.dim)).astype(np.float32)
        self.v = rng.standard_normal((length, self.heads * self.value_dim)).astype(np.float32)
        self.v[length // 2] = 0
        self.q = (2 * rng.standard_normal((tokens, self.heads * self.group * self.dim))).astype(np.float32)
        self.end = np.arange(length - tokens + 1, length + 1, dtype=np.int32)
        self.begin = np.maximum(0, self.end - window).astype(np.int32) if window else np.zeros(tokens, np.int32)
        self.scale = float(np.float32(self.dim**-0.5))
        self.mask = None
        if mask:
            self.mask = rng.standard_normal((tokens, self.heads * self.group, length)).astype(np.float32)
            self.mask[rng.random(self.mask.shape) < 0.3] = -np.inf
            self.mask[0, 0] = -np.inf  # a row that sees nothing

    def cache(self, kind: str, isa: str, steps: tuple[int, ...] = ()):
        """A cache filled in steps of `steps` tokens, then with the rest at once."""
        cache = testing.KvCache(kind, 1, self.heads, self.dim, self.value_dim, 4096)
        at = 0
        for n in [*steps, self.length]:
            n = min(n, self.length - at)
            cache.reserve(n)
            if n:
                testing.Table(isa).kv_append(cache, 0, self.k[at : at + n], self.v[at : at + n])
            cache.advance(n)
            at += n
        return cache

    def run(self, isa: str, cache, rows: slice = slice(None), mode: str = "rows", step: int = 1 << 20) -> np.ndarray:
        queries = testing.Queries()
        queries.q, queries.begin, queries.end = self.q[rows], self.begin[rows], self.end[rows]
        queries.group, queries.scale, queries.softcap = self.group, self.scale, self.softcap
        if self.mask is not None:
            queries.mask = np.ascontiguousarray(self.mask[rows])
            queries.mask_token, queries.mask_head = self.mask[0].size, self.mask.shape[2]
        return testing.Table(isa).attention(cache, 0, queries, mode, step)

    def exact(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(out, bound) in float64. int8: from integers that numpy quantizes by the formula of kernels.h."""

        def quantize(x: np.ndarray) -> np.ndarray:  # [rows, d] -> the quantized values, dequantized to float64
            absmax = np.abs(x).max(1, keepdims=True)
            inverse = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
            return np.rint(x * inverse).astype(np.float64) * (absmax / np.float32(127)).astype(np.float64)

        out = np.zeros((self.tokens, self.heads * self.group, self.value_dim))
        bound = np.zeros_like(out)
        for h in range(self.heads * self.group):
            kv = h // self.group
            q = self.q[:, h * self.dim : (h + 1) * self.dim]
            k = self.k[:, kv * self.dim : (kv + 1) * self.dim]
            v = self.v[:, kv * self.value_dim : (kv + 1) * self.value_dim]
            value_scale = (np.abs(v).max(1) / np.float32(127)).astype(np.float64)
            if kind == "int8":
                q, k, v = quantize(q), quantize(k), quantize(v)
            q, k, v = (a.astype(np.float64) for a in (q, k, v))
            score = q @ k.T * self.scale
            # int8: the dot is exact, 4 roundings of scales; float32: `dim` fused steps and the scale
            error = U * (
                4 * np.abs(score) if kind == "int8" else (self.dim + 1) * (np.abs(q) @ np.abs(k).T) * self.scale
            )
            if self.softcap:
                score = self.softcap * np.tanh(score / self.softcap)
                error = error + 9 * U * np.abs(score)
            if self.mask is not None:
                score = score + self.mask[:, h]
                error = error + U * np.abs(np.where(np.isfinite(score), score, 0))
            keys = np.arange(self.length)[None]
            score = np.where((keys >= self.begin[:, None]) & (keys < self.end[:, None]), score, -np.inf)
            top = score.max(1, keepdims=True)
            shift = np.where(np.isfinite(top), top, 0)
            p = np.exp(score - shift)
            total = p.sum(1, keepdims=True)
            p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
            out[:, h] = p @ v
            # p's relative error: its score's, the difference's rounding, exp (4), the sum, the merges; twice for the
            # numerator and the denominator. Then one fused step a token, and the scale of v.
            span = np.where(np.isfinite(score), shift - score, 0)
            relative = error.max(1, keepdims=True) + error + U * (2 * span + 40)
            steps = U * (CHUNK + 4 * (self.length / CHUNK) + 8)
            bound[:, h] = (p * (2 * relative + steps)) @ np.abs(v) + 1e-36
            if kind == "int8":
                # A chunk's weights p * vs are rounded to 15 bits of its largest: half a step for each value.
                for start in range(0, self.length, CHUNK):
                    part = slice(start, start + CHUNK)
                    step = (p[:, part] * value_scale[part]).max(1) / 32767
                    integers = np.divide(np.abs(v[part]), value_scale[part, None], out=np.zeros_like(v[part]),
                                         where=value_scale[part, None] > 0)  # fmt: skip
                    bound[:, h] += 0.501 * step[:, None] * integers.sum(0)
        return out.reshape(self.tokens, -1), bound.reshape(self.tokens, -1)


CASES = {
    "first token": lambda s: Case(s, 1, 1),
    "all of a short prompt": lambda s: Case(s, 5, 5),
    "a tile's edges": lambda s: Case(s, 17, 3),
    "decode": lambda s: Case(s, 100, 1),
    "a chunk's last token": lambda s: Case(s, CHUNK, 1),
    "one over a chunk": lambda s: Case(s, CHUNK + 1, 2),
    "prefill over chunks": lambda s: Case(s, 2 * CHUNK + 37, 2 * CHUNK + 37),
    "window": lambda s: Case(s, 3 * CHUNK + 5, 40, window=50),
    "window of a chunk": lambda s: Case(s, 3 * CHUNK, 2, window=CHUNK),
    "softcap": lambda s: Case(s, 40, 7, softcap=2.0),
    "mask": lambda s: Case(s, CHUNK + 20, 6, mask=True),
    "window, softcap, mask": lambda s: Case(s, 300, 30, window=33, softcap=5.0, mask=True),
}


@pytest.mark.parametrize("kind", ["int8", "float32"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(kind: str, name: str, shape) -> None:
    case = CASES[name](shape)
    exact, bound = case.exact(kind)
    expected = case.run("scalar", case.cache(kind, "scalar"))
    assert_within(expected, exact, bound, "scalar")
    for isa in ISAS:
        cache = case.cache(kind, isa)
        assert cache.save() == case.cache(kind, "scalar").save(), f"{isa}: other bytes in the cache"
        assert_same_bits(case.run(isa, cache), expected, isa)
        assert_same_bits(case.run(isa, cache, mode="chunks"), expected, f"{isa}, merged from partials")


def test_one_key_less_is_outside_the_bound() -> None:
    case = Case(SHAPES[1], 100, 4)
    exact, bound = case.exact("int8")
    case.end -= 1
    with pytest.raises(AssertionError, match="outside"):
        assert_within(case.run("scalar", case.cache("int8", "scalar")), exact, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_prefill_and_decode_give_the_same_bits(isa: str, kind: str) -> None:
    for shape in SHAPES[1:4]:
        case = Case(shape, CHUNK + 30, CHUNK + 30, softcap=30.0)
        cache = case.cache(kind, isa)
        whole = case.run(isa, cache)
        for step in (1, 7):
            assert_same_bits(case.run(isa, cache, step=step), whole)
            assert_same_bits(case.run(isa, cache, mode="chunks", step=step), whole)
        for i in (0, 1, CHUNK - 1, CHUNK, CHUNK + 29):
            assert_same_bits(case.run(isa, cache, slice(i, i + 1)), whole[i : i + 1])


@pytest.mark.parametrize("isa", ISAS)
def test_a_cache_filled_in_steps_is_the_cache_filled_at_once(isa: str) -> None:
    case = Case((2, 2, 30, 17), 2 * CHUNK + 3, 1)
    for kind in ("int8", "float32"):
        assert case.cache(kind, isa, (1, 1, 15, CHUNK - 1, 2)).save() == case.cache(kind, isa).save()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_a_query_reaches_only_its_own_rows(isa: str) -> None:
    case = Case((2, 3, 64, 64), 150, 4)
    case.q[2] = np.nan
    for kind in ("int8", "float32"):
        out = case.run(isa, case.cache(kind, isa))
        assert np.isnan(out[2]).all()
        assert np.isfinite(np.delete(out, 2, axis=0)).all()


def append(cache, case: Case, first: int, last: int) -> None:
    """The case's tokens [first, last)."""
    cache.reserve(last - first)
    testing.Table("scalar").kv_append(cache, 0, case.k[first:last], case.v[first:last])
    cache.advance(last - first)


def test_fork_truncate_save_and_load() -> None:
    case = Case((2, 1, 64, 64), 300, 1)
    cache = case.cache("int8", "scalar")
    saved = cache.save()
    copy = cache.fork()
    copy.truncate(100)
    assert (copy.length, cache.length) == (100, 300)
    append(copy, case, 0, 1)
    assert cache.save() == saved, "a fork's append was seen by its origin"

    # truncated and filled again: nothing of the removed tokens is seen
    cache.truncate(130)
    append(cache, case, 130, 300)
    assert_same_bits(case.run("scalar", cache), case.run("scalar", case.cache("int8", "scalar")))

    other = testing.KvCache("int8", 1, 2, 64, 64, 4096)
    other.load(saved)
    assert other.save() == saved
    assert_same_bits(case.run("scalar", other), case.run("scalar", cache))


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 300])
def test_a_fork_copies_one_chunk_when_it_grows(length: int) -> None:
    case = Case((2, 1, 64, 64), 400, 1)
    cache = testing.KvCache("int8", 1, 2, 64, 64, 4096)
    append(cache, case, 0, length)
    one = cache.bytes_alone // -(-length // CHUNK)
    cache.reserve(300)  # room that the fork must not share
    room = cache.bytes_alone
    saved = cache.save()
    copy = cache.fork()
    assert copy.bytes_alone == 0
    assert copy.bytes_shared == -(-length // CHUNK) * one
    append(copy, case, length, 400)
    assert copy.bytes_shared == length // CHUNK * one
    assert cache.bytes_alone == room - copy.bytes_shared
    assert cache.save() == saved
    append(cache, case, 0, 5)
    assert_same_bits(case.run("scalar", copy), case.run("scalar", case.cache("int8", "scalar")))
    del cache
    assert copy.bytes_shared == 0


def test_a_window_keeps_what_a_query_may_see() -> None:
    window, step = 100, 32
    case = Case((2, 1, 64, 64), 1000, 1, window=window)
    cache = testing.KvCache("int8", 1, 2, 64, 64, 4096, window=window)
    everything = testing.KvCache("int8", 1, 2, 64, 64, 4096)
    for first in range(0, 1000, step):
        last = min(first + step, 1000)
        append(cache, case, first, last)
        append(everything, case, first, last)
        cache.release_unseen()
        kept = cache.bytes_alone // (everything.bytes_alone // -(-last // CHUNK))
        # the chunks with the keys from last - CHUNK + 1 - window (the next query after the longest rewind) to last
        assert kept == -(-last // CHUNK) - max(0, last - CHUNK + 1 - window) // CHUNK
        query = Case((2, 1, 64, 64), last, 1, window=window)
        assert_same_bits(query.run("scalar", cache), query.run("scalar", everything))
        assert_same_bits(query.run("scalar", cache, mode="chunks"), query.run("scalar", everything))
        assert cache.shortest <= max(0, last - CHUNK)
    other = testing.KvCache("int8", 1, 2, 64, 64, 4096, window=window)
    other.load(cache.save())
    assert other.save() == cache.save()
    for shorter in (cache.shortest, 0):
        with pytest.raises(IndexError, match=f"shortest is {cache.shortest}"):
            cache.truncate(cache.shortest - 1)
        cache.truncate(shorter)
        append(cache, case, shorter, 1000)
        assert_same_bits(case.run("scalar", cache), case.run("scalar", everything))
    with pytest.raises(ValueError, match="windows are not those"):
        testing.KvCache("int8", 1, 2, 64, 64, 4096).load(other.save())


def test_the_cache_refuses() -> None:
    cache = Case((2, 1, 64, 64), 30, 1).cache("int8", "scalar")
    saved = cache.save()
    with pytest.raises(ValueError, match="limit is 4096"):
        cache.reserve(4067)
    with pytest.raises(IndexError, match="cannot truncate 30 tokens to 31"):
        cache.truncate(31)
    with pytest.raises(ValueError, match="expected"):
        cache.load(saved[:-1])
    with pytest.raises(ValueError, match="not those of this model"):
        testing.KvCache("int8", 1, 2, 64, 48, 4096).load(saved)
    with pytest.raises(ValueError, match="not those of this model"):
        testing.KvCache("float32", 1, 2, 64, 64, 4096).load(saved)
    with pytest.raises(ValueError, match="the limit is 29"):
        testing.KvCache("int8", 1, 2, 64, 64, 29).load(saved)
    with pytest.raises(ValueError, match="not written by save"):
        cache.load(b"nonsense" * 20)
    assert cache.save() == saved
