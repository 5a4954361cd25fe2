"""What an app wants of an encoder: one vector a text or picture, and labels with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from edgeformer.bundle import Bundle
from edgeformer.engine import Engine
from edgeformer.errors import BundleError, InputError
from edgeformer.signature import IDS
from edgeformer.tokenizer import Encoded, Tokenizer

Array = np.ndarray[Any, Any]
Pooling = Literal["mean", "cls", "max", "last"]
MASK = "attention_mask"
TYPES = "token_type_ids"
VECTORS = ("text_embeds", "image_embeds")  # outputs that are one vector already
STATES = "last_hidden_state"


@dataclass(frozen=True)
class Label:
    """A label of the model's config and its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """A labelled word of a text: characters `start` to `end`, the mean probability of its tokens' common label."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Encoder:
    """An engine with what its bundle says about the work before and after it."""

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer | None

    @property
    def inputs(self) -> Mapping[str, Any]:
        ports: Mapping[str, Any] = self.bundle.manifest["graphs"]["model"]["inputs"]
        return ports

    @property
    def outputs(self) -> Mapping[str, Any]:
        ports: Mapping[str, Any] = self.bundle.manifest["graphs"]["model"]["outputs"]
        return ports

    @property
    def processing(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.bundle.manifest.get("processing") or {}
        return settings

    def embed(
        self, items: Sequence[Any], pooling: Pooling | None, normalize: bool | None, batch_size: int
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [len(items), size]; see `Model.embed`."""
        name = next((name for name in (*VECTORS, STATES) if name in self.outputs), None)
        if name is None:
            raise InputError(
                f"{self.bundle.path} is a {self.bundle.task} model and gives {', '.join(self.outputs)}; embeddings "
                f"need an output {STATES} or {VECTORS[0]}."
            )
        mode = pooling or self.processing.get("pooling", "mean")
        if mode not in get_args(Pooling):
            raise InputError(f"pooling is {mode!r}, expected one of {', '.join(get_args(Pooling))}.")
        unit = self.processing.get("normalize", True) if normalize is None else normalize
        rows: list[Array] = [np.empty(0, np.float32)] * len(items)
        for places, feeds, _ in self._batches(items, batch_size):
            states = self.engine.forward([(feeds, self.engine.new_state())])[0][name].astype(np.float32)
            vectors = pool(states, feeds.get(MASK), mode) if states.ndim == 3 else states
            if unit:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
            for place, vector in zip(places, vectors, strict=True):
                rows[place] = vector
        return np.stack(rows)

    def classify(self, items: Sequence[Any], batch_size: int) -> list[list[Label]]:
        """For each item all labels, the likeliest first."""
        several = self.bundle.config.get("problem_type") == "multi_label_classification"
        found: list[list[Label]] = [[] for _ in items]
        for places, feeds, _ in self._batches(items, batch_size):
            logits = self._logits(feeds, 2)
            scores = 1 / (1 + np.exp(-logits)) if several or logits.shape[-1] == 1 else softmax(logits)
            for place, row in zip(places, scores, strict=True):
                order = np.argsort(-row, kind="stable")
                found[place] = [Label(self.label(int(i)), float(row[i])) for i in order]
        return found

    def classify_tokens(self, texts: Sequence[str], batch_size: int) -> list[list[Entity]]:
        """For each text its words that have a label other than O; a word takes the label of its first token."""
        found: list[list[Entity]] = [[] for _ in texts]
        for places, feeds, encoded in self._batches(texts, batch_size):
            scores = softmax(self._logits(feeds, 3))
            for place, row, tokens in zip(places, scores, encoded, strict=True):
                found[place] = list(self._entities(texts[place], row, tokens))
        return found

    def label(self, index: int) -> str:
        names = self.bundle.config.get("id2label") or {}
        return str(names.get(str(index), f"LABEL_{index}"))

    def _entities(self, text: str, scores: Array, tokens: Encoded) -> Iterator[Entity]:
        words: dict[int, list[int]] = {}
        for index, (word, special) in enumerate(zip(tokens.words, tokens.special, strict=True)):
            if not special and tokens.offsets[index][0] < tokens.offsets[index][1]:
                words.setdefault(index if word is None else word, []).append(index)
        for members in words.values():
            best = int(scores[members[0]].argmax())
            if self.label(best) != "O":
                start, end = tokens.offsets[members[0]][0], tokens.offsets[members[-1]][1]
                yield Entity(self.label(best), float(scores[members, best].mean()), text[start:end], start, end)

    def _logits(self, feeds: Mapping[str, Array], rank: int) -> Array:
        if "logits" not in self.outputs or len(self.outputs["logits"]["shape"]) != rank:
            given = ", ".join(f"{name} {port['shape']}" for name, port in self.outputs.items())
            raise InputError(
                f"{self.bundle.path} is a {self.bundle.task} model and gives {given}; it has no such labels."
            )
        logits: Array = self.engine.forward([(feeds, self.engine.new_state())])[0]["logits"].astype(np.float64)
        return logits

    # ----------------------------------------------------------------------------------------------------------- inputs

    def _batches(
        self, items: Sequence[Any], batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Array], list[Encoded]]]:
        """(places in `items`, the graph's inputs, the texts' tokens) of each batch; texts of like length together."""
        if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) or not items:
            raise InputError("Expected a list of at least one text or picture: embed(['a text']).")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1.")
        if IDS in self.inputs:
            yield from self._text_batches(items, batch_size)
            return
        if "pixel_values" in self.inputs:
            from edgeformer.image import pixels

            shape = self.inputs["pixel_values"]["shape"]
            settings = self._preprocessor()
            for start in range(0, len(items), batch_size):
                part = items[start : start + batch_size]
                arrays = np.stack([pixels(item, settings, tuple(shape[1:])) for item in part])
                yield list(range(start, start + len(part))), {"pixel_values": arrays}, []
            return
        raise InputError(
            f"{self.bundle.path} takes {', '.join(self.inputs)}, which is neither text nor a picture; call it with its "
            f"own arrays: model({', '.join(self.inputs)})."
        )

    def _text_batches(
        self, items: Sequence[Any], batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Array], list[Encoded]]]:
        if self.tokenizer is None:
            raise InputError(f"{self.bundle.path} has no tokenizer; call it with token ids: model(input_ids=...).")
        limit = self.processing.get("max_length")
        encoded = [self.tokenizer.encode_for_encoder(item, limit) for item in items]
        padding = self.bundle.config.get("pad_token_id")
        if padding is None:
            padding = self.tokenizer.pad_id
        order = sorted(range(len(items)), key=lambda place: -len(encoded[place].ids))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            part = [encoded[place] for place in places]
            length = max(1, len(part[0].ids))
            lists = {
                IDS: ([text.ids for text in part], padding if isinstance(padding, int) and padding >= 0 else 0),
                TYPES: ([text.type_ids for text in part], 0),
                MASK: ([[1] * len(text.ids) for text in part], 0),
            }
            feeds = {
                name: np.array([row + [fill] * (length - len(row)) for row in rows], np.int64)  # (batch, length)
                for name, (rows, fill) in lists.items()
                if name in self.inputs
            }
            yield places, feeds, part

    def _preprocessor(self) -> Mapping[str, Any]:
        from edgeformer.manifest import read_json

        path = self.bundle.file("preprocessor_config.json")
        if path is None:
            raise BundleError(
                f"{self.bundle.path} has no preprocessor_config.json, so how pictures become arrays is unknown; call "
                "it with its own arrays: model(pixel_values=...)."
            )
        return read_json(path)


def pool(states: Array, mask: Array | None, mode: str) -> Array:
    """One vector [batch, size] of the states [batch, length, size] where the mask [batch, length] is not 0."""
    seen = np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    vectors: Array
    if mode == "cls":
        vectors = states[:, 0]
    elif mode == "last":
        vectors = states[np.arange(len(states)), seen.sum(-1).astype(np.int64) - 1]
    elif mode == "max":
        vectors = np.where(seen[..., None] > 0, states, -np.inf).max(1)
    else:
        vectors = (states * seen[..., None]).sum(1) / np.maximum(seen.sum(-1, keepdims=True), 1e-9)
    return vectors


def softmax(logits: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares
