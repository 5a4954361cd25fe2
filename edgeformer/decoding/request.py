"""One generation, checked and ready to run: the prompt, what limits and ends the answer, and how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.answer_shape import TEXT, AnswerShape, ShapeOptions
from edgeformer.decoding.context import ContextPolicy, checked_policy
from edgeformer.decoding.generation_config import Arguments, GenerationConfig
from edgeformer.decoding.limits import Limits, checked_prompt
from edgeformer.decoding.logits_processors import Processor, logits_processors
from edgeformer.decoding.logprobs import check_count
from edgeformer.decoding.session import Session
from edgeformer.decoding.speculation.draft_model import DraftBundle
from edgeformer.decoding.speculation.speculation import SpeculationName, check_speculation
from edgeformer.errors import ContextError, InputError

MOST_ANSWERS = 128  # to one prompt; OpenAI's API has the same limit


@dataclass(frozen=True)
class CallOptions:
    """Arguments of one call that are no part of a generation config.

    Raises:
        InputError: the seed is no whole number of at least 0, `n` is no number of answers, the session is none, or
            there is one for several answers.
    """

    seed: int | None = None  # the same seed gives the same tokens; None takes a fresh one
    ignore_eos: bool = False
    session: Session | None = None
    n: int = 1  # answers to the prompt
    logprobs: int | None = None  # likeliest tokens to report beside each new one; None: no log probabilities
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    speculation: SpeculationName | DraftBundle = "auto"  # or "off", "lookup", a Model of the same vocabulary
    shape: ShapeOptions = ShapeOptions()  # noqa: RUF009  (frozen)
    context_policy: str | None = None  # what happens when the context is full: "stop" (None), "error" or "slide"
    context_protect: int | None = None  # tokens at the beginning that a sliding context keeps

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or not 1 <= self.n <= MOST_ANSWERS:
            raise InputError(f"n is {self.n!r}, expected a number of answers from 1 to {MOST_ANSWERS}.")
        for name in ("logprobs", "prompt_logprobs"):
            check_count(getattr(self, name), name)
        check_speculation(self.speculation)
        if self.session is not None and not isinstance(self.session, Session):
            raise InputError(f"session is {self.session!r}, expected one that Model.session() made.")
        if self.n > 1 and self.session is not None:
            raise InputError(f"n is {self.n}, and a session holds one conversation; leave out one of them.")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise InputError(f"seed is {seed!r}, expected a whole number of at least 0.")


class CallArguments(Arguments, total=False):
    """Arguments of `Model.generate`: those of a generation config, and the fields of `CallOptions`."""

    stop: str | Sequence[str] | None
    decoder_prompt: Sequence[int] | None
    seed: int | None
    ignore_eos: bool
    session: Session | None
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    speculation: SpeculationName | DraftBundle
    context_policy: ContextPolicy | None
    context_protect: int | None
    json_schema: Any
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None
    response_format: Mapping[str, Any] | None
    tools: Sequence[Any] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any] | None


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], CallOptions, Sequence[int] | None]:
    """(arguments of a generation config, options of the call, decoder_prompt).

    Raises:
        InputError: an option is out of its range.
    """
    config = dict(arguments)
    decoder_prompt, stop = config.pop("decoder_prompt", None), config.pop("stop", None)
    shape = ShapeOptions(**{one.name: config.pop(one.name) for one in fields(ShapeOptions) if one.name in config})
    given = {one.name: config.pop(one.name) for one in fields(CallOptions) if one.name in config}
    options = CallOptions(**given, shape=shape)
    if stop is not None:
        config["stop_strings"] = stop
    return config, options, decoder_prompt


@dataclass(frozen=True)
class Request:
    """A prompt and all that its answer depends on beside the engine. Made by `of`, which checks it."""

    prompt: list[int]
    config: GenerationConfig
    limits: Limits
    max_new_tokens: int
    processors: tuple[Processor, ...] = ()
    seed: int | None = None
    context_policy: ContextPolicy = "stop"
    context_protect: int = 0
    shape: AnswerShape = TEXT
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        config: GenerationConfig,
        limits: Limits,
        options: CallOptions,
        source: Sequence[int] | Array | None = None,
        shape: AnswerShape = TEXT,
    ) -> Request:
        """The request for an answer to `prompt`; `source` holds the token ids that an encoder read, if any.

        Raises:
            InputError: the prompt is empty, holds an unknown id, is too long, or leaves no room for an answer.
        """
        if options.ignore_eos:
            config = replace(config, eos_token_id=())
        if shape.grammar is not None:  # it says where the answer may end; a forced end token would break it
            config = replace(config, forced_eos_token_id=())
        policy, protect = checked_policy(options.context_policy, options.context_protect, limits.context)
        ids = checked_prompt(prompt, limits, may_slide=policy == "slide")
        if options.prompt_logprobs is not None and limits.context is not None and len(ids) > limits.context:
            raise ContextError(
                f"prompt_logprobs needs the logits of the whole prompt, which has {len(ids)} tokens; the limit is "
                f"{limits.context} ({limits.context_reason}). Shorten the prompt, or leave out prompt_logprobs."
            )
        new_tokens = config.new_tokens(len(ids))
        processors = logits_processors(config, len(ids), new_tokens, source)
        limits = replace(limits, eos=frozenset(config.eos_token_id))
        return cls(
            ids,
            config,
            limits,
            new_tokens,
            processors,
            seed=options.seed,
            context_policy=policy,
            context_protect=protect,
            shape=shape,
            logprobs=options.logprobs,
            prompt_logprobs=options.prompt_logprobs,
        )

    @property
    def tokens(self) -> int:
        """The most tokens that a state will hold for it."""
        most = len(self.prompt) + self.max_new_tokens
        return most if self.limits.context is None else min(most, self.limits.context)

    @property
    def wants_logprobs(self) -> bool:
        """Of generated tokens or of the prompt's."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    def rng(self, index: int = 0) -> np.random.Generator | None:
        """The random generator of sampled answer `index`, whose seed is `seed + index`; None for greedy ones."""
        if not self.config.do_sample:
            return None
        return np.random.default_rng(None if self.seed is None else self.seed + index)
