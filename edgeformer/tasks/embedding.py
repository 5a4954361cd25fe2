"""Encoders: one vector for each text or picture, and labels with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, MASK, TYPES, Array
from edgeformer.engines.base import Engine
from edgeformer.errors import BundleError, InputError
from edgeformer.processing.pooling import activate, modes_of, pool, softmax, unit
from edgeformer.processing.tokenizer import Encoded, Tokenizer
from edgeformer.tasks.encoder_batches import BATCH_ITEMS, BATCH_TOKENS, Batching

POOLED = "pooling_mask"  # 0 at tokens that a graph with its own pooling leaves out: those of a prompt
VECTORS = ("sentence_embedding", "text_embeds", "image_embeds")  # outputs that are one vector already
HIDDEN_STATES = "last_hidden_state"


@dataclass(frozen=True)
class Label:
    """A label of the model's config and its probability; for a cross-encoder the value of its activation."""

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
class Ranked:
    """A document: its index in the ranked list, and its score."""

    index: int
    score: float


@dataclass(frozen=True)
class EmbedOptions:
    """How hidden states become vectors; None means the setting of the bundle.

    Raises:
        InputError: a value is out of its range.
    """

    pooling: str | Sequence[str] | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    prompt: str | None = None
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None:
            modes_of(self.pooling)
        if self.normalize is not None and not isinstance(self.normalize, (bool, np.bool_)):
            raise InputError(f"normalize is {self.normalize!r}, expected True, False or None.")
        size = self.dimensions
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1):
            raise InputError(f"dimensions is {size!r}, expected a whole number of at least 1.")


@dataclass(frozen=True)
class Encoder:
    """An encoder: its engine, and the bundle's settings of what comes before and after the graph."""

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer | None

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The inputs of the graph by name, as the manifest describes them."""
        ports: Mapping[str, Any] = self.bundle.manifest["graphs"]["model"]["inputs"]
        return ports

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The outputs of the graph by name, as the manifest describes them."""
        ports: Mapping[str, Any] = self.bundle.manifest["graphs"]["model"]["outputs"]
        return ports

    @property
    def processing(self) -> Mapping[str, Any]:
        """The manifest's settings of pooling, normalization, prompts and lengths."""
        settings: Mapping[str, Any] = self.bundle.manifest.get("processing") or {}
        return settings

    def embed(
        self, items: Sequence[Any], options: EmbedOptions, batching: Batching
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [len(items), size]; see `Model.embed`."""
        _require_items(items)
        name = next((name for name in (*VECTORS, HIDDEN_STATES) if name in self.outputs), None)
        if name is None:
            raise InputError(
                f"{self.bundle.path} is a {self.bundle.task} model and gives {', '.join(self.outputs)}; embeddings "
                f"need an output {HIDDEN_STATES} or {VECTORS[0]}."
            )
        if options.pooling is not None and name != HIDDEN_STATES:
            raise InputError(
                f"{self.bundle.path} gives {name}, one vector an item, so there is nothing to pool; leave pooling out."
            )
        modes = modes_of(options.pooling or self.processing.get("pooling", "mean"))
        normal = self.processing.get("normalize", True) if options.normalize is None else options.normalize
        prompt = self.prompt(options.prompt, options.prompt_name)
        rows: list[Array] = [np.empty(0, np.float32)] * len(items)
        for places, feeds, _ in self._batches(items, batching, prompt):
            pooled = feeds[POOLED] if POOLED in self.inputs else feeds.pop(POOLED, None)
            states = self.engine.forward([(feeds, self.engine.new_state())])[0][name].astype(np.float32)
            vectors = pool(states, feeds.get(MASK), modes, pooled) if states.ndim == 3 else states
            vectors = self._cut(unit(vectors) if normal else vectors, options)
            for place, vector in zip(places, vectors, strict=True):
                rows[place] = vector
        return np.stack(rows)

    def _cut(self, vectors: Array, options: EmbedOptions) -> Array:
        """The first dimensions; at length 1 again only where the caller asks for it, as sentence-transformers does."""
        size = options.dimensions or self.processing.get("dimensions")
        if size is None:
            return vectors
        if options.dimensions is not None and options.dimensions > vectors.shape[-1]:
            raise InputError(f"dimensions is {options.dimensions}, the vectors have {vectors.shape[-1]}.")
        cut = vectors[:, :size]
        return unit(cut) if options.normalize else cut

    def prompt(self, text: str | None, name: str | None) -> str:
        """What stands before each text: `text`, else the prompt of that name, else the bundle's default prompt.

        Raises:
            InputError: both are given, or the bundle has no prompt of that name.
        """
        if text is not None and name is not None:
            raise InputError("prompt and prompt_name are both given, expected one of them.")
        if text is not None and not isinstance(text, str):
            raise InputError(f"prompt is {type(text).__name__}, expected a text.")
        chosen = self.processing.get("default_prompt_name") if name is None else name
        if text is not None or chosen is None:
            return text or ""
        prompts = {"query": "", "document": ""} | dict(self.processing.get("prompts") or {})
        if chosen not in prompts:
            raise InputError(f"prompt_name is {chosen!r}; {self.bundle.path} has {', '.join(map(repr, prompts))}.")
        return str(prompts[chosen])

    def classify(self, items: Sequence[Any], batching: Batching) -> list[list[Label]]:
        """For each item all labels, the likeliest first."""
        _require_items(items)
        several = self.bundle.config.get("problem_type") == "multi_label_classification"
        activation = self.processing.get("activation")
        found: list[list[Label]] = [[] for _ in items]
        for places, feeds, _ in self._batches(items, batching, self.prompt(None, None)):
            logits = self._logits(feeds, 2)
            single = several or logits.shape[-1] == 1
            name = activation or ("sigmoid" if single else None)
            scores = activate(logits, name) if name else softmax(logits)
            for place, row in zip(places, scores, strict=True):
                order = np.argsort(-row, kind="stable")
                found[place] = [Label(self.label(int(i)), float(row[i])) for i in order]
        return found

    def score(
        self, pairs: Sequence[Any], activation: str | None, prompt: str, batching: Batching
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [len(pairs)], or [len(pairs), labels] of a model with several labels; see `Model.score`."""
        _require_items(pairs)
        texts = [tuple(pair) if isinstance(pair, list) else pair for pair in pairs]
        rows: list[Array] = [np.empty(0, np.float32)] * len(texts)
        for places, feeds, _ in self._batches(texts, batching, prompt):
            logits = self._logits(feeds, 2)
            own = self.processing.get("activation") or ("sigmoid" if logits.shape[-1] == 1 else "identity")
            scores = activate(logits, activation or own).astype(np.float32)
            for place, row in zip(places, scores, strict=True):
                rows[place] = row
        found = np.stack(rows)
        return found[:, 0] if found.shape[1] == 1 else found

    def classify_tokens(self, texts: Sequence[str], batching: Batching) -> list[list[Entity]]:
        """For each text its words that have a label other than O; a word takes the label of its first token."""
        _require_items(texts)
        found: list[list[Entity]] = [[] for _ in texts]
        for places, feeds, encoded in self._batches(texts, batching, ""):
            scores = softmax(self._logits(feeds, 3))
            for place, row, tokens in zip(places, scores, encoded, strict=True):
                found[place] = list(self._entities(texts[place], row, tokens))
        return found

    def label(self, index: int) -> str:
        """The name of a label, from config.json."""
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
        self, items: Sequence[Any], batching: Batching, prompt: str
    ) -> Iterator[tuple[list[int], dict[str, Array], list[Encoded]]]:
        """(places in `items`, the graph's inputs, the texts' tokens) of each batch; texts of like length together."""
        batches = self._text_batches if IDS in self.inputs else self._picture_batches
        with batching.reporting(len(items)) as report:
            for places, feeds, encoded in batches(items, batching, prompt):
                yield places, feeds, encoded
                report(len(places))

    def _picture_batches(
        self, items: Sequence[Any], batching: Batching, prompt: str
    ) -> Iterator[tuple[list[int], dict[str, Array], list[Encoded]]]:
        if prompt:
            raise InputError(f"{self.bundle.path} takes no text, so there is no place for the prompt {prompt!r}.")
        if "pixel_values" in self.inputs:
            from edgeformer.processing.image import ImageSteps, pixels

            shape = self.inputs["pixel_values"]["shape"]
            steps = ImageSteps.of(self._preprocessor())
            size = batching.size or BATCH_ITEMS
            for start in range(0, len(items), size):
                part = items[start : start + size]
                arrays = np.stack([pixels(item, steps, tuple(shape[1:])) for item in part])
                yield list(range(start, start + len(part))), {"pixel_values": arrays}, []
            return
        raise InputError(
            f"{self.bundle.path} takes {', '.join(self.inputs)}, which is neither text nor a picture; call it with its "
            f"own arrays: model({', '.join(self.inputs)})."
        )

    def _text_batches(
        self, items: Sequence[Any], batching: Batching, prompt: str
    ) -> Iterator[tuple[list[int], dict[str, Array], list[Encoded]]]:
        if self.tokenizer is None:
            raise InputError(f"{self.bundle.path} has no tokenizer; call it with token ids: model(input_ids=...).")
        limit = self.processing.get("max_length")
        encoded = [self.tokenizer.encode_for_encoder(_with_prompt(prompt, item), limit) for item in items]
        leaves_out = bool(prompt) and not self.processing.get("include_prompt", True)
        first = self._prompt_length(prompt, limit) if leaves_out else 0
        padding = self.bundle.config.get("pad_token_id")
        if padding is None:
            padding = self.tokenizer.pad_id
        budget = None if self.engine.name == "cuda" else BATCH_TOKENS
        # Without an attention mask the graph takes padding for text.
        lengths, may_pad = [len(text.ids) for text in encoded], MASK in self.inputs
        for places in batching.by_length(lengths, budget, may_pad=may_pad):
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
            if POOLED in self.inputs or first:
                feeds[POOLED] = np.zeros((len(places), length), np.int64) + (np.arange(length) >= first)
            yield places, feeds, part

    def _prompt_length(self, prompt: str, limit: int | None) -> int:
        """Tokens of the prompt alone, with the special ones that begin a text but not the one that ends it."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode_for_encoder(prompt, limit).ids
        return len(ids) - bool(ids and ids[-1] in self.tokenizer.special_ids)

    def _preprocessor(self) -> Mapping[str, Any]:
        from edgeformer.bundle.manifest import read_json

        path = self.bundle.file("preprocessor_config.json")
        if path is None:
            raise BundleError(
                f"{self.bundle.path} has no preprocessor_config.json, so how pictures become arrays is unknown; call "
                "it with its own arrays: model(pixel_values=...)."
            )
        return read_json(path)


def _require_items(items: object) -> None:
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) or not items:
        found = "an empty list" if isinstance(items, Sequence) and not items else type(items).__name__
        raise InputError(f"Expected a list of at least one text or picture: embed(['a text']); this is {found}.")


def _with_prompt(prompt: str, item: Any) -> Any:
    """The text after the prompt; of a pair, the first text. Anything else stays, and is refused as what it is."""
    if isinstance(item, str):
        return prompt + item
    pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
    return (prompt + item[0], item[1]) if pair else item
