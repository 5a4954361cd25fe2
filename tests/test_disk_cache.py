"""The cache folder: entries come back as they were, damaged ones do not, and the folder stays within bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from threading import Event

import numpy as np
import pytest

from edgeformer import disk_cache


def test_entries(cache_folder):
    assert disk_cache.read("a") is None
    disk_cache.write("a", b"one")
    assert disk_cache.read("a") == b"one"
    disk_cache.write("a", b"")
    assert disk_cache.read("a") == b""
    assert os.listdir(cache_folder) == ["a"]
    assert disk_cache.key(b"ab", b"c") != disk_cache.key(b"a", b"bc")


def test_the_longest_unused_entries_go(cache_folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "MAX_ENTRIES", 2)
    for age, name in enumerate(("a", "b", "c")):
        disk_cache.write(name, name.encode())
        os.utime(cache_folder / name, (1000 + age, 1000 + age))
        assert name != "b" or disk_cache.read("a") == b"a"  # used again: now the newest
    assert sorted(os.listdir(cache_folder)) == ["a", "c"]


def test_no_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    disk_cache.write("a", b"one")
    assert disk_cache.folder() is None and disk_cache.read("a") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path / "file"))  # a file stands where the folder should be
    disk_cache.write("a", b"one")
    assert disk_cache.read("a") is None
    monkeypatch.delenv("EDGEFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    assert disk_cache.folder().is_relative_to(tmp_path / "home")


LARGE = np.random.default_rng(7).integers(0, 256, 3 * disk_cache._STEP + 5, np.uint8)


def keep(name, data, note=b"note"):
    disk_cache.write_behind(name, data, note)
    disk_cache.finish()


@pytest.mark.parametrize("data", [LARGE, LARGE[:5000], LARGE[:1]], ids=lambda data: str(len(data)))
def test_large_entries_are_mapped(cache_folder, data):
    assert disk_cache.read_mapped("a") is None
    keep("a", data, b"about it")
    found, note = disk_cache.read_mapped("a")
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.ctypes.data % 64 == 0
    np.testing.assert_array_equal(found, data)
    assert note == b"about it"
    keep("a", data[::-1].copy(), b"")
    np.testing.assert_array_equal(found, data)  # the mapped file is the old one
    np.testing.assert_array_equal(disk_cache.read_mapped("a")[0], data[::-1])
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
        lambda entry: entry[: disk_cache._STEP] + bytes(1 << 20) + entry[disk_cache._STEP + (1 << 20) :],
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
    assert disk_cache.read_mapped("a") is None
    keep("a", LARGE)
    assert disk_cache.read_mapped("a") is not None


def test_the_folder_takes_a_share_of_the_disk(cache_folder, monkeypatch):
    """Large entries go, the longest unused first; small ones make no room."""

    class Usage:
        @property
        def free(self):
            return disk_cache.DISK_DIVISOR * 25_000 - disk_cache.size()[1]

    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda place: Usage())
    monkeypatch.setattr(disk_cache, "SMALL", 1000)
    keep("too large", LARGE[:25_000])
    assert disk_cache.size() == (0, 0)
    disk_cache.write("small", b"oldest of all")
    os.utime(cache_folder / "small", (1, 1))
    for age, name in enumerate(("a", "b", "c")):
        keep(name, LARGE[:10_000])
        os.utime(cache_folder / name, (1000 + age, 1000 + age))
        assert name != "b" or disk_cache.read_mapped("a") is not None  # used again: now the newest
    assert sorted(os.listdir(cache_folder)) == ["a", "c", "small"]


def test_a_process_that_ends_leaves_nothing_half_written(cache_folder, monkeypatch):
    ending = Event()
    ending.set()
    monkeypatch.setattr(disk_cache, "_ending", ending)
    keep("a", LARGE)
    assert os.listdir(cache_folder) == []


def test_a_process_finishes_what_it_keeps(cache_folder):
    code = (
        "import numpy as np\n"
        "from edgeformer import disk_cache\n"
        "disk_cache.write_behind('a', np.arange(1 << 24, dtype=np.uint8), b'')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert len(disk_cache.read_mapped("a")[0]) == 1 << 24


def test_no_folder_keeps_nothing_large(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    keep("a", LARGE)
    assert disk_cache.read_mapped("a") is None and disk_cache.size() == (0, 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path / "file"))
    keep("a", LARGE)
    assert disk_cache.read_mapped("a") is None
