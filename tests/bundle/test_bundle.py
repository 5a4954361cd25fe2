"""Opening a bundle: the fields it gives, and the errors for damaged or wrong files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import tiny

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import MANIFEST, MAX_JSON, plain_name
from edgeformer.errors import BundleError


def test_the_fields_of_an_opened_bundle(lm):
    bundle = Bundle.open(lm, check="hashes")
    assert bundle.task == "text-generation"
    assert bundle.graph_path() == lm / "model.onnx"
    assert bundle.context == tiny.POSITIONS
    assert bundle.vocab_size == bundle.config["vocab_size"]
    assert bundle.generation_config["eos_token_id"] == [0, 2]
    assert bundle.size == sum(f.stat().st_size for f in lm.iterdir() if f.name != MANIFEST)
    assert bundle.file("chat_template.jinja") is None
    with pytest.raises(BundleError, match="no graph 'decoder'; it has model"):
        bundle.graph_path("decoder")


def test_the_fingerprint_changes_with_any_file(lm, copy_of, reseal):
    before = Bundle.open(lm).fingerprint
    changed = copy_of(lm)
    (changed / "config.json").write_text(json.dumps({"vocab_size": 320, "max_position_embeddings": 99}))
    reseal(changed)
    assert Bundle.open(changed).fingerprint != before


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(format_version=2), "format_version is 2, this edgeformer reads 1; update"),
        (lambda m: m.update(format_version=0), "format_version is 0.*export the model again"),
        (lambda m: m.update(format_version=True), "format_version is True"),
        (lambda m: m.update(format="gguf"), "format is 'gguf', expected 'edgeformer'"),
        (lambda m: m.pop("task"), "task is missing"),
        (lambda m: m.update(task=""), "task is empty"),
        (lambda m: m.update(graphs={}), "graphs is empty"),
        (lambda m: m.update(graphs=[]), "graphs is a list, expected an object"),
        (lambda m: m["graphs"]["model"].update(file="x.onnx"), "'x.onnx', which is not in files"),
        (lambda m: m["graphs"]["model"]["inputs"]["input_ids"].update(shape=[1.5]), r"shape holds 1\.5"),
        (lambda m: m["graphs"]["model"]["inputs"].update(input_ids=3), "input_ids is 3, expected {dtype"),
        (lambda m: m["quantization"].update(scheme="q3"), "scheme is 'q3', expected one of q4a"),
        (lambda m: m["quantization"].update(block_size=True), "block_size is true or false"),
        (lambda m: m["quantization"].update(block_size=0), "block_size is 0"),
        (lambda m: m["files"]["config.json"].update(size=-1), "size is -1"),
        (lambda m: m["files"]["config.json"].update(size="1"), "size is text, expected a whole number"),
        (lambda m: m["files"]["config.json"].update(sha256="abc"), "sha256 is not 64 hex digits"),
        (lambda m: m["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}), "'../x', expected a plain file name"),
        (lambda m: m["reference"]["tolerance"].update(logits=-1), "tolerance.logits is -1"),
        (lambda m: m["reference"]["tolerance"].update(logits="1"), "tolerance.logits is '1'"),
        (lambda m: m["reference"].update(file="r.npz"), "reference.file is 'r.npz'"),
    ],
)
def test_a_wrong_manifest_is_refused(lm, copy_of, edit_manifest, change, expected):
    damaged = copy_of(lm)
    edit_manifest(damaged, change)
    with pytest.raises(BundleError, match=expected):
        Bundle.open(damaged)


def test_every_problem_is_in_one_message(lm, copy_of, edit_manifest):
    damaged = copy_of(lm)

    def change(manifest):
        del manifest["task"]
        manifest["quantization"]["scheme"] = 7
        manifest["files"]["config.json"]["size"] = -3

    edit_manifest(damaged, change)
    with pytest.raises(BundleError, match="3 problems") as error:
        Bundle.open(damaged)
    assert all(part in str(error.value) for part in ("task is missing", "scheme is a whole number", "size is -3"))


def test_every_damaged_file_is_in_one_message(lm, copy_of):
    damaged = copy_of(lm)
    (damaged / "config.json").unlink()
    with open(damaged / "model.onnx.data", "r+b") as file:
        file.truncate(100)
    with pytest.raises(BundleError) as error:
        Bundle.open(damaged)
    assert "config.json is missing" in str(error.value)
    assert "model.onnx.data holds 100 bytes" in str(error.value)
    assert "the copy is cut short" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("<!DOCTYPE html>", "not valid JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"format": "edgeformer", "format": "edgeformer"}', "'format' occurs twice"),
        ('{"format": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
    ],
)
def test_a_manifest_that_is_not_strict_json_is_refused(lm, copy_of, text, expected):
    damaged = copy_of(lm)
    (damaged / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=expected):
        Bundle.open(damaged)


def test_a_manifest_that_is_not_utf8_or_huge_is_refused(lm, copy_of):
    damaged = copy_of(lm)
    (damaged / MANIFEST).write_bytes(b'{"format": "\xff"}')
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.open(damaged)
    with open(damaged / MANIFEST, "wb") as file:
        file.truncate(MAX_JSON + 1)  # sparse: takes no disk
    with pytest.raises(BundleError, match="expected at most"):
        Bundle.open(damaged)


def test_the_error_for_another_path_names_what_it_is(tmp_path, lm):
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BundleError, match="is a GGUF file"):
        Bundle.open(tmp_path / "model.gguf")
    with pytest.raises(BundleError, match="is a file, expected a bundle folder"):
        Bundle.open(lm / "model.onnx")
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(BundleError, match=r"is not an edgeformer bundle: it has no edgeformer\.json"):
        Bundle.open(plain)
    (plain / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="was not exported yet"):
        Bundle.open(plain)
    shutil.copy(lm / "model.onnx", plain)
    with pytest.raises(BundleError, match="holds ONNX files but is not an edgeformer bundle"):
        Bundle.open(plain)


def test_a_flipped_byte_is_refused_when_hashes_are_checked(lm, copy_of):
    damaged = copy_of(lm)
    with open(damaged / "model.onnx.data", "r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    Bundle.open(damaged)  # the size is right
    with pytest.raises(BundleError, match=r"model\.onnx\.data has the right size but other content"):
        Bundle.open(damaged, check="hashes")


def test_the_error_names_a_git_lfs_pointer(lm, copy_of):
    damaged = copy_of(lm)
    (damaged / "model.onnx.data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BundleError, match="git lfs pull"):
        Bundle.open(damaged)


def test_a_fifo_is_refused_and_not_read(lm, copy_of):
    damaged = copy_of(lm)
    (damaged / "config.json").unlink()
    os.mkfifo(damaged / "config.json")
    with pytest.raises(BundleError, match=r"config\.json is not a plain file"):
        Bundle.open(damaged)


@pytest.mark.parametrize("kept", range(0, 64, 7))  # 64ths of the file
def test_a_truncated_graph_is_refused_even_if_the_manifest_matches(lm, copy_of, reseal, kept):
    damaged = copy_of(lm)
    path = damaged / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * kept // 64])
    reseal(damaged)
    with pytest.raises(BundleError, match=r"ONNX model|disagree|needs|not a file"):
        _open_and_load(damaged)


def _open_and_load(bundle: Path) -> None:
    from edgeformer.engines.onnxruntime import OrtEngine

    OrtEngine(Bundle.open(bundle), threads=1)  # if a truncated graph can be parsed, its inputs and outputs are wrong


def _change_tensor(bundle: Path, name: str, change) -> None:
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    change(next(tensor for tensor in model.graph.initializer if tensor.name == name))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())


def _external(key, value):
    def change(tensor):
        found = [entry for entry in tensor.external_data if entry.key == key]
        entry = found[0] if found else tensor.external_data.add()
        entry.key, entry.value = key, value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(
            (_external("location", bad), "plain file name")
            for bad in ("../x", "/etc/passwd", "C:\\x", "a/../../x", "", "..")
        ),
        (_external("location", "other.data"), "not a file of this bundle"),
        (_external("offset", "-64"), "bytes -64"),
        (_external("offset", "18446744073709551552"), "which holds"),
        (_external("offset", "x"), "not a number"),
        (_external("length", "99999999999"), "which holds"),
        (_external("length", "64"), "needs"),
        (lambda tensor: tensor.dims.__setitem__(0, -1), "negative size"),
        (lambda tensor: tensor.dims.extend([2**31, 2**31, 4]), "needs"),
        (lambda tensor: setattr(tensor, "data_type", 999), "unknown element type"),
    ],
)
def test_wrong_external_data_entries_are_refused(lm, copy_of, reseal, change, expected):
    damaged = copy_of(lm)
    _change_tensor(damaged, "embed.weight", change)
    reseal(damaged)
    with pytest.raises(BundleError, match=expected):
        Bundle.open(damaged)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused_when_hashes_are_checked(tmp_path, bad):
    def spoil(model):
        for tensor in model.graph.initializer:
            if tensor.name == "layers.1.up.weight.scale":
                values = numpy_helper.to_array(tensor).copy()
                values[3, 0] = bad
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    with pytest.raises(BundleError, match=r"scales layers\.1\.up\.weight\.scale hold NaN or infinity"):
        tiny.write_lm(tmp_path / "bad", scheme="q8", with_reference=False, change=spoil)
    assert os.listdir(tmp_path) == []


def test_8_bit_weights_of_minus_128_are_refused_when_hashes_are_checked(tmp_path):
    def spoil(model):
        for tensor in model.graph.initializer:
            if tensor.name == "embed.weight":  # goes through a Gather, and a Transpose, to its DequantizeLinear
                values = numpy_helper.to_array(tensor).copy()
                values[-1, -1] = -128
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    with pytest.raises(BundleError, match=r"8-bit weights embed\.weight hold -128"):
        tiny.write_lm(tmp_path / "bad", scheme="q8", with_reference=False, change=spoil)


def test_a_hugging_face_cache_folder_of_links_opens(lm, tmp_path):
    from edgeformer.engines.onnxruntime import OrtEngine

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(lm.iterdir())):
        shutil.copy(file, blobs / f"{number:04x}")
        os.symlink(f"../../blobs/{number:04x}", snapshot / file.name)
    bundle = Bundle.open(snapshot, check="hashes")
    engine = OrtEngine(bundle, threads=1)
    assert engine.forward([({"input_ids": [[5]]}, engine.new_state())])[0]["logits"].shape[:2] == (1, 1)
    assert engine.prepare_batches() is None  # the graph is loaded again, with the weights behind the link


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "C:x", "a\0b", "a\nb"])
def test_a_plain_name_cannot_leave_its_folder(name):
    assert not plain_name(name)
    assert plain_name("model.onnx.data")
