"""bench.imports: a fresh process tells what an import brings in."""

from __future__ import annotations

import json
import subprocess
import sys

from bench import imports


def test_the_import_of_this_system_is_measured_and_has_a_line() -> None:
    name, run = next(imports.systems())
    found = imports.measured(run, 2)
    assert 0 < found["package"]["min"] < found["load"]["min"]
    assert found["packages"] == ["numpy", "platformdirs"]
    saved = {"systems": {name: found}, "machine": {"cpu": "a cpu", "system": "a", "versions": {}, "date": "2026-01-01"}}
    assert f"| {found['modules']} | numpy, platformdirs |" in imports.text(saved)


def test_what_else_is_imported_would_be_named() -> None:
    probe = imports.PROBE.replace("import edgeformer\n", "import edgeformer, jinja2\n")
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True, cwd=imports.ROOT)
    assert "jinja2" in json.loads(done.stdout)["packages"]
