"""Layers with a sliding window keep only the chunks that a later token may see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from support.decoder_graphs import LM, Builder, F, decoder_layer, window_mask

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.decoding.session import Session
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.options import NativeOptions
from edgeformer.errors import StateError

WINDOW, LENGTH = 150, 1000
RNG = np.random.default_rng(3)
X = RNG.standard_normal((1, LENGTH, 64)).astype(np.float32)
ANGLE = RNG.uniform(-3, 3, (1, LENGTH, 8)).astype(np.float32)


class _Renamed:
    """A Builder that gives other inputs to the nodes than their names say."""

    def __init__(self, g, names):
        self.g, self.names = g, names

    def __call__(self, op, *inputs, **more):
        return self.g(op, *(self.names.get(i, i) if isinstance(i, str) else i for i in inputs), **more)

    def __getattr__(self, name):
        return getattr(self.g, name)


@pytest.fixture(scope="module", params=["both layers", "one layer"])
def path(request, tmp_path_factory):
    """Two decoder layers; both have a window, or the first one."""
    g = Builder()
    y, *caches = decoder_layer(g, mask=window_mask(g, WINDOW))
    second = _Renamed(g, {"x": y, "pk": "pk2", "pv": "pv2"})
    mask = window_mask(g, WINDOW) if request.param == "both layers" else ""
    y, *more = decoder_layer(second, mask=mask)
    inputs = LM | {"pk2": LM["pk"], "pv2": LM["pv"]}
    file = tmp_path_factory.mktemp("window") / "model.onnx"
    onnx.save(g.model({n: (F, s) for n, (_, s) in inputs.items()}, [y, *caches, *more]), file)
    return file


@pytest.fixture(
    scope="module",
    params=[NativeOptions(context=4096), NativeOptions(kv="int8", context=4096, float32_layers=(1,))],
    ids=["float32", "mixed"],
)
def options(request):
    """`mixed`: the second layer's cache is float32, the first one's int8."""
    return request.param


@pytest.fixture(scope="module")
def engine(path, options):
    return NativeEngine.create(path, "model", 2, options)


def forward(engine, state, first, last):
    feeds = {"x": X[:, first:last], "cos": np.cos(ANGLE[:, first:last]), "sin": np.sin(ANGLE[:, first:last])}
    return next(iter(engine.forward([(feeds, state)])[0].values()))


def grown(engine, length, step=100):
    state = engine.new_state()
    for first in range(0, length, step):
        forward(engine, state, first, min(first + step, length))
    return state


@pytest.fixture(scope="module")
def whole(engine):
    """The outputs of one call: nothing is dropped before its end."""
    return forward(engine, engine.new_state(), 0, LENGTH)


def windowed(engine):
    return [op.ints["window"][0] for op in engine.program.ops if op.kind == "attend"].count(WINDOW)


@pytest.mark.parametrize("step", [1, 33, 250])
def test_a_window_forgets_and_nobody_notices(engine, whole, step):
    state = engine.new_state()
    parts = [forward(engine, state, at, min(at + step, LENGTH)) for at in range(0, LENGTH, step)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    # Both layers have the same heads.
    chunks = {
        kv: NativeEngine.from_bundle(engine._path, threads=1, kv=kv).kv_bytes(1) // 2 for kv in ("int8", "float32")
    }
    layers = [chunks["int8" if layer in engine.int8_layers else "float32"] for layer in (0, 1)]
    # The next token, after a truncation by 128, is at 872 and sees keys from 723 on: chunks 0 to 4 are gone.
    assert state.nbytes == 8 * sum(layers) - 5 * sum(layers[: windowed(engine)])


def test_the_prediction_bounds_what_a_state_holds(engine):
    state = engine.new_state()
    for at in range(LENGTH):
        forward(engine, state, at, at + 1)
        assert state.nbytes <= engine.kv_bytes(at + 1)
    assert (engine.kv_bytes(4096) < 2 * engine.kv_bytes(1000)) == (windowed(engine) == 2)


def test_a_state_with_a_window_is_cut_as_far_as_it_can_go_on(engine, whole):
    state = grown(engine, LENGTH)
    assert 0 < state.shortest <= LENGTH - 128
    with pytest.raises(StateError, match=f"cut to {state.shortest} or more"):
        state.truncate(state.shortest - 1)
    assert state.length == LENGTH
    for length in (LENGTH - 128, state.shortest, 0):
        other = state.fork()
        other.truncate(length)
        np.testing.assert_array_equal(forward(engine, other, length, LENGTH), whole[:, length:])
    loaded = engine.state_from_bytes(state.to_bytes())
    assert loaded.shortest == state.shortest
    loaded.truncate(start := loaded.shortest)
    np.testing.assert_array_equal(forward(engine, loaded, start, LENGTH), whole[:, start:])


def test_a_conversation_that_a_window_cannot_continue_starts_again(engine):
    state = grown(engine, LENGTH)
    session = Session(state)
    session.ids = list(range(LENGTH))
    near = state.shortest
    assert session.reuse([*range(near), -1]) == state.length == near
    assert session.reuse([*range(near - 1), -1]) == state.length == 0


def test_a_failed_call_leaves_the_window_as_it_was(engine, whole, options):
    state = grown(engine, 500)
    small = NativeEngine.create(engine._path, "model", 1, replace(options, context=700))
    full = grown(small, 500)
    with pytest.raises(Exception, match="700"):
        forward(small, full, 500, LENGTH)
    assert (full.length, full.nbytes) == (500, state.nbytes)
    np.testing.assert_array_equal(forward(small, full, 500, 700), whole[:, 500:700])


def test_chunks_restore_up_to_where_every_window_is_whole(engine, whole):
    early = {}
    state = engine.new_state()
    for at in range(0, 896, 128):
        forward(engine, state, at, at + 128)
        early[at // 128] = state.chunks(at // 128)[0]
    late = state.chunks()
    for length in (896, 800, 129, 5):
        restored = engine.new_state()
        assert restored.restore(list(early.values()), length) == length
        np.testing.assert_array_equal(forward(engine, restored, length, LENGTH), whole[:, length:])
    # Chunks 0 to 3 are outside the window of 896 tokens less 128: the next token sees keys from 619 on.
    assert [c.nbytes < engine.kv_bytes(1) for c in late] == [True] * 4 + [False] * 3
    restored = engine.new_state()
    assert restored.restore(late, 896) == 896
    np.testing.assert_array_equal(forward(engine, restored, 896, LENGTH), whole[:, 896:])
    assert engine.new_state().restore(late, 600) == 0  # sees keys from 451 on, in chunk 3
    assert engine.new_state().restore(late[:5], 640) == 0
    assert engine.new_state().restore(late[:6], 700) == 700  # from 551 on
    mixed = [*list(early.values())[:2], *late[2:5]]
    assert engine.new_state().restore(mixed, 600) == 256
    assert engine.chunk_from_bytes(late[0].save()).nbytes == late[0].nbytes
