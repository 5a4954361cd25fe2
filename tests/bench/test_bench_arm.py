"""Counting instructions on ARM: what is counted, sorted and shown."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.peer_results import saved

from bench.arm import __main__ as arm
from bench.report import runs

# -- instructions on ARM

LISTING = """
linear:     file format elf64-littleaarch64

0000000000400580 <main>:
  400580:\tsdot\tv20.4s, v1.16b, v2.4b[0]
  400584:\tldr\tq3, [x1, #16]
  400588:\tstr\tq3, [sp, #32]
  40058c:\tand\tv1.16b, v2.16b, v3.16b
  400590:\tand\tx1, x2, #0xf
  400594:\tadd\tv1.4s, v1.4s, v2.4s
  400598:\tb.lt\t400580 <main>
  40059c:\tmov\tv1.16b, v2.16b
  4005a0:\tret
"""


def test_an_instruction_is_sorted_by_what_it_is_for() -> None:
    kinds = [arm.kind(*found) for found in arm.parse_disassembly(LISTING).values()]
    rest = "addresses, loops"
    scaled = "to float, scales"
    assert kinds == ["dots", "loads, stores", "spills", "unpacking", rest, scaled, rest, "moves", rest]
    assert set(kinds) <= set(arm.ORDER)


def test_only_what_the_second_call_ran_is_counted() -> None:
    assert arm.one_call({4: 10, 8: 7}, {4: 16, 8: 7, 12: 2}) == {4: 6, 12: 2}


def test_the_floor_is_the_number_of_dot_products() -> None:
    assert arm.floor("neon_dotprod", 16, 32, 1) == 32
    assert arm.floor("neon_dotprod", 17, 33, 1) == 128  # a panel and a block begun are done whole
    assert arm.floor("neon_i8mm", 16, 32, 64) == 64 * 16
    assert arm.floor("neon_i8mm", 16, 32, 3) == 32 + 32  # two rows by SMMLA, the third by SDOT


def test_the_floor_of_one_row_counts_what_its_weights_need() -> None:
    # 32 SDOT, 16 for the sums, 4 scales widened; 8 loads of weights, 3 of scales and the row
    assert arm.one_row_floor("q8") == (32 + 20 + 8 + 3) / 32
    assert arm.one_row_floor("q4a") == (32 + 32 + 28 + 4 + 4) / 32  # 32 nibbles


def test_the_counts_are_near_their_floors() -> None:
    kernels = runs("arm")[0]["kernels"]
    totals = {(row["isa"], row["scheme"], row["rows"]): sum(row["kinds"].values()) for row in kernels}
    ones = [row for row in kernels if row["rows"] == 1]
    assert len(ones) == 2 * len(arm.BLOCKS)
    for row in ones:
        counted = totals[row["isa"], row["scheme"], 1] / row["floor"]
        assert counted <= arm.ONE_ROW_TARGET * arm.one_row_floor(row["scheme"])
    for (isa, scheme, count), total in totals.items():
        assert isa != "neon_i8mm" or total <= arm.SAME * totals["neon_dotprod", scheme, count]


def test_the_counted_program_still_compiles() -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    subprocess.run(["g++", *arm.FLAGS, "-fsyntax-only", str(arm.HERE / "linear.cpp")], check=True)


def test_the_plugin_counts_every_instruction(tmp_path: Path) -> None:
    missing = [tool for tool in arm.TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    source, program = tmp_path / "loop.cpp", tmp_path / "loop"
    source.write_text(
        "#include <cstdlib>\n"
        "int main(int, char** v) {\n"
        '  for (int i = std::atoi(v[1]); i; i--) asm volatile("sdot v0.4s, v1.16b, v2.16b" ::: "v0");\n'
        "}\n"
    )
    flags = ["-O1", "-static", "-no-pie", "-march=armv8.2-a+dotprod"]
    subprocess.run([arm.COMPILER, *flags, str(source), "-o", str(program)], check=True)
    listing, plugin = arm.disassemble(program), arm.build_plugin(tmp_path)
    counts = arm.run(program, plugin, ["12345"])
    assert sum(count for address, count in counts.items() if listing[address][0] == "sdot") == 12345
    more = arm.one_call(counts, arm.run(program, plugin, ["12346"]))
    assert sum(count for address, count in more.items() if listing[address][0] == "sdot") == 1


def test_the_instructions_are_shown_for_each_of_the_floor() -> None:
    kernel = {"isa": "neon_dotprod", "scheme": "q4", "rows": 64, "floor": 100}
    one = {"isa": "neon_dotprod", "scheme": "q8", "rows": 1, "floor": 100}
    numbers = saved() | {
        "compiler": "g++ 1",
        "kernels": [
            kernel | {"kinds": {"dots": 100, "spills": 45}},
            kernel | {"kinds": {"dots": 100, "moves": 60}},
            kernel | {"isa": "neon_i8mm", "floor": 50, "kinds": {"dots": 50, "moves": 79}},
            one | {"kinds": {"dots": 100, "moves": 150}},
            one | {"isa": "neon_i8mm", "kinds": {"dots": 100, "moves": 160}},
        ],
        "tokens": [{"model": "m", "isa": "neon_dotprod", "rows": 1, "floor": 8e6, "instructions": 10e6}],
    }
    numbers["machine"]["versions"] = {}
    text = arm.text(numbers)
    assert "| neon_dotprod | q4 | 64 | **1.45** | 1.00 | 0.00 | 0.00 | 0.00 | 0.45 |" in text
    assert "1 of 5 cases are within 1.5" in text
    assert "| neon_dotprod | q8 | 2.50 | 1.97 | x 1.27 |" in text
    assert "1 of 2 cases are within 1.3 of this floor" in text
    assert "(within 0.1 %) in 1 of 2 cases" in text
    assert "| q8 | x 1.040 |  |  |  |\n" in text and "| q4 |  |  |  | x 0.806 |\n" in text
    assert "| m | decoding | neon_dotprod | 10.0 M | 8.0 M | x 1.25 |" in text
