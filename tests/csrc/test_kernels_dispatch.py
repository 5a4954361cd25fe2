"""The tables that are built and chosen, and the symbols that a kernel file leaves in the binary."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeformer.engines.native.ir.weight import WEIGHT_TYPES

native = pytest.importorskip("edgeformer._native")
testing = native.testing
KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"


def test_isas_are_best_first_and_end_with_scalar() -> None:
    assert native.isas()[-1] == "scalar"
    assert [isa for isa in native.built_isas() if isa in native.isas()] == native.isas()
    assert testing.Table("").isa == native.isas()[0]


@pytest.mark.parametrize("isa", native.isas())
def test_a_named_isa_is_the_one_that_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert testing.Table(isa).isa == isa
    monkeypatch.setenv("EDGEFORMER_ISA", isa)
    assert testing.Table("").isa == isa


def test_weight_types_have_the_same_numbers_in_python() -> None:
    assert WEIGHT_TYPES == testing.WEIGHT_TYPES


def test_an_unknown_isa_is_refused_with_the_usable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = re.escape(", ".join(native.isas()))
    with pytest.raises(ValueError, match=f'isa is "sse9".*usable here: {usable}'):
        testing.Table("sse9")
    monkeypatch.setenv("EDGEFORMER_ISA", "sse9")
    with pytest.raises(ValueError, match=f'EDGEFORMER_ISA is "sse9".*usable here: {usable}'):
        testing.Table("")
    assert testing.Table("scalar").isa == "scalar", "an explicit name has precedence over the environment"


@pytest.mark.parametrize("name", ["scalar", "avx2", "avxvnni", "avx512vnni"])
def test_a_kernel_file_exports_one_symbol(name: str, tmp_path: Path) -> None:
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if not compiler or not nm:
        pytest.skip("needs g++ and nm")
    out = tmp_path / "k.o"
    # -O1 compiles fast and still shows a std:: function
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fPIC", f"-I{KERNELS.parent}"]
    subprocess.run([compiler, *flags, "-c", next(KERNELS.rglob(f"{name}.cpp")), "-o", out], check=True)
    symbols = subprocess.run(
        [nm, "-C", "--defined-only", "--extern-only", out], check=True, capture_output=True, text=True
    )
    names = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
    if not names and name != "scalar":
        pytest.skip(f"{name} is not for this machine's architecture")
    assert len(names) == 1, names
    assert re.match(rf"edgeformer::kernels_{name}\(", names[0])


@pytest.mark.parametrize("path", sorted(path for path in KERNELS.rglob("*") if path.is_file()), ids=lambda p: p.name)
def test_kernel_files_use_no_std(path: Path) -> None:
    code = re.sub(r"//.*", "", path.read_text())
    assert "std::" not in code, "the linker may keep the copy that a target region compiled, and use it on all CPUs"


def test_the_extension_does_not_load_torch_or_onnxruntime() -> None:
    code = "import sys, edgeformer._native; sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
