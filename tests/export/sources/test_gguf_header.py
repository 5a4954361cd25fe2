"""Headers of GGUF files: equal to what the gguf package reads; wrong sizes are refused before they are used."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the toolchain needs gguf")
pytest.importorskip("transformers", reason="the toolchain needs transformers")

from support import gguf_files

from bench.sources._gguf_forms import FORMS
from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.header import read_header
from edgeformer.export.sources.gguf.shards import join, open_gguf


@pytest.fixture
def plain(tmp_path):
    return gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), gguf_files.tensors(), kind="Q8_0")


def same_as_the_package(path, shards):
    """Metadata and tensors of `shards` as the package reads `path`."""
    reader = gguf.GGUFReader(path)
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    expected = {}
    for shard in reversed(shards):
        expected |= read_header(shard).metadata
    assert {k: v for k, v in found.items() if "split." not in k} == {
        k: v for k, v in expected.items() if "split." not in k
    }
    tensors = {tensor.name: (shard, tensor) for shard in shards for tensor in read_header(shard).tensors}
    assert set(tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        shard, ours = tensors[tensor.name]
        raw = shard.read_bytes()[ours.start : ours.start + ours.size]
        assert (ours.type, ours.shape) == (tensor.tensor_type, tuple(int(n) for n in tensor.shape[::-1]))
        assert raw == np.ascontiguousarray(tensor.data).tobytes()


def test_a_header_is_what_the_gguf_package_reads(plain):
    same_as_the_package(plain, [plain])


def test_shards_join_to_the_file_that_the_package_reads(tmp_path):
    paths = gguf_files.split(tmp_path, gguf_files.keys(), gguf_files.tensors(), count=3)
    join(open_gguf(paths[1]).shards, tmp_path / "joined.gguf")
    same_as_the_package(tmp_path / "joined.gguf", paths)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_is_read_or_refused_by_name(form, tmp_path):
    row = FORMS[form](form, tmp_path)
    assert row.outcome != "ignored", row.detail


def test_a_file_cut_anywhere_is_refused(plain):
    last = read_header(plain).tensors[-1]
    raw = plain.read_bytes()[: last.start + last.size]  # padding may follow
    for size in {*range(0, 400, 7), *range(400, len(raw), 997), len(raw) - 1}:
        plain.write_bytes(raw[:size])
        with pytest.raises(ExportError, match=r"m\.gguf"):
            read_header(plain)


def test_flipped_bytes_never_end_in_another_error(plain):
    """300 headers with up to four random bytes: read, or refused by ExportError."""
    raw, chance = plain.read_bytes(), random.Random(0)
    end = read_header(plain).tensors[0].start
    for _ in range(300):
        changed = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(4, end)] = chance.randrange(256)
        plain.write_bytes(changed)
        try:
            read_header(plain)
        except ExportError:
            continue


def test_a_duplicate_key_or_tensor_is_refused(plain, tmp_path):
    twice = plain.read_bytes().replace(b"llama.block_count", b"llama.rope.freqxx")  # of equal length
    twice = twice.replace(b"llama.rope.freqxx", b"llama.embedding_l").replace(b"blk.1.attn_norm", b"blk.0.attn_norm")
    (tmp_path / "t.gguf").write_bytes(twice)
    with pytest.raises(ExportError, match=r"tensor blk\.0\.attn_norm\.weight twice"):
        read_header(tmp_path / "t.gguf")


def test_tensors_that_overlap_are_refused(plain):
    header = read_header(plain)
    first, second = header.tensors[:2]
    raw = bytearray(plain.read_bytes())
    at = raw.index(second.name.encode()) + len(second.name) + 4 + 8 * len(second.shape) + 4
    raw[at : at + 8] = struct.pack("<Q", 0)  # the offset of the first
    plain.write_bytes(raw)
    with pytest.raises(ExportError, match="overlap"):
        read_header(plain)
    assert first.start < second.start
