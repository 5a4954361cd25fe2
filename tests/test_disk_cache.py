"""The disk cache: entries are read as they were written, damaged ones count as missing, the folder keeps its limits."""

from __future__ import annotations

import os
import subprocess
import sys
from threading import Event

import numpy as np
import pytest

from edgeformer import disk_cache


def test_an_entry_is_read_as_it_was_written(cache_folder):
    assert disk_cache.read("a") is None
    disk_cache.write("a", b"one")
    assert disk_cache.read("a") == b"one"
    disk_cache.write("a", b"")
    assert disk_cache.read("a") == b""
    assert os.listdir(cache_folder) == ["a"]
    assert disk_cache.key(b"ab", b"c") != disk_cache.key(b"a", b"bc")


def test_the_least_recently_used_entries_are_deleted(cache_folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "MAX_ENTRIES", 2)
    for age, name in enumerate(("a", "b", "c")):
        disk_cache.write(name, name.encode())
        os.utime(cache_folder / name, (1000 + age, 1000 + age))
        assert name != "b" or disk_cache.read("a") == b"a"  # this read makes it the most recently used
    assert sorted(os.listdir(cache_folder)) == ["a", "c"]


def test_without_a_usable_folder_nothing_is_stored_and_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    disk_cache.write("a", b"one")
    assert disk_cache.folder() is None and disk_cache.read("a") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path / "file"))  # a file, not a folder
    disk_cache.write("a", b"one")
    assert disk_cache.read("a") is None
    monkeypatch.delenv("EDGEFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    assert disk_cache.folder().is_relative_to(tmp_path / "home")


LARGE = np.random.default_rng(7).integers(0, 256, 3 * disk_cache._STEP + 5, np.uint8)


def store_large(name, data, note=b"note"):
    """Write an entry and wait for the background thread."""
    disk_cache.write_behind(name, data, note)
    disk_cache.finish()


@pytest.mark.parametrize("data", [LARGE, LARGE[:5000], LARGE[:1]], ids=lambda data: str(len(data)))
def test_large_entries_are_mapped(cache_folder, data):
    assert disk_cache.read_mapped("a") is None
    store_large("a", data, b"about it")
    found, note = disk_cache.read_mapped("a")
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.ctypes.data % 64 == 0
    np.testing.assert_array_equal(found, data)
    assert note == b"about it"
    store_large("a", data[::-1].copy(), b"")
    np.testing.assert_array_equal(found, data)  # the old file stays mapped
    np.testing.assert_array_equal(disk_cache.read_mapped("a")[0], data[::-1])
    assert os.listdir(cache_folder) == ["a"]


def flip_bit(at):
    """Damage: one bit of byte `at` changes."""

    def damage(entry):
        entry[at] ^= 1
        return entry

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[: len(entry) // 2],
        lambda entry: entry[:10],
        lambda entry: b"",
        lambda entry: entry + entry,
        lambda entry: entry[: disk_cache._STEP] + bytes(1 << 20) + entry[disk_cache._STEP + (1 << 20) :],
        flip_bit(0),
        flip_bit(-33),
        flip_bit(-43),
        flip_bit(-1),
    ],
    ids=["half", "10 bytes", "empty", "twice", "zeros inside", "first byte", "length", "note", "digest"],
)
def test_a_damaged_large_entry_counts_as_missing(cache_folder, damage):
    store_large("a", LARGE)
    path = cache_folder / "a"
    path.write_bytes(damage(bytearray(path.read_bytes())))
    assert disk_cache.read_mapped("a") is None
    store_large("a", LARGE)
    assert disk_cache.read_mapped("a") is not None


def test_the_folder_uses_a_limited_part_of_the_disk(cache_folder, monkeypatch):
    """Large entries are deleted to keep the limit, the least recently used first; small ones are not."""

    class Usage:
        @property
        def free(self):
            return disk_cache.DISK_DIVISOR * 25_000 - disk_cache.size()[1]

    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda place: Usage())
    monkeypatch.setattr(disk_cache, "SMALL", 1000)
    store_large("too large", LARGE[:25_000])
    assert disk_cache.size() == (0, 0)
    disk_cache.write("small", b"oldest of all")
    os.utime(cache_folder / "small", (1, 1))
    for age, name in enumerate(("a", "b", "c")):
        store_large(name, LARGE[:10_000])
        os.utime(cache_folder / name, (1000 + age, 1000 + age))
        assert name != "b" or disk_cache.read_mapped("a") is not None  # this read makes it the most recently used
    assert sorted(os.listdir(cache_folder)) == ["a", "c", "small"]


def test_an_ending_process_leaves_no_partial_entry(cache_folder, monkeypatch):
    ending = Event()
    ending.set()
    monkeypatch.setattr(disk_cache, "_ending", ending)
    store_large("a", LARGE)
    assert os.listdir(cache_folder) == []


def test_background_writes_finish_before_the_process_ends(cache_folder):
    code = (
        "import numpy as np\n"
        "from edgeformer import disk_cache\n"
        "disk_cache.write_behind('a', np.arange(1 << 24, dtype=np.uint8), b'')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert len(disk_cache.read_mapped("a")[0]) == 1 << 24


def test_without_a_usable_folder_no_large_entry_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORMER_CACHE", "")
    store_large("a", LARGE)
    assert disk_cache.read_mapped("a") is None and disk_cache.size() == (0, 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path / "file"))
    store_large("a", LARGE)
    assert disk_cache.read_mapped("a") is None
