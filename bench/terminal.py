"""A terminal recording for README: commands and what they print, as an SVG.

make recording                       makes a bundle of SmolLM2 in out/recording, then the line below
python -m bench.terminal BUNDLE      runs the commands on a bundle, writes docs/images/terminal.svg
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bench.report import ROOT

PAGE = ROOT / "docs" / "images" / "terminal.svg"
WIDTH = 100  # columns
PROMPT = "Once upon a time, in a small village by the sea,"
COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (  # arguments, sections shown; all if there are none
    (("inspect", "{bundle}"), ("quantization", "accuracy")),
    (("verify", "{bundle}"), ()),
    (("run", "{bundle}", PROMPT, "-n", "72"), ()),
)


def output(arguments: list[str], bundle: Path) -> tuple[str, str]:
    """(stdout, stderr) of `edgeformer ARGUMENTS`, run in the bundle's parent folder.

    Raises:
        SystemExit: the command failed.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "edgeformer", *arguments]
    done = subprocess.run(command, cwd=bundle.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"edgeformer {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.rstrip(), done.stderr.strip()


def shown(arguments: list[str]) -> str:
    """The command as one types it: arguments with spaces or brackets are quoted."""
    return " ".join(f'"{word}"' if set(word) & set(" ()") else word for word in arguments)


def chosen(printed: str, sections: tuple[str, ...]) -> list[str]:
    """The lines of the sections, which blank lines divide; "..." for each gap between them."""
    if not sections:
        return printed.splitlines()
    lines: list[str] = []
    for section in printed.split("\n\n"):
        title, *rest = section.splitlines()
        if title in sections:
            lines += [title, *rest]
        elif lines[-1:] != ["..."]:
            lines.append("...")
    return lines


def record(bundle: Path) -> Console:
    """A console that holds the commands and their output."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    for words, sections in COMMANDS:
        arguments = [word.format(bundle=bundle.name) for word in words]
        printed, notes = output(arguments, bundle)
        console.print(Text.assemble(("$ ", "bold green"), (f"edgeformer {shown(arguments)}", "bold")))
        for line in chosen(printed, sections):
            table = line.startswith("  ")  # rows of a table are cut, texts are wrapped
            console.print(Text(line.rstrip()), overflow="ellipsis" if table else "fold", no_wrap=table)
        if notes:
            console.print(Text(notes.splitlines()[-1], style="cyan"))
        console.print()
    return console


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.terminal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle.absolute()
    console = record(bundle)
    PAGE.parent.mkdir(exist_ok=True)
    # A fixed id: equal output gives an equal file.
    console.save_svg(str(PAGE), title=f"edgeformer, {bundle.name}", unique_id="edgeformer")
    print(f"{PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
