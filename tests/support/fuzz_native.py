"""Fuzz targets of the C++ module: bytes choose shapes, types, layouts and values of what its entry points get.

The tests replay their seeds. `EDGEFORMER_SANITIZE=fuzz` builds the module for a run under atheris.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import SimpleNamespace

import numpy as np
from support import tiny

from edgeformer.errors import EngineUnavailable, InputError, StateError

TOKENS = 150  # of the saved state: a whole chunk and a part of one


class Choices:
    """Numbers, items and arrays made of the bytes of an input; zeros once these are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def is_empty(self) -> bool:
        return self._at >= len(self._data)

    def rest(self) -> bytes:
        return self._data[self._at :]

    def number(self, low: int, high: int) -> int:
        """A number in low .. high."""
        size = 1 if high - low < 256 else 8
        value = int.from_bytes(self._data[self._at : self._at + size].ljust(size, b"\0"), "little")
        self._at += size
        return low + value % (high - low + 1)

    def pick(self, items):
        return items[self.number(0, len(items) - 1)]

    def odd(self, right: int) -> int:
        """Mostly `right`, else a number that a check may forget."""
        return right if self.number(0, 7) else self.pick([0, 1, -1, right + 1, right - 1, 2 * right, 2**31, -(2**63)])

    def array(self, count: int, dtype) -> np.ndarray:
        """`count` values: bytes of the input, again and again."""
        size = np.dtype(dtype).itemsize * count
        piece = self._data[self._at : self._at + min(size, 64)] or b"\1"
        self._at += len(piece)
        return np.frombuffer((piece * (size // len(piece) + 1))[:size], dtype).copy()

    def floats(self, *shape: int) -> np.ndarray:
        """Finite float32 values of ordinary sizes."""
        return (self.array(int(np.prod(shape)), np.int8).astype(np.float32) / 16).reshape(shape)


@cache
def lowered():
    """The executables of tiny decoders, by scheme."""
    from support.fuzz_targets import folder

    from edgeformer.engines.native.program.executable import load_executable

    tiny.write_lm(folder() / "q8", scheme="q8")
    tiny.write_lm(folder() / "window", window=20)
    return {name: load_executable(folder() / name / "model.onnx") for name in ("lm", "q8", "window")}


@cache
def engine(name: str, isa: str | None = None):
    from support.fuzz_targets import folder

    from edgeformer.engines.native.engine import NativeEngine

    lowered()
    return NativeEngine.from_bundle(folder() / name, threads=1, isa=isa)


@cache
def saved(name: str):
    """(the bytes of a state of TOKENS tokens, those of its first chunk)."""
    made = engine(name)
    state = made.new_state()
    made.forward([({"input_ids": np.array([[3 + i % 300 for i in range(TOKENS)]])}, state)])
    return state._state.save()[0], None if name == "window" else state._state.chunk(0).save()


# --------------------------------------------------------------------------------------------------------- the targets


def packing(data: bytes) -> None:
    """`Engine.pack` with rows, blocks, types and values that do not fit each other."""
    from edgeformer import _native

    c = Choices(data)
    kind = c.pick(_native.NAMES["weight"])
    n, k = c.number(1, 70), c.number(1, 140)
    program = {name: [] for name in ("symbols", "sizes", "slots", "ops", "caches", "inputs", "outputs")}
    program |= dict.fromkeys(("logits_to_keep", "batch", "sequence", "kept", "past"), -1)
    program |= {"row_local": False, "weights": [{"type": kind, "n": n, "k": k}]}
    made = _native.Engine(program, 1, "", "int8", 8, 8)
    for _ in range(c.number(1, 4)):
        rows, block = c.odd(n), c.odd(c.pick([16, 32, 64, 128]))
        wide = max(1, min(abs(block), 4096))
        size, scales = max(0, min(rows, 4096)) * k, max(0, min(rows, 4096)) * -(-k // wide)
        q = c.array(max(0, c.odd((size + 1) // 2 if kind.startswith("q4") else size) % (1 << 20)), c.pick("Bbfd"))
        numbers = [c.array(max(0, c.odd(scales) % (1 << 20)), c.pick("fffd")) for _ in range(2)]
        part = SimpleNamespace(
            weight=c.odd(0), name="w", q=q, scale=numbers[0], min=numbers[1], rows=rows, block=block,
            first_row=c.odd(0), role=c.pick(_native.NAMES["role"]), mapped=[],
        )  # fmt: skip
        try:
            made.pack([part])
        except (InputError, EngineUnavailable, TypeError, OverflowError):
            continue
        except RuntimeError as error:  # a number beyond the C++ type
            if "Unable to cast" not in str(error):
                raise
    assert made.packed().size in (0, made.packed_size)


def states(data: bytes) -> None:
    """Saved states and chunks that were changed; then what a caller may do with a state."""
    c = Choices(data)
    name = c.pick(["q8", "lm", "window"])
    made = engine(name)
    state, what = made.new_state(), c.number(0, 3)
    own = state._state
    try:
        if what == 0:
            own.load([c.rest()])
        elif what == 1:
            own.restore([made.chunk_from_bytes(c.rest())], 128)
        else:
            own.load([saved(name)[0]] * what)
            for _ in range(12):
                change(c, own, made)
    except (StateError, InputError, TypeError, OverflowError):
        return
    if own.length < made.context - 1:
        batch = max(1, own.batch)
        made.forward([({"input_ids": np.full((batch, 2), 5)}, state)])


def session(data: bytes) -> None:
    """A file of a saved session, with the hash of what it holds."""
    from hashlib import sha256

    from support.fuzz_targets import folder

    from edgeformer.decoding.session import Session
    from edgeformer.decoding.session_file import MAGIC

    path = folder() / "session"
    path.write_bytes(MAGIC + sha256(data).digest() + data)
    found = Session.read(engine("q8"), path)
    if found.state.length < engine("q8").context:
        engine("q8").forward([({"input_ids": np.full((max(1, found.state._state.batch), 1), 5)}, found.state)])


def change(c: Choices, own, made) -> None:
    """One call of a state's methods, with numbers that may be odd."""
    try:
        how = c.number(0, 4)
        if how == 0:
            own.truncate(c.odd(c.number(0, TOKENS)))
        elif how == 1:
            own.select([c.odd(c.number(0, 2)) for _ in range(c.number(0, 4))])
        elif how == 2:
            own.load(own.fork().save())
        elif how == 3:
            chunks = [own.chunk(c.odd(0)) for _ in range(c.number(0, 3))]
            own.truncate(0)
            own.restore(chunks, c.odd(128 * len(chunks)))
        else:
            other = made.new_state()._state
            other.load(own.save())
            assert other.length == own.length
    except (StateError, InputError, TypeError, OverflowError):
        pass


def forward(data: bytes) -> None:
    """`Engine.forward` with arrays of wrong types, ranks, sizes, layouts and ids."""
    c = Choices(data)
    name = c.pick(["q8", "lm", "window"])
    made = engine(name)
    sets, given = [], []
    for _ in range(c.number(1, 3)):
        rows = c.number(1, 40)
        batch = c.pick([1, 1, 2])
        ids = c.array(max(0, min(c.odd(batch * rows), 4096)), c.pick("qqqqifB?"))
        if c.number(0, 3):
            ids = (ids.astype(np.int64) & 255) + 3
        odd = c.pick([(ids.size,), (1, ids.size), (ids.size, 1), (1, 1, ids.size)])
        ids = ids.reshape((batch, rows) if ids.size == batch * rows else odd)
        ids = c.pick([ids, ids, ids, np.asfortranarray(ids), ids[..., ::-1], ids.astype(">i8"), ids.T])
        inputs = {"input_ids": ids}
        if c.number(0, 1):
            inputs["logits_to_keep"] = np.array(c.odd(1)) if c.number(0, 3) else c.array(2, "q")
        if c.number(0, 2) == 0:
            inputs["position_ids"] = c.array(max(1, ids.size), "q").reshape(ids.shape if ids.size else (1,))
        sets.append(inputs)
        given.append(c.pick(given) if given and c.number(0, 9) == 0 else made.new_state())
    before = [state.length for state in given]
    try:
        made.forward(list(zip(sets, given, strict=True)))
    except (InputError, StateError):
        assert [state.length for state in given] == before
    raw = [list(inputs.values()) for inputs in sets]
    with suppress(InputError, StateError, TypeError):
        made._native.forward([made.new_state()._state for _ in raw], raw)


def kernels(data: bytes) -> None:
    """Every table's kernels on odd shapes give the bits of the scalar table."""
    from edgeformer import _native

    c = Choices(data)
    isa = c.pick(_native.isas())
    tables = [_native.testing.Table(name) for name in (isa, "scalar")]
    run = c.pick(CASES)(c)
    one, two = (run(table) for table in tables)
    np.testing.assert_array_equal(one.view(np.int32), two.view(np.int32), err_msg=isa)


def case_linear(c: Choices) -> Callable:
    from edgeformer import _native

    kind = c.pick(_native.testing.WEIGHT_TYPES)
    span = {"x64": 64, "128": 128}.get(kind[-3:], 32)
    n, m, k = c.number(1, 70), c.number(1, 20), c.number(1, 260)
    k = max(span, k // span * span) if span > 32 or kind.startswith("q4") else k
    block = 16 if kind == "q8x16" else span
    packed = _native.testing.Packed(kind, n, k)
    scales = np.abs(c.floats(n, -(-k // block))) + np.float32(0.01)
    if kind == "f32":
        packed.pack(c.floats(n, k))
    elif kind.startswith("q4"):
        packed.pack(c.array((n * k + 1) // 2, np.uint8), scales, c.floats(*scales.shape), block)
    else:
        packed.pack(np.maximum(c.array(n * k, np.int8), -127).reshape(n, k), scales, None, block)
    x = c.floats(m, k)

    def run(table):
        y = np.zeros((m, -(-n // 16) * 16), np.float32)
        panels = -(-n // 16)
        if kind == "f32":
            table.linear_f32(packed, x, y, 0, panels)
        else:
            table.linear(packed, table.quantize(x, k, span), y, 0, panels)
        return y[:, :n].copy()

    return run


def case_rows(c: Choices) -> Callable:
    m, n = c.number(1, 9), c.number(1, 200)
    x, weight, bias = c.floats(m, n), c.floats(n), c.floats(n)
    how = c.pick(["rms", "layer", "softmax", "rope"])

    def run(table):
        y = np.zeros((m, n), np.float32)
        if how == "rms":
            table.rms_norm(x, n, weight, 1e-5, y)
        elif how == "layer":
            table.layer_norm(x, n, weight, bias, 1e-5, y)
        elif how == "softmax":
            table.softmax(x, n, y)
        else:
            from edgeformer import _native

            rotary = n // 2 * 2
            rope = _native.testing.Rope(heads=1, head_dim=n, rotary=rotary, interleaved=bool(m % 2))
            angle = np.resize(x, (m, max(1, rotary // 2)))
            table.rope(x, rope, np.cos(angle), np.sin(angle), y)
        return y

    return run


def case_attention(c: Choices) -> Callable:
    from edgeformer import _native

    kind, heads, group = c.pick(["int8", "float32"]), c.number(1, 3), c.number(1, 9)
    dim, value_dim, held, tokens = c.number(1, 80), c.number(1, 80), c.number(0, 300), c.number(1, 20)
    window, mode, step = c.pick([0, 0, 5, 200]), c.pick(["rows", "chunks"]), c.number(1, 20)
    k, v = c.floats(held + tokens, heads * dim), c.floats(held + tokens, heads * value_dim)
    q = c.floats(tokens, heads * group * dim)

    def run(table):
        cache = _native.testing.KvCache(kind, 1, heads, dim, value_dim, held + tokens)
        cache.reserve(held + tokens)
        table.kv_append(cache, 0, k, v)
        cache.advance(held + tokens)
        queries = _native.testing.Queries()
        queries.q, queries.group, queries.scale = q, group, 0.25
        queries.end = np.arange(held + 1, held + tokens + 1, dtype=np.int32)
        queries.begin = np.maximum(queries.end - window, 0).astype(np.int32) if window else np.zeros(tokens, np.int32)
        return table.attention(cache, 0, queries, mode, step)

    return run


CASES = (case_linear, case_rows, case_attention)


def lowered_graph(data: bytes) -> None:
    """A changed graph that the passes take, past onnx's checker: the engine is made, and runs."""
    from support.fuzz_targets import folder

    from edgeformer.engines.native.engine import NativeEngine

    lowered()
    work = folder() / "graph"
    work.mkdir(exist_ok=True)
    (work / "model.onnx").write_bytes(data)
    if not (work / "model.onnx.data").exists():
        (work / "model.onnx.data").write_bytes((folder() / "q8" / "model.onnx.data").read_bytes())
    made = NativeEngine.from_bundle(work / "model.onnx", threads=1, context=64)
    inputs = {}
    for name, dtype, shape in made._inputs:
        sizes = [size if isinstance(size, int) else 2 for size in shape]
        if np.prod([float(size) for size in sizes]) > 1 << 16:
            return
        inputs[name] = np.ones(sizes, dtype)
    inputs.pop("logits_to_keep", None)
    if made.memory().total < 1 << 28:
        made.forward([(inputs, made.new_state())])


TARGETS = {
    "packing": packing,
    "states": states,
    "session": session,
    "forward": forward,
    "kernels": kernels,
    "lowered": lowered_graph,
}


def seeds(name: str) -> list[bytes]:
    """Inputs that reach the inside of a target."""
    if name == "states":
        return [b"\0\0" + saved("q8")[0], b"\1\0" + saved("lm")[0], b"\0\1" + saved("q8")[1], bytes(range(2, 90))]
    if name == "session":
        made = engine("q8")
        state = made.new_state()
        return [(3).to_bytes(8, "little") + np.arange(3, dtype="<i8").tobytes() + state.to_bytes()]
    if name == "lowered":
        from support.fuzz_targets import folder

        lowered()
        return [(folder() / "q8" / "model.onnx").read_bytes()]
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, 300).astype(np.uint8).tobytes() for _ in range(16)] + [b"\1" * 300]
