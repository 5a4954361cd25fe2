"""The tokens that a transcript begins with: earlier text, start, language, task, and whether times are written.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, figure 1.
"""

from __future__ import annotations

from typing import Any

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.base import Arrays
from edgeformer.errors import InputError
from edgeformer.tasks.seq2seq import EncoderDecoder

SILENCE = ("<|nospeech|>", "<|nocaptions|>")  # the names of the token that says that nobody speaks
LONGEST = 448  # tokens of an answer, where the bundle does not say


def speech_prompt(
    pair: EncoderDecoder, static: Arrays, language: str | None, task: str | None, *, times: bool = False
) -> tuple[list[int], str | None]:
    """(the tokens an answer begins with, language code): start, language, task, no timestamps; as far as the model
    has tokens for them. What is None is as generation_config.json says; without a language the likeliest is taken.
    With `times` the answer may write times.

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
    elif task not in (None, "transcribe"):
        raise InputError(f"task is {task!r}, but this model has no tokens for tasks: it transcribes.")
    silent = settings.get("no_timestamps_token_id")
    if type(silent) is int and not times:
        prompt.append(silent)
    return prompt, language


def knows_task(bundle: Bundle, task: str) -> bool:
    """Whether the model has a token for the task; every speech model transcribes."""
    return task == "transcribe" or task in (bundle.generation_config.get("task_to_id") or {})


def earlier_text(pair: EncoderDecoder, text: str | None) -> list[int]:
    """The tokens that stand before an answer so that it goes on in the manner of `text`; none without a text.

    At most half of the context: of a longer text the end.

    Raises:
        InputError: the model has no token for it, or no tokenizer.
    """
    if not text or not text.strip():
        return []
    token = pair.bundle.generation_config.get("prev_sot_token_id")
    if type(token) is not int or pair.tokenizer is None:
        raise InputError("prompt is for models with a token for earlier text (prev_sot_token_id), and this has none.")
    most = (pair.limits.context or LONGEST) // 2 - 1
    ids = pair.tokenizer.encode(" " + text.strip(), add_special_tokens=False, split_special_tokens=True)
    return [token, *ids[-most:]]


def silence_token(pair: EncoderDecoder) -> int | None:
    """The token whose probability at the start says that nobody speaks; None if the model has none."""
    known: dict[str, Any] = {} if pair.tokenizer is None else dict(pair.tokenizer.special_texts)
    return next((known[name] for name in SILENCE if name in known), None)
