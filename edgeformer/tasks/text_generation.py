"""Text generation: prompts of text, token ids or chat messages, and the stream of their answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS
from edgeformer.decoding.answer_shape import Vocabulary, chat_shape, text_shape
from edgeformer.decoding.generation import Call, TextGenerator
from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.request import split_arguments
from edgeformer.decoding.speculation.speculation import Speculation
from edgeformer.engines.base import Engine
from edgeformer.engines.feed import CHUNK, feed, joined
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeformer.decoding.prefix_cache import PrefixCache

Prompt = str | Sequence[int] | np.ndarray[Any, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TextGeneration:
    """A decoder-only language model: the engine of its graph, its tokenizer and its limits."""

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer | None
    limits: Limits
    prefix_cache: PrefixCache | None = None
    speculation: Speculation | None = None

    @cached_property
    def generator(self) -> TextGenerator:
        """Makes answers with this model."""
        return TextGenerator(self.engine, self.limits, self.tokenizer, self.prefix_cache, self.speculation)

    def call(self, prompt: Prompt, arguments: Mapping[str, Any]) -> Call:
        """One prompt with its arguments, checked; see `Model.generate`.

        Raises:
            InputError: an argument is wrong.
            TemplateError: the chat template refuses the messages.
        """
        given, options, decoder_prompt = split_arguments(arguments)
        if decoder_prompt is not None:
            raise InputError("decoder_prompt is for encoder-decoders; this model's answer begins with its prompt.")
        config = GenerationConfig.for_call(file_settings(self.bundle), given, self.bundle.vocab_size)
        eos = () if options.ignore_eos else config.eos_token_id
        vocabulary = Vocabulary(self.tokenizer, eos, self.bundle.vocab_size)
        if is_chat(prompt) and self.tokenizer is not None:
            ids, shape = chat_shape(prompt, options.shape, vocabulary)  # type: ignore[arg-type]
        else:
            ids = encode_prompt(prompt, self.tokenizer, str(self.bundle.path))
            shape = text_shape(options.shape, vocabulary)
        return Call(ids, config, options, lambda _: self.engine.new_state(), ids, shape)

    def logits(self, ids: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits at every position, float32 [len(ids), vocab]; see `Model.logits`.

        Raises:
            InputError: `ids` is empty, longer than the context, or holds an unknown id.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise InputError(f"ids has the shape {list(array.shape)}, expected a list of at least one token id.")
        chunk = CHUNK if self.limits.cached else None
        outputs = joined(feed(self.engine, self.engine.new_state(), {IDS: array[None]}, chunk=chunk))
        logits: np.ndarray[Any, np.dtype[np.float32]] = outputs["logits"][0].astype(np.float32, copy=False)
        return logits


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, name: str) -> list[int]:
    """Token ids of a prompt: text, token ids, or a list of chat messages. `name` is the bundle's, for messages.

    Raises:
        InputError: it is none of these, or text for a bundle without a tokenizer.
    """
    if isinstance(prompt, str):
        return _require(tokenizer, name).encode(prompt)
    if isinstance(prompt, np.ndarray):
        return prompt.tolist() if prompt.ndim == 1 and prompt.dtype.kind in "iu" else _no_prompt(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        return _no_prompt(prompt)
    if is_chat(prompt):
        return _require(tokenizer, name).encode_chat(prompt)  # type: ignore[arg-type]
    if all(isinstance(part, (int, np.integer)) and not isinstance(part, bool) for part in prompt):
        return [int(part) for part in prompt]  # type: ignore[arg-type]
    return _no_prompt(prompt)


def _require(tokenizer: Tokenizer | None, name: str) -> Tokenizer:
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer; give the prompt as token ids, and no stop strings.")
    return tokenizer


def _no_prompt(prompt: object) -> list[int]:
    raise InputError(
        f"The prompt is {type(prompt).__name__}, expected text, a list of token ids, or a list of chat messages "
        "({'role': ..., 'content': ...})."
    )


def is_chat(prompt: object) -> bool:
    """Whether it is a list of chat messages."""
    if isinstance(prompt, (str, bytes, np.ndarray)) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(isinstance(part, Mapping) for part in prompt)


def is_list_of_prompts(prompt: object) -> bool:
    """Whether it holds several prompts: a list of texts, of lists of token ids, or of lists of messages."""
    if isinstance(prompt, (str, bytes, Mapping, np.ndarray)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return all(isinstance(part, (str, list, tuple, np.ndarray)) for part in prompt)
