"""Ctrl-C at any moment of an export: it comes soon, nothing is half written, and the next export works."""

from __future__ import annotations

import pytest
from support.own_process import run

pytest.importorskip("torch", reason="the toolchain needs torch")

SCRIPT = """
import hashlib, pathlib, statistics, tempfile
place = pathlib.Path(PATH)
scratch = place / "tmp"
scratch.mkdir()
tempfile.tempdir = str(scratch)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "inductor")  # torch's own, which stays
import torch
torch.set_num_threads(1)
from bench.sources import _sentences as tiny
from edgeformer.export import ExportOptions, export
source = tiny.base(place / "source", tiny.bert)

def run(out):
    return export(ExportOptions(str(source), out, quantize="q8"))
def files(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if "model.onnx" in p.name}

run(place / "warm" / "b")  # imports, compiled kernels
began = time.perf_counter()
run(place / "whole" / "b")
whole = time.perf_counter() - began
expected = files(place / "whole" / "b")
latencies = []
for number in range(8):
    out, sent = place / str(number), []
    out.mkdir()
    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    timer, ended = threading.Timer(whole * (number + 0.5) / 9, send), False
    try:
        timer.start()
        run(out / "b")
        ended = True
        timer.join()
        time.sleep(1)
    except KeyboardInterrupt:
        if not ended:
            latencies.append(time.perf_counter() - sent[0])
    timer.join()
    left = os.listdir(out)
    assert left == (["b"] if ended else []), (number, left)
    assert not ended or files(out / "b") == expected
    assert os.listdir(scratch) == [], os.listdir(scratch)
assert len(latencies) >= 4, (latencies, whole)
run(place / "after" / "b")
assert files(place / "after" / "b") == expected
print(json.dumps([whole, latencies]))
"""


def test_ctrl_c_at_any_moment_of_an_export_leaves_nothing(tmp_path):
    """The bound is a part of the export's own time, because the machine may be busy."""
    import json
    import statistics

    whole, latencies = json.loads(run("import json\n" + SCRIPT, tmp_path, "cpu"))
    assert statistics.median(latencies) < max(0.2, whole / 10), (latencies, whole)
    assert max(latencies) < max(1.0, whole / 3), (latencies, whole)
