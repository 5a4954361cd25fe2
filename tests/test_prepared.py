"""What a load keeps for the next one: the same engine from it, and never an old one for a new model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import edgeformer
from edgeformer import cache
from edgeformer.bundle import seal
from edgeformer.errors import BundleError, EngineUnavailable
from edgeformer.native import lowering, prepared
from edgeformer.native.engine import NativeEngine


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache folder of its own; it does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGEFORMER_CACHE", str(folder))
    return folder


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
def test_the_second_engine_is_the_first_one_without_lowering(bundles, name, kept, lowered):
    once = NativeEngine.from_bundle(bundles / name, threads=1)
    again = NativeEngine.from_bundle(bundles / name, threads=1)
    assert len(lowered) == 1 and len(programs(kept)) == 1
    assert again.memory(100) == once.memory(100)
    assert again.rounded == once.rounded
    for one, other in zip(answer(once), answer(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [op.kind for op in again.program.ops] == [op.kind for op in once.program.ops]  # lowered when it is asked for
    assert len(lowered) == 3


def test_an_encoder_keeps_its_types_and_names(bundles, kept, lowered):
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


def test_other_weights_are_another_model(q8, tmp_path, kept, lowered):
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


def test_bundles_that_differ_in_their_weights_alone_are_told_apart(q8, tmp_path, kept, lowered):
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
    [lambda entry: entry[: len(entry) // 2], lambda entry: b"", lambda entry: entry[:-1] + bytes([entry[-1] ^ 1])],
    ids=["cut short", "empty", "a bit turned"],
)
def test_a_damaged_entry_is_none(q8, kept, lowered, damage):
    before = answer(NativeEngine.from_bundle(q8, threads=1))
    (entry,) = programs(kept)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    after = answer(NativeEngine.from_bundle(q8, threads=1))
    assert len(lowered) == 2
    assert entry.read_bytes() == whole
    np.testing.assert_array_equal(before[0], after[0])


def test_changed_code_lowers_again(q8, kept, lowered, monkeypatch):
    NativeEngine.from_bundle(q8, threads=1)
    monkeypatch.setattr(prepared, "_code", lambda: b"other")
    NativeEngine.from_bundle(q8, threads=1)
    assert len(lowered) == 2 and len(programs(kept)) == 2


def test_what_is_large_is_not_kept(q8, kept, lowered, monkeypatch):
    monkeypatch.setattr(prepared, "LARGEST_KEPT", 10)
    for _ in range(2):
        NativeEngine.from_bundle(q8, threads=1)
    assert len(lowered) == 2 and programs(kept) == []


def test_what_cannot_be_lowered_is_not_kept(q8, kept, monkeypatch):
    def refuse(path):
        raise EngineUnavailable("1 node cannot be lowered: Frobnicate")

    monkeypatch.setattr(lowering, "lower_bundle", refuse)
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="Frobnicate"):
            NativeEngine.from_bundle(q8, threads=1)
    assert programs(kept) == []


def test_a_second_load_imports_no_onnx(q8, kept):
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


def test_a_fault_of_the_graph_is_found_at_every_load(q8, tmp_path, kept):
    """That a graph was checked is kept with the sizes of the files, not with its name."""
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


def test_a_damaged_tokenizer_is_told_while_the_weights_are_packed(q8, tmp_path, kept):
    bundle = tmp_path / "bundle"
    shutil.copytree(q8, bundle)
    path = bundle / "tokenizer.json"
    path.write_bytes(b"x" * path.stat().st_size)
    for engine in ("native", "auto"):
        with pytest.raises(BundleError, match="is not a tokenizer"):
            edgeformer.load(bundle, engine=engine)


def test_entries(kept):
    assert cache.read("a") is None
    cache.write("a", b"one")
    assert cache.read("a") == b"one"
    cache.write("a", b"")
    assert cache.read("a") == b""
    assert os.listdir(kept) == ["a"]
    assert cache.key(b"ab", b"c") != cache.key(b"a", b"bc")


def test_the_longest_unused_entries_go(kept, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 2)
    for age, name in enumerate(("a", "b", "c")):
        cache.write(name, name.encode())
        os.utime(kept / name, (1000 + age, 1000 + age))
        assert name != "b" or cache.read("a") == b"a"  # used again: now the newest
    assert sorted(os.listdir(kept)) == ["a", "c"]


def test_no_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    cache.write("a", b"one")
    assert cache.folder() is None and cache.read("a") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path / "file"))  # a file stands where the folder should be
    cache.write("a", b"one")
    assert cache.read("a") is None
    monkeypatch.delenv("EDGEFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    assert cache.folder().is_relative_to(tmp_path / "home")
