"""The only token loop: prompt, then one token at a time, as a generator.

`finish_reason` is why it ended: "eos" (the model ended its answer), "stop" (a stop string appeared), "length"
(`max_new_tokens` reached), "time" (`max_time` passed) or "context" (the model has no more positions). OpenAI's API
calls the first two "stop".
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, KEEP, PAST
from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.decoding.generation_fields import listed
from edgeformer.decoding.logits_processors import Processor, process
from edgeformer.decoding.sampling import check, choose
from edgeformer.engines.base import Engine, State
from edgeformer.errors import EdgeformerError, InputError

CHUNK = 512  # prompt tokens a step: bounds the activations' memory, and how long Ctrl-C waits

Array = np.ndarray[Any, Any]


class TextStream(Protocol):
    """What the loop needs of a detokenizer."""

    def push(self, id: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True)
class GenerationOptions:
    """How long to go on, and whether each token is drawn.

    The same `seed` gives the same tokens; None takes a fresh one.

    Raises:
        InputError: the seed is no whole number of at least 0.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    do_sample: bool = False
    seed: int | None = None
    max_time: float | None = None  # seconds
    remove_invalid_values: bool = False  # of the logits, instead of an error

    def __post_init__(self) -> None:
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise InputError(f"seed is {seed!r}, expected a whole number of at least 0.")

    @classmethod
    def of(cls, config: GenerationConfig, prompt_length: int, seed: int | None) -> GenerationOptions:
        """What `config` says of an answer to `prompt_length` tokens.

        Raises:
            InputError: the prompt leaves no room, or the seed is no whole number.
        """
        return cls(
            config.new_tokens(prompt_length),
            config.stop_strings,
            config.do_sample,
            seed,
            config.max_time,
            config.remove_invalid_values,
        )

    def rng(self) -> np.random.Generator | None:
        """What draws; None where the likeliest is taken."""
        return np.random.default_rng(self.seed) if self.do_sample else None


@dataclass(frozen=True)
class Piece:
    """One step of a stream. `text` may be empty: in the middle of a character, or of what may become a stop string.

    The last piece carries `finish_reason`; its `id` is None where it only brings held-back text.
    """

    id: int | None
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds of one generation. Tokenizing the prompt is not in them; sampling is."""

    prompt_tokens: int
    reused_tokens: int  # of these: were in the state already
    prompt_seconds: float
    first_token_seconds: float
    new_tokens: int
    decode_seconds: float  # from the first new token to the last

    @property
    def prompt_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens - self.reused_tokens, self.prompt_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes with the prompt, so it is not counted."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def __str__(self) -> str:
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        parts = [
            f"prompt {self.prompt_tokens} tokens{reused} at {self.prompt_tokens_per_second:.1f} tokens/s",
            f"first token after {self.first_token_seconds:.3f} s",
        ]
        if self.new_tokens > 1:
            parts.append(f"{self.new_tokens} new tokens at {self.decode_tokens_per_second:.1f} tokens/s")
        return ", ".join(parts)


@dataclass(frozen=True)
class Result:
    """A whole answer. `ids` holds every new token, the end token too; `text` holds neither it nor the stop string."""

    text: str
    ids: list[int]
    finish_reason: str
    timings: Timings

    def __str__(self) -> str:
        return self.text


class Session:
    """A state and the tokens it holds, so that the next prompt only runs what is new. For one conversation."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the state to what it has in common with `prompt`, and say how many tokens that is.

        The prompt's last token is never reused: running it gives the logits of the first new one.
        """
        # A run that was interrupted between the engine and this list leaves the state one step ahead.
        held = min(self.state.length, len(self.ids))
        common = 0
        limit = min(held, len(prompt) - 1)
        while common < limit and self.ids[common] == prompt[common]:
            common += 1
        if self.state.length > common:
            self.state.truncate(common)
        self.ids = self.ids[:common]
        return common

    def reset(self) -> None:
        """Forget everything."""
        self.state.truncate(0)
        self.ids = []


@dataclass(frozen=True)
class Limits:
    """What the loop must know of a bundle."""

    cached: bool  # the graph has a KV cache; without one each step runs the whole text
    keeps_logits: bool
    context: int | None  # tokens that a state may hold
    context_reason: str
    vocab_size: int | None
    eos: frozenset[int]
    bos: int | None

    @classmethod
    def of(cls, bundle: Bundle, engine: Engine, graph: str = "model") -> Limits:
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


def next_logits(engine: Engine, session: Session, ids: Sequence[int], limits: Limits) -> Array:
    """The logits [vocab] that follow `ids`; runs the part of `ids` which the session does not hold."""
    start = len(session.ids)
    while True:
        end = min(start + CHUNK, len(ids)) if limits.cached else len(ids)
        chunk = ids[start if limits.cached else 0 : end]
        inputs: dict[str, Array] = {IDS: np.array([chunk], np.int64)}
        if limits.keeps_logits:
            inputs[KEEP] = np.array(1, np.int64)
        logits = engine.forward([(inputs, session.state)])[0]["logits"]  # (1, kept, vocab)
        session.ids.extend(ids[start:end])
        if end == len(ids):
            last: Array = logits[0, -1]
            return last
        start = end


def tokens(
    engine: Engine,
    session: Session,
    prompt: Sequence[int],
    limits: Limits,
    options: GenerationOptions,
    text: TextStream | None = None,
    processors: Sequence[Processor] = (),
) -> Generator[Piece, None, Result]:
    """Pieces as they come; the generator's value is the Result.

    Raises:
        InputError: the prompt is empty, holds an unknown id, or is longer than the model's context.
        EdgeformerError: the logits hold NaN.
    """
    began = time.perf_counter()
    ids = checked_prompt(prompt, limits)
    length = len(ids)
    reused = session.reuse(ids)
    logits = next_logits(engine, session, ids, limits)
    prompt_end = first = last = time.perf_counter()
    rng = options.rng()
    filter = StopFilter(options.stop)
    seen = np.array(ids, np.int64) if processors else np.empty(0, np.int64)
    new: list[int] = []
    shown: list[str] = []
    reason: str | None = None
    while reason is None:
        try:
            scores = np.asarray(logits, np.float32)
            if not options.remove_invalid_values:
                check(scores)
            if processors:
                scores = process(processors, seen, scores)
            id = choose(scores, rng)
        except EdgeformerError as error:
            raise EdgeformerError(f"Step {len(new)} of the generation, after {len(ids)} tokens: {error}") from error
        last = time.perf_counter()
        if not new:
            first = last
        new.append(id)
        ids.append(id)
        if processors:
            seen = np.append(seen, id)
        ended = id in limits.eos
        piece = "" if ended or text is None else filter.push(text.push(id))
        if ended:
            reason = "eos"
        elif filter.found():
            reason = "stop"
        elif len(new) >= options.max_new_tokens:
            reason = "length"
        elif options.max_time is not None and last - began > options.max_time:
            reason = "time"
        elif limits.context is not None and len(ids) > limits.context:
            reason = "context"
        if reason is None:
            shown.append(piece)
            yield Piece(id, piece)
            logits = next_logits(engine, session, ids, limits)
            continue
        if text is not None and not filter.found():
            piece += filter.push(text.flush())
            piece += filter.flush()
            reason = "stop" if filter.found() and reason != "eos" else reason
        shown.append(piece)
        yield Piece(id, piece, reason)
    timings = Timings(length, reused, prompt_end - began, first - began, len(new), last - first)
    return Result("".join(shown), new, reason, timings)


class Stream(Iterator[Piece]):
    """An iterator of pieces that keeps the Result: `result` is there once the stream has ended."""

    def __init__(self, pieces: Generator[Piece, None, Result]) -> None:
        self._pieces = pieces
        self._result: Result | None = None

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if self._result is None:
                self._result = end.value
            raise StopIteration from None

    @property
    def result(self) -> Result:
        """The whole answer.

        Raises:
            InputError: the stream was not read to its end.
        """
        if self._result is None:
            raise InputError("The stream has not ended; read all its pieces first.")
        return self._result

    def close(self) -> None:
        """Stop early; what was generated stays in the session."""
        self._pieces.close()


class StopFilter:
    """Lets text through up to the first stop string, holding back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._found = False

    def found(self) -> bool:
        """Whether a stop string appeared; from then on nothing comes through."""
        return self._found

    def push(self, text: str) -> str:
        if self.found():
            return ""
        self._held += text
        # The one that is complete first, so that the answer does not depend on where tokens end.
        places = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            _, place = min(places)
            self._found = True
            out, self._held = self._held[:place], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`, but is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def checked_prompt(prompt: Sequence[int], limits: Limits) -> list[int]:
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
    if limits.context is not None and len(array) > limits.context:
        raise InputError(
            f"The prompt has {len(array)} tokens, the limit is {limits.context} ({limits.context_reason}); shorten it."
        )
    return [int(id) for id in array]


def _ids(bundle: Bundle, name: str) -> list[int]:
    return [id for id in listed(file_settings(bundle).get(name)) if type(id) is int]


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
