"""The accuracy that quantization costs, measured on the bundle's graph: perplexity, KL divergence, same next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeformer.errors import ExportError
from edgeformer.export.check.parity import F64, Runs
from edgeformer.export.progress import Progress
from edgeformer.export.source import Source

_WINDOW = 512  # tokens of context, the default of llama.cpp's perplexity tool


@dataclass
class Score:
    """How the next-token distributions of a graph differ from the float graph's, over all scored tokens."""

    tokens: int = 0
    float_loss: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    agree: int = 0

    @property
    def mean_kl(self) -> float:
        """KL(float || graph) in nats a token."""
        return self.kl / self.tokens

    def as_dict(self) -> dict[str, float]:
        """For the manifest."""
        return {
            "perplexity": float(np.exp(self.loss / self.tokens)),
            "mean_kl": self.mean_kl,
            "top1_agreement": self.agree / self.tokens,
        }

    def add(self, expected: F64, found: F64, targets: NDArray[np.int64]) -> None:
        """Counts log probabilities [tokens, vocab] of the float graph and of this one, and the tokens that follow."""
        self.tokens += len(targets)
        for p, q, target in zip(expected, found, targets, strict=True):  # one at a time: Ctrl-C waits for a line
            self.float_loss -= float(p[target])
            self.loss -= float(q[target])
            self.kl += float(np.dot(np.exp(p), p - q))
            self.agree += int(p.argmax() == q.argmax())


@dataclass(frozen=True)
class Text:
    """Token ids to measure on, and their source for the manifest. Each window starts with an empty cache."""

    ids: NDArray[np.int64]
    name: str
    window: int

    @classmethod
    def of(cls, source: Source, text: Path | None, tokens: int) -> Text:
        """The first `tokens` of a text file, or of one that every Python has; random ids without a tokenizer."""
        ids, name = _tokens(source, text, tokens)
        return cls(ids, name, min(_WINDOW, len(ids), source.context or _WINDOW))

    def first(self) -> Text:
        """The first window alone."""
        return replace(self, ids=self.ids[: self.window])

    @property
    def starts(self) -> range:
        """Where windows begin."""
        return range(0, len(self.ids) - self.window + 1, self.window)

    def score(self, reference: Runs, graphs: Mapping[str, Runs], progress: Progress) -> dict[str, Score]:
        """Each graph against the float graph. The first half of a window is context only and is not scored."""
        scores = {name: Score() for name in graphs}
        skip = self.window // 2
        for start in progress.track(self.starts, "accuracy"):
            piece = self.ids[start : start + self.window][None]
            feeds = {"input_ids": piece, "position_ids": np.arange(self.window)[None]}

            def scored(graph: Runs, feeds: dict[str, Any] = feeds) -> F64:
                return _log_softmax(graph(feeds)[0]["logits"][0, skip - 1 : -1])

            expected = scored(reference)
            # An embedding may have more rows than the head (padding): such a token has no logit.
            known = piece[0, skip:] < expected.shape[-1]
            targets = piece[0, skip:][known]
            for name, graph in graphs.items():
                scores[name].add(expected[known], scored(graph)[known], targets)
        return scores


def accuracy_report(score: Score, text: Text) -> dict[str, Any]:
    """{tokens, perplexity_float, perplexity, mean_kl, top1_agreement, text}."""
    return {
        "tokens": score.tokens,
        "perplexity_float": float(np.exp(score.float_loss / score.tokens)),
        **score.as_dict(),
        "text": text.name,
    }


def _log_softmax(logits: NDArray[np.float32]) -> F64:
    wide = logits.astype(np.float64)
    for row in wide:
        row -= row.max()
        row -= np.log(np.exp(row).sum())
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
