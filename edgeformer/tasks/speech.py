"""Speech recognition: a recording is cut into the model's windows, and each is transcribed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.manifest import read_json
from edgeformer.bundle.signature import IDS, Array
from edgeformer.decoding.request import CallOptions
from edgeformer.engines.base import Arrays
from edgeformer.errors import InputError
from edgeformer.processing.audio import LogMel, read_wav
from edgeformer.tasks.seq2seq import EncoderDecoder


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


def transcribe(
    pair: EncoderDecoder,
    audio: str | os.PathLike[str] | Array,
    language: str | None,
    task: str | None,
    arguments: Mapping[str, Any],
) -> Transcript:
    """What is said; see `Model.transcribe`."""
    settings = pair.bundle.file("preprocessor_config.json")
    if settings is None or IDS in pair.bundle.manifest["graphs"]["encoder"]["inputs"]:
        raise InputError(
            f"{pair.bundle.path} is a {pair.bundle.task} model that takes no sound, or has no preprocessor_config.json."
        )
    front = LogMel.of(read_json(settings))
    is_file = isinstance(audio, (str, os.PathLike))
    samples = read_wav(audio, front.sampling_rate) if is_file else np.asarray(audio)  # type: ignore[arg-type]
    if samples.ndim != 1 or samples.dtype.kind != "f" or not samples.size:
        raise InputError(f"The recording is {samples.dtype}{list(samples.shape)}, expected float samples [count].")
    if not np.isfinite(samples).all():
        raise InputError("The recording holds samples that are no numbers (NaN or infinity).")
    ids: list[int] = []
    for start in range(0, len(samples), front.samples):
        static = pair.encode(pair.source(front.features(samples[start : start + front.samples])))
        prompt, language = speech_prompt(pair, static, language, task)
        room = max(1, (pair.limits.context or 448) - len(prompt))
        asked = arguments.get("max_new_tokens") or pair.bundle.generation_config.get("max_new_tokens") or room
        call = pair.decoding(static, prompt, None, {**arguments, "max_new_tokens": min(asked, room)}, CallOptions())
        (result,) = next(pair.generator.answers([call], call.config.num_beams)).answers()
        ids += [token for token in result.ids if token not in pair.limits.eos]
    text = pair.tokenizer.decode(ids).strip() if pair.tokenizer else ""
    return Transcript(text, ids, language)
