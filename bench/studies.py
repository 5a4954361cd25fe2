"""Studies that write a page: each measures, saves bench/results/NAME-STUDY.json and writes its block of the page."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import models
from bench.report import elsewhere, put, runs, save


@dataclass(frozen=True)
class Study:
    """`measure` takes the options and gives what is saved; `text` makes the block of the page, with its plots in the
    folder given. `brief` says what the page has of the other machines: the bars alone. `plotted`: as for `save`."""

    measure: Callable[[Any], dict[str, Any]]
    text: Callable[[dict[str, Any], Path], str]
    brief: Callable[[dict[str, Any]], str] | None = None
    plotted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Studies:
    """The studies of one page. `name` begins the names of their results and blocks."""

    name: str
    page: Path
    images: Path
    studies: Mapping[str, Study]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The arguments that the commands share."""
        parser.add_argument("studies", nargs="*", default="all", choices=["all", *self.studies])
        parser.add_argument("--bundle", type=Path, help="SmolLM2's bundle; exported to out/ where none is given")
        parser.add_argument("--peers", nargs="*", help="only those whose project and name contain one of these words")
        parser.add_argument("--quick", action="store_true", help="one round of fewer cases")
        parser.add_argument("--tiny", action="store_true", help="the least that runs everything; printed, not saved")
        parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")

    def chosen(self, given: argparse.Namespace) -> list[str]:
        """The studies that the arguments ask for."""
        return list(self.studies) if "all" in given.studies else given.studies

    def write(self, name: str) -> None:
        """The block of a study, from its saved results, if there are any."""
        measured, study = runs(f"{self.name}-{name}"), self.studies[name]
        if not measured:
            return
        parts = [study.text(measured[0], self.images)]
        if study.brief is not None:
            parts += elsewhere(measured[1:], study.brief, 4)
        put(self.page, f"{self.name}-{name}", "\n\n".join(parts))

    def take(self, names: Sequence[str], options: Any, facts: Mapping[str, Any], *, tiny: bool) -> None:
        """Measures, saves and writes the studies; one that fails does not stop the others. `facts` are saved too. With
        `tiny` the blocks are printed instead.

        Raises:
            SystemExit: some failed.
        """
        failed = []
        for name in names:
            began = time.monotonic()
            try:
                found = self.studies[name].measure(options)
            except (Exception, SystemExit) as error:
                if len(names) == 1:
                    raise
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            result = {**facts, **found}
            if tiny:
                machine = {"cpu": "tiny", "system": "", "versions": {}, "date": ""}
                saved = {"machine": machine, **result}
                print(self.studies[name].text(saved, models.OUT / "tiny-images"), flush=True)
            else:
                save(f"{self.name}-{name}", result, plotted=self.studies[name].plotted)
                self.write(name)
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")


def bundle_of(given: argparse.Namespace) -> Path:
    """The bundle that `--bundle` names, else SmolLM2's, exported if it is not there."""
    return (given.bundle or models.bundle("keep")).resolve()
