"""The examples of docs/serving.md work as they stand, with tiny models under the names of the examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import running

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
EXAMPLES = [(kind, text) for kind, text in re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def documented(served):
    """A server whose models have the names of the page."""
    with running([f"smollm2={served['calls']}", f"minilm={served['encoder']}"]) as one:
        yield one


@pytest.mark.parametrize(("kind", "text"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_works(documented, kind, text):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert "http://127.0.0.1:8080" in text
    text = text.replace("http://127.0.0.1:8080", documented.url).replace("curl ", "curl -sS --fail-with-body ")
    command = ["bash", "-ec", text] if kind == "bash" else [sys.executable, "-c", text]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and found.stdout, found.stdout + found.stderr
    if '"stream": true' in text:
        assert found.stdout.rstrip().endswith("data: [DONE]")
    elif kind == "bash" and "/metrics" not in text:
        assert "error" not in json.loads(found.stdout)


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
