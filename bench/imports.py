"""What `import edgeformer` takes, and what it brings in, on the systems that this machine can run.

    PYTHONPATH=.:tests EDGEFORMER_TEST_WHEELS=1 python -m bench.imports    # measures; docs/platforms.md
    python -m bench.imports --write-only                                   # the page again, from the saved numbers

Windows' CPython runs under Wine and arm64's under QEMU, with the wheels of `make check-wheels`; where Wine or QEMU is
missing, their lines are left out. Each import is one of a fresh process whose files are in the page cache; the median
of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench.report import ROOT, footnote, put, runs, save, summary, table

PAGE = ROOT / "docs" / "platforms.md"
PROBE = """
import json, sys, time
before, began = set(sys.modules), time.perf_counter()
import edgeformer
first = time.perf_counter()
edgeformer.load
seconds = first - began, time.perf_counter() - began
new = set(sys.modules) - before
others = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) - {"edgeformer", "cython_runtime"}
print(json.dumps({"seconds": seconds, "modules": len(new), "packages": sorted(n for n in others if n[0] != "_"),
                  "python": sys.version.split()[0]}))
"""
Run = Callable[[], str]


def systems() -> Iterator[tuple[str, Run]]:
    """(the system, a function that runs PROBE there in a fresh process and gives what it prints)."""

    def here() -> str:
        command = [sys.executable, "-c", PROBE]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    yield "Linux x86-64", here
    from _pytest.outcomes import OutcomeException
    from support.arm64 import Arm64
    from support.wine import Windows

    for name, make, before in (
        ("Windows x86-64, under Wine", Windows, ()),
        ("Linux aarch64, under QEMU", Arm64, ("max,sve=off,pauth-impdef=on",)),
    ):
        try:
            system = make()
        except OutcomeException as error:  # what is missing, as a test would tell
            print(f"{name}: {error}", file=sys.stderr)
            continue
        yield name, lambda system=system, before=before: system.run(*before, "-c", PROBE)  # type: ignore[misc]


def measured(run: Run, rounds: int) -> dict[str, Any]:
    """{package, load: summaries of seconds; modules, packages, python} of one system."""
    run()  # files come into the page cache, and compiled ones are written where they may be
    found = [json.loads(run()) for _ in range(rounds)]
    return {
        "package": summary([one["seconds"][0] for one in found]),
        "load": summary([one["seconds"][1] for one in found]),
        **{name: found[-1][name] for name in ("modules", "packages", "python")},
    }


def text(saved: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [
            name,
            found["python"],
            f"{found['package']['median'] * 1e3:.0f}",
            f"{found['load']['median'] * 1e3:.0f}",
            str(found["modules"]),
            ", ".join(found["packages"]),
        ]
        for name, found in saved["systems"].items()
    ]
    heads = ["system", "CPython", "`import edgeformer`, ms", "with `edgeformer.load`, ms", "modules"]
    heads += ["packages beside the standard library"]
    return f"{table(heads, rows)}\n\n{footnote(saved['machine'])}"


def write() -> None:
    if saved := runs("imports"):
        put(PAGE, "imports", text(saved[0]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.imports", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")
    options = parser.parse_args()
    if not options.write_only:
        save("imports", {"systems": {name: measured(run, options.rounds) for name, run in systems()}})
    write()


if __name__ == "__main__":
    main()
