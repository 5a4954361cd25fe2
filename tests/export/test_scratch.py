"""Weights in mapped files: the same values, tied as before, and restored afterwards."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")

from edgeformer.errors import ExportError
from edgeformer.export.blocks import quantize
from edgeformer.export.quantize.dequantized import dequantized_weights
from edgeformer.export.quantize.weights import QuantizedWeight
from edgeformer.export.scratch import on_disk, to_disk


class Tied(torch.nn.Module):
    """An embedding and its head as one parameter, a stack of two matrices, and a second name for the first's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(6, 32)
        self.head = torch.nn.Linear(32, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.alias = torch.nn.Parameter(self.embedding.weight.data)
        self.stack = torch.nn.Parameter(torch.randn(2, 4, 32))


def mappings(folder: Path) -> int:
    """How many deleted files of `folder` this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and "(deleted)" in line for line in lines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_values_in_a_file_are_the_values(dtype):
    values = torch.arange(15).reshape(3, 5).to(dtype)
    for given in (values, values.T, values[1], values[0, 0], values[:0]):
        found = on_disk(given)
        assert torch.equal(found, given) and found.dtype == dtype and found.shape == given.shape


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_is_freed_with_its_tensor_and_writing_does_not_change_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = on_disk(torch.zeros(4096))
    assert mappings(tmp_path) == 1 and not list(tmp_path.iterdir())
    found += 1
    assert found.sum() == 4096
    del found
    gc.collect()
    assert mappings(tmp_path) == 0


def test_a_full_disk_is_reported_in_bytes():
    resource = pytest.importorskip("resource", reason="limits a file's size as a full disk would")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ExportError, match=r"4,194,304 bytes of weights.*12 bytes a parameter.*TMPDIR"):
            on_disk(torch.zeros(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tied_parameters_stay_tied():
    module = Tied()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    old = module.embedding.weight.data_ptr()
    to_disk(module)
    assert module.embedding.weight is module.head.weight
    assert old != module.embedding.weight.data_ptr() == module.alias.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("mapped", [False, True])
def test_dequantized_weights_are_the_blocks_values_and_the_same_memory_is_restored(mapped):
    module = Tied()
    if mapped:
        to_disk(module)
    places = {name: value.data_ptr() for name, value in module.named_parameters(remove_duplicate=False)}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    table = quantize(module.embedding.weight.detach().numpy(), "q8", 32)
    own, slice_ = (quantize(value.detach().numpy(), "q4", 32) for value in (module.head.weight, module.stack[1]))
    weights = [
        QuantizedWeight("embedding.weight", table),
        QuantizedWeight("embedding.weight", own, own_head=True),
        QuantizedWeight("stack.1", slice_),
    ]
    with contextlib.suppress(KeyError), dequantized_weights(module, weights):
        np.testing.assert_array_equal(module.embedding.weight.detach(), table.dequantize())
        np.testing.assert_array_equal(module.head.weight.detach(), own.dequantize())
        np.testing.assert_array_equal(module.stack[1].detach(), slice_.dequantize())
        assert torch.equal(module.stack[0], before["stack"][0])
        raise KeyError("inside")
    assert {name: value.data_ptr() for name, value in module.named_parameters(remove_duplicate=False)} == places
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
