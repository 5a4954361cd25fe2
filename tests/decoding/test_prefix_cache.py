"""The prefix cache: the longest common beginning, least recently used first out, and the same bits as without it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from edgeformer.bundle.bundle import Bundle
from edgeformer.decoding.prefix_cache import PrefixCache
from edgeformer.engines.base import CHUNK_TOKENS
from edgeformer.errors import InputError

# ------------------------------------------------------------------------- the tree, against a list of what was kept


@dataclass(frozen=True)
class FakeChunk:
    ids: tuple[int, ...]
    nbytes: int = 100


class FakeState:
    """Holds token ids in place of keys and values."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids = tuple(ids)

    @property
    def length(self) -> int:
        return len(self.ids)

    def chunks(self, first: int = 0) -> list[FakeChunk]:
        starts = range(first * CHUNK_TOKENS, self.length - CHUNK_TOKENS + 1, CHUNK_TOKENS)
        return [FakeChunk(self.ids[at : at + CHUNK_TOKENS]) for at in starts]

    def restore(self, chunks: Sequence[FakeChunk], length: int) -> int:
        assert self.length == 0
        assert length <= len(chunks) * CHUNK_TOKENS
        self.ids = tuple(i for chunk in chunks for i in chunk.ids)[:length]
        return length


class Model:
    """The same cache by brute force: a list of whole beginnings, the least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.kept = limit, []

    def use(self, beginnings) -> None:
        """Longer ones first: each is used after those that need it."""
        for beginning in sorted(beginnings, key=len, reverse=True):
            if beginning in self.kept:
                self.kept.remove(beginning)
            self.kept.append(beginning)
        while len(self.kept) * 100 > self.limit:
            self.kept.pop(0)

    def insert(self, ids) -> None:
        self.use([ids[:n] for n in range(CHUNK_TOKENS, len(ids) + 1, CHUNK_TOKENS)])

    def match(self, ids) -> int:
        best, used = 0, None
        for beginning in self.kept:
            common = 0
            while common < min(len(ids), len(beginning)) and ids[common] == beginning[common]:
                common += 1
            if common > best:
                best, used = common, beginning
        if used:
            full = -(-best // CHUNK_TOKENS) * CHUNK_TOKENS
            self.use([used[:n] for n in range(CHUNK_TOKENS, full + 1, CHUNK_TOKENS)])
        return min(best, max(0, len(ids) - 1))


def prompts_of(pieces: int, size: int):
    """Prompts of up to `pieces` pieces of `size` equal ids, the last one cut."""
    return st.tuples(st.lists(st.integers(0, 2), max_size=pieces), st.integers(0, size)).map(
        lambda drawn: tuple(i for piece in drawn[0] for i in [piece] * size)[: len(drawn[0]) * size - drawn[1]]
    )


def calls_of(prompt):
    return st.lists(st.tuples(st.booleans(), prompt), max_size=30)


# In chunks of half equal ids several may begin alike; which of them counts as used is open, so nothing is dropped.
SCHEDULES = st.one_of(
    st.tuples(calls_of(prompts_of(9, CHUNK_TOKENS // 2)), st.just(10**6)),
    st.tuples(calls_of(prompts_of(5, CHUNK_TOKENS)), st.sampled_from([0, 100, 399, 1000])),
)


@settings(max_examples=300, deadline=None)
@given(SCHEDULES)
def test_the_tree_is_the_list(schedule):
    calls, limit = schedule
    cache, model, hits = PrefixCache(limit), Model(limit), 0
    for inserts, ids in calls:
        if inserts:
            cache.insert(ids, FakeState(ids))
            model.insert(ids)
        else:
            state, length = cache.match(ids, FakeState)
            assert state.ids == ids[:length]
            expected = model.match(ids)
            assert length == expected
            hits += expected
        assert cache.nbytes == 100 * len(cache) <= limit
        assert len(cache) == len(model.kept)
    assert cache.hits == hits
    assert cache.queries == sum(len(ids) for inserts, ids in calls if not inserts)
    cache.evict(0)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_what_is_used_stays():
    cache = PrefixCache(limit_bytes=300)
    first, second, third = ((n,) * CHUNK_TOKENS for n in (1, 2, 3))
    cache.insert(first + second, FakeState(first + second))
    cache.insert(third, FakeState(third))
    assert cache.match((*first, 9), FakeState)[1] == CHUNK_TOKENS
    cache.insert(second, FakeState(second))  # a fourth chunk: of the three, the second of the first prompt goes
    assert [cache.match((*ids, 9), FakeState)[1] for ids in (first + second, third)] == [CHUNK_TOKENS, CHUNK_TOKENS]


def test_the_cache_refuses():
    with pytest.raises(InputError, match="-1"):
        PrefixCache(-1)
    with pytest.raises(InputError, match="200 ids"):
        PrefixCache(1000).insert([1] * 200, FakeState([1] * 199))


# ------------------------------------------------------------------------------------------------- with real engines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny q8 decoder with 1,024 positions."""
    folder = tmp_path_factory.mktemp("long") / "q8"
    tiny.write_lm(folder, scheme="q8", positions=1024)
    return folder


def native_engines(bundle):
    native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")
    from edgeformer.engines.native.engine import NativeEngine
    from edgeformer.engines.native.options import NativeOptions

    for isa in native.isas():
        for kv, layers in (("int8", ()), ("int8", (1,)), ("float32", ())):
            yield NativeEngine.create(bundle, "model", 2, NativeOptions(isa, kv, float32_layers=layers))


def prompts(count):
    """Prompts that share beginnings with earlier ones, of any length, as a list of ids."""
    rng = np.random.default_rng(count)
    made = [rng.integers(0, 90, 700)]
    while len(made) < count:
        start = made[rng.integers(len(made))]
        made.append(
            np.concatenate([start[: rng.integers(len(start))], rng.integers(0, 90, rng.integers(1, 300))])[:900]
        )
    return [made[i].tolist() for i in rng.permutation(count)]


def logits_by_cache(engine, cache, ids, step=150):
    """The logits of what the cache did not have, and how many tokens it had."""
    state, found = cache.match(ids, engine.new_state)
    assert state.length == found < len(ids)
    parts = []
    for first in range(found, len(ids), step):
        part = np.asarray([ids[first : first + step]])
        parts.append(engine.forward([({"input_ids": part}, state)])[0]["logits"])
    cache.insert(ids, state)
    return np.concatenate(parts, axis=1), found


def whole_logits(engine, ids):
    return engine.forward([({"input_ids": np.asarray([ids])}, engine.new_state())])[0]["logits"]


@pytest.mark.parametrize("chunks", [3, 1000])
def test_native_logits_have_the_same_bits_with_and_without_the_cache(bundle, chunks):
    for engine in native_engines(bundle):
        cache = PrefixCache(chunks * engine.kv_bytes(CHUNK_TOKENS))
        total = 0
        for ids in prompts(8):
            got, found = logits_by_cache(engine, cache, ids)
            np.testing.assert_array_equal(got, whole_logits(engine, ids)[:, found:])
            total += found
        assert total > 0
        assert cache.nbytes <= cache.limit_bytes
        assert cache.nbytes == len(cache) * engine.kv_bytes(CHUNK_TOKENS)


def test_onnxruntime_logits_differ_by_rounding_only(bundle):
    pytest.importorskip("onnxruntime")
    from edgeformer.engines.onnxruntime import OrtEngine

    engine = OrtEngine(Bundle.open(bundle), threads=1)
    cache = PrefixCache(1 << 30)
    for ids in prompts(8):
        got, found = logits_by_cache(engine, cache, ids)
        expected = whole_logits(engine, ids)[:, found:]
        # One rounding of the activations to int8 may fall on the other side.
        assert np.abs(got - expected).max() < 1e-5 * np.ptp(expected)
    assert cache.hits > 0
    assert cache.nbytes == len(cache) * engine.kv_bytes(CHUNK_TOKENS)


def test_a_running_sequence_outlives_its_chunks(bundle):
    engine = next(native_engines(bundle))
    [ids, *_] = prompts(1)
    cache = PrefixCache(1 << 30)
    _, _ = logits_by_cache(engine, cache, ids)
    state, found = cache.match(ids, engine.new_state)
    assert found == 5 * CHUNK_TOKENS
    assert (state.nbytes, state.nbytes_shared) == (0, engine.kv_bytes(found))
    cache.evict(0)
    assert (state.nbytes, state.nbytes_shared) == (engine.kv_bytes(found), 0)
    rest = engine.forward([({"input_ids": np.asarray([ids[found:]])}, state)])[0]["logits"]
    np.testing.assert_array_equal(rest, whole_logits(engine, ids)[:, found:])


def test_a_prompt_of_whole_chunks_runs_its_last_token_only(bundle):
    engine = next(native_engines(bundle))
    ids = prompts(1)[0][: 4 * CHUNK_TOKENS]
    cache = PrefixCache(1 << 30)
    logits_by_cache(engine, cache, ids)
    got, found = logits_by_cache(engine, cache, ids)
    assert found == len(ids) - 1
    np.testing.assert_array_equal(got, whole_logits(engine, ids)[:, -1:])


def test_threads_may_share_a_cache(bundle):
    engine = next(native_engines(bundle))
    cache, wrong = PrefixCache(4 * engine.kv_bytes(CHUNK_TOKENS)), []
    expected = [(ids, whole_logits(engine, ids)) for ids in prompts(6)]

    def use(seed):
        for i in np.random.default_rng(seed).integers(0, len(expected), 12):
            ids, whole = expected[i]
            got, found = logits_by_cache(engine, cache, ids)
            if not np.array_equal(got, whole[:, found:]):
                wrong.append(found)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert cache.hits > 0
    assert cache.nbytes <= cache.limit_bytes
