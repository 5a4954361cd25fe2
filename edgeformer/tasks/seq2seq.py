"""Encoder-decoders: the source is encoded once, then the answer is decoded token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, Array
from edgeformer.decoding.answer_shape import Vocabulary, text_shape
from edgeformer.decoding.generation import Call, TextGenerator
from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.logits_processors import log_softmax
from edgeformer.decoding.request import CallOptions, split_arguments
from edgeformer.engines.base import Arrays, Engine, State
from edgeformer.engines.feed import encode_source
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.tasks.text_generation import Prompt


@dataclass(frozen=True)
class EncoderDecoder:
    """The engines of both graphs of a bundle, and the tokens that its answers begin with."""

    bundle: Bundle
    encoder: Engine
    decoder: Engine
    tokenizer: Tokenizer | None
    limits: Limits

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The decoder's static inputs for a source; see `engines.feed.encode_source`."""
        return encode_source(self.bundle, self.encoder, inputs)

    def source(self, source: Prompt) -> dict[str, Array]:
        """The encoder's inputs for a text, token ids, or features without their batch axis.

        Raises:
            InputError: it is none of these, or holds a negative id.
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
        if ids.min() < 0:
            raise InputError(f"The source holds the token id {ids.min()}, expected ids of at least 0.")
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

    @cached_property
    def generator(self) -> TextGenerator:
        """Makes answers with this model."""
        return TextGenerator(self.decoder, self.limits, self.tokenizer)

    def call(self, prompt: Prompt, arguments: Mapping[str, Any]) -> Call:
        """One source, encoded, with its arguments, checked; see `Model.generate`.

        Raises:
            InputError: an argument or the source is wrong.
        """
        given, options, decoder_prompt = split_arguments(arguments)
        if options.session is not None:
            raise InputError("A session keeps tokens alone, and this answer also depends on its source; leave it out.")
        begins = self.start() if decoder_prompt is None or np.size(decoder_prompt) == 0 else decoder_prompt
        inputs = self.source(prompt)
        tokens = inputs[IDS][0] if IDS in inputs else None
        return self.decoding(self.encode(inputs), begins, tokens, given, options)

    def decoding(
        self,
        static: Arrays,
        prompt: Sequence[int],
        source: Array | None,
        arguments: Mapping[str, Any],
        options: CallOptions,
    ) -> Call:
        """The answer that begins with `prompt`, for the `static` inputs that `encode` made. `arguments` override the
        bundle's generation config; `source` holds the token ids [length] that were encoded, if they were tokens.

        Raises:
            InputError: an argument is wrong.
        """
        config = GenerationConfig.for_call(file_settings(self.bundle), arguments, self.limits.vocab_size)

        def new_state(rows: int) -> State:
            copies = {name: np.repeat(value, rows, axis=0) for name, value in static.items()} if rows > 1 else static
            return self.decoder.new_state(copies)

        eos = () if options.ignore_eos else config.eos_token_id
        shape = text_shape(options.shape, Vocabulary(self.tokenizer, eos, self.limits.vocab_size))
        return Call(prompt, config, options, new_state, source, shape, is_cacheable=False)

    def likeliest(self, static: Arrays, prompt: Sequence[int], among: Sequence[int]) -> int:
        """Which of the tokens `among` the model would put after `prompt`."""
        logits = self._next(static, prompt)
        return max(among, key=lambda token: float(logits[token]))

    def probability(self, static: Arrays, prompt: Sequence[int], token: int) -> float:
        """How likely the model finds `token` after `prompt`, before all logits processors."""
        return float(np.exp(log_softmax(self._next(static, prompt).astype(np.float64))[token]))

    def _next(self, static: Arrays, prompt: Sequence[int]) -> Array:
        """The logits [vocab] of what follows `prompt`."""
        inputs = {IDS: np.array([list(prompt)], np.int64)}
        logits: Array = self.decoder.forward([(inputs, self.decoder.new_state(static))])[0]["logits"][0, -1]
        return logits
