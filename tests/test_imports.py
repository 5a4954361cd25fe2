"""The two halves: what ships to a device is light, and never imports the toolchain."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgeformer

PACKAGE = Path(edgeformer.__file__).parent
HEAVY = ("torch", "onnxruntime", "onnx", "jinja2", "tokenizers", "transformers", "typer", "rich")
TOOLCHAIN = (
    "torch",
    "transformers",
    "onnxscript",
    "onnx_ir",
    "accelerate",
    "safetensors",
    "gguf",
    "matplotlib",
    "peft",
)


def _python(code, *arguments):
    done = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _loaded(code):
    out = _python(f"{code}\nimport sys, json\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))")
    return set(json.loads(out.splitlines()[-1]))


def test_import_loads_nothing_heavy():
    assert not _loaded("import edgeformer") & {*HEAVY, "numpy"}


def test_import_costs_less_than_50_ms_beyond_numpy():
    code = (
        "import time, numpy\nstart = time.process_time()\nimport edgeformer, edgeformer.errors\n"
        "print(time.process_time() - start)"
    )
    assert min(float(_python(code)) for _ in range(5)) < 0.05


def test_running_a_bundle_loads_no_toolchain(lm):
    loaded = _loaded(
        f"import edgeformer\nmodel = edgeformer.load({str(lm)!r}, 'cpu', 1)\n"
        "model.generate([{'role': 'user', 'content': 'hi'}], max_new_tokens=3)"
    )
    assert not loaded & set(TOOLCHAIN)
    assert {"onnxruntime", "tokenizers", "jinja2"} <= loaded  # or the test above ran nothing


def test_token_ids_need_neither_tokenizers_nor_jinja2(bundles):
    plain = str(bundles / "plain")
    loaded = _loaded(f"import edgeformer\nedgeformer.load({plain!r}, 'cpu', 1).generate([5, 6], max_new_tokens=3)")
    assert not loaded & {"tokenizers", "jinja2", "typer", "rich"}


def test_without_any_onnxruntime_the_package_imports_and_explains(lm):
    code = (
        "import sys\nsys.modules['onnxruntime'] = None\nimport edgeformer\n"
        f"bundle = edgeformer.Bundle.open({str(lm)!r})\n"
        f"try:\n    edgeformer.load({str(lm)!r}, 'cpu')\n"
        "except edgeformer.EngineUnavailable as error:\n    print(error)"
    )
    assert "onnxruntime is" in _python(code)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


RUNTIME = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not {"export", "train", "models"} & set(path.relative_to(PACKAGE).parts[:1])
)


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_runtime_never_imports_the_toolchain(path):
    forbidden = (*TOOLCHAIN, "edgeformer.export", "edgeformer.train", "edgeformer.models")
    for name in _imports(path):
        assert not any(name == bad or name.startswith(bad + ".") for bad in forbidden), name


def test_the_import_check_sees_an_import_of_the_toolchain():
    export = [name for path in (PACKAGE / "export").rglob("*.py") for name in _imports(path)]
    assert "torch" in export
