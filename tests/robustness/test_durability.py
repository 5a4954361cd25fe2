"""Writing a bundle on a full or read-only disk, beside another writer, and over one that a process has loaded.

Kills at every step are in tests/bundle/test_bundle_writing.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys

import pytest
from support import damage_study, tiny

from edgeformer import load
from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.write import seal, write_bundle
from edgeformer.errors import BundleError

IDS = [5, 40, 17, 88]


def tokens(path, engine="native"):
    return load(path, engine, threads=1).generate(IDS, max_new_tokens=6, ignore_eos=True).ids


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_a_loaded_model_goes_on_while_its_bundle_is_replaced(tmp_path, lm, engine):
    path = shutil.copytree(lm, tmp_path / "b")
    model = load(path, engine, threads=1)
    before = model.generate(IDS, max_new_tokens=6, ignore_eos=True).ids
    other = tiny.write_lm(tmp_path / "other", seed=1)
    with write_bundle(path, overwrite=True) as folder:
        for name in Bundle.open(other).manifest["files"]:
            shutil.copyfile(other / name, folder / name)
        seal(folder, {k: v for k, v in Bundle.open(other).manifest.items() if k != "files"})
    for _ in range(3):
        assert model.generate(IDS, max_new_tokens=6, ignore_eos=True).ids == before
    assert tokens(path, engine) == tokens(other, engine)


def test_a_packed_model_reads_nothing_of_files_that_are_cut_later(tmp_path, q8):
    """A cut mapped file ends a process that reads it (SIGBUS). The native engine has packed the weights by then."""
    path = shutil.copytree(q8, tmp_path / "b")
    script = (
        "import os, sys\n"
        "from edgeformer import load\n"
        "model = load(sys.argv[1], 'native', threads=1)\n"
        "ids = model.generate([5, 40, 17], max_new_tokens=4, ignore_eos=True).ids\n"
        "os.truncate(sys.argv[1] + '/model.onnx.data', 0)\n"
        "assert model.generate([5, 40, 17], max_new_tokens=4, ignore_eos=True).ids == ids\n"
    )
    env = {**os.environ, "PYTHONPATH": str(damage_study.ROOT), "EDGEFORMER_CACHE": ""}
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=env, timeout=600)


FULL = """
import resource, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from support import tiny
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    tiny.write_lm(sys.argv[2])
except OSError as error:
    sys.exit(3 if error.errno == 27 else 4)  # EFBIG
except Exception as error:
    sys.exit(3 if "27" in str(error) or "large" in str(error) or "write" in str(error) else str(error))
"""


@pytest.mark.parametrize("size", [0, 300, 5_000, 50_000])
def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path, size):
    """The limit on the size of files stands for a full disk: write(2) fails after some bytes."""
    command = [sys.executable, "-c", FULL, str(damage_study.ROOT), str(tmp_path / "b"), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3, (done.returncode, done.stderr[-2000:])
    assert not (tmp_path / "b").exists()
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_target_that_cannot_be_written_to_is_an_oserror(tmp_path, monkeypatch):
    refused = pytest.raises(OSError, match=r"Read-only file system|Permission denied|Not a directory|No such")
    with refused, write_bundle("/proc/edgeformer/b"):
        raise AssertionError("the block must not run")


def test_two_writers_to_one_path_leave_one_whole_bundle(tmp_path):
    script = (
        "import sys\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\n"
        "from support import tiny\n"
        "from edgeformer.errors import BundleError\n"
        "try:\n"
        "    tiny.write_lm(sys.argv[2], seed=int(sys.argv[3]))\n"
        "except BundleError as error:\n"
        "    sys.exit(3 if 'already exists' in str(error) else str(error))\n"
    )
    command = [sys.executable, "-c", script, str(damage_study.ROOT), str(tmp_path / "b")]
    writers = [subprocess.Popen([*command, str(seed)]) for seed in (0, 1)]
    codes = sorted(writer.wait(600) for writer in writers)
    assert codes in ([0, 3], [3, 0])
    Bundle.open(tmp_path / "b", check="hashes")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_damaged_copy_in_the_target_is_replaced_only_if_it_is_a_bundle(tmp_path, lm):
    path = shutil.copytree(lm, tmp_path / "b")
    (path / "edgeformer.json").write_text("{")
    with pytest.raises(BundleError, match="not replaced"), write_bundle(path, overwrite=True):
        raise AssertionError("the block must not run")
    assert (path / "model.onnx").exists()
