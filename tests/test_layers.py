"""The layers: each package imports only what the table allows. docs/architecture.md shows them in one picture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeformer

ROOT = Path(edgeformer.__file__).parent.parent
BASE = "errors machine threads files disk_cache"
RUNTIME = f"{BASE} bundle processing engines decoding"

# package or module -> what it may import beside itself. The entry with the longest name that fits a module counts.
ALLOWED = {
    "errors": "",
    "machine": "",
    "files": "machine",
    "threads": "errors",
    "disk_cache": "machine threads",
    "bundle": BASE,
    "processing": f"{BASE} bundle",
    "engines": f"{BASE} bundle",
    "engines.native.ir": f"{BASE} bundle",
    "engines.native.passes": f"{BASE} bundle engines.native.ir",
    "engines.native.program": f"{BASE} bundle engines.native.ir engines.native.passes engines.native.options "
    "engines.in_flight",
    "decoding": f"{BASE} bundle processing engines",
    "tasks": RUNTIME,
    "model": f"{RUNTIME} tasks",
    "": f"{RUNTIME} tasks model",  # edgeformer/__init__.py
    "tools": f"{RUNTIME} tasks model _native",
    "server": f"{RUNTIME} tasks model",
    "cli": f"{RUNTIME} tasks model tools server _native",
    "__main__": "cli",
    # the toolchain
    "models": "errors",
    "train": "errors models engines.options",
    "train.__main__": "errors models engines.options cli",
    "export": f"{RUNTIME} models",
    "export.__main__": f"{RUNTIME} models cli",
}

# The floors of the toolchain's main package, the lowest first; modules of one floor may import each other.
EXPORT_FLOORS = (
    "options progress quiet scratch short_collections interrupts sizes inputs blocks source positions",
    "trace",
    "passes",
    "check",
    "quantize",
    "graphs",
    "sources",
    "write engine_gate cache_choice pipeline",
    "__main__ __init__",
)

# csrc: folder -> the folders that it may include from
CPP_ALLOWED = {
    "platform": "",
    "kernels": "",
    "program": "kernels platform",
    "ops": "program kernels platform",
    "engine": "ops program kernels platform",
    "bindings": "engine ops program kernels platform",
}


def module_of(path: Path) -> str:
    """`edgeformer/bundle/check.py` -> "bundle.check"; `edgeformer/bundle/__init__.py` -> "bundle"."""
    parts = path.relative_to(ROOT / "edgeformer").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in (ROOT / "edgeformer").rglob("*.py")}


def imports(source: str) -> Iterator[str]:
    """The modules of this package that `source` imports anywhere, also for type checkers only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "edgeformer" or name.startswith("edgeformer."):
                name = name.removeprefix("edgeformer").removeprefix(".")
                while name not in MODULES and name.rpartition(".")[2] != "_native" and name:
                    name = name.rpartition(".")[0]
                yield name


def is_in(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies in it."""
    return module == package or (bool(package) and module.startswith(package + "."))


def row(module: str) -> str:
    """The entry of ALLOWED that counts for `module`."""
    return max((name for name in ALLOWED if is_in(module, name)), key=len)


def forbidden(module: str, source: str) -> list[str]:
    """The imports of `source`, as the module of that name, that the table does not allow."""
    own = row(module)
    allowed = [*ALLOWED[own].split(), own.partition(".__main__")[0], "_native"]
    return [name for name in imports(source) if name and not any(is_in(name, package) for package in allowed)]


def export_floor(module: str) -> int | None:
    """The floor of a module of the export; None for the others."""
    if not is_in(module, "export"):
        return None
    name = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, names in enumerate(EXPORT_FLOORS) if name in names.split())


def upward(module: str, source: str) -> list[str]:
    """The imports of a module of the export from a higher floor of it."""
    own = export_floor(module)
    if own is None:
        return []
    return [name for name in imports(source) if (floor := export_floor(name)) is not None and floor > own]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_layer_allows(module: str) -> None:
    source = MODULES[module].read_text()
    assert not forbidden(module, source)
    assert not upward(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bundle.check", "from edgeformer.engines.base import Engine"),
        ("engines.native.ir.graph", "def f():\n    from edgeformer.engines.native.passes import attention"),
        ("decoding.scheduler", "import edgeformer.tasks.embedding"),
        ("processing.audio", "from edgeformer import model"),
        ("model", "from edgeformer.export import export"),
        ("export.pipeline", "from edgeformer.cli import exit_code"),
    ],
)
def test_an_import_of_a_higher_layer_is_seen(module: str, source: str) -> None:
    assert forbidden(module, source)


def test_an_import_of_a_higher_floor_of_the_export_is_seen() -> None:
    assert upward("export.trace.trace", "from edgeformer.export.passes import edit")
    assert not upward("export.passes.edit", "from edgeformer.export.trace import trace")


def test_nothing_but_the_face_lies_at_the_root() -> None:
    names = {path.name for path in (ROOT / "edgeformer").iterdir() if path.suffix == ".py"}
    assert names == {
        "__init__.py",
        "__main__.py",
        "model.py",
        "errors.py",
        "machine.py",
        "files.py",
        "disk_cache.py",
        "threads.py",
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The circles of imports between modules: each strongly connected part of more than one."""
    found: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:  # Tarjan, SIAM Journal on Computing 1 (1972)
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges.get(module, ()):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            part = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(part) > 1:
                found.append(sorted(part))

    for module in edges:
        if module not in index:
            visit(module)
    return found


def test_modules_import_each_other_in_no_circle() -> None:
    lazy = {"", "export", "engines.native"}  # packages that load their names when these are first used
    edges = {
        module: {name for name in imports(path.read_text()) if name not in lazy and name != module}
        for module, path in MODULES.items()
        if module not in lazy
    }
    assert not circles(edges)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def cpp_includes(source: str) -> Iterator[str]:
    """The folders of csrc that a C++ file includes from."""
    for line in source.splitlines():
        if line.startswith('#include "'):
            yield line.split('"')[1].split("/")[0]


@pytest.mark.parametrize("folder", CPP_ALLOWED)
def test_a_cpp_file_includes_what_its_layer_allows(folder: str) -> None:
    files = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.suffix in (".cpp", ".h", ".inl")]
    assert files
    for path in files:
        extra = set(cpp_includes(path.read_text())) - {folder, *CPP_ALLOWED[folder].split()}
        assert not extra, path


def test_an_include_of_a_higher_layer_is_seen() -> None:
    assert set(cpp_includes('#include "engine/engine.h"\n#include <vector>\n')) == {"engine"}
