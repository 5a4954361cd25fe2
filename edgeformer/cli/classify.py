"""`edgeformer classify`: labels of texts or pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from edgeformer.cli.console import load_model, read_items, stdout
from edgeformer.cli.purpose import require
from edgeformer.engines.options import EngineOptions


def print_labels(bundle: Path, engine: EngineOptions, arguments: Sequence[str], top: int, *, as_json: bool) -> None:
    """Print the `top` labels of each item, or the labelled words of each text: a table, or JSON lines.

    Raises:
        InputError: the bundle gives no labels, or there is nothing to classify.
    """
    opened = require(bundle, "classify")
    words = opened.task == "token-classification"
    items = read_items(arguments)
    model = load_model(opened, engine.arguments())
    method: Callable[..., Sequence[Sequence[Any]]] = model.classify_tokens if words else model.classify
    found = method(items, show_progress=None)
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
            table.add_row(*map(escape, cells))
        if not labels:
            table.add_row(escape(item), *["-"] * (3 if words else 2))
    stdout.print(table)
