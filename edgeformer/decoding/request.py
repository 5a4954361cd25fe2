"""One generation, checked and ready to run: the prompt, what limits and ends the answer, and how tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.limits import Limits, checked_prompt
from edgeformer.decoding.logits_processors import Processor, logits_processors
from edgeformer.decoding.session import Session
from edgeformer.errors import InputError


@dataclass(frozen=True)
class CallOptions:
    """Arguments of one call that are no part of a generation config.

    Raises:
        InputError: the seed is no whole number of at least 0.
    """

    seed: int | None = None  # the same seed gives the same tokens; None takes a fresh one
    ignore_eos: bool = False
    session: Session | None = None  # not used by a beam search

    def __post_init__(self) -> None:
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise InputError(f"seed is {seed!r}, expected a whole number of at least 0.")


@dataclass(frozen=True)
class Request:
    """A prompt and all that its answer depends on beside the engine. Made by `of`, which checks it."""

    prompt: list[int]
    config: GenerationConfig
    limits: Limits
    max_new_tokens: int
    processors: tuple[Processor, ...] = ()
    seed: int | None = None

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        config: GenerationConfig,
        limits: Limits,
        options: CallOptions,
        source: Sequence[int] | Array | None = None,
    ) -> Request:
        """The request for an answer to `prompt`; `source` holds the token ids that an encoder read, if any.

        Raises:
            InputError: the prompt is empty, holds an unknown id, is too long, or leaves no room for an answer.
        """
        if options.ignore_eos:
            config = replace(config, eos_token_id=())
        ids = checked_prompt(prompt, limits)
        new_tokens = config.new_tokens(len(ids))
        processors = logits_processors(config, len(ids), new_tokens, source)
        limits = replace(limits, eos=frozenset(config.eos_token_id))
        return cls(ids, config, limits, new_tokens, processors, options.seed)

    def rng(self) -> np.random.Generator | None:
        """The random generator of a sampled answer; None for a greedy one."""
        return np.random.default_rng(self.seed) if self.config.do_sample else None
