"""The official npm clients of OpenAI and Anthropic drive every route and every stream."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import speech
from support.serving import running

pytest.importorskip("torch", reason="the speech model is exported by the toolchain")

PACKAGES = ("openai@7.59.0", "@anthropic-ai/sdk@1.14.0", "zod@4.6.7")
SCRIPT = Path(__file__).with_name("npm_clients.mjs")
CHECKS = re.findall(r"^  async (\w+)\(\)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def packages():
    """A folder with the packages, kept between runs."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        told = "node and npm are not installed: apt-get install nodejs npm"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    place = Path(__file__).parents[2] / "build" / "npm-clients"
    stamp = place / ".packages"
    if not stamp.exists() or stamp.read_text() != repr(PACKAGES):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "package.json").write_text('{"name": "npm-clients", "private": true, "type": "module"}')
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
        found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        stamp.write_text(repr(PACKAGES))
    return place


@pytest.fixture(scope="module")
def results(packages, served, tmp_path_factory):
    """Check -> what the script says of it."""
    folder = tmp_path_factory.mktemp("npm")
    whisper = speech.write_whisper(folder)[0]
    (folder / "talk.wav").write_bytes(speech.wav(speech.recording(1, 3)))
    shutil.copyfile(SCRIPT, packages / SCRIPT.name)
    bundles = [*(f"{name}={path}" for name, path in served.items()), f"whisper={whisper}"]
    with running(bundles) as one:
        command = ["node", SCRIPT.name, one.url, str(folder / "talk.wav")]
        found = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    said = re.split(r"^(?=held |broke )", found.stdout, flags=re.MULTILINE)
    return {re.split(r"[ :\n]", text)[1]: text for text in said if text}


@pytest.mark.parametrize("name", CHECKS)
def test_what_the_client_reads_is_right(results, name):
    assert results[name].strip() == f"held {name}"


def test_all_checks_ran(results):
    assert list(results) == CHECKS and len(CHECKS) >= 15
