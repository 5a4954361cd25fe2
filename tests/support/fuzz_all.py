"""Runs fuzz targets one after another, each in a process of its own, and keeps what they did.

    python -m support.fuzz_all SECONDS [TARGET ...]    writes bench/results/fuzz.json and docs/security.md
    python -m support.fuzz_all planted                 the planted defects alone

Needs atheris, and for the targets of the C++ module its build of `EDGEFORMER_SANITIZE=fuzz` in build/sanitize/fuzz
(`make fuzz` makes both). Ends with 1 where an input ended with an exception or a sanitizer's report; the input is then
in out/fuzz/TARGET. The numbers are libFuzzer's: inputs run, and the edges of the code that it counts, reached of all.

First it plants two defects in a target (`PLANTED`), built and run as the others are: a write behind the end of an array
in C++, and an untyped error. If one is not found, nothing is fuzzed.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import fuzz_native, fuzz_targets

from bench.report import ROOT, footnote, put, runs, save, table

SANITIZED = ROOT / "build" / "sanitize" / "fuzz"
FLAGS = ["-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=undefined"]  # as setup.py has
START = 600  # seconds that a target may take to begin, under the sanitizers on a busy machine


PLANTED = {
    "write": (
        "import ctypes\nplanted = ctypes.CDLL({library!r}).planted\n"
        "planted.argtypes = [ctypes.c_char_p, ctypes.c_size_t]\n"
        "def target(data):\n    planted(data, len(data))\n",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "error": (
        "def target(data):\n    if len(data) > 3:\n        raise KeyError('planted')\n",
        "KeyError: 'planted'",
    ),
}
WRITE = """
#include <cstdlib>
extern "C" void planted(const char* data, std::size_t length) {
    volatile char* copy = static_cast<char*>(std::malloc(length));
    for (std::size_t i = 0; i <= length; ++i) copy[i] = i < length ? data[i] : 0;  // one too many
    std::free(const_cast<char*>(copy));
}
"""
RUN_PLANTED = """
import sys, atheris
sys.argv[1:] = []
{target}
atheris.Setup([sys.argv[0], "-runs=1000", "-artifact_prefix={place}/"], target)
atheris.Fuzz()
"""


def missed(flags: list[str] = FLAGS) -> list[str]:
    """The planted defects that a run of libFuzzer with the sanitizers does not find. `flags` are those of setup.py."""
    found = []
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        library = Path(name) / "planted.so"
        source = library.with_suffix(".cpp")
        source.write_text(WRITE)
        built = ["clang++", "-O1", "-g1", "-fPIC", *flags, "-c", str(source), "-o", f"{source}.o"]
        subprocess.run(built, check=True)
        subprocess.run(["clang++", "-shared", f"{source}.o", "-o", str(library)], check=True)
        for defect, (target, words) in PLANTED.items():
            code = RUN_PLANTED.format(target=target.format(library=str(library)), place=name)
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=START
            )
            if done.returncode == 0 or words not in done.stdout + done.stderr:
                found.append(f"{defect}: {(done.stdout + done.stderr)[-2000:]}")
    return found


def environment(name: str | None = None) -> dict[str, str]:
    """The variables of a target's process; the C++ module's targets find the sanitized one first. None: any library."""
    import atheris

    found = {**os.environ, "EDGEFORMER_CACHE": "", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if name is None or name in fuzz_native.TARGETS:
        if name is not None and not list((SANITIZED / "edgeformer").glob("_native*")):
            raise SystemExit(f"{SANITIZED} has no C++ module; `make fuzz` builds it")
        paths.insert(0, str(SANITIZED))
        # The sanitizers' code comes from atheris' library. Python does not free all memory.
        found["LD_PRELOAD"] = str(Path(atheris.path()) / "asan_with_fuzzer.so")
        found["ASAN_OPTIONS"] = "detect_leaks=0"
        found["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1"
    return {**found, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def numbers(output: str) -> dict[str, int]:
    """What libFuzzer prints at the end of a run.

    Raises:
        ValueError: the run never began.
    """
    done = re.findall(r"^#(\d+)\s+[A-Z]+\s+(?:cov: (\d+))?", output, re.MULTILINE)
    runs_at_end = re.search(r"number_of_executed_units: (\d+)", output)
    if not done:
        raise ValueError(f"no run of libFuzzer: {output[-2000:]}")
    edges = sum(int(count) for count in re.findall(r"\((\d+) inline 8-bit counters\)", output))
    return {
        "runs": int(runs_at_end[1] if runs_at_end else done[-1][0]),
        "reached": int(done[-1][1] or 0),
        "edges": edges,
    }


def fuzz(name: str, seconds: int) -> dict[str, Any]:
    """One target's result: {target, seconds, runs, reached, edges, findings, date}."""
    place = ROOT / "out" / "fuzz" / name
    before = set(place.glob("*"))
    command = [sys.executable, "-m", "support.fuzz", name, str(seconds), str(place)]
    done = subprocess.run(
        command, env=environment(name), capture_output=True, text=True, errors="replace", timeout=seconds + START
    )
    found = sorted(set(place.glob("*")) - before)
    if done.returncode or found:
        print(done.stderr[-6000:], file=sys.stderr)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    facts = {"target": name, "seconds": seconds, **numbers(done.stderr)}
    return {**facts, "findings": max(len(found), int(done.returncode != 0)), "date": today}


def _edges(one: dict[str, Any]) -> str:
    """How many edges of Python code there are is not known before they run; no line where libFuzzer counted none."""
    if not one["reached"]:
        return "not counted"
    return f"{one['reached']:,}" + (f" of {one['edges']:,}" if one["edges"] else "")


def page(run: dict[str, Any]) -> str:
    """The block of docs/security.md."""
    rows = [
        [f"`{one['target']}`", str(one["seconds"]), f"{one['runs']:,}", _edges(one),
         str(one["findings"]), one["date"]]
        for one in run["targets"]
    ]  # fmt: skip
    header = ["target", "seconds", "inputs", "edges reached", "findings", "date"]
    return table(header, rows) + "\n\n" + footnote(run["machine"])


def main(arguments: list[str]) -> int:
    if unseen := missed():
        raise SystemExit("planted defects were not found:\n" + "\n".join(unseen))
    print(f"planted defects found: {', '.join(PLANTED)}", flush=True)
    if arguments == ["planted"]:
        return 0
    order = [*fuzz_targets.TARGETS, *fuzz_native.TARGETS]
    names = arguments[1:] or order
    kept = {one["target"]: one for run in runs("fuzz")[:1] for one in run["targets"]}
    findings = 0
    for name in names:
        kept[name] = fuzz(name, int(arguments[0]))
        findings += kept[name]["findings"]
        print(kept[name], flush=True)
        save("fuzz", {"targets": [kept[known] for known in order if known in kept]})
    put(ROOT / "docs" / "security.md", "fuzz", page(runs("fuzz")[0]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
