"""Encoder-decoders at run time: the source is encoded once, then decoded token by token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import read_json
from edgeformer.bundle.signature import ENCODER, IDS, PAST, PRESENT
from edgeformer.decoding.generation import Answering, Call
from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.decoding.loop import Limits, Stream
from edgeformer.engines.base import Arrays, Engine, State
from edgeformer.errors import InputError
from edgeformer.processing.audio import LogMel, read_wav
from edgeformer.processing.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
MASK = "attention_mask"
SOURCE_MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class EncoderDecoder:
    """The two engines of a bundle, and what its config says about decoding."""

    bundle: Bundle
    encoder: Engine
    decoder: Engine
    tokenizer: Tokenizer | None
    limits: Limits

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """What the decoder needs of a source: inputs of its graph that stay the same for the whole answer."""
        feeds = dict(inputs)
        ports = self.bundle.manifest["graphs"]
        if MASK in ports["encoder"]["inputs"] and MASK not in feeds and IDS in feeds:
            feeds[MASK] = np.ones_like(np.asarray(feeds[IDS]))
        outputs = self.encoder.forward([(feeds, self.encoder.new_state())])[0]
        wanted = ports["decoder"]["inputs"]
        held = {
            name.replace(PRESENT, PAST, 1) if ENCODER in name else name: value
            for name, value in outputs.items()
            if (name.replace(PRESENT, PAST, 1) if ENCODER in name else name) in wanted
        }
        if SOURCE_MASK in wanted:
            held[SOURCE_MASK] = feeds[MASK]
        return held

    def source(self, source: str | Sequence[int] | Array) -> dict[str, Array]:
        """The encoder's inputs for a text, token ids, or features without their batch axis.

        Raises:
            InputError: it is none of these.
        """
        ports = self.bundle.manifest["graphs"]["encoder"]["inputs"]
        if IDS not in ports:
            name = next(iter(ports))
            return {name: np.asarray(source, np.float32)[None]}
        if isinstance(source, str):
            if self.tokenizer is None:
                raise InputError(f"{self.bundle.path} has no tokenizer; give the source as token ids.")
            source = self.tokenizer.encode(source)
        ids = np.asarray(source)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise InputError(f"The source is {ids.dtype}{list(ids.shape)}, expected a text or a list of token ids.")
        return {IDS: ids[None].astype(np.int64)}

    def start(self) -> list[int]:
        """The tokens that every answer begins with.

        Raises:
            InputError: the config names none.
        """
        for settings in (self.bundle.generation_config, self.bundle.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                value = settings.get(name)
                if type(value) is int:
                    return [value]
        raise InputError(f"{self.bundle.path} names no decoder_start_token_id; give decoder_prompt=[...].")

    def stream(
        self,
        held: Arrays,
        prompt: Sequence[int],
        source: Array | None,
        arguments: Mapping[str, Any],
        call: Call,
    ) -> Stream:
        """The answer piece by piece, by the bundle's rules and the `arguments` that override them. `source` holds the
        token ids [length] that were encoded, if they were tokens.

        Raises:
            InputError: an argument is wrong, or the prompt leaves no room.
        """
        config = GenerationConfig.for_call(file_settings(self.bundle), arguments, self.limits.vocab_size)

        def new_state(rows: int) -> State:
            copies = {name: np.repeat(value, rows, axis=0) for name, value in held.items()} if rows > 1 else held
            return self.decoder.new_state(copies)

        answering = Answering(self.decoder, self.limits, self.tokenizer)
        return answering.stream(prompt, config, call, new_state, source)

    def logits(self, held: Arrays, ids: Array, steps: Sequence[int] = ()) -> Array:
        """float32 [batch, length, vocab]: the scores of what follows each of `ids` [batch, length].

        They are fed `steps[0]`, `steps[1]`, ... at a time, and what is left at once.
        """
        state, parts, start = self.decoder.new_state(held), [], 0
        for step in (*steps, ids.shape[1]):
            piece = ids[:, start : start + step]
            if piece.shape[1]:
                parts.append(self.decoder.forward([({IDS: piece}, state)])[0]["logits"].astype(np.float32))
            start += step
        return np.concatenate(parts, axis=1)

    def likeliest(self, held: Arrays, prompt: Sequence[int], among: Sequence[int]) -> int:
        """Which of the tokens `among` the model would put after `prompt`."""
        inputs = {IDS: np.array([list(prompt)], np.int64)}
        logits = self.decoder.forward([(inputs, self.decoder.new_state(held))])[0]["logits"][0, -1]
        return max(among, key=lambda id: float(logits[id]))


# -------------------------------------------------------------------------------------------------------------- speech


@dataclass(frozen=True)
class Transcript:
    """What was said. `language` is the code that was given or heard, None where the model knows one alone."""

    text: str
    ids: list[int]
    language: str | None

    def __str__(self) -> str:
        return self.text


def speech_prompt(
    pair: EncoderDecoder, held: Arrays, language: str | None, task: str | None
) -> tuple[list[int], str | None]:
    """(the tokens an answer begins with, language code): start, language, task, no timestamps; as far as the model
    has tokens for them. What is None is as generation_config.json says; without a language the likeliest is taken.

    Raises:
        InputError: the model does not know the language or task.
    """
    settings = pair.bundle.generation_config
    prompt = pair.start()
    languages: dict[str, int] = {
        name.strip("<|>"): id for name, id in (settings.get("lang_to_id") or {}).items() if type(id) is int
    }
    if languages:
        tasks: dict[str, int] = settings.get("task_to_id") or {}
        language, task = language or settings.get("language"), task or settings.get("task")
        if language is None and task is None:  # an older file says both by their tokens
            forced = dict(settings.get("forced_decoder_ids") or pair.bundle.config.get("forced_decoder_ids") or ())
            language = next((name for name, id in languages.items() if id == forced.get(1)), None)
            task = next((name for name, id in tasks.items() if id in forced.values()), None)
        language, task = language and language.strip("<|>").lower(), task or "transcribe"
        if language is None:
            heard = pair.likeliest(held, prompt, list(languages.values()))
            language = next(name for name, id in languages.items() if id == heard)
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
        held = pair.encode(pair.source(front.features(samples[start : start + front.samples])))
        prompt, language = speech_prompt(pair, held, language, task)
        room = max(1, (pair.limits.context or 448) - len(prompt))
        asked = arguments.get("max_new_tokens") or pair.bundle.generation_config.get("max_new_tokens") or room
        stream = pair.stream(held, prompt, None, {**arguments, "max_new_tokens": min(asked, room)}, Call())
        for _ in stream:
            pass
        ids += [id for id in stream.result.ids if id not in pair.limits.eos]
    text = pair.tokenizer.decode(ids).strip() if pair.tokenizer else ""
    return Transcript(text, ids, language)
