"""Scenarios of the chat page in headless Chromium, run by playwright-core in one Node.js process with one browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support.browser import chromium
from support.npm import npm_folder

PACKAGES = ("playwright-core@1.65.1", "axe-core@4.14.1", "typescript@7.0.2")
SCENARIOS = Path(__file__).resolve().parents[1] / "server" / "page"


def page_folder() -> Path:
    """The folder with the npm packages of these tests."""
    return npm_folder("page", PACKAGES)


class ScenarioFailed(AssertionError):
    """A scenario failed; the message has the JavaScript stack."""


class Driver:
    """The process. `run` runs one scenario in a fresh browser context."""

    def __init__(self) -> None:
        # Modules are looked up from where a file lies, so the scenarios lie beside node_modules.
        place = page_folder()
        copied = place / "scenarios"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(SCENARIOS, copied)
        self._process = subprocess.Popen(
            ["node", "scenarios/driver.mjs", chromium()],
            cwd=place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, scenario: str, url: str, **arguments: Any) -> Any:
        """What the scenario `FILE.NAME` returns for the server at `url`.

        Raises:
            ScenarioFailed: an assertion failed, the page had an error, or it asked for something elsewhere.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"scenario": scenario, "url": url, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"The driver ended with {self._process.wait()}."
        found = json.loads(line)
        if "error" in found:
            raise ScenarioFailed(found["error"])
        return found.get("value")

    def close(self) -> None:
        """Ends the browser."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
