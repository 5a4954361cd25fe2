"""The list of malformed bundles, by hand: each is refused by a typed error that names the file, or runs as before.

Damage at random is in test_damaged_bundles.py; more of the list is in tests/bundle/test_bundle.py.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import tiny
from support.damage import VALUES
from support.malformed import ENGINES, answer, typed

from edgeformer import load
from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import BundleError, EdgeformerError, EngineUnavailable


@pytest.fixture
def change_graph(reseal):
    """`change_graph(bundle, change)`: `change(model)` is applied to model.onnx, and the manifest renewed."""

    def edit(bundle, change):
        model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
        change(model)
        (bundle / "model.onnx").write_bytes(model.SerializeToString())
        reseal(bundle)

    return edit


# ----------------------------------------------------------------------------------------- layers with a float32 cache

KV_COST = {kind: {"mean_kl": 0.01} for kind in ("float32", "int8", "auto")}
# Of two layers. True where the bundle runs.
FLOAT32_LAYERS = [([], True), ([0], True), ([1, 0], True), ([1, 1], True), ([2], False), ([0, 2**31], False),
                  ([2**63], False), ([10**30], False), (list(range(100_000)), False)]  # fmt: skip


@pytest.mark.parametrize(("layers", "runs"), FLOAT32_LAYERS, ids=lambda value: repr(value)[:20])
def test_layers_of_a_float32_cache_are_those_of_the_graph(q8, copy_of, edit_manifest, layers, runs):
    copy = copy_of(q8)
    edit_manifest(copy, lambda manifest: manifest.update(kv_cache={**KV_COST, "float32_layers": layers}))
    if runs:
        assert answer(copy, "native")
        return
    for engine in ("native", "auto"):
        with pytest.raises(BundleError, match=rf"kv_cache\.float32_layers has {layers[-1] if len(layers) < 9 else 2},"):
            load(copy, engine, threads=1)
    with pytest.raises(BundleError, match="float32_layers"):
        load(copy, "native", threads=1)
    load(copy, "cpu", threads=1)  # has no such cache


@pytest.mark.parametrize("key", ["kv_cache", "float32_layers", "layer", "int8", "mean_kl"])
def test_any_value_in_the_cost_of_the_cache_gives_a_typed_error_or_a_bundle_that_runs(q8, copy_of, edit_manifest, key):
    copy, outcomes = copy_of(q8), set()
    for value in VALUES:
        entry: object = {**KV_COST, "float32_layers": [1]}
        entry = {
            "kv_cache": value,
            "float32_layers": {**KV_COST, "float32_layers": value},
            "layer": {**KV_COST, "float32_layers": [0, value]},
            "int8": {**KV_COST, "int8": value, "float32_layers": []},
            "mean_kl": {**KV_COST, "auto": {"mean_kl": value}, "float32_layers": [0]},
        }[key]
        edit_manifest(copy, lambda manifest, entry=entry: manifest.update(kv_cache=entry))
        found = typed(lambda: answer(copy, "native"))
        assert not isinstance(found, str) or "kv_cache" in found, (value, found)
        outcomes.add(type(found))
    assert str in outcomes


# -------------------------------------------------------------------------------------------------- files that are none

FILES = ("edgeformer.json", "model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "reference.npz")
CONTENTS = {
    "empty": b"",
    "one byte": b"\x08",
    "zeros": bytes(4096),
    "a page of errors": b"<!DOCTYPE html><html><title>404</title></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(64),
    "a zip file": b"PK\x03\x04" + bytes(64),
}


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_something_else_is_refused_by_name(lm, copy_of, name, content, renewed):
    damaged = copy_of(lm)
    (damaged / name).write_bytes(CONTENTS[content])
    if renewed:
        from support.damage import renew

        renew(damaged)
    with pytest.raises(BundleError, match=name.partition(".")[0]):
        load(damaged, "cpu", threads=1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "loop", "broken link"])
def test_a_path_that_is_no_file_is_refused_and_never_read(lm, copy_of, name, kind):
    damaged = copy_of(lm)
    path = damaged / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    with pytest.raises(BundleError, match=name.partition(".")[0]):
        load(damaged, "cpu", threads=1)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read every file")
def test_a_file_without_the_right_to_read_is_refused(lm, copy_of, monkeypatch):
    damaged = copy_of(lm)
    if os.geteuid() == 0:  # root may read it: the system's answer is given here instead
        import builtins

        whole = builtins.open

        def refuse(path, *rest, **more):
            if str(path).endswith("config.json") and "copy" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return whole(path, *rest, **more)

        monkeypatch.setattr(builtins, "open", refuse)
        monkeypatch.setattr("io.open", refuse)
    else:
        (damaged / "config.json").chmod(0)
    with pytest.raises(BundleError, match=r"config\.json cannot be read: Permission denied"):
        load(damaged, "cpu", threads=1)


# --------------------------------------------------------------------------------------------------------------- links


def outside(tmp_path, lm):
    """A folder of its own with the files of the bundle."""
    return shutil.copytree(lm, tmp_path / "outside")


@pytest.mark.parametrize("name", ["model.onnx.data", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_that_leaves_the_folder_is_refused(lm, copy_of, tmp_path, name, absolute):
    elsewhere, damaged = outside(tmp_path, lm), copy_of(lm)
    (damaged / name).unlink()
    target = elsewhere / name
    (damaged / name).symlink_to(target if absolute else os.path.relpath(target, damaged))
    with pytest.raises(BundleError, match=f"{name} is a link to .*outside of the folder; copy the file itself"):
        Bundle.open(damaged)


def test_a_link_through_a_link_that_leaves_the_folder_is_refused(lm, copy_of, tmp_path):
    elsewhere, damaged = outside(tmp_path, lm), copy_of(lm)
    (damaged / "config.json").unlink()
    (damaged / "blobs").symlink_to(elsewhere)  # a folder of the right name, in the wrong place
    (damaged / "config.json").symlink_to("blobs/config.json")
    with pytest.raises(BundleError, match="outside of the folder"):
        Bundle.open(damaged)


@pytest.mark.parametrize("engine", ENGINES)
def test_links_inside_the_folder_and_to_the_folder_are_followed(lm, copy_of, tmp_path, engine):
    copy = copy_of(lm)
    (copy / "..data").mkdir()  # as a Kubernetes volume lies
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        shutil.move(copy / name, copy / "..data" / name)
        (copy / name).symlink_to(f"..data/{name}")
    (tmp_path / "link").symlink_to(copy)
    assert answer(tmp_path / "link", engine) == answer(lm, engine)


# ------------------------------------------------------------------------------------------------------- tensors, types


def initializer(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def place(tensor, key, value=None):
    entry = next(e for e in tensor.external_data if e.key == key)
    if value is not None:
        entry.value = str(value)
    return int(entry.value)


def overlap(model):
    first, second = initializer(model, "layers.0.gate.weight"), initializer(model, "layers.0.up.weight")
    place(second, "offset", place(first, "offset") + 64)


def unaligned(model):
    tensor = initializer(model, "layers.0.gate.weight")
    place(tensor, "offset", place(tensor, "offset") + 1)


@pytest.mark.parametrize("change", [overlap, unaligned])
@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_that_overlap_or_are_not_aligned_are_numbers_like_any(q8, copy_of, change_graph, change, engine):
    copy = copy_of(q8)
    change_graph(copy, change)  # what they hold is wrong, so the bundle's own reference tells
    with pytest.raises(EngineUnavailable, match=r"differs from this bundle's reference|-128"):
        load(copy, engine, threads=1)


def with_dims(name, dims):
    def change(model):
        tensor = initializer(model, name)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def attribute(op, name, value):
    def change(model):
        for node in model.graph.node:
            if node.op_type == op:
                kept = [a for a in node.attribute if a.name != name]
                del node.attribute[:]
                node.attribute.extend(kept)
                if value is not None:
                    node.attribute.append(helper.make_attribute(name, value))

    return change


def retyped(name, data_type):
    def change(model):
        tensor = initializer(model, name)
        tensor.data_type = data_type

    return change


def stored(name, array):
    def change(model):
        tensor = numpy_helper.from_array(array, name)
        initializer(model, name).CopyFrom(tensor)

    return change


def zero_points(value):
    """The Gather of the embedding's rows is dequantized with zero points that the format does not have."""

    def change(model):
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                scale = node.input[1]
                del node.input[2:]
                node.input.append(scale if value is None else "zp")
        if value is not None:
            model.graph.initializer.append(numpy_helper.from_array(value, "zp"))

    return change


SCALE = "layers.1.up.weight.scale"
QUANTIZED = {
    "a scale is missing": with_dims(SCALE, (64, 0)),
    "too few scales": stored(SCALE, np.ones((63, 1), np.float32)),
    "too many scales": stored(SCALE, np.ones((64, 2), np.float32)),
    "scales of rank 1": stored(SCALE, np.ones(64, np.float32)),
    "scales that are integers": stored(SCALE, np.ones((64, 1), np.int64)),
    "blocks of 0": attribute("DequantizeLinear", "block_size", 0),
    "blocks of -32": attribute("DequantizeLinear", "block_size", -32),
    "blocks of 31": attribute("DequantizeLinear", "block_size", 31),
    "blocks of 2**62": attribute("DequantizeLinear", "block_size", 2**62),
    "no block size": attribute("DequantizeLinear", "block_size", None),
    "the axis 7": attribute("DequantizeLinear", "axis", 7),
    "weights as uint8": retyped("layers.1.up.weight", TensorProto.UINT8),
    "weights as float8": retyped("layers.1.up.weight", TensorProto.FLOAT8E4M3FN),
    "weights as text": retyped("layers.1.up.weight", TensorProto.STRING),
    "weights as int4": retyped("layers.1.up.weight", TensorProto.INT4),
    "zero points as floats": zero_points(None),
    "zero points of another shape": zero_points(np.full((3, 3), 7, np.int8)),
    "NaN scales": stored(SCALE, np.full((64, 1), np.nan, np.float32)),
    "infinite scales": stored(SCALE, np.full((64, 1), np.inf, np.float32)),
    "scales beyond float16": stored(SCALE, np.full((64, 1), 1e30, np.float32)),
    "scales of 0": stored(SCALE, np.zeros((64, 1), np.float32)),
    "denormal scales": stored(SCALE, np.full((64, 1), 1e-42, np.float32)),
    "weights of -128": stored("layers.1.up.weight", np.full((64, 32), -128, np.int8)),
}


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_that_do_not_fit_are_refused(q8, copy_of, change_graph, case, engine):
    damaged = copy_of(q8)
    change_graph(damaged, QUANTIZED[case])
    with pytest.raises((BundleError, EngineUnavailable)) as error:
        load(damaged, engine, threads=1)
    assert len(str(error.value)) > 40
    assert answer(q8, "native")  # the process goes on


@pytest.mark.parametrize("case", ["NaN scales", "infinite scales", "weights of -128"])
def test_wrong_values_are_named_where_hashes_are_checked(q8, copy_of, change_graph, case):
    damaged = copy_of(q8)
    change_graph(damaged, QUANTIZED[case])
    with pytest.raises(BundleError, match=r"layers\.1\.up\.weight"):
        Bundle.open(damaged, check="hashes")


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize(
    "dims", [(), (1,) * 10_000, (2**31, 2**31, 4), (2**62, 4), (2**63 - 1,), (0,), (-1, 32), (320, 2**40), (320 * 32,)]
)
def test_shapes_that_their_bytes_do_not_fill_are_refused_without_memory(lm, copy_of, change_graph, dims, engine):
    damaged = copy_of(lm)
    change_graph(damaged, with_dims("embed.weight", dims))
    with pytest.raises((BundleError, EngineUnavailable)):
        load(damaged, engine, threads=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_embedding_with_fewer_rows_than_logits_never_reads_beyond_it(tmp_path, engine):
    def fewer(model):
        tensor = initializer(model, "embed.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:100], "embed.weight"))

    path = tiny.write_lm(tmp_path / "few", change=fewer, with_reference=False)
    model = load(path, engine, threads=1)
    assert model.generate([99], max_new_tokens=1, ignore_eos=True).ids
    with pytest.raises(EdgeformerError):
        model.generate([100], max_new_tokens=1)
    assert model.generate([99], max_new_tokens=1, ignore_eos=True).ids
