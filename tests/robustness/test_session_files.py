"""Files of sessions and of the prefix cache: kills and disk errors at each step, damage, other models and engines."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support import damage_study, faults, tiny

pytest.importorskip("edgeformer._native", reason="the native extension is not built")
from edgeformer import disk_cache, load
from edgeformer.decoding.prefix_cache import PrefixCache
from edgeformer.decoding.prefix_folder import PrefixFolder
from edgeformer.decoding.session_file import MAGIC
from edgeformer.errors import EngineUnavailable, InputError, StateError

IDS = [5, 40, 17, 88]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
REFUSED = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]
LONG = [3 + i % 300 for i in range(200)]  # a full chunk of the cache and a part of one


def talk(model, session, ids, n=6):
    return ids + model.generate(ids, max_new_tokens=n, ignore_eos=True, session=session).ids


@pytest.fixture(scope="module")
def model(q8):
    return load(q8, "native", threads=1)


@pytest.fixture
def saved(model, tmp_path):
    """(path of a saved session, its ids, the ids after one more turn)."""
    session = model.session()
    ids = talk(model, session, LONG)
    session.save(tmp_path / "s")
    return tmp_path / "s", ids, talk(model, session, [*ids, 9])


def test_another_process_goes_on_from_the_file_with_the_same_tokens(model, q8, saved):
    path, ids, after = saved
    session = model.session(path)
    assert session.state.length >= len(ids) - 1
    assert talk(model, session, [*ids, 9]) == after
    code = (
        "import sys; from edgeformer import load; model = load(sys.argv[1], 'native', threads=2)\n"
        f"ids = {[*ids, 9]}\n"
        "session = model.session(sys.argv[2])\n"
        "print(ids + model.generate(ids, max_new_tokens=6, ignore_eos=True, session=session).ids)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(q8), str(path)], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == str(after), done.stderr[-2000:]


DAMAGE = {
    "empty": (lambda data: b"", "not a saved session"),
    "a page of HTML": (lambda data: b"<html>", "not a saved session"),
    "cut": (lambda data: data[:-1], "damaged"),
    "cut in its head": (lambda data: data[: len(MAGIC) + 3], "damaged"),
    "longer": (lambda data: data + b"x", "damaged"),
    "a changed bit": (lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:], "damaged"),
    "an older format": (lambda data: data.replace(b"session 1", b"session 0", 1), "not a saved session"),
    "2^63 ids": (lambda data: renewed((1 << 63).to_bytes(8, "little")), "token ids"),
    "no state": (lambda data: renewed(bytes(8)), "not a saved state"),
}


def renewed(body):
    return MAGIC + hashlib.sha256(body).digest() + body


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(model, saved, name):
    path, change = saved[0], DAMAGE[name]
    path.write_bytes(change[0](path.read_bytes()))
    with pytest.raises(StateError, match=change[1]):
        model.session(path)


def test_what_is_no_file_is_refused_without_waiting(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(StateError, match="is no file"):
            model.session(path)
    for path in (tmp_path / "none", "", "a\0b"):
        with pytest.raises(StateError, match=r"cannot be read: (No such file|embedded null)|is no file"):
            model.session(path)


@pytest.mark.parametrize("path", [5, b"x", True, ["x"]], ids=repr)
def test_what_is_no_path_is_refused(model, path):
    for call in (model.session, model.session().save):
        with pytest.raises(InputError, match="expected the path"):
            call(path)


def test_another_model_cache_type_or_engine_refuses_it(q8, lm, saved):
    for other in (load(lm, "native", threads=1), load(q8, "native", threads=1, kv="float32")):
        with pytest.raises(StateError):
            other.session(saved[0])
    cpu = load(q8, "cpu", threads=1)
    with pytest.raises(EngineUnavailable, match="native"):
        cpu.session(saved[0])
    with pytest.raises(EngineUnavailable, match="native"):
        cpu.session().save(saved[0])


@FORKS
@pytest.mark.parametrize("exists", [False, True])
def test_after_a_kill_at_any_step_the_old_or_the_new_session_is_whole(model, tmp_path, exists):
    old, new = model.session(), model.session()
    texts = [talk(model, old, IDS), talk(model, new, LONG)]
    kinds = {len(texts[0]): "old", len(texts[1]): "new"}
    seen, leftovers = set(), 0
    for step in range(1, 40):
        path = tmp_path / str(step) / "s"
        path.parent.mkdir()
        if exists:
            old.save(path)
        code = faults.killed_at(step, lambda path=path: new.save(path))
        assert code in (0, 9)
        if exists or path.exists():
            restored = model.session(path)
            seen.add(kinds[len(restored.ids) + 1])  # the last token has not run
            assert talk(model, restored, [*texts[0], 9]) == talk(model, model.session(), [*texts[0], 9])
        leftovers += len(os.listdir(path.parent)) - path.exists()
        if code == 0:
            break
        old.save(path)  # works in spite of the leftovers, and removes them
        assert os.listdir(path.parent) == ["s"]
        assert len(model.session(path).ids) == len(old.ids)
    assert code == 0 and step > 4 and leftovers > 1
    assert seen == ({"old", "new"} if exists else {"new"})


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
def test_a_disk_that_refuses_leaves_the_old_session_and_nothing_else(model, tmp_path, number):
    old, new = model.session(), model.session()
    talk(model, old, IDS)
    talk(model, new, LONG)
    path, said = tmp_path / "s", []
    for step in range(1, 40):
        old.save(path)
        before = path.read_bytes()
        with faults.Steps(step, faults.refusing(number), ("fsync", "replace")) as steps:
            try:
                new.save(path)
            except StateError as error:
                said.append(str(error))
        assert os.listdir(tmp_path) == ["s"]
        if steps.count < step:
            break
        # The rename has happened where only the folder's fsync fails.
        assert path.read_bytes() == before or len(model.session(path).ids) == len(new.ids)
    assert len(said) > 3 and all(os.strerror(number) in one and "unchanged" in one for one in said)
    assert new.state.length  # the session in memory goes on
    new.save(path)
    assert len(model.session(path).ids) == len(new.ids)


@FORKS
def test_the_faults_find_a_writer_that_writes_in_place(tmp_path):
    path, found = tmp_path / "s", set()
    for step in range(1, 9):
        path.write_bytes(b"old" * 100)
        code = faults.killed_at(step, lambda: path.write_bytes(b"newer" * 100))
        found.add(path.read_bytes())
        if code == 0:
            break
    assert code == 0 and found > {b"old" * 100, b"newer" * 100}  # and something that is neither


def test_a_target_that_is_no_folder_or_takes_nothing_is_a_state_error(model, tmp_path):
    for path in (tmp_path / "none" / "s", "/proc/edgeformer", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(StateError, match="cannot be written"):
            model.session().save(path)
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_written_whole_is_an_error(model, q8, tmp_path):
    """The limit on the size of files stands for a full disk: write(2) itself fails after some bytes."""
    code = (
        "import resource, signal, sys; from edgeformer import load\n"
        "from edgeformer.errors import StateError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "session = load(sys.argv[1], 'native', threads=1).session()\n"
        "session.save(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try:\n    session.save(sys.argv[2])\n"
        "except StateError as error:\n    sys.exit(3 if 'File too large' in str(error) else str(error))\n"
    )
    env = {**os.environ, "EDGEFORMER_CACHE": ""}
    command = [sys.executable, "-c", code, str(q8), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 3, done.stderr[-2000:]
    assert os.listdir(tmp_path) == ["s"]
    assert model.session(tmp_path / "s").ids == []


def test_a_running_writer_keeps_its_file_and_links_and_permissions_stay(model, tmp_path):
    session, real = model.session(), tmp_path / "deep" / "s"
    real.parent.mkdir()
    session.save(real)
    os.chmod(real, 0o600)
    (tmp_path / "link").symlink_to(real)
    found = []

    def meanwhile():  # between the fsync and the rename
        session.save(real)
        found.extend(os.listdir(real.parent))

    with faults.Steps(4, meanwhile, ("fsync", "replace")):
        session.save(tmp_path / "link")
    assert len(found) == 2  # the file and the other writer's part
    assert (tmp_path / "link").is_symlink() and os.listdir(real.parent) == ["s"]
    assert os.stat(real).st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------- the prefix cache on disk


@pytest.fixture
def prompt_state(model):
    state = model.engine.new_state()
    tiny.logits(model.engine, np.array([LONG]), state)
    yield state
    disk_cache.finish()


def keep(model, folder, state):
    PrefixCache(1 << 30, PrefixFolder(model.engine, folder)).insert(LONG, state)
    disk_cache.finish()


def kept(model, folder):
    return PrefixCache(1 << 30, PrefixFolder(model.engine, folder)).match(LONG, model.engine.new_state)


@FORKS
def test_after_a_kill_at_any_step_the_prefix_folder_has_a_whole_file_or_none(model, prompt_state, tmp_path):
    expected = tiny.logits(model.engine, np.array([LONG[128:]]), kept_state(model, prompt_state, tmp_path / "whole"))
    seen, leftovers = set(), 0
    for step in range(1, 40):
        folder = tmp_path / str(step)
        code = faults.killed_at(step, lambda folder=folder: keep(model, folder, prompt_state))
        assert code in (0, 9)
        state, length = kept(model, folder)
        seen.add(length)
        if length:
            assert np.array_equal(tiny.logits(model.engine, np.array([LONG[128:]]), state), expected)
        partial = list(folder.glob("*.partial"))
        leftovers += len(partial)
        for path in partial:  # an hour later
            os.utime(path, (1, 1))
        shutil.rmtree(folder / "x", ignore_errors=True)
        keep(model, folder, prompt_state)
        assert kept(model, folder)[1] == 128
        if code == 0:
            break
        other = PrefixFolder(model.engine, folder)
        other.write([(other.key(other.root, [1] * 128), prompt_state.chunks()[0])])
        disk_cache.finish()
        assert not list(folder.glob("*.partial"))
    assert code == 0 and step > 3 and leftovers > 0 and seen == {0, 128}


def kept_state(model, state, folder):
    keep(model, folder, state)
    return kept(model, folder)[0]


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
def test_a_disk_that_refuses_costs_the_prefix_folder_one_file_and_the_model_nothing(
    model, prompt_state, tmp_path, number
):
    refused = 0
    for step in range(1, 40):
        folder = tmp_path / str(step)
        with faults.Steps(step, faults.refusing(number), ("mkdir", "replace")) as steps:
            keep(model, folder, prompt_state)
        left = os.listdir(folder) if folder.exists() else []
        assert not any(name.endswith(".partial") for name in left)
        if steps.count < step:
            break
        refused += not left
    assert refused > 2 and steps.count < step
    assert kept(model, folder)[1] == 128


def test_a_process_that_ends_with_status_0_wrote_no_error(q8, tmp_path):
    """A folder that cannot be written to is no reason to fail: the cache is one."""
    code = (
        "import sys; from edgeformer import load\n"
        "model = load(sys.argv[1], 'native', threads=1, prefix_cache='/proc/edgeformer/prefixes')\n"
        f"print(model.generate({LONG}, max_new_tokens=2, ignore_eos=True).ids)"
    )
    env = {**os.environ, "PYTHONPATH": str(damage_study.ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(q8)], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
