"""The disk cache of programs and packed weights: the same engine from it, and never an old one for a new model."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgeformer
from edgeformer import disk_cache
from edgeformer.bundle.write import seal
from edgeformer.errors import BundleError, EngineUnavailable

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.program import executable, lowering, packing


@pytest.fixture
def lowered(monkeypatch):
    """The paths of the graphs that were lowered."""
    seen, whole = [], lowering.lower_bundle

    def lower(path):
        seen.append(path)
        return whole(path)

    monkeypatch.setattr(lowering, "lower_bundle", lower)
    return seen


def programs(folder):
    return sorted(folder.glob("*.program"))


def answer(engine):
    """Logits of a prompt and of a step after it."""
    state = engine.new_state()
    first = engine.forward([({"input_ids": np.array([[3, 1, 4, 1, 5]])}, state)])[0]["logits"]
    return first, engine.forward([({"input_ids": np.array([[9]])}, state)])[0]["logits"]


@pytest.mark.parametrize("name", ["float", "q8", "float16", "plain"])
def test_the_second_engine_is_the_first_one_without_lowering(bundles, name, cache_folder, lowered):
    once = NativeEngine.from_bundle(bundles / name, threads=1)
    again = NativeEngine.from_bundle(bundles / name, threads=1)
    assert len(lowered) == 1 and len(programs(cache_folder)) == 1
    assert again.memory(100) == once.memory(100)
    assert again.rounded == once.rounded
    for one, other in zip(answer(once), answer(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [op.kind for op in again.program.ops] == [op.kind for op in once.program.ops]  # lowered when it is asked for
    assert len(lowered) == 3


@pytest.mark.usefixtures("cache_folder")
def test_an_encoder_keeps_its_types_and_names(bundles, lowered):
    rng = np.random.default_rng(0)
    once, again = (edgeformer.load(bundles / "forecast", engine="native", threads=1) for _ in range(2))
    assert len(lowered) == 1
    ((name, info),) = again.info["inputs"].items()
    x = {name: rng.standard_normal([s if isinstance(s, int) else 3 for s in info["shape"]]).astype(np.float32)}
    one, other = once(**x), again(**x)
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
    with pytest.raises(edgeformer.InputError, match=f"this graph takes {name}"):
        again(other=x[name])


@pytest.mark.usefixtures("cache_folder")
def test_other_weights_are_another_model(q8, tmp_path, lowered):
    """The same graph and sizes, other values: what the engine computes is theirs."""
    bundle = tmp_path / "bundle"
    shutil.copytree(q8, bundle)
    before = answer(NativeEngine.from_bundle(bundle, threads=1))
    data = bundle / "model.onnx.data"
    values = np.fromfile(data, np.uint8)
    was = data.stat()
    values[: len(values) // 2] = values[: len(values) // 2][::-1].copy() & 63
    values.tofile(data)
    os.utime(data, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    after = answer(NativeEngine.from_bundle(bundle, threads=1))
    assert len(lowered) == 2
    assert not np.array_equal(before[0], after[0])
    again = answer(NativeEngine.from_bundle(bundle, threads=1))
    assert len(lowered) == 2
    np.testing.assert_array_equal(after[0], again[0])


@pytest.mark.usefixtures("cache_folder")
def test_bundles_that_differ_only_in_their_weights_have_two_entries(q8, tmp_path, lowered):
    """Equal graphs, sizes and times, as archives with normalized times have them: the manifests differ."""
    answers = []
    for name, change in (("one", 0), ("other", 1)):
        bundle = tmp_path / name
        shutil.copytree(q8, bundle)
        data = bundle / "model.onnx.data"
        values = np.fromfile(data, np.float32)
        small = (np.abs(values) > 0.5) & (np.abs(values) < 2)  # the norms' weights are about 1
        assert small.any()
        values[small] *= 1 + change
        values.tofile(data)
        manifest = json.loads((bundle / "edgeformer.json").read_text())
        seal(bundle, {key: value for key, value in manifest.items() if key != "files"})
        os.utime(data, ns=(10**18, 10**18))
        answers.append(answer(NativeEngine.from_bundle(bundle, threads=1))[0])
    assert len(lowered) == 2
    assert not np.array_equal(*answers)


@pytest.mark.parametrize(
    "damage",
    [lambda entry: entry[: len(entry) // 2], lambda _: b"", lambda entry: entry[:-1] + bytes([entry[-1] ^ 1])],
    ids=["cut short", "empty", "a bit flipped"],
)
def test_a_damaged_entry_is_none(q8, cache_folder, lowered, damage):
    before = answer(NativeEngine.from_bundle(q8, threads=1))
    (entry,) = programs(cache_folder)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    after = answer(NativeEngine.from_bundle(q8, threads=1))
    assert len(lowered) == 2
    assert entry.read_bytes() == whole
    np.testing.assert_array_equal(before[0], after[0])


def test_changed_code_lowers_again(q8, cache_folder, lowered, monkeypatch):
    NativeEngine.from_bundle(q8, threads=1)
    monkeypatch.setattr(executable, "code_identity", lambda: b"other")
    NativeEngine.from_bundle(q8, threads=1)
    assert len(lowered) == 2 and len(programs(cache_folder)) == 2


def test_a_large_program_is_not_cached(q8, cache_folder, lowered, monkeypatch):
    monkeypatch.setattr(executable, "LARGEST_CACHED", 10)
    for _ in range(2):
        NativeEngine.from_bundle(q8, threads=1)
    assert len(lowered) == 2 and programs(cache_folder) == []


def test_a_graph_that_cannot_be_lowered_is_not_cached(q8, cache_folder, monkeypatch):
    def refuse(_):
        raise EngineUnavailable("1 node cannot be lowered: Frobnicate")

    monkeypatch.setattr(lowering, "lower_bundle", refuse)
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="Frobnicate"):
            NativeEngine.from_bundle(q8, threads=1)
    assert programs(cache_folder) == []


@pytest.mark.usefixtures("cache_folder")
def test_a_second_load_imports_no_onnx(q8):
    code = (
        "import json, sys, edgeformer\n"
        f"model = edgeformer.load({str(q8)!r}, engine='native', threads=1)\n"
        "text = model.generate('a', max_new_tokens=3).text\n"
        "print(json.dumps(['onnx' in sys.modules, text]))\n"
    )
    (first, one), (second, other) = (
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
        for _ in range(2)
    )
    assert (first, second) == (True, False)
    assert one == other


@pytest.mark.usefixtures("cache_folder")
def test_a_fault_of_the_graph_is_found_at_every_load(q8, tmp_path):
    """The cached result of a check belongs to the sizes of the files, not to their names."""
    bundle = tmp_path / "bundle"
    shutil.copytree(q8, bundle)
    edgeformer.load(bundle)
    data = bundle / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    manifest = json.loads((bundle / "edgeformer.json").read_text())
    manifest["files"]["model.onnx.data"]["size"] -= 100
    (bundle / "edgeformer.json").write_text(json.dumps(manifest))
    for _ in range(2):
        with pytest.raises(BundleError, match=r"of model\.onnx\.data, which holds"):
            edgeformer.load(bundle)


@pytest.mark.usefixtures("cache_folder")
def test_a_damaged_tokenizer_is_reported_while_the_weights_are_packed(q8, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(q8, bundle)
    path = bundle / "tokenizer.json"
    path.write_bytes(b"x" * path.stat().st_size)
    for engine in ("native", "auto"):
        with pytest.raises(BundleError, match="is not a tokenizer"):
            edgeformer.load(bundle, engine=engine, check="sizes")


# ------------------------------------------------------------------------------------------------------ packed weights


@pytest.fixture
def packed(monkeypatch):
    """One entry for each engine that packed its weights itself."""
    seen, whole = [], packing.pack

    def pack(native, e, while_packing):
        seen.append(e.cache_key)
        return whole(native, e, while_packing)

    monkeypatch.setattr(packing, "pack", pack)
    return seen


def engine_of(bundle, **options):
    engine = NativeEngine.from_bundle(bundle, threads=1, **options)
    disk_cache.finish()
    return engine


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("name", ["float", "q8", "float16", "plain"])
def test_packed_weights_serve_the_next_engine(bundles, name, isa, cache_folder, packed):
    """Of any kernel table: the packed form is one."""
    once, again = engine_of(bundles / name), engine_of(bundles / name, isa=isa)
    assert len(packed) == 1
    for one, other in zip(answer(once), answer(again), strict=True):
        np.testing.assert_array_equal(one, other)
    (entry,) = cache_folder.glob("*.packed")
    entry.unlink()
    np.testing.assert_array_equal(answer(again)[0], answer(once)[0])  # mapped, it needs no name


@pytest.mark.parametrize(
    ("huge", "free", "limit", "copied"),
    [
        (0.1, 100, None, True),
        (0.8, 100, None, True),
        (0.95, 100, None, False),  # the map is fast as it is
        (0.1, 2, None, False),  # too little memory for a copy
        (0.1, 100, 10**9, False),  # a limit asks for little
        (None, 100, None, False),  # a system that does not tell
    ],
)
def test_packed_weights_in_small_pages_are_copied_where_memory_is_free(
    q8, cache_folder, packed, monkeypatch, huge, free, limit, copied
):
    before = answer(engine_of(q8))
    (entry,) = cache_folder.glob("*.packed")
    monkeypatch.setattr(packing, "has_huge_pages", lambda: True)
    monkeypatch.setattr(packing, "mapped_in_huge_pages", lambda data: None if huge is None else int(huge * data.nbytes))
    monkeypatch.setattr(packing, "available_memory", lambda: free * entry.stat().st_size)
    engine = engine_of(q8, memory_limit=limit)
    gc.collect()  # a cycle of objects may hold the map until then; its pages were released
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert (entry.name in maps.read_text()) != copied
    assert len(packed) == 1
    np.testing.assert_array_equal(answer(engine)[0], before[0])
    np.testing.assert_array_equal(engine._native.packed(), disk_cache.read_mapped(entry.name)[0])


@pytest.mark.parametrize("place", [0, -60, -1], ids=["weights", "note", "digest"])
def test_damaged_packed_weights_are_packed_again(q8, cache_folder, packed, place):
    before = answer(engine_of(q8))
    (entry,) = cache_folder.glob("*.packed")
    whole = entry.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1
    entry.write_bytes(damaged)
    after = answer(engine_of(q8))
    assert len(packed) == 2
    assert entry.read_bytes() == whole
    np.testing.assert_array_equal(before[0], after[0])


def test_packed_weights_of_another_program_are_refused(q8, cache_folder, packed):
    """The note fits and the size does not: only a fault in the cache key can cause it."""
    engine_of(q8)
    (entry,) = cache_folder.glob("*.packed")
    data, note = disk_cache.read_mapped(entry.name)
    disk_cache.write_behind(entry.name, data[:-64].copy(), note)
    disk_cache.finish()
    engine_of(q8)
    assert len(packed) == 2


@pytest.mark.usefixtures("cache_folder")
def test_packed_weights_of_other_weights_are_packed_again(copy_of, q8, packed):
    """The same graph, manifest and size; only the file's time tells."""
    bundle = copy_of(q8)
    before = answer(engine_of(bundle))
    data = bundle / "model.onnx.data"
    values, was = np.fromfile(data, np.uint8), data.stat()
    values[: len(values) // 2] = values[: len(values) // 2][::-1].copy() & 63
    values.tofile(data)
    os.utime(data, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    after = answer(engine_of(bundle))
    again = answer(engine_of(bundle))
    assert len(packed) == 2
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(after[0], again[0])


def test_packed_weights_of_the_wrong_size_or_alignment_are_refused(q8):
    given = engine_of(q8)._native.packed()
    assert not given.flags.writeable and given.ctypes.data % 64 == 0
    plain = executable.load_executable(q8 / "model.onnx")
    fresh = native.Engine(plain.program, 1, "", "int8", 64, 64)
    assert len(fresh.packed()) == 0
    room = np.empty(len(given) + 128, np.uint8)
    start = -room.ctypes.data % 64
    for wrong in (given[:-64], room[start + 1 :][: len(given)], np.zeros(2 * len(given), np.uint8)[::2]):
        with pytest.raises(edgeformer.InputError, match=f"expected {len(given)} contiguous ones at a multiple of 64"):
            fresh.use_packed(wrong)
        with pytest.raises(edgeformer.InputError, match=f"expected {len(given)} contiguous ones at a multiple of 64"):
            fresh.copy_packed(wrong, mapped=False)
    fresh.use_packed(given)
    with pytest.raises(edgeformer.InputError, match="has its weights already"):
        fresh.use_packed(given)
    with pytest.raises(edgeformer.InputError, match="has its weights already"):
        fresh.copy_packed(given, mapped=False)
    with pytest.raises(edgeformer.InputError, match="belong to another one"):
        fresh.pack([])
