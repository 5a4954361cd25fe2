"""One architecture: built, exported in float and with the default options, run on every engine, and compared."""

from __future__ import annotations

import re
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.coverage.models import tiny
from edgeformer.engines.choose import EngineName

F32 = NDArray[np.float32]
ENGINES: tuple[EngineName, ...] = ("cpu", "native")
FLOAT, DEFAULT = "f32", "q4a"  # columns of the results: the float bundle, and the default export
# 5, 9, 37 and 150 tokens, without special ones: inside and beyond every sliding window, more than one tile of keys, odd
# numbers of rows.
PAD = 0
PROMPTS = tuple([3 + (11 * i * i + 5 * i + n) % 116 for i in range(n)] for n in (5, 9, 37, 150))
FLOAT_TOLERANCE = 1e-4  # of the logits' range: the tolerance of the exporter's parity check
# Both engines round a linear's inputs to int8, a block of 32 at a time: steps of absmax / 127, so an error of
# absmax / 127 / sqrt(12), where absmax is about 2.2 deviations: 0.5 % of the input of a layer, and so of its output.
# Errors of the two layers' eight linears in a row and the head's are independent and add as squares:
# sqrt(9) * 0.5 % = 1.5 % of the logits' deviation in a row (root mean square over the vocabulary); three times that and
# a little, for models with more linears in a row, is allowed. Where experts are chosen, an error of that size now and
# then tips a choice: the token gets another expert's answer, 20 to 90 % off, and later tokens attend to it. With most
# models that is 1 to 4 rows of 150, with some a fifth of all. So the median over all rows must keep the bound, and
# every row must be finite.
# The reference is the same graph with every operator run in float as it is written, which the gate has compared with
# PyTorch: what four bits cost the model does not enter.
QUANTIZED_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Depth:
    """How much of an examination is run; the default is for the table."""

    tokens: int = 10  # of a greedy answer to each prompt
    generate: bool = True  # also ask transformers' generate()


QUICK = Depth(tokens=2, generate=False)


@dataclass(frozen=True)
class Answer:
    """transformers' answer to one prompt."""

    logits: F32  # [prompt, vocabulary]
    tokens: list[int]  # greedy, each from a forward over all before it
    margins: list[float]  # of the best logit over the second, as a share of the logits' range


def examine(name: str, depth: Depth = Depth()) -> dict[str, Any]:
    """One row: {status, engines: {"cpu f32": "ok" or what is wrong, ...}, errors: {the same keys: numbers}, cause}."""
    import torch
    from transformers import GenerationConfig

    torch.set_num_threads(1)
    row: dict[str, Any] = {"engines": {}, "errors": {}, "stage": "build"}
    try:
        model = tiny(name)
        row["class"], row["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        row["stage"] = "run in transformers"
        model.generation_config = GenerationConfig()  # no forced or suppressed tokens: the plain greedy path
        answers = [_answer(model, prompt, depth.tokens) for prompt in PROMPTS]
        if depth.generate:
            # If generate() counts positions differently from forward, forward is the reference.
            told = [_generated(model, prompt, depth.tokens) for prompt in PROMPTS]
            row["generate_differs"] = told != [answer.tokens for answer in answers]
        row["stage"] = "export"

        from edgeformer.export.graphs import trace_model
        from edgeformer.export.sources.hub.hub import language_model

        traced = trace_model(language_model(model, f"tiny {name}"))
        row["layers"] = traced.layers
        for kind in (FLOAT, DEFAULT):
            row["stage"] = f"export {kind}"
            with tempfile.TemporaryDirectory() as folder:
                _bundle(row, kind, traced, answers, Path(folder) / "bundle")
        row["stage"] = "done"
    except Exception as error:
        row["cause"] = told_shortly(error)
        row["trace"] = "".join(traceback.format_exc(limit=-4))[-1500:]  # for debugging; not saved in docs/coverage.json
    row["status"] = "works" if all(row["engines"].get(f"cpu {kind}") == "ok" for kind in (FLOAT, DEFAULT)) else "no"
    return row


def _bundle(row: dict[str, Any], kind: str, traced: Any, answers: list[Answer], path: Path) -> None:
    """Exports to `path` and fills the columns of `kind`."""
    import edgeformer
    from edgeformer.errors import EngineUnavailable
    from edgeformer.export import ExportOptions, export

    quantize = "none" if kind == FLOAT else None  # None: the defaults
    manifest = export(ExportOptions(row["class"], path, quantize=quantize), traced=traced)
    if kind == DEFAULT:
        assert manifest["quantization"]["scheme"] == DEFAULT, "the default scheme has changed: rename the column"
    row[f"parity_{kind}"] = (manifest["parity"]["dequantized"] or manifest["parity"]["float"])["worst"]
    references = [answer.logits for answer in answers] if kind == FLOAT else _dequantized(path)
    for engine in ENGINES:
        key = f"{engine} {kind}"
        try:
            loaded = edgeformer.load(path, engine=engine, threads=1, kv="float32")
        except EngineUnavailable as error:
            row["engines"][key] = f"no: {error}"
            continue
        except Exception as error:
            row["engines"][key] = f"fails to load: {told_shortly(error)}"
            continue
        try:
            if kind == FLOAT:
                row["engines"][key], row["errors"][key] = compare_float(loaded, answers)
            else:
                row["engines"][key], row["errors"][key] = compare_quantized(loaded, references)
        except Exception as error:
            row["engines"][key] = f"fails: {told_shortly(error)}"


def _answer(model: Any, prompt: list[int], count: int) -> Answer:
    import torch

    ids, margins, first = list(prompt), [], None
    with torch.no_grad():
        for _ in range(max(1, count)):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
            first = logits if first is None else first
            second, best = np.sort(logits[-1])[-2:]
            margins.append(float(best - second) / float(np.ptp(logits)))
            ids.append(int(logits[-1].argmax()))
    assert first is not None
    return Answer(first, ids[len(prompt) :], margins)


def _generated(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def _dequantized(path: Path) -> list[F32]:
    """The logits of each prompt with dequantized weights and every operator run in float as written."""
    from edgeformer.export.check.graph_run import OrtGraph

    graph = OrtGraph(path / "model.onnx", optimized=False)
    found = []
    for prompt in PROMPTS:
        ids = np.array([prompt])
        feeds = {"input_ids": ids, "position_ids": np.arange(len(prompt))[None], "logits_to_keep": np.array(0)}
        found.append(graph({n: v for n, v in feeds.items() if n in graph.inputs})[0]["logits"][0])
    return found


def compare_float(loaded: Any, answers: list[Answer]) -> tuple[str, float]:
    """("ok" or what is wrong, the largest error as a share of the logits' range): logits and greedy tokens."""
    largest = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        worst = float(np.abs(loaded.logits(prompt) - answer.logits).max()) / float(np.ptp(answer.logits))
        largest = max(largest, worst)
        if not worst <= FLOAT_TOLERANCE:  # NaN too
            return f"logits off by {worst:.1e} of their range at {len(prompt)} tokens", worst
        ids = loaded.generate(prompt, max_new_tokens=len(answer.tokens), ignore_eos=True).ids
        for found, expected, margin in zip(ids, answer.tokens, answer.margins, strict=True):
            if margin <= 2 * FLOAT_TOLERANCE:
                break  # a tie within the tolerance: the answers may differ from here on
            if found != expected:
                return f"tokens {ids} instead of {answer.tokens} after {len(prompt)}", largest
            if expected == PAD:
                break  # some models count positions without it, in their forward over all tokens
    return "ok", largest


def compare_quantized(loaded: Any, references: list[F32]) -> tuple[str, float | None]:
    """("ok" or what is wrong, the median of the rows' errors): a row's is relative to the logits' deviation."""
    rows: list[float] = []
    for prompt, reference in zip(PROMPTS, references, strict=True):
        off = loaded.logits(prompt).astype(np.float64) - reference
        errors = np.sqrt(np.mean(off**2, axis=-1)) / np.std(reference, dtype=np.float64)
        rows += errors.tolist()
        if not np.isfinite(errors).all():
            return f"logits are not finite at {len(prompt)} tokens", None
        loaded.generate(prompt, max_new_tokens=2, ignore_eos=True)
    half = float(np.median(rows))
    return "ok" if half <= QUANTIZED_TOLERANCE else f"half of the logits off by {half:.1%} or more", half


def told_shortly(error: Exception) -> str:
    """The class of the error and the first line of its message, without paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"/\S*/(site-packages/)?", "", f"{type(error).__name__}: {(lines or [''])[0][:400]}")
