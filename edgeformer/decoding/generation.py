"""One generation from its rules: the token loop or the beam search, with one list of logits processors."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeformer.decoding.beam import BeamOptions, Finished, beam_search
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import logits_processors
from edgeformer.decoding.loop import (
    GenerationOptions,
    Limits,
    Piece,
    Result,
    Session,
    StopFilter,
    Stream,
    Timings,
    checked_prompt,
    tokens,
)
from edgeformer.engines.base import Engine, State
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Call:
    """What one call adds to the rules."""

    seed: int | None = None
    ignore_eos: bool = False
    session: Session | None = None  # a beam search makes no use of it


@dataclass(frozen=True)
class Answering:
    """The engine that answers, and what it answers with."""

    engine: Engine
    limits: Limits
    tokenizer: Tokenizer | None

    def stream(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        call: Call,
        new_state: Callable[[int], State],
        source: Sequence[int] | Array | None,
    ) -> Stream:
        """The answer to `prompt`, piece by piece; that of a beam search comes all at its end.

        `new_state` makes the state of a number of sequences; `source` is what the encoder read, if it was tokens.

        Raises:
            InputError: the prompt or the seed is wrong, or there are stop strings and no tokenizer.
        """
        if config.stop_strings and self.tokenizer is None:
            raise InputError("Stop strings need a tokenizer, and this bundle has no tokenizer; leave them out.")
        if call.ignore_eos:
            config = replace(config, eos_token_id=())
        ids = checked_prompt(prompt, self.limits)
        options = GenerationOptions.of(config, len(ids), call.seed)
        processors = logits_processors(config, len(ids), options.max_new_tokens, source)
        limits = replace(self.limits, eos=frozenset(config.eos_token_id))
        if config.num_beams > 1:
            state, search = new_state(config.num_beams), BeamOptions.of(config)

            def find() -> Finished:
                stopped = self._stopped(options.stop) if options.stop else None
                return beam_search(self.engine, state, ids, limits, options, search, processors, stopped)

            return Stream(self._found(len(ids), find, options.stop))
        session = call.session or Session(new_state(1))
        text = self.tokenizer.detokenizer() if self.tokenizer else None
        return Stream(tokens(self.engine, session, ids, limits, options, text, processors))

    def _stopped(self, stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        return lambda ids: any(stop in self._text(ids) for stop in stops)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer else ""

    def _found(
        self, prompt_length: int, find: Callable[[], Finished], stops: Sequence[str]
    ) -> Generator[Piece, None, Result]:
        began = time.perf_counter()
        found = find()
        seconds = time.perf_counter() - began
        filter = StopFilter(stops)
        text = filter.push(self._text(found.ids[:-1] if found.reason == "eos" else found.ids))
        text += filter.flush()
        for id in found.ids[:-1]:
            yield Piece(id, "")
        yield Piece(found.ids[-1], text, found.reason)
        timings = Timings(prompt_length, 0, 0.0, seconds, len(found.ids), seconds)
        return Result(text, found.ids, found.reason, timings)
