"""Instructions of the NEON linears under qemu-user, against a floor.

python -m bench.arm               builds, counts, writes bench/results/arm.json and the page; two minutes
python -m bench.arm --write-only  the page again, from the saved numbers

Needs gcc, aarch64-linux-gnu-g++ and objdump, qemu-aarch64 with plugins (Debian: gcc g++-aarch64-linux-gnu qemu-user).
The counts are exact and the same on every machine; they do not say how many a CPU executes in a cycle.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.peers.pages import PAGE
from bench.report import ROOT, footnote, put, runs, save, table
from edgeformer.engines.native.ir.weight import WEIGHT_TYPES

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = [*(CSRC / "kernels").rglob("*.cpp"), *(CSRC / "platform").glob("*.cpp"), CSRC / "engine" / "dispatch.cpp"]
SOURCES += [HERE / "linear.cpp"]
FLAGS = [
    f"-I{CSRC}",
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
]  # as setup.py has them
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = ("gcc", COMPILER, "aarch64-linux-gnu-objdump", "qemu-aarch64")
TARGET = 1.5  # instructions over the floor of dots alone
ONE_ROW_TARGET = 1.3  # instructions of one row over its floor
SAME = 1.001  # of two tables: GCC may place one instruction a panel elsewhere
ROWS = (1, 4, 8, 64)  # of activations

# weight type -> columns of its measured matrix, about SmolLM2-135M's 576: a wide block divides them.
BLOCKS = {"q4a": 32, "q4": 32, "q4x64": 64, "q8": 32, "q8x128": 128}  # weights that share a scale
COLUMNS = {"q4a": 576, "q4": 576, "q4x64": 576, "q8": 576, "q8x128": 640}
# The linears of one layer of SmolLM2-135M as the engine merges them, [rows, columns]: q, k, v; out; gate, up; down.
LAYER, LAYERS, HEAD = ((960, 576), (576, 576), (3072, 576), (576, 1536)), 30, (49152, 576)
MODELS = (  # name, weight type of the layers, of the head
    ("kept (q4a, q8 head)", "q4a", "q8"),
    ("q4, q4 head", "q4", "q4"),
    ("q4, blocks of 64, q4 head", "q4x64", "q4x64"),
)
PREFILL = 64  # rows: every tile is unpacked once for all of them, so 512 rows only spread the unpacking thinner

# An instruction's kind by its mnemonic; `kind` corrects it by the operands.
KINDS = {
    "dots": "sdot smmla usdot",
    "unpacking": "and ushr eor zip1 zip2",
    "to float, scales": "scvtf fmul fmla fcvtl fcvtl2 fadd uzp1 uzp2",
    "loads, stores": "ldr ldp ldur ld1 ld1r ld2 str stp stur st1 ldrb ldrh ldrsw ldpsw ldrsb",
    "prefetch": "prfm prfum",
    "moves": "mov fmov dup movi ins sshr umov smov mvni",
}
ORDER = ("dots", "unpacking", "to float, scales", "loads, stores", "spills", "moves", "prefetch", "addresses, loops")
BY_MNEMONIC = {mnemonic: name for name, words in KINDS.items() for mnemonic in words.split()}


def kind(mnemonic: str, operands: str) -> str:
    """What an instruction is for.

    Loads and stores relative to sp are spills: the kernels' own buffers are reached through other registers. Moves,
    ands and shifts of general registers are addresses and loops.
    """
    found = BY_MNEMONIC.get(mnemonic, "addresses, loops")
    if found == "loads, stores" and "[sp" in operands:
        return "spills"
    if mnemonic == "add" and operands.startswith("v"):
        return "to float, scales"  # q4's centring: + (-8 * sum of x)
    if mnemonic == "sub" and operands.startswith("v"):
        return "unpacking"  # q4's centring, once a tile
    if found in ("unpacking", "moves", "to float, scales") and not re.search(r"\b[vqds]\d", operands):
        return "addresses, loops"
    return found


def disassemble(program: Path) -> dict[int, tuple[str, str]]:
    """address -> (mnemonic, operands)."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(program)]
    return parse_disassembly(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_disassembly(text: str) -> dict[int, tuple[str, str]]:
    lines = re.finditer(r"^\s+([0-9a-f]+):\t(\S+)[ \t]*(.*)$", text, re.MULTILINE)
    return {int(found[1], 16): (found[2], found[3]) for found in lines}


def build_plugin(folder: Path) -> Path:
    plugin = folder / "libcount.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(HERE / "count.c"), "-o", str(plugin)], check=True)
    return plugin


def build(folder: Path) -> tuple[Path, Path]:
    """(the program, the plugin).

    Raises:
        SystemExit: a tool is missing.
    """
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed; see `python -m bench.arm --help`")
    plugin, program = build_plugin(folder), folder / "linear"

    def compiled(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *FLAGS, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run([COMPILER, "-static", "-no-pie", "-pthread", *objects, "-o", str(program)], check=True)
    return program, plugin


def run(program: Path, plugin: Path, arguments: list[str]) -> dict[int, int]:
    """address -> number of executions."""
    out = program.with_name("counts")
    command = ["qemu-aarch64", "-cpu", "max", "-plugin", f"{plugin},out={out}", str(program), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    pairs = (line.split() for line in out.read_text().splitlines())
    return {int(address, 16): int(count) for address, count in pairs}


def one_call(once: dict[int, int], twice: dict[int, int]) -> dict[int, int]:
    """The instructions of the second call: everything else is executed once in both runs."""
    found = {address: count - once.get(address, 0) for address, count in twice.items()}
    return {address: count for address, count in found.items() if count}


def measure(places: tuple[Path, Path], listing: dict[int, tuple[str, str]], isa: str, scheme: str, shape: Any) -> Any:
    """{kind: instructions} of one call over `shape`: [rows of weights, columns, rows of activations]."""
    runs = [run(*places, [isa, str(WEIGHT_TYPES.index(scheme)), *map(str, shape), str(repeats)]) for repeats in (1, 2)]
    kinds: Counter[str] = Counter()
    for address, count in one_call(*runs).items():
        kinds[kind(*listing[address])] += count
    return dict(kinds)


def floor(isa: str, rows: int, columns: int, m: int) -> int:
    """The fewest dot instructions: SMMLA does 32 multiply-adds where there are two rows for it, SDOT 16.

    Weights are padded to panels of 16 rows and blocks of 32 columns.
    """
    macs = -(-rows // 16) * 16 * -(-columns // 32) * 32
    pairs = m - m % 2 if isa == "neon_i8mm" else 0
    return macs * pairs // 32 + macs * (m - pairs) // 16


def one_row_floor(scheme: str) -> float:
    """Instructions for each SDOT that one row of activations needs at least, on both tables.

    A tile of 16 rows of weights and one block of `columns` takes as many SDOT as it has columns. It needs four zeros to
    start from, four conversions of the sums, four products of the scales and four multiply-adds, and four conversions
    of the weights' scales from float16; for q4a four conversions and four multiply-adds more, for the minima. Loads
    take 64 bytes each at most: of the weights, the scales (32 bytes), the minima, the row, and one of its scale.
    Nibbles take one instruction for each SDOT; the bytes of q8 none.
    """
    columns = BLOCKS[scheme]
    minima = scheme == "q4a"
    weights = columns * (8 if scheme.startswith("q4") else 16)
    loads = weights / 64 + 1 + minima + -(-columns // 64) + 1
    unpacking = columns if scheme.startswith("q4") else 0
    return (columns + unpacking + 20 + 8 * minima + loads) / columns


def comparisons(kernels: list[dict[str, Any]]) -> list[str]:
    """What the counts say of one row beside its floor, and of neon_i8mm beside neon_dotprod."""
    totals = {(row["isa"], row["scheme"], row["rows"]): sum(row["kinds"].values()) for row in kernels}
    rows: list[list[str]] = []
    ratios: list[float] = []
    for row in kernels:
        if row["rows"] == 1:
            counted, least = sum(row["kinds"].values()) / row["floor"], one_row_floor(row["scheme"])
            ratios.append(counted / least)
            rows.append([row["isa"], row["scheme"], f"{counted:.2f}", f"{least:.2f}", f"x {ratios[-1]:.2f}"])
    reached = sum(ratio <= ONE_ROW_TARGET for ratio in ratios)
    pairs = {
        key[1:]: total / totals["neon_dotprod", *key[1:]] for key, total in totals.items() if key[0] != "neon_dotprod"
    }
    no_more = sum(ratio <= SAME for ratio in pairs.values())
    return [
        "**One row (decoding)**, instructions for each SDOT, beside the least that the format needs with its loads and "
        f"the widening of its scales (`one_row_floor` derives it): {reached} of {len(ratios)} cases are within "
        f"{ONE_ROW_TARGET} of this floor.",
        table(["table", "weights", "instructions", "floor", ""], rows),
        "**neon_i8mm beside neon_dotprod**, instructions for the same product: no more of them (within 0.1 %) in "
        f"{no_more} of {len(pairs)} cases.",
        table(
            ["weights", *(f"{m} rows" if m > 1 else "1 row" for m in ROWS)],
            [
                [scheme, *(f"x {pairs[scheme, m]:.3f}" if (scheme, m) in pairs else "" for m in ROWS)]
                for scheme in COLUMNS
            ],
        ),
    ]


def count_all(folder: Path) -> dict[str, Any]:
    places = build(folder)
    listing = disassemble(places[0])
    kernels, tokens = [], []
    for isa in ("neon_dotprod", "neon_i8mm"):
        for scheme, columns in COLUMNS.items():
            for m in ROWS:
                shape = (960, columns, m)
                kinds, least = measure(places, listing, isa, scheme, shape), floor(isa, *shape)
                kernels.append({"isa": isa, "scheme": scheme, "rows": m, "floor": least, "kinds": kinds})
    for name, scheme, head in MODELS:
        for isa, m in itertools.product(("neon_dotprod", "neon_i8mm"), (1, PREFILL)):
            total = least = 0.0
            for shape in LAYER:
                total += LAYERS * sum(measure(places, listing, isa, scheme, (*shape, m)).values()) / m
                least += LAYERS * floor(isa, *shape, m) / m
            if m == 1:  # a prompt needs the head for its last token only; all panels cost the same: measure a sixteenth
                total += 16 * sum(measure(places, listing, isa, head, (HEAD[0] // 16, HEAD[1], 1)).values())
                least += floor(isa, *HEAD, 1)
            tokens.append({"model": name, "isa": isa, "rows": m, "floor": round(least), "instructions": round(total)})
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return {"compiler": version, "kernels": kernels, "tokens": tokens}


def text(saved: dict[str, Any]) -> str:
    """The block of docs/performance.md."""
    rows = []
    for row in saved["kernels"]:
        total = sum(row["kinds"].values())
        cells = [f"{row['kinds'].get(name, 0) / row['floor']:.2f}" for name in ORDER]
        rows.append([row["isa"], row["scheme"], str(row["rows"]), f"**{total / row['floor']:.2f}**", *cells])
    tokens = []
    for row in saved["tokens"]:
        what = "decoding" if row["rows"] == 1 else f"prompt, {row['rows']} rows, no head"
        ratio = row["instructions"] / row["floor"]
        numbers = [f"{row[name] / 1e6:.1f} M" for name in ("instructions", "floor")]
        tokens.append([row["model"], what, row["isa"], *numbers, f"x {ratio:.2f}"])
    worst = [sum(row["kinds"].values()) / row["floor"] for row in saved["kernels"]]
    reached = sum(ratio <= TARGET for ratio in worst)
    return "\n\n".join(
        [
            table(["table", "weights", "rows", "all", *ORDER], rows),
            f"{reached} of {len(worst)} cases are within {TARGET} of the floor.",
            *comparisons(saved["kernels"]),
            "Linears of SmolLM2-135M, instructions a token:",
            table(["weights", "", "table", "instructions", "floor", ""], tokens),
            f"{saved['compiler']}, `{' '.join(FLAGS[2:-1])}`. {footnote(saved['machine'])}",
        ]
    )


def write() -> None:
    put(PAGE, "arm", text(runs("arm")[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.arm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")
    if not parser.parse_args().write_only:
        with tempfile.TemporaryDirectory() as folder:
            save("arm", count_all(Path(folder)), counts=True)
    write()


if __name__ == "__main__":
    main()
