"""`python -m wheels`: the sdist and the wheels of all systems and Pythons, each checked."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from wheels.build import ROOT, build_extensions
from wheels.check import problems
from wheels.pack import platform_wheel, pure_wheel, source_archive
from wheels.record import NOTHING, facts, timed, today, write
from wheels.targets import PYTHONS, TARGETS


def main() -> int:
    """Builds and checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wheels", description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="all, if none is given")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="all, if none is given")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--optimize", type=int, default=2, choices=(0, 2), help="0 for a quick trial (default: 2)")
    parser.add_argument("--record", action="store_true", help="write the results and the table of docs/platforms.md")
    options = parser.parse_args()
    pythons = options.python or list(PYTHONS)
    check_tag()

    build = ROOT / "build" / "wheels"
    begin = time.monotonic()
    from_nothing = set()
    archive = source_archive(options.output)
    print(f"{archive.name}: sdist")
    pure = pure_wheel(build / "pure")
    wrong = 0
    for name in options.target or TARGETS:
        target = TARGETS[name]
        made = {}
        with timed(target, pythons) as seconds:
            built = build_extensions(target, pythons, build, options.jobs, options.optimize)
            for python, extension in built.items():
                wheel = platform_wheel(pure, extension, target, python, options.output)
                found = problems(wheel, target, python)
                wrong += bool(found)
                print(f"{wheel.name}: {'; '.join(found) or 'checked'}", flush=True)
                made[target.tag(python)] = facts(wheel, extension, found)
        from_nothing |= {name} if NOTHING in seconds else set()
        print(f"{name}: " + "".join(f"{spent} s of CPU time, {kind}" for kind, spent in seconds.items()), flush=True)
        if options.record:
            write(made, {name: seconds})
    if options.record and from_nothing == set(TARGETS):
        write({}, {}, {"seconds": round(time.monotonic() - begin), "jobs": options.jobs, "date": today()})
    return 1 if wrong else 0


def check_tag() -> None:
    """A commit that is tagged as a release holds that version.

    Raises:
        SystemExit: it holds another one.
    """
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    command = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    try:
        tags = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split()
    except OSError:  # no git, as in an unpacked sdist
        tags = []
    if tags and f"v{version}" not in tags:
        raise SystemExit(
            f"this commit is tagged {', '.join(tags)}, pyproject.toml says {version}: write one of them anew"
        )


if __name__ == "__main__":
    sys.exit(main())
