"""`edgeformer inspect`: what a bundle holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.cache_cost import CacheCost
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.cli.console import size, stdout, waiting
from edgeformer.errors import EngineUnavailable


def print_bundle(path: Path, *, hashes: bool, as_json: bool) -> None:
    """Print the manifest as tables, or as JSON."""
    with waiting("reading every byte ..." if hashes else "reading ..."):
        bundle = Bundle.open(path, check="hashes" if hashes else "sizes")
    if as_json:
        print(json.dumps(bundle.manifest, indent=2, ensure_ascii=False))
        return
    manifest = bundle.manifest
    stdout.print(f"[bold]{bundle.path.name}[/bold]  {bundle.task}, {size(bundle.size)}")
    for title, facts in (
        ("provenance", manifest["provenance"]),
        ("made with", manifest["producer"]),
        ("quantization", manifest["quantization"]),
        ("model", _model_facts(bundle)),
        *([("processing", manifest["processing"])] if manifest.get("processing") else []),
        ("accuracy", manifest["accuracy"] or {"": "not measured"}),
        *([("KV cache", _cache(manifest))] if "kv_cache" in manifest else []),
    ):
        _facts(title, facts)
    _facts("parity", _parity(manifest["parity"]))
    for name, graph in manifest["graphs"].items():
        stdout.print(f"\n[bold]graph {name}[/bold]  {graph['file']}")
        table = Table(box=None, padding=(0, 2), show_header=False)
        for side in ("inputs", "outputs"):
            for port, kind in _folded(graph[side]):
                table.add_row(f"[dim]{side[:-1]}[/dim]", port, kind)
        stdout.print(table)
    stdout.print("\n[bold]files[/bold]" + ("  all hashes match" if hashes else ""))
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, entry in manifest["files"].items():
        table.add_row(name, size(entry["size"]), f"[dim]sha256 {entry['sha256'][:12]}[/dim]")
    table.add_row(MANIFEST, size((bundle.path / MANIFEST).stat().st_size), "")
    stdout.print(table)


def print_program(path: Path) -> None:
    """Print the native engine's program of each graph.

    Raises:
        EngineUnavailable: the native engine is not installed, or cannot run a graph.
    """
    bundle = Bundle.open(path)
    try:
        from edgeformer.engines.native import describe
    except ImportError as error:
        raise EngineUnavailable(f"The native engine is not installed ({error}); install edgeformer again.") from error
    graphs = list(bundle.manifest["graphs"])
    for name in graphs:
        if len(graphs) > 1:
            print(f"graph {name}:")
        print(describe(bundle.path, name))


def _facts(title: str, facts: Mapping[str, Any]) -> None:
    stdout.print(f"\n[bold]{title}[/bold]")
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in (None, "", {}, []):
            table.add_row(key.replace("_", " "), _value(value))
    stdout.print(table)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:,}" if type(value) is int else str(value)


def _model_facts(bundle: Bundle) -> dict[str, Any]:
    config = bundle.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    facts: dict[str, Any] = {name: config.get(name) for name in names}
    return {"vocabulary": bundle.vocab_size, "context": bundle.context} | facts


def _cache(manifest: Mapping[str, Any]) -> dict[str, str]:
    cost = CacheCost.of(manifest)
    facts = {"int8": cost.described("int8")}
    if cost.float32_layers:
        facts["float32 layers"] = f"{', '.join(map(str, cost.float32_layers))}; {cost.described('auto')}"
    return facts


def difference(found: Mapping[str, Any]) -> str:
    """One result of the manifest's `parity`: how far from PyTorch, as fractions of the outputs' range."""
    worst = f"worst {found['worst']:.2g} of the range, allowed {found.get('tolerance', 0):.2g}"
    if not found.get("rows"):
        return worst
    rows = found["rows"][-1]
    return f"{rows['quantile']:.0%} of rows within {rows['worst']:.2g}, allowed {rows['tolerance']:.2g}; {worst}"


def _parity(parity: Mapping[str, Any] | None) -> dict[str, str]:
    if not parity:
        return {"": "not checked"}
    facts = {}
    for name, found in parity.items():
        if isinstance(found, dict) and "worst" in found:
            facts[name] = difference(found) + (f", {found['where']}" if found.get("where") else "")
    for name, found in (parity.get("engines") or {}).items():
        if found.get("passed"):
            facts[f"engine {name}"] = difference(found)
        elif found.get("problem"):
            facts[f"engine {name}"] = f"FAILED: {found['problem']}"
        else:
            facts[f"engine {name}"] = f"not checked: {found.get('unavailable')}"
    return facts


def _folded(ports: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and types; the KV caches of all layers are one line."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, info in ports.items():
        kind = f"{info['dtype']}[{', '.join(map(str, info['shape']))}]"
        match = re.fullmatch(r"((?:past_key_values|present)\.)(\d+)(\..*)", name)
        if match:
            rows.setdefault((f"{match[1]}N{match[3]}", kind), []).append(int(match[2]))
        else:
            rows[name, kind] = []
    lines = []
    for (name, kind), layers in rows.items():
        span = f"{min(layers)}...{max(layers)}" if len(layers) > 1 else "".join(map(str, layers))
        lines.append((name.replace(".N.", f".{{{span}}}.") if layers else name, escape(kind)))
    return lines
