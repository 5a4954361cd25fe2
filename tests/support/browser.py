"""A page in headless Chromium: served from this machine to itself, and it posts its result back."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PAGE = """<!doctype html>
<meta charset="utf-8">
<script type="importmap">{"imports": %s}</script>
<script type="module">
async function tell(what) { await fetch('/result', { method: 'POST', body: JSON.stringify(what) }); }
addEventListener('error', (event) => tell({ error: `${event.message} ${event.filename}:${event.lineno}` }));
addEventListener('unhandledrejection', (event) => tell({ error: String(event.reason?.stack ?? event.reason) }));
const { default: work } = await import('/work.mjs');
await tell({ found: await work() });
</script>
"""


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, *arguments: Any, made: Mapping[str, bytes], folders: Mapping[str, Path], told: Any) -> None:
        self.made, self.folders, self.told = made, folders, told
        super().__init__(*arguments)

    def do_GET(self) -> None:
        body = self.made.get(self.path)
        if body is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path == "/" else "text/javascript")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def translate_path(self, path: str) -> str:
        """`/packages/x` is x in the folder called `packages`; nothing else is served."""
        first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        root = self.folders.get(first)
        if root is None or ".." in rest.split("/"):
            return "/nonexistent"
        return str(root / rest)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


def chromium() -> str:
    """The browser's program; without one the test is skipped, in CI it fails."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        told = "Chromium is not installed: apt-get install chromium"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    return found


def visit(
    module: str, imports: Mapping[str, str], folders: Mapping[str, Path], profile: Path, seconds: int = 240
) -> Any:
    """What the default function of the JavaScript `module` returns on a page.

    Args:
        imports: the page's import map, name -> address.
        folders: what is served, first part of the address -> folder.
        profile: an empty folder for the browser's own files.
        seconds: how long the page may take.

    Raises:
        AssertionError: the page failed, or said nothing in time.
    """
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    made = {"/": (PAGE % json.dumps(imports)).encode(), "/work.mjs": module.encode()}
    handler = partial(_Handler, made=made, folders=folders, told=told)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    quiet = ("--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
    address = f"http://127.0.0.1:{server.server_port}/"
    log = profile / "browser.log"
    with log.open("wb") as output:
        browser = subprocess.Popen(
            [chromium(), "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}", address],
            stdout=output,
            stderr=output,
            start_new_session=True,  # it starts a dozen processes: they end together
        )
    try:
        result = told.get(timeout=seconds)
    except queue.Empty:
        raise AssertionError(
            f"The page said nothing in {seconds} s.\n{log.read_text(errors='replace')[-3000:]}"
        ) from None
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        server.shutdown()
        server.server_close()
    assert "error" not in result, result["error"]
    return result["found"]
