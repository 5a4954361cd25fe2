"""SHA-256 of a bundle's files at each load, once a machine, and signatures with a key that the app pins."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from conftest import require

from edgeformer import load
from edgeformer.bundle import integrity
from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.bundle.write import check_target, write_bundle
from edgeformer.errors import BundleError, EdgeformerError, InputError


def flip(path, at=1000):
    """Another byte at `at`; the times of the file are those before."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed."""
    seen, whole = [], integrity.hash_problems
    monkeypatch.setattr(
        integrity, "hash_problems", lambda f, files, stop=None: seen.extend(files) or whole(f, files, stop)
    )
    return seen


@pytest.fixture(params=["before the load", "beside it"])
def small(request, monkeypatch):
    """The bundles of the tests count as small ones, or as large ones."""
    monkeypatch.setattr(integrity, "SMALL", 1 << 30 if request.param == "before the load" else 0)


def test_a_bundle_is_hashed_at_its_first_load_and_after_a_change(lm, copy_of, cache_folder, hashed, small):
    copy = copy_of(lm)
    load(copy, "cpu")
    assert "model.onnx.data" in hashed
    hashed.clear()
    load(copy, "cpu")
    assert not hashed
    flip(copy / "model.onnx.data")  # the time of its content is as before, that of its inode cannot be
    with pytest.raises(BundleError, match=r"model\.onnx\.data has the right size but other content.*SHA-256"):
        load(copy, "cpu")
    with pytest.raises(BundleError, match="other content"):  # and again: a failure is not remembered
        load(copy, "cpu")


def test_another_copy_is_hashed_for_itself(lm, tmp_path, cache_folder, hashed):
    for name in ("one", "two"):
        shutil.copytree(lm, tmp_path / name)
        load(tmp_path / name, "cpu")
        assert hashed
        hashed.clear()


def test_a_wrong_hash_is_named_where_the_engine_fails_too(lm, copy_of, small):
    damaged = copy_of(lm)
    data = (damaged / "model.onnx").read_bytes().replace(b"RMSNormalization", b"RMSNormalizatiox")
    (damaged / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError):
        load(damaged, "native")


def test_files_that_change_during_a_load_are_refused(lm, copy_of, monkeypatch, small):
    copy, whole = copy_of(lm), integrity.hash_problems

    def slow(folder, files, stop=None):
        found = whole(folder, files, stop)
        (folder / "model.onnx.data").touch()
        return found

    monkeypatch.setattr(integrity, "hash_problems", slow)
    with pytest.raises(BundleError, match="changed while they were read"):
        load(copy, "cpu")


def test_ctrl_c_does_not_wait_for_the_hashes(lm, monkeypatch):
    def endless(folder, files, stop):
        stop.wait(60)
        return []

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(integrity, "SMALL", 0)
    monkeypatch.setattr(integrity, "hash_problems", endless)
    monkeypatch.setattr("edgeformer.model.choose", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        load(lm, "cpu")
    assert time.monotonic() - began < 30  # half of what `endless` would take


# ----------------------------------------------------------------------------------------------------------- signatures


@pytest.fixture
def signing():
    require("cryptography", "pip install cryptography")
    from edgeformer.bundle import signing

    return signing


@pytest.fixture
def signed(signing, lm, copy_of, tmp_path):
    """(a signed copy of a bundle, its public key)."""
    copy = copy_of(lm)
    public = signing.make_key(tmp_path / "key.pem")
    signing.sign_bundle(copy, (tmp_path / "key.pem").read_bytes())
    return copy, public


def test_a_signed_bundle_opens_with_its_key_and_without(signed):
    copy, public = signed
    assert load(Bundle.open(copy, public_key=public), "cpu").generate([5], max_new_tokens=1).ids
    Bundle.open(copy, check="hashes")
    check_target(copy, overwrite=True)  # the signature is a part of the bundle, not a file that would be lost


def test_another_key_wrote_it(signed, signing, tmp_path):
    copy, _ = signed
    other = signing.make_key(tmp_path / "other.pem")
    with pytest.raises(BundleError, match="not a signature of edgeformer"):
        Bundle.open(copy, public_key=other)


def test_a_bundle_without_a_signature_is_refused_where_a_key_is_pinned(lm, signed):
    with pytest.raises(BundleError, match=r"is not signed: it has no edgeformer\.sig"):
        Bundle.open(lm, public_key=signed[1])


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json", MANIFEST])
def test_a_change_of_any_file_breaks_the_signature(signed, name, reseal):
    copy, public = signed
    flip(copy / name, 20)
    with pytest.raises(BundleError):
        Bundle.open(copy, public_key=public)


def test_renewed_hashes_break_the_signature(signed, reseal):
    copy, public = signed
    flip(copy / "model.onnx.data")
    reseal(copy)  # what somebody does who changes the weights on the way
    Bundle.open(copy, check="hashes")
    with pytest.raises(BundleError, match="changed after it was signed"):
        Bundle.open(copy, public_key=public)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 10_000])
def test_a_signature_of_another_size_is_refused(signed, size):
    copy, public = signed
    (copy / "edgeformer.sig").write_bytes(bytes(size))
    with pytest.raises(BundleError, match="not a signature"):
        Bundle.open(copy, public_key=public)


def test_a_signature_that_is_no_file_is_refused(signed):
    copy, public = signed
    (copy / "edgeformer.sig").unlink()
    os.mkfifo(copy / "edgeformer.sig")
    with pytest.raises(BundleError, match="not a plain file"):
        Bundle.open(copy, public_key=public)


@pytest.mark.parametrize("key", [b"", bytes(31), "0" * 64, None.__class__])
def test_a_public_key_of_another_form_is_refused(signed, key):
    with pytest.raises(InputError, match="expected 32"):
        Bundle.open(signed[0], public_key=key)


def test_private_keys_are_not_overwritten_and_their_own_owners(signed, signing, tmp_path):
    assert os.stat(tmp_path / "key.pem").st_mode & 0o077 == 0
    with pytest.raises(InputError, match="exists"):
        signing.make_key(tmp_path / "key.pem")
    for bad in (b"", b"x" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(InputError, match="cannot be read"):
            signing.sign_bundle(signed[0], bad)


def test_a_damaged_bundle_is_not_signed(signed, signing, tmp_path):
    flip(signed[0] / "model.onnx.data")
    with pytest.raises(BundleError, match="other content"):
        signing.sign_bundle(signed[0], (tmp_path / "key.pem").read_bytes())


def test_the_command_makes_a_key_signs_and_checks(signing, lm, copy_of, tmp_path, capsys):
    copy, key = str(copy_of(lm)), str(tmp_path / "k.pem")
    assert signing.main(["key", key]) == 0
    public = capsys.readouterr().out.strip()
    assert signing.main(["sign", copy, key]) == 0
    assert signing.main(["check", copy, public]) == 0
    assert signing.main(["check", copy, "00" * 32]) == 1
    assert signing.main(["check", copy, "xyz"]) == 1
    assert signing.main([]) == 2


def test_the_message_without_cryptography_says_what_to_install(lm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(EdgeformerError, match="pip install "):
        Bundle.open(lm, public_key=bytes(32))


def test_a_written_bundle_replaces_a_signed_one(signed):
    copy, _ = signed
    files = {path.name: path.read_bytes() for path in copy.iterdir() if path.name not in (MANIFEST, "edgeformer.sig")}
    manifest = {k: v for k, v in Bundle.open(copy).manifest.items() if k != "files"}
    from edgeformer.bundle.write import seal

    with write_bundle(copy, overwrite=True) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        seal(folder, manifest)
    assert not (copy / "edgeformer.sig").exists()
