"""The cache folder: entries come back as they were, damaged ones do not, and the folder stays within bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from threading import Event

import numpy as np
import pytest

from edgeformer import cache


def test_entries(cache_folder):
    assert cache.read("a") is None
    cache.write("a", b"one")
    assert cache.read("a") == b"one"
    cache.write("a", b"")
    assert cache.read("a") == b""
    assert os.listdir(cache_folder) == ["a"]
    assert cache.key(b"ab", b"c") != cache.key(b"a", b"bc")


def test_the_longest_unused_entries_go(cache_folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 2)
    for age, name in enumerate(("a", "b", "c")):
        cache.write(name, name.encode())
        os.utime(cache_folder / name, (1000 + age, 1000 + age))
        assert name != "b" or cache.read("a") == b"a"  # used again: now the newest
    assert sorted(os.listdir(cache_folder)) == ["a", "c"]


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


LARGE = np.random.default_rng(7).integers(0, 256, 3 * cache._STEP + 5, np.uint8)


def keep(name, data, note=b"note"):
    cache.write_behind(name, data, note)
    cache.finish()


@pytest.mark.parametrize("data", [LARGE, LARGE[:5000], LARGE[:1]], ids=lambda data: str(len(data)))
def test_large_entries_are_mapped(cache_folder, data):
    assert cache.read_mapped("a") is None
    keep("a", data, b"about it")
    found, note = cache.read_mapped("a")
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.ctypes.data % 64 == 0
    np.testing.assert_array_equal(found, data)
    assert note == b"about it"
    keep("a", data[::-1].copy(), b"")
    np.testing.assert_array_equal(found, data)  # the mapped file is the old one
    np.testing.assert_array_equal(cache.read_mapped("a")[0], data[::-1])
    assert os.listdir(cache_folder) == ["a"]


def turned(at):
    def turn(entry):
        entry[at] ^= 1
        return entry

    return turn


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[: len(entry) // 2],
        lambda entry: entry[:10],
        lambda entry: b"",
        lambda entry: entry + entry,
        lambda entry: entry[: cache._STEP] + bytes(1 << 20) + entry[cache._STEP + (1 << 20) :],  # as a crash leaves it
        turned(0),
        turned(-33),
        turned(-43),
        turned(-1),
    ],
    ids=["cut short", "only its end", "empty", "twice", "a hole", "first byte", "length", "note", "digest"],
)
def test_a_damaged_large_entry_is_none(cache_folder, damage):
    keep("a", LARGE)
    path = cache_folder / "a"
    path.write_bytes(damage(bytearray(path.read_bytes())))
    assert cache.read_mapped("a") is None
    keep("a", LARGE)
    assert cache.read_mapped("a") is not None


def test_the_folder_takes_a_share_of_the_disk(cache_folder, monkeypatch):
    """Large entries go, the longest unused first; small ones make no room."""

    class Usage:
        @property
        def free(self):
            return cache.SHARE * 25_000 - cache.size()[1]

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: Usage())
    monkeypatch.setattr(cache, "SMALL", 1000)
    keep("too large", LARGE[:25_000])
    assert cache.size() == (0, 0)
    cache.write("small", b"oldest of all")
    os.utime(cache_folder / "small", (1, 1))
    for age, name in enumerate(("a", "b", "c")):
        keep(name, LARGE[:10_000])
        os.utime(cache_folder / name, (1000 + age, 1000 + age))
        assert name != "b" or cache.read_mapped("a") is not None  # used again: now the newest
    assert sorted(os.listdir(cache_folder)) == ["a", "c", "small"]


def test_a_process_that_ends_leaves_nothing_half_written(cache_folder, monkeypatch):
    ending = Event()
    ending.set()
    monkeypatch.setattr(cache, "_ending", ending)
    keep("a", LARGE)
    assert os.listdir(cache_folder) == []


def test_a_process_finishes_what_it_keeps(cache_folder):
    code = (
        "import numpy as np\n"
        "from edgeformer import cache\n"
        "cache.write_behind('a', np.arange(1 << 24, dtype=np.uint8), b'')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert len(cache.read_mapped("a")[0]) == 1 << 24


def test_no_folder_keeps_nothing_large(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    keep("a", LARGE)
    assert cache.read_mapped("a") is None and cache.size() == (0, 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path / "file"))
    keep("a", LARGE)
    assert cache.read_mapped("a") is None
