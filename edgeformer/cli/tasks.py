"""`edgeformer embed | classify | transcribe`: bundles that do not go on writing a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from edgeformer.cli.console import load_model, stderr, stdout
from edgeformer.cli.purpose import require
from edgeformer.errors import InputError


def embed(
    bundle: Path, where: Mapping[str, Any], given: Sequence[str], output: Path | None, settings: Mapping[str, Any]
) -> None:
    """One vector an item: JSON lines on stdout, or an array in a .npy file.

    Raises:
        InputError: the bundle gives no vectors, or there is nothing to embed.
    """
    opened = require(bundle, "embed")
    if output is not None and output.suffix != ".npy":
        raise InputError(f"--output is {output}, expected a name ending in .npy.")
    items = _items(given)
    vectors = load_model(opened, where).embed(items, **settings)
    if output is None:
        for item, vector in zip(items, vectors, strict=True):
            print(json.dumps({"item": item, "vector": [float(f"{x:.7g}") for x in vector]}, ensure_ascii=False))
        return
    np.save(output, vectors)
    stderr.print(f"[dim]float32{list(vectors.shape)} written to {output}[/dim]")


def classify(bundle: Path, where: Mapping[str, Any], given: Sequence[str], top: int, *, as_json: bool) -> None:
    """The likeliest labels of each item, or the labelled words of each text: a table, or JSON lines.

    Raises:
        InputError: the bundle gives no labels, or there is nothing to classify.
    """
    opened = require(bundle, "classify")
    words = opened.task == "token-classification"
    items = _items(given)
    model = load_model(opened, where)
    found: Sequence[Sequence[Any]] = model.classify_tokens(items) if words else model.classify(items)
    shown = found if words else [labels[:top] for labels in found]
    if as_json:
        for item, labels in zip(items, shown, strict=True):
            line = {"item": item, "labels": [asdict(label) for label in labels]}
            print(json.dumps(line, ensure_ascii=False))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("item", *(("words",) if words else ()), "label"):
        table.add_column(name, overflow="fold")
    table.add_column("score", justify="right")
    for item, labels in zip(items, shown, strict=True):
        for place, label in enumerate(labels):
            cells = [item if place == 0 else "", *([label.text] if words else []), label.label, f"{label.score:.4f}"]
            table.add_row(*map(_plain, cells))
        if not labels:
            table.add_row(_plain(item), *["-"] * (3 if words else 2))
    stdout.print(table)


def transcribe(
    bundle: Path, where: Mapping[str, Any], files: Sequence[Path], settings: Mapping[str, Any], *, as_json: bool
) -> None:
    """What is said in each file: a line of text, or JSON lines with the language too.

    Raises:
        InputError: the bundle takes no sound, or a file cannot be read.
    """
    model = load_model(require(bundle, "transcribe"), where)
    for file in files:
        found = model.transcribe(file, **settings)
        if as_json:
            line = {"file": str(file), "text": found.text, "language": found.language, "ids": found.ids}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(f"{file}: {found.text}" if len(files) > 1 else found.text, flush=True)


def _items(given: Sequence[str]) -> list[str]:
    """The arguments; `-`, or none with a pipe, reads stdin, an item a line."""
    if list(given) == ["-"] or (not given and not sys.stdin.isatty()):
        items = [line for line in sys.stdin.read().splitlines() if line.strip()]
    else:
        items = list(given)
    if not items:
        raise InputError("There is nothing to read; give texts or pictures as arguments, or - and one a line on stdin.")
    return items


def _plain(text: str) -> str:
    """Brackets of a text are no markup."""
    return text.replace("[", "\\[")
