"""docs/coverage.md, from the results."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import Any

from bench.coverage.examine import DEFAULT, FLOAT_TOLERANCE, PROMPTS, QUANTIZED_TOLERANCE, Depth

CAUSES = (  # words of a row's cause -> the reason in plain words; the first that fits
    (r"recurrent or convolution|LinearAttention layers|MiniMax uses cache of its own|matC_old",
     "has a recurrent or convolution state (state-space, linear attention), which is no KV cache"),
    (r"index or compressed blocks", "selects or compresses its keys by a cached index: no standard operator"),
    (r"does not run with a plain key-value cache", "has more state than keys and values"),
    (r"s_aux", "attention sinks without a mask"),
    (r"No decompositions registered for the complex", "computes its rotary embedding with complex numbers"),
    (r"data-dependent|branches on the values", "chooses its experts or layers by a Python branch on values"),
    (r"was frozen at", "uses the length as a Python number: a loop over the text, or a table of one length"),
    (r"requires the timm library", "not examined: its image encoder needs the package timm"),
    (r"shared_kv_states|hidden_size_per_layer_input must be 0",
     "a draft model that reads the keys and values of another model"),
    (r"shape '\[-1, 4, 5\]' is invalid", "reads several codebooks at once, not one sequence of token ids"),
)  # fmt: skip


def why(row: dict[str, Any]) -> str:
    """The cause in plain words; the message itself if no entry of CAUSES fits."""
    cause = row.get("cause") or next((v for k, v in row["engines"].items() if k.startswith("cpu") and v != "ok"), "")
    for words, told in CAUSES:
        if re.search(words, cause):
            return told
    if row.get("stage") in ("build", "run in transformers"):
        return f"not examined: transformers cannot run a tiny model of its config class ({cause[:80]})"
    return cause


def page(rows: dict[str, Any]) -> str:
    """docs/coverage.md"""
    works = [name for name, row in rows.items() if row["status"] == "works"]
    native = [n for n in works if {v for k, v in rows[n]["engines"].items() if k.startswith("native")} == {"ok"}]
    origins = _origins(rows)
    most = Counter(origins.values()).most_common(1)[0][0]
    lengths = [str(len(prompt)) for prompt in PROMPTS]
    about = (
        "Written by `python -m bench.coverage`; do not edit. Each architecture is built from its config class, tiny "
        f"and with random weights, exported in float and with the default options (calibrated `{DEFAULT}`), and run "
        f"from the bundles with prompts of {', '.join(lengths[:-1])} and {lengths[-1]} tokens and a float KV cache. "
        f"**cpu** is yes if on the engine `cpu` the float logits equal PyTorch's to {FLOAT_TOLERANCE:.0e} of their "
        f"range, {Depth().tokens} greedy tokens are equal, and the logits of the default export differ from the same "
        f"bundle with dequantized weights and float operators by at most {QUANTIZED_TOLERANCE:.0%} of their standard "
        "deviation (root mean square; the median over positions, because rounding sometimes changes the choice of an "
        "expert). This measures int8 activations, not the loss by 4-bit weights. **native** is the same for the native "
        "engine. The exporter has no code for a particular architecture."
    )
    lines = [
        "# Coverage of transformers' causal language models",
        "",
        *textwrap.wrap(about, 110, break_on_hyphens=False),
        "",
        *textwrap.wrap(_made(rows), 110, break_on_hyphens=False),
        "",
        f"**{len(works)} of {len(rows)} work on `cpu`, {len(native)} of them on `native` too.**",
        "",
        "| model type | class | cpu | native | remark |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        row = rows[name]
        fits = "yes" if name in works else "no"
        fast = "yes" if name in native else "no"
        remark = why(row) if name not in works else ""
        if name in works and name not in native:
            remark = next((v for k, v in row["engines"].items() if k.startswith("native") and v != "ok"), "not reached")
            remark = remark.removeprefix("no: ").split(". Run this")[0]
        if row.get("generate_differs"):
            remark = f"{remark}; transformers' generate() counts positions differently from its forward".strip("; ")
        if name in works and not row.get("layers"):
            remark = f"without a KV cache; {remark}".strip("; ")
        if origins[name] != most:
            remark = f"{remark[:160]}; from {origins[name][0].split(' (')[0]}".strip("; ")
        lines.append(f"| {name} | {row.get('class', '')} | {fits} | {fast} | {remark.replace('|', '/')[:220]} |")
    return "\n".join(lines) + "\n"


OLD_FORM = ("an older form of this page (native float at 5e-2, q4 instead of the default export)", "5.24.0")


def _origins(rows: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """name -> (commit, transformers version) of each row."""
    return {n: (f"commit {r['commit']}", r["transformers"]) if "commit" in r else OLD_FORM for n, r in rows.items()}


def _made(rows: dict[str, Any]) -> str:
    """The number of rows for each commit and transformers version, the largest group first."""
    (first, count), *others = Counter(_origins(rows).values()).most_common()
    told = f"Made from {first[0]}, with transformers {first[1]}" + (f": {count} rows." if others else ".")
    for (where, version), count in others:
        told += f" {count} {'row is' if count == 1 else 'rows are'} from {where}, with transformers {version}."
    return told + (" The remarks say which." if others else "")
