"""Pictures of the chat page for docs/serving.md, with the answers of a real model.

python -m bench.page_pictures BUNDLE     serves the bundle, asks it, writes docs/images/page-*.png

Needs node, npm and chromium; playwright-core is installed from npm into out/pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.report import ROOT

IMAGES = ROOT / "docs" / "images"
PLAYWRIGHT = "playwright-core@1.65.1"
LARGEST = 150_000  # bytes of a picture
QUESTIONS = (
    {"text": "Give me a short packing list for a weekend by the sea.", "newChat": True},
    {"text": "Write a Python function that counts the vowels of a word. Show how to call it.", "newChat": True},
    {"text": "What is a transformer in machine learning? Answer in two sentences.", "newChat": False},
)


def serve(bundle: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The process of a server of the bundle under the name `smollm2`, and its address.

    Raises:
        SystemExit: it ended.
    """
    command = [sys.executable, "-m", "edgeformer", "serve", f"smollm2={bundle}", "--port", "0", "--preload"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, cwd=ROOT)
    while (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())) is None:
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        raise SystemExit(f"The server ended: {log.read_text()}")
    return process, found[1]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or shutil.which("npm") is None:
        raise SystemExit("This needs chromium, node and npm: apt-get install chromium nodejs npm")
    place = ROOT / "out" / "pictures"
    place.mkdir(parents=True, exist_ok=True)
    (place / "package.json").write_text('{"private": true, "type": "module"}')
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PLAYWRIGHT], cwd=place, check=True)
    script = shutil.copy(ROOT / "bench" / "page_pictures.mjs", place)  # packages are looked up from where it lies
    process, address = serve(bundle, place / "server.log")
    try:
        environment = {**os.environ, "QUESTIONS": json.dumps(QUESTIONS)}
        subprocess.run(["node", script, browser, address, str(IMAGES)], env=environment, check=True)
    finally:
        process.terminate()
        process.wait()
    for path in sorted(IMAGES.glob("page-*.png")):
        size = path.stat().st_size
        print(f"{path.relative_to(ROOT)}  {size:,} bytes")
        if size > LARGEST:
            raise SystemExit(f"{path.name} has more than {LARGEST:,} bytes.")


if __name__ == "__main__":
    main()
