"""What a bundle and an engine allow: the context length, known token ids, and whether the graph has a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import KEEP, PAST
from edgeformer.decoding.generation_config import file_settings
from edgeformer.decoding.generation_fields import listed
from edgeformer.engines.base import Engine
from edgeformer.errors import ContextError, InputError


@dataclass(frozen=True)
class Limits:
    """What a loaded graph allows. `cached`: it has a KV cache; without one each step runs the whole text."""

    cached: bool
    keeps_logits: bool
    context: int | None  # tokens that a state may hold
    context_reason: str
    vocab_size: int | None
    eos: frozenset[int]
    bos: int | None

    @classmethod
    def of(cls, bundle: Bundle, engine: Engine, graph: str = "model") -> Limits:
        """The limits of one graph of a bundle, as `engine` was loaded."""
        inputs = bundle.manifest["graphs"][graph]["inputs"]
        context, reason = bundle.context, bundle.context_source(graph)
        loaded = getattr(engine, "context", None)
        if loaded is not None and (context is None or loaded < context):
            context, reason = loaded, f"what the {engine.name} engine was loaded for; load with a larger context"
        return cls(
            cached=any(name.startswith(PAST) for name in inputs),
            keeps_logits=KEEP in inputs,
            context=context,
            context_reason=reason,
            vocab_size=bundle.vocab_size,
            eos=frozenset(_ids(bundle, "eos_token_id")),
            bos=next(iter(_ids(bundle, "bos_token_id")), None),
        )

    def refuse_length(self, length: int) -> NoReturn:
        """
        Raises:
            ContextError: always; it says how many tokens there may be.
        """
        raise ContextError(
            f"The text has {length} tokens, the limit is {self.context} ({self.context_reason}); shorten it, or choose "
            'context_policy="slide".'
        )


def checked_prompt(prompt: Sequence[int], limits: Limits, *, may_slide: bool = False) -> list[int]:
    """The token ids of a prompt; an empty one becomes the token that begins a text.

    Raises:
        InputError: the prompt holds an unknown id, or is empty without such a token.
        ContextError: it is longer than the context, and the context may not slide.
    """
    array = np.asarray(prompt)
    if array.size == 0:
        if limits.bos is None:
            raise InputError(
                "The prompt is empty, and the model names no token to begin with; give at least one token."
            )
        return [limits.bos]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"The prompt has {array.dtype} elements in {array.ndim} dimensions, expected a list of token ids."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or (limits.vocab_size is not None and high >= limits.vocab_size):
        known = "" if limits.vocab_size is None else f" to {limits.vocab_size - 1}"
        raise InputError(f"The prompt holds the token id {low if low < 0 else high}, the model knows 0{known}.")
    if limits.context is not None and len(array) > limits.context and not may_slide:
        raise ContextError(
            f"The prompt has {len(array)} tokens, the limit is {limits.context} ({limits.context_reason}); shorten it, "
            'or choose context_policy="slide".'
        )
    return [int(token) for token in array]


def _ids(bundle: Bundle, name: str) -> list[int]:
    return [token for token in listed(file_settings(bundle).get(name)) if type(token) is int]
