"""A stream of one answer: from the token loop, or from a beam search when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from edgeformer.bundle.signature import Array
from edgeformer.decoding.beam import beam_search
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.loop import tokens
from edgeformer.decoding.request import CallOptions, Request
from edgeformer.decoding.result import Piece, Result, Stream, Timings
from edgeformer.decoding.session import Session
from edgeformer.decoding.stop import StopFilter
from edgeformer.decoding.token_settings import with_token_ids
from edgeformer.engines.base import Engine, State
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextGenerator:
    """An engine that generates, with its limits and its tokenizer."""

    engine: Engine
    limits: Limits
    tokenizer: Tokenizer | None

    def stream(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        options: CallOptions,
        new_state: Callable[[int], State],
        source: Sequence[int] | Array | None = None,
    ) -> Stream:
        """The answer to `prompt`, piece by piece; that of a beam search comes all at its end.

        `new_state` makes the state of a number of sequences; `source` holds the token ids that an encoder read, if any.

        Raises:
            InputError: the prompt is wrong, or there are stop strings and no tokenizer.
        """
        if config.stop_strings and self.tokenizer is None:
            raise InputError("Stop strings need a tokenizer, and this bundle has no tokenizer; leave them out.")
        config = with_token_ids(config, self.tokenizer)
        request = Request.of(prompt, config, self.limits, options, source)
        if config.num_beams > 1:
            return Stream(self._beams(request, new_state(config.num_beams)))
        session = options.session or Session(new_state(1))
        text = self.tokenizer.detokenizer() if self.tokenizer else None
        return Stream(tokens(self.engine, session, request, text))

    def _beams(self, request: Request, state: State) -> Generator[Piece, None, Result]:
        began = time.perf_counter()
        stops = request.config.stop_strings

        def is_stopped(ids: Sequence[int]) -> bool:
            return any(stop in self._text(ids) for stop in stops)

        best = beam_search(self.engine, state, request, is_stopped if stops else None)
        seconds = time.perf_counter() - began
        stop = StopFilter(stops)
        text = stop.push(self._text(best.ids[:-1] if best.reason == "eos" else best.ids))
        text += stop.flush()
        for token in best.ids[:-1]:
            yield Piece(token, "")
        yield Piece(best.ids[-1], text, best.reason)
        timings = Timings(len(request.prompt), 0, 0.0, seconds, len(best.ids), seconds)
        return Result(text, best.ids, best.reason, timings)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer else ""
