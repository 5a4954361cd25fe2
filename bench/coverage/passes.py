"""Which passes of the native lowering are needed: each is left out in turn, over graphs of many models.

    python -m bench.coverage.passes export FOLDER [SECONDS]    float and q4a graphs of the coverage models
    python -m bench.coverage.passes study FOLDER               the table of docs/native.md, from FOLDER/*/model.onnx

A pass is needed where a graph no longer lowers without it, or its program has other operations.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.coverage.models import tiny
from edgeformer.engines.native.ir.graph import Graph, Node, read_graph
from edgeformer.engines.native.passes import PASSES, simplify
from edgeformer.engines.native.program.lowering import emit_program
from edgeformer.engines.native.program.program import Program


def _export(name: str, folder: Path) -> None:
    """Writes the graphs of one model, without checks of parity."""
    from edgeformer.export.graphs import trace_model
    from edgeformer.export.passes.finish import finish
    from edgeformer.export.progress import Silent
    from edgeformer.export.quantize.plan import Plan, quantize_graph
    from edgeformer.export.sources.hub.hub import language_model
    from edgeformer.export.write import save_graph

    source = language_model(tiny(name), f"tiny {name}")
    traced = trace_model(source)
    model = traced.models["model"]
    save_graph(model, folder / f"{name}.f32" / "model.onnx")
    quantize_graph(model, source, Plan("q4a", None, 32, traced.transposed), Silent())
    finish(model, f"tiny {name}")
    save_graph(model, folder / f"{name}.q4a" / "model.onnx")


def export(names: list[str], folder: Path, seconds: float) -> None:
    """Exports the models in random order, each in a subprocess, until `seconds` have passed."""
    import edgeformer.export.pipeline  # noqa: F401  loaded once: the subprocesses are forks of this one

    start = time.monotonic()
    for name in random.Random(0).sample(names, len(names)):
        if time.monotonic() - start > seconds:
            return
        process = multiprocessing.get_context("fork").Process(target=_export, args=(name, folder))
        process.start()
        process.join(120)
        process.kill()


def _copy(g: Graph) -> Graph:
    """A graph that passes can change while `g` stays as it is; constants are shared."""
    nodes = [Node(n.op, list(n.inputs), list(n.outputs), dict(n.attrs)) for n in g.nodes]
    copy = Graph(nodes, dict(g.constants), dict(g.inputs), list(g.outputs))
    copy.info = {name: replace(info) for name, info in g.info.items()}
    copy.inputs = {name: copy.info[name] for name in g.inputs}
    copy.io_dtypes, copy.defaults, copy.files = g.io_dtypes, g.defaults, g.files
    copy.caches, copy._names = list(g.caches), g._names
    return copy


def _state(g: Graph) -> tuple[Any, ...]:
    """All that passes read and change, to see whether one did anything."""
    nodes = [(n.op, *n.inputs, "->", *n.outputs, repr(sorted(n.attrs.items()))) for n in g.nodes]
    return nodes, list(g.outputs), list(g.inputs), len(g.constants), [i.shape for i in g.info.values()]


def _text(p: Program) -> list[Any]:
    """The program without names, slots numbered as they are first used."""
    number: dict[int, int] = {-1: -1}
    lines: list[Any] = [p.row_local, p.batch_local]
    for op in p.ops:
        slots = [number.setdefault(i, len(number)) for i in (*op.inputs, *op.outputs)]
        shapes = [p.slots[i].shape for i in op.outputs if i >= 0]
        lines.append((op.kind, slots, shapes, op.ints, op.floats, op.sizes, op.note))
    return lines


def _run(g: Graph, start: int) -> Program:
    for step in PASSES[start:]:
        step(g)
    return emit_program(g, g.caches)


@dataclass
class Effect:
    """What a graph loses without one pass; `more` is by how many operations its program is longer."""

    lost: str = ""
    changed: bool = False
    more: int = 0


def effects(path: Path) -> Iterator[Effect]:
    """For each of PASSES, what this graph loses without it."""
    whole = _run(_normalized(path), 0)
    g = _normalized(path)
    for i, step in enumerate(PASSES):
        without, before = _copy(g), _state(g)
        step(g)
        if _state(g) == before:  # it did nothing here
            yield Effect()
            continue
        try:
            program = _run(without, i + 1)
        except Exception as error:
            yield Effect(lost=f"{type(error).__name__}: {error}"[:200])
            continue
        yield Effect("", _text(program) != _text(whole), len(program.ops) - len(whole.ops))


def _normalized(path: Path) -> Graph:
    g = read_graph(path)
    assert not simplify.normalize(g)
    return g


def study(paths: list[Path]) -> str:
    """The table, as Markdown."""
    found: list[list[Effect]] = [[] for _ in PASSES]
    for path in paths:
        try:
            for row, effect in zip(found, list(effects(path)), strict=True):
                row.append(effect)
        except Exception as error:
            print(f"{path.parent.name}: {error}", file=sys.stderr)
    turn: Counter[str] = Counter()
    lines = ["| pass | graphs lost | programs that differ | longer, operations |", "|---|---|---|---|"]
    for step, row in zip(PASSES, found, strict=True):
        name = f"{step.__module__.rpartition('.')[2]}.{step.__name__}"
        turn[name] += 1
        label = name if PASSES.count(step) == 1 else f"{name} ({turn[name]})"
        more = [e.more for e in row if e.changed]
        longer = f"{min(more)} to {max(more)}" if more else ""
        lines.append(f"| `{label}` | {sum(bool(e.lost) for e in row)} | {len(more)} | {longer} |")
    return f"{len(found[0])} graphs\n\n" + "\n".join(lines)


if __name__ == "__main__":
    command, folder, *more = sys.argv[1:]
    if command == "export":
        from bench.coverage.models import names

        export(names(), Path(folder), float(more[0]) if more else 3600.0)
    else:
        table = study(sorted(Path(folder).glob("*/model.onnx")))
        print(table)
