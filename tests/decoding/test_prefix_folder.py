"""The prefix cache on disk: other engines and processes find it, and what is damaged is removed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from support.tiny import logits

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer import disk_cache
from edgeformer.bundle.bundle import Bundle
from edgeformer.decoding.prefix_cache import PrefixCache
from edgeformer.decoding.prefix_folder import PrefixFolder
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.options import NativeOptions
from edgeformer.errors import InputError

IDS = np.random.default_rng(11).integers(0, 90, 255).tolist()  # a full chunk and a part of one
LIMIT = 1 << 30


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "prefixes"
    disk_cache.finish()


def engine_of(bundle, **options):
    return NativeEngine.from_bundle(bundle, threads=1, **options)


def fill(engine, folder, ids=IDS, limit=LIMIT):
    """Runs a prompt and keeps it in `folder`."""
    state = engine.new_state()
    logits(engine, np.array([ids]), state)
    PrefixCache(LIMIT, PrefixFolder(engine, folder, limit)).insert(ids, state)
    disk_cache.finish()


def found(engine, folder, ids=IDS):
    """(state, tokens) that a new cache has from the folder alone."""
    return PrefixCache(LIMIT, PrefixFolder(engine, folder)).match(ids, engine.new_state)


@pytest.mark.parametrize("kv", ["int8", "float32"])
@pytest.mark.parametrize("isa", native.isas())
def test_an_engine_of_any_isa_goes_on_from_the_folder(q8, folder, kv, isa):
    fill(engine_of(q8, kv=kv, isa=native.isas()[0]), folder)
    engine = engine_of(q8, kv=kv, isa=isa)
    state, length = found(engine, folder)
    assert length == 128
    whole = logits(engine, np.array([IDS]))
    np.testing.assert_array_equal(logits(engine, np.array([IDS[128:]]), state), whole[:, 128:])


def test_another_process_goes_on_from_the_folder(q8, folder):
    code = textwrap.dedent(f"""
        import numpy as np
        from pathlib import Path
        from edgeformer.decoding.prefix_cache import PrefixCache
        from edgeformer.decoding.prefix_folder import PrefixFolder
        from edgeformer.engines.native.engine import NativeEngine
        engine = NativeEngine.from_bundle({str(q8)!r}, threads=1)
        state = engine.new_state()
        engine.forward([({{"input_ids": np.array([{IDS}])}}, state)])
        PrefixCache(1 << 30, PrefixFolder(engine, Path({str(folder)!r}))).insert({IDS}, state)
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)  # its end waits for the writer
    assert found(engine_of(q8), folder)[1] == 128


def test_a_longer_prompt_of_another_beginning_finds_nothing(q8, folder):
    engine = engine_of(q8)
    fill(engine, folder)
    assert found(engine, folder, [*IDS[1:], 5])[1] == 0
    assert found(engine, folder, IDS[:100])[1] == 0


def test_files_of_other_models_and_types_are_not_taken(q8, lm, folder):
    fill(engine_of(q8, kv="int8"), folder)
    mixed = NativeEngine.create(q8, "model", 1, NativeOptions(kv="int8", float32_layers=(1,)))
    for other in (engine_of(q8, kv="float32"), engine_of(lm, kv="int8"), mixed):
        assert found(other, folder)[1] == 0
    assert found(engine_of(q8, kv="int8"), folder)[1] == 128


def test_what_came_from_the_folder_obeys_the_limit_in_memory(q8, folder):
    engine = engine_of(q8)
    fill(engine, folder)
    cache = PrefixCache(1, PrefixFolder(engine, folder))
    assert cache.match(IDS, engine.new_state)[1] == 128
    assert cache.nbytes == 0


DAMAGE = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "empty": lambda data: b"",
    "a changed bit": lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:],
    "another format": lambda data: b"efprefx0" + data[8:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_ignored_and_removed(q8, folder, name):
    engine = engine_of(q8)
    fill(engine, folder)
    [path] = folder.glob("*.kv")
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    assert found(engine, folder)[1] == 0
    assert not path.exists()
    fill(engine, folder)
    assert found(engine, folder)[1] == 128


def test_a_file_under_another_name_is_ignored_and_removed(q8, folder):
    engine = engine_of(q8)
    fill(engine, folder)
    [path] = folder.glob("*.kv")
    other = [*IDS[1:], 5]
    key = PrefixFolder(engine, folder)
    wrong = folder / (key.key(key.root, other[:128]) + ".kv")
    path.rename(wrong)
    assert found(engine, folder, other)[1] == 0
    assert not wrong.exists()


def test_the_least_recently_used_files_go_first(q8, folder):
    engine = engine_of(q8)
    prompts = [[n, *IDS[1:]] for n in range(4)]
    fill(engine, folder, prompts[0])
    [one] = folder.glob("*.kv")
    limit = 3 * one.stat().st_size
    for prompt in prompts[1:3]:
        fill(engine, folder, prompt, limit)
    for age, path in enumerate(sorted(folder.glob("*.kv"), key=os.path.getmtime, reverse=True)):
        os.utime(path, (time.time() - 100 * (age + 1),) * 2)
    assert found(engine, folder, prompts[0])[1] == 128  # now the most recent one
    stranger, stale, fresh = folder / "notes.txt", folder / f"{'0' * 64}.kv.1-aa.partial", folder / "1.kv.2-bb.partial"
    for path in (stranger, stale, fresh):
        path.write_bytes(bytes(limit))
    os.utime(stale, (1, 1))
    os.utime(stranger, (1, 1))
    fill(engine, folder, prompts[3], limit)
    assert [found(engine, folder, prompt)[1] for prompt in prompts] == [128, 0, 128, 128]
    assert stranger.exists()
    assert fresh.exists()
    assert not stale.exists()


def test_the_limit_holds_and_the_folder_is_not_read_at_every_write(q8, folder, monkeypatch):
    """The soak found it: each write listed all files, so a folder with thousands of them took time and memory."""
    engine, looks, scandir = engine_of(q8), [], os.scandir
    state = engine.new_state()
    logits(engine, np.array([IDS]), state)
    [chunk] = state.chunks()
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or scandir(path))

    def write(place, count):
        for number in range(count):
            place.write([(place.key(place.root, [number]), chunk)])
            disk_cache.finish()
            yield sum((folder / name).stat().st_size for name in os.listdir(folder))

    roomy = PrefixFolder(engine, folder, LIMIT)
    [*_, size] = write(roomy, 40)
    assert looks.count(folder) == 1
    tight = PrefixFolder(engine, folder, size // 8)  # five files
    assert max(write(tight, 60)) <= size // 8
    assert 3 <= len(list(folder.glob("*.kv"))) <= 5


def test_a_folder_that_cannot_be_written_stores_nothing(q8, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    engine = engine_of(q8)
    fill(engine, file)
    assert found(engine, file)[1] == 0
    assert file.read_text() == ""


def test_the_folder_is_refused(lm, q8, cache_folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    from edgeformer.engines.onnxruntime import OrtEngine

    with pytest.raises(InputError, match="needs engine='native', this one is 'cpu'"):
        PrefixFolder(OrtEngine(Bundle.open(lm), threads=1))
    engine = engine_of(q8)
    assert PrefixFolder(engine).path == cache_folder / "prefixes"
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    with pytest.raises(InputError, match="disabled"):
        PrefixFolder(engine)
