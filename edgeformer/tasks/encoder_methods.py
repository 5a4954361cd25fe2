"""The methods of a Model that is an encoder: vectors, labels, scores of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeformer.bundle.signature import F32
from edgeformer.errors import InputError
from edgeformer.processing.pooling import ACTIVATIONS, Pooling, Similarity, similarity
from edgeformer.tasks.choose import Task
from edgeformer.tasks.embedding import EmbedOptions, Encoder, Entity, Label, Ranked
from edgeformer.tasks.encoder_batches import Batching, Progress

if TYPE_CHECKING:
    from edgeformer.bundle.bundle import Bundle


class EncoderMethods:
    """The part of `Model` that does not generate."""

    bundle: Bundle
    _task: Task

    def embed(
        self,
        items: Sequence[Any],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        pooling: Pooling | Sequence[Pooling] | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        batch_size: int | None = None,
        show_progress: bool | Progress | None = False,
    ) -> F32:
        """One vector for each text or picture, float32 [len(items), size].

        Texts may be pairs of them; pictures are paths, Pillow images, or uint8 [height, width, 3]. None means the
        setting of the bundle: the `prompt` before each text (`prompt_name` selects one of the bundle; `prompt=""`
        leaves it out), `pooling` (several are joined), and whether to `normalize` to length 1. A model that gives one
        vector is not pooled. The first `dimensions` are kept, as Matryoshka models allow it; these are at length 1
        only with `normalize=True`, as in sentence-transformers.

        Items of like length run together: as many as run well, and at most `batch_size`. `show_progress` is a function
        of (items done, items in all), True for a bar on stderr, or None for one if stderr is a terminal and there are
        many items. Both are the same in all methods here.

        Raises:
            InputError: the model has no such vectors, no such prompt, or an item is of another kind.
        """
        options = EmbedOptions(pooling, normalize, dimensions, prompt, prompt_name)
        return self._encoding.embed(items, options, Batching(batch_size, show_progress))

    def similarity(self, a: Any, b: Any, function: Similarity | None = None) -> F32:
        """float32 [len(a), len(b)]: how alike vectors are, by the bundle's own function (cosine where it has none).

        Higher is more alike, so `euclidean` and `manhattan` are negative distances.

        Raises:
            InputError: the function is unknown, or the vectors are of different sizes.
        """
        return similarity(a, b, function or self._encoding.processing.get("similarity", "cosine"))

    def classify(
        self, items: Sequence[Any], *, batch_size: int | None = None, show_progress: bool | Progress | None = False
    ) -> list[list[Label]]:
        """For each text or picture its labels, the likeliest first, with probabilities.

        Of a cross-encoder, which brings its own activation, the scores are what that activation gives.

        Raises:
            InputError: the model gives no labels for an item, or an item is of another kind.
        """
        return self._encoding.classify(items, Batching(batch_size, show_progress))

    def classify_tokens(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool | Progress | None = False
    ) -> list[list[Entity]]:
        """For each text the words with a label (other than O), and where they stand.

        Raises:
            InputError: the model gives no labels for tokens, or has no tokenizer.
        """
        return self._encoding.classify_tokens(texts, Batching(batch_size, show_progress))

    def score(
        self,
        pairs: Sequence[Any],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        activation: str | None = None,
        batch_size: int | None = None,
        show_progress: bool | Progress | None = False,
    ) -> F32:
        """A cross-encoder's score for each pair of texts: float32 [len(pairs)], or [len(pairs), labels].

        The numbers of `CrossEncoder.predict`: the bundle's own `activation` unless given ("identity" gives logits); a
        model that names none has sigmoid for one label, and identity for several. The prompt stands before the first
        text of a pair.

        Raises:
            InputError: the model gives no labels for a text, there is no such prompt or activation, or an item is
                neither a text nor a pair.
        """
        if activation is not None and activation not in ACTIVATIONS:
            raise InputError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
        encoding = self._encoding
        return encoding.score(
            pairs, activation, encoding.prompt(prompt, prompt_name), Batching(batch_size, show_progress)
        )

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress: bool | Progress | None = False,
    ) -> list[Ranked]:
        """The documents by a cross-encoder's score for each with the query, the best first.

        Raises:
            InputError: the model has several labels, or see `score`.
        """
        if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
            raise InputError(f"documents is {type(documents).__name__}, expected a list of texts.")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise InputError(f"top_k is {top_k!r}, expected a whole number of at least 1.")
        scores = self.score(
            [(query, document) for document in documents],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress=show_progress,
        )
        if scores.ndim != 1:
            raise InputError(f"{self.bundle.path} gives {scores.shape[1]} labels a pair, so there is no one order.")
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [Ranked(int(i), float(scores[i])) for i in order]

    @property
    def _encoding(self) -> Encoder:
        if not isinstance(self._task, Encoder):
            raise InputError(f"{self.bundle.path} is a {self.bundle.task} model: it generates, and has no such method.")
        return self._task
