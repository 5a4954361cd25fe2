"""What deploy/Dockerfile runs, step by step outside Docker: the wheel in a clean environment, serve, health check."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "openai"):
    if os.environ.get("CI") != "true":
        pytest.importorskip(package)

import httpx
from support import serving
from support.serving import wait_for

import edgeformer

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def instructions(name):
    """The arguments of the instructions of this name, in their order."""
    return [line.partition(" ")[2].strip() for line in LINES if line.startswith(f"{name} ")]


def step(name, word):
    """The only instruction of this name that holds `word`."""
    (found,) = [one for one in instructions(name) if word in one]
    return re.sub(r"^--mount=\S+\s+", "", found)


def run(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copied_sources(folder):
    """The tree that the first stage's COPY instructions make, as the ignore file lets them."""
    copies = [one.split() for one in instructions("COPY")]
    kept = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    for *sources, target in copies:
        for source in sources:
            assert f"!{source}" in kept, source
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(ROOT / source, folder / target / source)


def with_native(wheel):
    """Adds the native engine that this checkout was built with: compiling it again takes minutes."""
    (library,) = (ROOT / "edgeformer").glob("_native*.so")
    data = library.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as old:
        files = {name: old.read(name) for name in old.namelist()}
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    files[f"edgeformer/{library.name}"] = data
    files[record] += f"edgeformer/{library.name},sha256={digest},{len(data)}\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            new.writestr(name, content)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(the environment that the image has, the folder that stands for /)"""
    if not list((ROOT / "edgeformer").glob("_native*.so")):
        assert os.environ.get("CI") != "true", "the native engine is not built"
        pytest.skip("the native engine is not built: make setup")
    place = tmp_path_factory.mktemp("image")
    source = place / "source"
    source.mkdir()
    copied_sources(source)
    build = step("RUN", "pip wheel").replace("/wheels", str(place / "wheels"))
    build = build.replace("python -m", f"{sys.executable} -m", 1).replace(
        "wheel --", "wheel --no-build-isolation --", 1
    )
    run(["bash", "-ec", build], cwd=source, env={**os.environ, "EDGEFORMER_NATIVE": "0"})
    (wheel,) = (place / "wheels").iterdir()
    with_native(wheel)
    install = step("RUN", "pip install").replace("/opt/edgeformer", str(place / "opt"))
    install = install.replace("/wheels", str(place / "wheels")).replace("python -m", f"{sys.executable} -m", 1)
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(["bash", "-ec", install], cwd=place, env=bare)
    return place / "opt" / "bin", place


@pytest.fixture(scope="module")
def container(installed, tmp_path_factory):
    """A server as the container runs it."""
    binaries, place = installed
    model = serving.write_long_lm(tmp_path_factory.mktemp("models") / "lm")
    entry = json.loads(step("ENTRYPOINT", "serve"))
    entry[entry.index("8080")] = "0"
    entry[entry.index("0.0.0.0")] = "127.0.0.1"  # this machine alone, in a test
    environment = {
        "PATH": f"{binaries}:/usr/bin:/bin", "EDGEFORMER_CACHE": str(place / "cache"), "PYTHONUNBUFFERED": "1",
        "EDGEFORMER_API_KEY": "secret",
    }  # fmt: skip
    command = [str(binaries / entry[0]), *entry[1:], str(model), "--preload", "--grace", "5"]
    with open(place / "log", "w") as log:
        process = subprocess.Popen(command, stderr=log, env=environment, cwd=place)
    try:
        said = place / "log"
        wait_for(lambda: "running on" in said.read_text() or process.poll() is not None, 90)
        assert process.poll() is None, said.read_text()
        port = re.search(r"running on http://127.0.0.1:(\d+)", said.read_text())[1]
        yield process, f"http://127.0.0.1:{port}", environment
    finally:
        process.kill()
        process.wait()


def test_the_image_holds_no_toolchain(installed):
    binaries, _ = installed
    names = {one["name"].lower() for one in json.loads(run([binaries / "pip", "list", "--format", "json"]))}
    assert {"edgeformer", "starlette", "uvicorn", "opentelemetry-sdk"} <= names
    assert not names & {"torch", "transformers", "onnxruntime", "pytest"}


def test_without_a_key_it_does_not_start(installed):
    binaries, place = installed
    entry = json.loads(step("ENTRYPOINT", "serve"))
    model = serving.write_long_lm(place / "unkeyed")
    environment = {"PATH": f"{binaries}:/usr/bin:/bin"}
    done = subprocess.run(
        [str(binaries / entry[0]), *entry[1:], str(model)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2 and "EDGEFORMER_API_KEY" in done.stderr


def test_the_health_check_answers(container):
    _, url, environment = container
    command = json.loads(step("HEALTHCHECK", "urlopen").partition("CMD ")[2])
    own = [one.replace("http://127.0.0.1:8080", url) for one in command]
    assert own != command
    run(own, env=environment)
    away = [one.replace("http://127.0.0.1:8080", "http://127.0.0.1:9") for one in command]
    assert subprocess.run(away, capture_output=True, timeout=60, env=environment).returncode != 0


def test_the_probe_of_kubernetes_answers(container, tmp_path):
    yaml = pytest.importorskip("yaml")
    _, url, environment = container
    objects = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    text = next(one for one in objects if one["kind"] == "ConfigMap")["data"]["probe.py"]
    (tmp_path / "probe.py").write_text(text.replace("http://127.0.0.1:8080", url))
    command = ["python", str(tmp_path / "probe.py"), "/ready"]
    run(command, env=environment)
    wrong = subprocess.run(command, capture_output=True, timeout=60, env=environment | {"EDGEFORMER_API_KEY": "no"})
    assert wrong.returncode != 0


def test_it_answers_on_the_native_engine_and_ends_in_time(container):
    process, url, _ = container
    body = {"prompt": "The quick", "max_tokens": 5}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
    key = {"Authorization": "Bearer secret"}
    found = httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 5
    assert f"edgeformer {edgeformer.__version__}" in httpx.get(f"{url}/props", headers=key).text
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


def test_the_command_is_one_that_the_shell_reads():
    for one in [*instructions("RUN"), *instructions("ENV")]:
        assert shlex.split(one)
