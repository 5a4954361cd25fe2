"""The accuracy that quantization costs, measured on the bundle's graph: perplexity, KL divergence, same next token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeformer.errors import ExportError
from edgeformer.export.check.graph_run import OrtGraph
from edgeformer.export.progress import Progress
from edgeformer.export.source import Source

_WINDOW = 512  # tokens of context, the default of llama.cpp's perplexity tool


@dataclass
class _Sums:
    tokens: int = 0
    float_loss: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    agree: int = 0


def measure_accuracy(
    source: Source, float_graph: Path, graph: Path, text: Path | None, tokens: int, progress: Progress
) -> dict[str, Any]:
    """Both graphs on the same tokens: {tokens, perplexity_float, perplexity, mean_kl, top1_agreement, text}.

    Each window of 512 tokens starts with an empty cache; its first half is context only and is not scored. `mean_kl`
    is KL(float || bundle) of the next-token distributions in nats, averaged over the scored tokens.
    """
    ids, name = _tokens(source, text, tokens)
    window = min(_WINDOW, len(ids), source.context or _WINDOW)
    starts = range(0, len(ids) - window + 1, window)
    reference, quantized = OrtGraph(float_graph, mapped=True), OrtGraph(graph)
    sums = _Sums()
    for start in progress.track(starts, "accuracy"):
        piece = ids[start : start + window][None]
        feeds = {"input_ids": piece, "position_ids": np.arange(window)[None]}
        skip = window // 2
        expected = _log_softmax(reference(feeds)[0]["logits"][0, skip - 1 : -1])
        found = _log_softmax(quantized(feeds)[0]["logits"][0, skip - 1 : -1])
        # An embedding may have more rows than the head (padding): such a token has no logit.
        scored = piece[0, skip:] < expected.shape[-1]
        expected, found, targets = expected[scored], found[scored], piece[0, skip:][scored]
        rows = np.arange(len(targets))
        sums.tokens += len(targets)
        sums.float_loss -= float(expected[rows, targets].sum())
        sums.loss -= float(found[rows, targets].sum())
        sums.kl += float((np.exp(expected) * (expected - found)).sum())
        sums.agree += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return {
        "tokens": sums.tokens,
        "perplexity_float": float(np.exp(sums.float_loss / sums.tokens)),
        "perplexity": float(np.exp(sums.loss / sums.tokens)),
        "mean_kl": sums.kl / sums.tokens,
        "top1_agreement": sums.agree / sums.tokens,
        "text": name,
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def _tokens(source: Source, path: Path | None, count: int) -> tuple[NDArray[np.int64], str]:
    """(token ids [count], their source for the manifest): of the text if there is a tokenizer, else random."""
    if path is not None:
        return read_tokens(source, path, count), path.name
    if "tokenizer.json" not in source.files:
        generator = np.random.default_rng(0)
        return generator.integers(0, source.inputs[0].high, count), "random token ids (the model has no tokenizer)"
    name = "the Python language reference (pydoc_data.topics)"
    return _encode(source, _language_reference(), count, name), name


def read_tokens(source: Source, path: Path, count: int) -> NDArray[np.int64]:
    """The first `count` tokens, or all, of the text in a file.

    Raises:
        ExportError: the model has no tokenizer, or the file cannot be read or has fewer than 32 tokens.
    """
    if "tokenizer.json" not in source.files:
        raise ExportError(f"the text {path} was given, but the model has no tokenizer; leave it out.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ExportError(f"the text {path} cannot be read: {error}") from error
    return _encode(source, text, count, path.name)


def _encode(source: Source, text: str, count: int, name: str) -> NDArray[np.int64]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(source.files["tokenizer.json"].decode())
    ids = np.array(tokenizer.encode(text[: 40 * count]).ids[:count], np.int64)
    if len(ids) < 32:
        raise ExportError(f"the text {name} has only {len(ids)} tokens; at least 32 are needed.")
    return ids


def _language_reference() -> str:
    """English prose that every Python installation contains."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
