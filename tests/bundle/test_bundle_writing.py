"""Writing a bundle is atomic: after exceptions, disk errors, kills at any step, and with two writers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from edgeformer.bundle import write as module
from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.bundle.write import seal, write_bundle
from edgeformer.errors import BundleError


def _fill(folder: Path, source: Path, marker: str) -> None:
    """Fill and seal the temporary folder as an exporter does: a copy of `source` marked with `marker`."""
    for file in source.iterdir():
        if file.name != MANIFEST:
            shutil.copy(file, folder)
    (folder / "generation_config.json").write_text(json.dumps({"marker": marker}))
    manifest = json.loads((source / MANIFEST).read_text())
    seal(folder, {key: value for key, value in manifest.items() if key != "files"})


def _marker(path: Path) -> str:
    return Bundle.open(path, check="hashes").generation_config["marker"]


def test_an_error_in_the_block_leaves_nothing(lm, tmp_path):
    def interrupted():
        with write_bundle(tmp_path / "b") as folder:
            _fill(folder, lm, "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_an_unsealed_folder_never_gets_the_final_name(lm, tmp_path):
    with pytest.raises(BundleError, match="has no edgeformer"), write_bundle(tmp_path / "b") as folder:
        shutil.copy(lm / "model.onnx", folder)
    assert os.listdir(tmp_path) == []


def test_a_file_changed_after_sealing_is_noticed(lm, tmp_path):
    def careless():
        with write_bundle(tmp_path / "b") as folder:
            _fill(folder, lm, "new")
            data = (folder / "model.onnx.data").read_bytes()
            (folder / "model.onnx.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(BundleError, match="other content"):
        careless()
    assert os.listdir(tmp_path) == []


def test_an_existing_path_is_refused_unless_overwrite_is_set(lm, tmp_path):
    target = tmp_path / "deep" / "b"
    with write_bundle(target) as folder:
        _fill(folder, lm, "old")
    with pytest.raises(BundleError, match="already exists"), write_bundle(target):
        pytest.fail("the block must not run")
    with write_bundle(target, overwrite=True) as folder:
        _fill(folder, lm, "new")
    assert _marker(target) == "new"
    assert os.listdir(target.parent) == ["b"]


def test_overwriting_never_deletes_files_that_are_not_part_of_a_bundle(lm, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="is a folder but not a bundle"), write_bundle(home, overwrite=True):
        pytest.fail("the block must not run")
    target = tmp_path / "b"
    with write_bundle(target) as folder:
        _fill(folder, lm, "old")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"would be lost: notes\.txt"), write_bundle(target, overwrite=True):
        pytest.fail("the block must not run")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BundleError, match="is a file"), write_bundle(file, overwrite=True):
        pytest.fail("the block must not run")
    assert (home / "thesis.tex").read_text() == "years of work"
    assert (target / "notes.txt").read_text() == "mine"


def test_a_link_to_a_bundle_stays_a_link(lm, tmp_path):
    with write_bundle(tmp_path / "disk" / "b") as folder:
        _fill(folder, lm, "old")
    os.symlink(tmp_path / "disk" / "b", tmp_path / "link")
    with write_bundle(tmp_path / "link", overwrite=True) as folder:
        assert folder.parent == tmp_path / "disk"
        _fill(folder, lm, "new")
    assert os.path.islink(tmp_path / "link")
    assert _marker(tmp_path / "disk" / "b") == "new"


def test_the_folder_has_the_users_permissions(lm, tmp_path):
    umask = os.umask(0o022)
    try:
        with write_bundle(tmp_path / "b") as folder:
            _fill(folder, lm, "new")
    finally:
        os.umask(umask)
    assert os.stat(tmp_path / "b").st_mode & 0o777 == 0o755


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("fault", ["fsync", "rename"])
def test_a_disk_error_leaves_the_old_bundle(lm, tmp_path, monkeypatch, exists, fault):
    target = tmp_path / "b"
    if exists:
        with write_bundle(target) as folder:
            _fill(folder, lm, "old")
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError(28, "No space left on device")

    def attempt():
        with write_bundle(target, overwrite=True) as folder:
            _fill(folder, lm, "new")
            monkeypatch.setattr(os, fault, refuse)
            monkeypatch.setattr(module, "_exchange", lambda one, other: False)

    with pytest.raises(OSError, match="No space left"):
        attempt()
    monkeypatch.undo()
    assert calls
    assert os.listdir(tmp_path) == (["b"] if exists else [])
    assert not exists or _marker(target) == "old"


STEPS = ("mkdir", "open", "fsync", "rename", "replace", "close")


def _killed_at(step: int, target: Path, source: Path, atomic: bool) -> int:
    """The exit code of a child process that writes to `target` and exits with 9 before its `step`-th system call."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    try:
        for name in STEPS:
            setattr(os, name, deadly(getattr(os, name)))
        shutil.rmtree = deadly(shutil.rmtree)
        module._exchange = deadly(module._exchange) if atomic else lambda one, other: False
        with write_bundle(target, overwrite=True) as folder:
            _fill(folder, source, "new")
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork and renameat2")
@pytest.mark.parametrize("exists", [False, True])
def test_after_a_kill_at_any_step_the_old_or_the_new_bundle_is_complete(lm, tmp_path, exists):
    seen = set()
    for step in range(1, 200):
        target = tmp_path / f"{step}" / "b"
        if exists:
            with write_bundle(target) as folder:
                _fill(folder, lm, "old")
        target.parent.mkdir(exist_ok=True)
        code = _killed_at(step, target, lm, atomic=True)
        assert code in (0, 9)
        if exists or target.exists():
            seen.add(_marker(target))
        if code == 0:
            break
        # The next writer works in spite of the leftovers, and removes them.
        with write_bundle(target, overwrite=True) as folder:
            _fill(folder, lm, "again")
        assert _marker(target) == "again"
        assert os.listdir(target.parent) == ["b"]
    else:
        pytest.fail("the writer never finished")
    assert step > 15
    assert seen == ({"old", "new"} if exists else {"new"})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork")
def test_a_kill_loses_nothing_if_folders_cannot_be_exchanged(lm, tmp_path):
    """Without renameat2 the final name is missing for a moment; the complete old bundle is then beside it."""
    for step in range(1, 200):
        target = tmp_path / f"{step}" / "b"
        with write_bundle(target) as folder:
            _fill(folder, lm, "old")
        code = _killed_at(step, target, lm, atomic=False)
        markers = set()
        for entry in target.parent.iterdir():
            if (entry / MANIFEST).exists():
                markers.add(_marker(entry))
        assert "old" in markers or _marker(target) == "new"
        if code == 0:
            assert step > 15
            return
        with write_bundle(target, overwrite=True) as folder:
            assert _marker(target) in ("old", "new")
            _fill(folder, lm, "again")
        assert os.listdir(target.parent) == ["b"]
    pytest.fail("the writer never finished")


def test_the_folder_of_a_running_writer_is_not_removed(lm, tmp_path):
    with write_bundle(tmp_path / "b") as first:
        _fill(first, lm, "first")
        with write_bundle(tmp_path / "b") as second:
            assert first.exists()
            _fill(second, lm, "second")
        assert first.exists()
        shutil.rmtree(tmp_path / "b")
    assert _marker(tmp_path / "b") == "first"


def test_the_second_of_two_writers_to_end_is_refused(lm, tmp_path):
    def late():
        with write_bundle(tmp_path / "b") as first:
            _fill(first, lm, "first")
            with write_bundle(tmp_path / "b") as second:
                _fill(second, lm, "second")

    with pytest.raises(BundleError, match="already exists"):
        late()
    assert _marker(tmp_path / "b") == "second"
    assert os.listdir(tmp_path) == ["b"]


def test_seal_refuses_folders_and_links(lm, tmp_path):
    (tmp_path / "inner").mkdir()
    os.symlink("/etc/passwd", tmp_path / "link")
    with pytest.raises(BundleError) as error:
        seal(tmp_path, {"task": "x"})
    assert "inner is not a plain file" in str(error.value)
    assert "link is not a plain file" in str(error.value)
    assert "graphs is missing" in str(error.value)
    assert not (tmp_path / MANIFEST).exists()


def test_seal_refuses_numbers_that_are_not_json(lm, copy_of):
    folder = copy_of(lm)
    manifest = json.loads((folder / MANIFEST).read_text())
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        seal(folder, {**manifest, "accuracy": {"perplexity": float("nan")}})
