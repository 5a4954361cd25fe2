"""A folder is gone when `remove_folder` returns, and nothing of it stays open."""

from __future__ import annotations

import _thread
import os
import threading
import time

import pytest

from edgeformer import files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows does not delete an open file")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two large files, one in a folder, and a small one."""
    monkeypatch.setattr(files, "_LARGE", 1 << 10)
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    for name, size in (("large", 1 << 12), ("inner/large", 1 << 10), ("small", 1)):
        (path / name).write_bytes(bytes(size))
    return path


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_large_files_lose_their_names_before_a_thread_frees_them(folder, monkeypatch):
    may_close, closed, close = threading.Event(), [], files._close

    def close_late(opened):
        may_close.wait(10)
        closed.append(len(opened))
        close(opened)

    monkeypatch.setattr(files, "_close", close_late)
    before = open_files()
    files.remove_folder(folder)
    assert not folder.exists() and not closed and open_files() == before + 2
    may_close.set()
    end = time.monotonic() + 10
    while open_files() > before:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert closed == [2]


def test_where_no_thread_can_be_started_the_caller_closes_them(folder, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    before = open_files()
    files.remove_folder(folder)
    assert not folder.exists() and open_files() == before


def test_a_system_that_keeps_the_names_of_open_files(folder, monkeypatch):
    """NFS: a folder is not empty before its deleted files are closed."""
    before, rmdir = open_files(), os.rmdir

    def refuse(path):
        if open_files() > before:
            raise OSError(39, "Directory not empty")
        rmdir(path)

    monkeypatch.setattr(files.os, "rmdir", refuse)
    files.remove_folder(folder)
    assert not folder.exists() and open_files() == before


def test_a_link_to_a_large_file_is_removed_and_the_file_stays(folder, tmp_path):
    kept = tmp_path / "kept"
    kept.write_bytes(bytes(1 << 12))
    (folder / "link").symlink_to(kept)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    files.remove_folder(folder)
    assert not folder.exists() and kept.stat().st_size == 1 << 12
