"""Ctrl-C at any moment of an export: it comes soon, nothing is half written or left, and the next export works."""

from __future__ import annotations

import json
import statistics

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
    whole, latencies = json.loads(run("import json\n" + SCRIPT, tmp_path, "cpu"))
    assert statistics.median(latencies) < max(0.2, whole / 10), (latencies, whole)
    assert max(latencies) < max(1.0, whole / 3), (latencies, whole)


TEMPORARY = """
import pathlib, shutil, tempfile, torch
from edgeformer.export.scratch import on_disk
from edgeformer.files import temporary_folder
scratch = pathlib.Path(PATH) / "tmp"
scratch.mkdir()
tempfile.tempdir = str(scratch)
values = torch.zeros(1 << 18)

def weights():
    return [on_disk(values) for _ in range(4)]
def folders():
    for _ in range(40):
        with temporary_folder() as folder:
            (folder / "file").write_bytes(b"x")
def unsafe():
    for _ in range(40):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x")

left = {}
for work in (weights, folders, unsafe):
    left[work.__name__] = 0
    began = time.perf_counter()
    work()
    whole = time.perf_counter() - began
    for number in range(200):
        timer = threading.Timer(whole * number / 200, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            work()
            timer.join()
            time.sleep(1)
        except KeyboardInterrupt:
            timer.join()
        for name in os.listdir(scratch):
            left[work.__name__] += 1
            path = scratch / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
print(json.dumps(left))
"""


def test_ctrl_c_while_a_temporary_file_is_made_leaves_none(tmp_path):
    """The system takes most of the time, where `tempfile` does not know yet what it makes: it is the planted defect."""
    left = json.loads(run("import json\n" + TEMPORARY, tmp_path, "cpu"))
    assert left.pop("unsafe") > 0
    assert left == {"weights": 0, "folders": 0}


LOST = """
import pathlib, torch
import edgeformer.export.pipeline as pipeline
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, export, module_source
from edgeformer.export.progress import Silent

class Loses(torch.nn.Module):
    def __init__(self, result):
        super().__init__()
        self.linear, self.result, self.input_spec = torch.nn.Linear(8, 4), result, {"x": "float32[batch,sequence,8]"}
    def forward(self, x):
        if torch.compiler.is_compiling():  # while it is traced
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if self.result == "error":
                    raise RuntimeError("List[int] expected, found list")
        return self.linear(x)

class Stages(Silent):
    def stage(self, text):
        stages.append(text)

ends = {}
for kept in (True, False):
    if not kept:  # the planted defect
        @contextlib.contextmanager
        def passed(progress):
            yield progress
        pipeline.no_interrupt_lost = passed
    for result in ("error", "none"):
        stages, out = [], pathlib.Path(PATH) / f"{kept} {result}"
        try:
            options = ExportOptions("a module", out / "b", quantize="none")
            export(options, Stages(), module_source(Loses(result), options, "a module"))
            end = "bundle"
        except (KeyboardInterrupt, ExportError) as error:
            end = type(error).__name__
        ends[f"{kept} {result}"] = [end, stages, os.listdir(out)]
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(json.dumps(ends))
"""


def test_ctrl_c_that_a_library_loses_ends_the_export(tmp_path):
    ends = json.loads(run("import contextlib, json\n" + LOST, tmp_path, "cpu"))
    for result in ("error", "none"):
        assert ends.pop(f"True {result}") == ["KeyboardInterrupt", ["trace"], []]
    assert ends.pop("False error") == ["ExportError", ["trace"], []]
    assert ends.pop("False none")[0] == "bundle"
