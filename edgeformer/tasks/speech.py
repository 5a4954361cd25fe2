"""Speech recognition: recordings are cut into the model's windows, and several windows are transcribed at once."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, TypedDict

import numpy as np

from edgeformer.bundle.manifest import read_json
from edgeformer.bundle.signature import IDS, Array
from edgeformer.decoding.generation import Call
from edgeformer.decoding.request import CallOptions
from edgeformer.engines.base import Arrays
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.machine import available_memory
from edgeformer.processing.audio import LogMel, read_wav
from edgeformer.tasks.encoder_batches import Batching, Progress
from edgeformer.tasks.seq2seq import EncoderDecoder

Audio = str | os.PathLike[str] | Array  # a file, or float samples [count] at the model's rate
MAX_WINDOWS = 8  # that run at once, where their memory is less than a quarter of what is free


@dataclass(frozen=True)
class Transcript:
    """What was said. `language` is the code that was given or heard, None where the model knows one alone."""

    text: str
    ids: list[int]
    language: str | None

    def __str__(self) -> str:
        return self.text


def speech_prompt(
    pair: EncoderDecoder, static: Arrays, language: str | None, task: str | None
) -> tuple[list[int], str | None]:
    """(the tokens an answer begins with, language code): start, language, task, no timestamps; as far as the model
    has tokens for them. What is None is as generation_config.json says; without a language the likeliest is taken.

    Raises:
        InputError: the model does not know the language or task.
    """
    settings = pair.bundle.generation_config
    prompt = pair.start()
    languages: dict[str, int] = {
        name.strip("<|>"): token for name, token in (settings.get("lang_to_id") or {}).items() if type(token) is int
    }
    if languages:
        tasks: dict[str, int] = settings.get("task_to_id") or {}
        language, task = language or settings.get("language"), task or settings.get("task")
        if language is None and task is None:  # an older file says both by their tokens
            forced = dict(settings.get("forced_decoder_ids") or pair.bundle.config.get("forced_decoder_ids") or ())
            language = next((name for name, token in languages.items() if token == forced.get(1)), None)
            task = next((name for name, token in tasks.items() if token in forced.values()), None)
        language, task = language and language.strip("<|>").lower(), task or "transcribe"
        if language is None:
            heard = pair.likeliest(static, prompt, list(languages.values()))
            language = next(name for name, token in languages.items() if token == heard)
        elif language not in languages:
            raise InputError(f"language is {language!r}; the model knows {', '.join(sorted(languages))}.")
        if task not in tasks:
            raise InputError(f"task is {task!r}; the model knows {', '.join(sorted(tasks)) or 'none'}.")
        prompt += [languages[language], tasks[task]]
    elif language is not None:
        raise InputError(f"language is {language!r}, but this model has no tokens for languages.")
    silent = settings.get("no_timestamps_token_id")
    if type(silent) is int:
        prompt.append(silent)
    return prompt, language


class SpeechArguments(TypedDict, total=False):
    """Arguments of `Model.transcribe`."""

    language: str | None
    task: str | None
    num_beams: int | None
    max_new_tokens: int | None
    show_progress: bool | Progress | None


def transcribe_each(
    pair: EncoderDecoder, audios: Iterable[Audio], arguments: Mapping[str, Any]
) -> Iterator[Transcript | EdgeformerError]:
    """What is said in each recording, or why it has no transcript; see `Model.transcribe_each`.

    Raises:
        InputError: the model takes no sound, or an argument is unknown.
    """
    unknown = sorted(arguments.keys() - SpeechArguments.__annotations__.keys())
    if unknown:
        known = ", ".join(SpeechArguments.__annotations__)
        raise InputError(f"transcribe() has no argument {', '.join(unknown)}; it has {known}.")
    recordings = _Recordings(pair, audios, arguments)
    return recordings.transcripts(Batching(progress=arguments.get("show_progress", False)).progress)


class _Recordings:
    """Recordings on their way to text, in order. A window does not depend on the one before, so several run at once.

    They are read and encoded when one can begin soon: the windows that run, and one recording, are in memory.
    """

    def __init__(self, pair: EncoderDecoder, audios: Iterable[Audio], arguments: Mapping[str, Any]) -> None:
        settings = pair.bundle.file("preprocessor_config.json")
        if settings is None or IDS in pair.bundle.manifest["graphs"]["encoder"]["inputs"]:
            raise InputError(
                f"{pair.bundle.path} is a {pair.bundle.task} model that takes no sound, or has no "
                "preprocessor_config.json."
            )
        self._pair = pair
        self._audios = audios
        self._language, self._task = arguments.get("language"), arguments.get("task")
        self._generation = {name: arguments.get(name) for name in ("num_beams", "max_new_tokens")}
        self._front = LogMel.of(read_json(settings))
        self._begun: deque[_Recording] = deque()  # those whose transcripts were not given yet
        self._windows: dict[int, tuple[_Recording, int]] = {}  # of calls that have not ended, by their number
        self._window_bytes = self._beams = 1  # of a window: bytes that the decoder reads, beams
        self._read = 0  # windows of the recordings so far

    def transcripts(self, progress: bool | Progress | None) -> Iterator[Transcript | EdgeformerError]:
        """What is said in each recording, or why it could not be transcribed; in order, each once it is whole."""
        calls = self._calls()
        first = list(islice(calls, 1))  # its size decides how many windows run together
        with self._reporting(progress) as report:
            for ended in self._pair.generator.answers(chain(first, calls), self._together()):
                recording, window = self._windows.pop(ended.index)
                if ended.error is None:
                    recording.ids[window] = ended.results[0].ids
                elif isinstance(ended.error, EdgeformerError):
                    recording.error = recording.error or ended.error
                else:
                    raise ended.error
                report()
                while self._begun and self._begun[0].is_whole:
                    yield self._begun.popleft().transcript(self._pair)

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
            recording = _Recording(self._language)
            self._begun.append(recording)
            try:
                samples = self._samples(audio)
                size = self._front.samples
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
        pair, arguments = self._pair, self._generation
        static = pair.encode(pair.source(self._front.features(samples)))
        self._window_bytes = sum(array.nbytes for array in static.values())
        prompt, recording.language = speech_prompt(pair, static, recording.language, self._task)
        room = max(1, (pair.limits.context or 448) - len(prompt))
        asked = arguments.get("max_new_tokens") or pair.bundle.generation_config.get("max_new_tokens") or room
        arguments = {**arguments, "max_new_tokens": min(asked, room)}
        call = pair.decoding(static, prompt, None, arguments, CallOptions())
        self._beams = call.config.num_beams
        return call


@dataclass
class _Recording:
    """One recording: the answers of its windows, as they end."""

    language: str | None
    windows: int | None = None  # known once it was read
    ids: dict[int, list[int]] = field(default_factory=dict)  # by window
    error: EdgeformerError | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all windows have ended, or one failed."""
        return self.error is not None or len(self.ids) == self.windows

    def transcript(self, pair: EncoderDecoder) -> Transcript | EdgeformerError:
        """What is said in all windows, or why one failed."""
        if self.error is not None:
            return self.error
        answers = (self.ids[window] for window in range(len(self.ids)))
        ids = [token for answer in answers for token in answer if token not in pair.limits.eos]
        text = pair.tokenizer.decode(ids).strip() if pair.tokenizer else ""
        return Transcript(text, ids, self.language)
