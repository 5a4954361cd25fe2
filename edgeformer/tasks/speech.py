"""Speech recognition: recordings are cut into the model's windows, and several windows are transcribed at once."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from typing import Any, TypedDict

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import read_json
from edgeformer.bundle.signature import IDS, Array
from edgeformer.decoding.generation import Call
from edgeformer.decoding.logprobs import TokenLogprob
from edgeformer.decoding.request import CallOptions
from edgeformer.decoding.result import Result
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.machine import available_memory
from edgeformer.processing.audio import LogMel, read_wav
from edgeformer.tasks.encoder_batches import Batching, Progress
from edgeformer.tasks.seq2seq import EncoderDecoder
from edgeformer.tasks.speech_prompt import LONGEST, earlier_text, silence_token, speech_prompt
from edgeformer.tasks.timestamps import TimeTokens, spans
from edgeformer.tasks.transcript import PieceText, Segment, Transcript, TranscriptPiece

Audio = str | os.PathLike[str] | Array  # a file, or float samples [count] at the model's rate
MAX_WINDOWS = 8  # that run at once, where their memory is less than a quarter of what is free


class SpeechArguments(TypedDict, total=False):
    """Arguments of `Model.transcribe`."""

    language: str | None
    task: str | None
    prompt: str | None
    timestamps: bool
    logprobs: bool
    temperature: float | None
    seed: int | None
    num_beams: int | None
    max_new_tokens: int | None
    show_progress: bool | Progress | None
    on_step: Callable[[], None] | None


def transcribe_each(
    pair: EncoderDecoder, audios: Iterable[Audio], arguments: Mapping[str, Any]
) -> Iterator[Transcript | EdgeformerError]:
    """What is said in each recording, or why it has no transcript; see `Model.transcribe_each`.

    Raises:
        InputError: the model takes no sound, or an argument is unknown.
    """
    recordings = _Recordings(pair, audios, _checked(arguments))
    return recordings.transcripts(Batching(progress=arguments.get("show_progress", False)).progress)


def transcript_pieces(
    pair: EncoderDecoder, audio: Audio, arguments: Mapping[str, Any]
) -> Generator[TranscriptPiece, None, Transcript]:
    """The text of one recording token by token, window after window; returns the transcript.

    Raises:
        InputError: as `transcribe_each`, or times are asked for: their tokens are known once a window has ended.
    """
    if arguments.get("timestamps"):
        raise InputError("timestamps belong to a whole transcript; leave them out of a stream.")
    return _Recordings(pair, [audio], _checked(arguments)).pieces()


def _checked(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(arguments.keys() - SpeechArguments.__annotations__.keys())
    if unknown:
        known = ", ".join(SpeechArguments.__annotations__)
        raise InputError(f"transcribe() has no argument {', '.join(unknown)}; it has {known}.")
    for name, kind, expected in _KINDS:
        value = arguments.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} is {value!r:.200}, expected {expected}.")
    if not (arguments.get("on_step") is None or callable(arguments["on_step"])):
        raise InputError(f"on_step is {arguments['on_step']!r:.200}, expected a function without arguments.")
    return arguments


# Of the arguments that `generate` does not check.
_KINDS: tuple[tuple[str, type, str], ...] = (
    ("language", str, "a code such as 'en'"),
    ("task", str, "'transcribe' or 'translate'"),
    ("prompt", str, "a text"),
    ("timestamps", bool, "True or False"),
    ("logprobs", bool, "True or False"),
    ("max_new_tokens", int, "a whole number"),
)


def log_mel(bundle: Bundle) -> LogMel:
    """The front end of a model that takes sound.

    Raises:
        InputError: it takes none.
    """
    settings = bundle.file("preprocessor_config.json")
    graph = bundle.manifest["graphs"].get("encoder")
    if settings is None or graph is None or IDS in graph["inputs"]:
        raise InputError(
            f"{bundle.path} is a {bundle.task} model that takes no sound, or has no preprocessor_config.json."
        )
    return LogMel.of(read_json(settings))


class _Recordings:
    """Recordings on their way to text, in order. A window does not depend on the one before, so several run at once.

    They are read and encoded when one can begin soon: the windows that run, and one recording, are in memory.
    """

    def __init__(self, pair: EncoderDecoder, audios: Iterable[Audio], arguments: Mapping[str, Any]) -> None:
        self._pair = pair
        self._audios = audios
        self._given = arguments
        self._front = log_mel(pair.bundle)
        self._earlier = earlier_text(pair, arguments.get("prompt"))
        self._times = self._silence = None
        if arguments.get("timestamps"):
            settings, positions = pair.bundle.generation_config, pair.bundle.config.get("max_source_positions")
            self._times = TimeTokens.of(settings, positions, self._front.chunk_length, pair.limits.eos)
            self._silence = silence_token(pair)
        self._begun: deque[_Recording] = deque()  # those whose transcripts were not given yet
        self._windows: dict[int, tuple[_Recording, int]] = {}  # of calls that have not ended, by their number
        self._window_bytes = self._beams = 1  # of a window: bytes that the decoder reads, beams
        self._read = 0  # windows of the recordings so far

    def transcripts(self, progress: bool | Progress | None) -> Iterator[Transcript | EdgeformerError]:
        """What is said in each recording, or why it could not be transcribed; in order, each once it is whole."""
        calls = self._calls()
        first = list(islice(calls, 1))  # its size decides how many windows run together
        answers = self._pair.generator.answers(chain(first, calls), self._together(), self._given.get("on_step"))
        with self._reporting(progress) as report:
            for ended in answers:
                recording, window = self._windows.pop(ended.index)
                if ended.error is None:
                    recording.results[window] = ended.results[0]
                elif isinstance(ended.error, EdgeformerError):
                    recording.error = recording.error or ended.error
                else:
                    raise ended.error
                report()
                while self._begun and self._begun[0].is_whole:
                    yield self._transcript(self._begun.popleft())

    def pieces(self) -> Generator[TranscriptPiece, None, Transcript]:
        """The text of the one recording as it is made, then its transcript."""
        pair, before_step = self._pair, self._given.get("on_step") or _nothing
        decoder = pair.tokenizer.detokenizer() if pair.tokenizer else None
        text = PieceText(decoder.push, decoder.flush) if decoder else PieceText(lambda _: "", lambda: "")
        held: list[TokenLogprob] = []
        for window, call in enumerate(self._calls()):
            if isinstance(call, EdgeformerError):
                raise call
            stream = pair.generator.stream(call)
            before_step()
            for piece in stream:
                if piece.id is None or piece.id in pair.limits.eos:
                    continue
                if piece.logprob is not None:
                    held.append(piece.logprob)
                if new := text.push(piece.id):
                    yield TranscriptPiece(new, tuple(held))
                    held = []
                before_step()
            self._begun[0].results[window] = stream.result
        if (new := text.flush()) or held:
            yield TranscriptPiece(new, tuple(held))
        found = self._transcript(self._begun[0])
        assert isinstance(found, Transcript)
        return found

    def _together(self) -> int:
        """How many windows (with beams: beams) run at once."""
        free = available_memory()
        fitting = MAX_WINDOWS if free is None else free // 4 // self._window_bytes
        return max(self._beams, min(MAX_WINDOWS, fitting))

    @contextmanager
    def _reporting(self, show: bool | Progress | None) -> Iterator[Callable[[], None]]:
        """A function to call after each window."""
        if callable(show):
            done = count(1)
            yield lambda: show(next(done), self._read)
        elif show or (show is None and sys.stderr.isatty()):
            from tqdm import tqdm

            with tqdm(total=self._read, unit=" windows", file=sys.stderr) as bar:

                def advance() -> None:
                    bar.total = self._read  # grows as recordings are read
                    bar.update()

                yield advance
        else:
            yield lambda: None

    def _calls(self) -> Iterator[Call | EdgeformerError]:
        """The windows of all recordings; an error for a recording that cannot be read."""
        numbers = count()
        for audio in self._audios:
            recording = _Recording(self._given.get("language"))
            self._begun.append(recording)
            try:
                samples = self._samples(audio)
                size = self._front.samples
                recording.samples = len(samples)
                recording.windows = -(-len(samples) // size)
                self._read += recording.windows
                for window in range(recording.windows):
                    call = self._call(samples[window * size : (window + 1) * size], recording)
                    self._windows[next(numbers)] = recording, window
                    yield call
            except EdgeformerError as error:
                self._windows[next(numbers)] = recording, 0
                yield error

    def _samples(self, audio: Audio) -> Array:
        is_file = isinstance(audio, (str, os.PathLike))
        samples = read_wav(audio, self._front.sampling_rate) if is_file else np.asarray(audio)  # type: ignore[arg-type]
        if samples.ndim != 1 or samples.dtype.kind != "f" or not samples.size:
            raise InputError(f"The recording is {samples.dtype}{list(samples.shape)}, expected float samples [count].")
        if not np.isfinite(samples).all():
            raise InputError("The recording holds samples that are no numbers (NaN or infinity).")
        return samples

    def _call(self, samples: Array, recording: _Recording) -> Call:
        """The answer of one window. The first one of a recording says which language it is in."""
        pair, given = self._pair, self._given
        static = pair.encode(pair.source(self._front.features(samples)))
        self._window_bytes = sum(array.nbytes for array in static.values())
        begin, recording.language = speech_prompt(
            pair, static, recording.language, given.get("task"), times=self._times is not None
        )
        if self._silence is not None:
            recording.silences[len(recording.silences)] = pair.probability(static, pair.start(), self._silence)
        prompt = self._earlier + begin
        room = max(1, (pair.limits.context or LONGEST) - len(prompt))
        asked = given.get("max_new_tokens") or pair.bundle.generation_config.get("max_new_tokens") or room
        arguments = {"num_beams": given.get("num_beams"), "max_new_tokens": min(asked, room)}
        if given.get("temperature") is not None:
            arguments |= {"temperature": given["temperature"], "top_k": 0}
        options = CallOptions(seed=given.get("seed"), logprobs=0 if given.get("logprobs") else None)
        call = pair.decoding(static, prompt, None, arguments, options)
        if self._times is not None:
            call = replace(call, processors=(self._times.rules(len(prompt)),))
        self._beams = call.config.num_beams
        return call

    def _transcript(self, recording: _Recording) -> Transcript | EdgeformerError:
        """What is said in all windows, or why one failed."""
        if recording.error is not None:
            return recording.error
        pair, rate, size = self._pair, self._front.sampling_rate, self._front.samples
        decode = pair.tokenizer.decode if pair.tokenizer else lambda _: ""
        text = _Tokens()
        segments: list[Segment] = []
        for window in range(len(recording.results)):
            tokens = _Tokens.of(recording.results[window], pair.limits.eos)
            length = min(size, recording.samples - window * size) / rate
            for span in spans(tokens.ids, self._times, length):
                part = tokens.at(span.places)
                text.add(part)
                begin, said, silence = window * size / rate, decode(part.ids), recording.silences.get(window)
                segment = Segment(begin + span.start, begin + span.end, said, part.ids, window, part.mean(), silence)
                segments.append(segment)
        shown = segments if self._given.get("timestamps") else []
        logprobs = text.logprobs if self._given.get("logprobs") else None
        return Transcript(
            decode(text.ids).strip(), text.ids, recording.language, recording.samples / rate, shown, logprobs
        )


@dataclass
class _Tokens:
    """Tokens of text and, where asked for, their log probabilities."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @classmethod
    def of(cls, result: Result, eos: Collection[int]) -> _Tokens:
        """Those of an answer, without the end."""
        kept = [place for place, token in enumerate(result.ids) if token not in eos]
        return cls(result.ids, result.logprobs or []).at(kept)

    def at(self, places: Sequence[int]) -> _Tokens:
        """Those at these places."""
        return _Tokens([self.ids[i] for i in places], [self.logprobs[i] for i in places] if self.logprobs else [])

    def add(self, more: _Tokens) -> None:
        """Appends others."""
        self.ids += more.ids
        self.logprobs += more.logprobs

    def mean(self) -> float | None:
        """The mean log probability; None where they were not asked for."""
        known = [one.logprob for one in self.logprobs if one.logprob is not None]
        return sum(known) / len(known) if known else None


@dataclass
class _Recording:
    """One recording: the answers of its windows, as they end."""

    language: str | None
    samples: int = 0
    windows: int | None = None  # known once it was read
    results: dict[int, Result] = field(default_factory=dict)  # by window
    silences: dict[int, float] = field(default_factory=dict)  # by window
    error: EdgeformerError | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all windows have ended, or one failed."""
        return self.error is not None or len(self.results) == self.windows


def _nothing() -> None:
    """What happens between two steps, if nobody asks for more."""
