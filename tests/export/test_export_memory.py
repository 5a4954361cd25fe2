"""An export keeps no second float copy of the model in memory: measured in separate processes, stage by stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
transformers = pytest.importorskip("transformers", reason="the toolchain needs transformers")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

# Bytes of anonymous memory that a parameter costs at each stage's worst moment. Float weights are in mapped files, so:
BOUNDS = {
    "load": 4 + 1.5,  # transformers makes all of them in float32 before they can be moved
    "trace": 0 + 1.5,
    # The float gate: nothing. Then the blocks: int8 and a float32 scale for each 32 weights.
    "check the float graph": 1.125 + 1.5,
    # onnxruntime, running the graph as written, dequantizes all linears before it multiplies with the first.
    "check the quantized graph": 1.125 + 4 + 1.5,
    # onnxruntime's own packed form, 4 bits and a float32 scale, and what it read them from.
    "write": 1.125 + 2 * (0.5 + 0.125) + 1.5,
}  # 1.5: the largest matrix and its blocks pass through; less than half of a float copy

EXPORT = """
import json, resource, sys, threading, time
from pathlib import Path
from edgeformer.export import ExportOptions, export

peaks, stage, done = {}, [""], threading.Event()

def anonymous():
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize()

def sample():
    while not done.wait(0.003):
        name, used = stage[0], anonymous()
        if stage[0] == name:  # else it was measured between two stages
            peaks[name] = max(peaks.get(name, 0), used)

class Stages:
    def stage(self, text):
        stage[0] = text

    def track(self, items, name):
        return items

threading.Thread(target=sample, daemon=True).start()
export(ExportOptions(sys.argv[1], Path(sys.argv[2]), quantize="q4", head="q4", calibration="none", tokens=0), Stages())
done.set()
print(json.dumps(peaks))
"""


def folder(path: Path, size: int) -> tuple[Path, int]:
    """(a Llama in float16 with matrices of `size` and twice `size`, how many parameters it has)."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(path)
    return path, sum(parameter.numel() for parameter in model.parameters())


def peaks(source: Path, output: Path) -> dict[str, int]:
    """Peak anonymous bytes of each stage; glibc is set to return freed memory at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", EXPORT, str(source), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_export_keeps_no_second_float_copy(tmp_path):
    """The difference of two exports that differ only in width: what libraries and graphs need cancels out."""
    (small, few), (large, many) = folder(tmp_path / "small", 64), folder(tmp_path / "large", 896)
    fixed, found = peaks(small, tmp_path / "a"), peaks(large, tmp_path / "b")
    for name, bound in BOUNDS.items():
        stage = next(stage for stage in found if stage.startswith(name))
        lesser = next(value for stage, value in fixed.items() if stage.startswith(name))
        bytes_each = (found[stage] - lesser) / (many - few)
        assert bytes_each <= bound, f"{name}: {bytes_each:.2f} bytes a parameter, at most {bound}"
