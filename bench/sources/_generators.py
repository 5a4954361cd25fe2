"""Tiny random models that generate, in transformers and in bundles, with the same settings."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import edgeformer
from edgeformer.decoding.generation_fields import listed
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.hub.encoder_decoder_source import encoder_decoder_source
from edgeformer.export.sources.hub.hub import language_model

VOCABULARY = 100
EOS = [2, 7, 8, 9, 10]  # several, so that random beams end
_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


def llama() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def bart() -> Any:
    return tf.BartForConditionalGeneration(tf.BartConfig(**_SIZES))


def whisper() -> Any:
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    plain = {"begin_suppress_tokens": None, "suppress_tokens": None}
    sizes |= {name: value for name, value in _SIZES.items() if name != "max_position_embeddings"}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **tokens, **plain))


KINDS = {"llama": llama, "t5": t5, "bart": bart, "whisper": whisper}


@dataclass(frozen=True)
class Generator:
    """One model in transformers and as a bundle."""

    reference: Any  # of transformers
    loaded: edgeformer.Model

    @classmethod
    def of(cls, kind: str, folder: Path) -> Generator:
        """A model of `KINDS`, its bundle written under `folder`."""
        torch.manual_seed(0)
        model = KINDS[kind]()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # larger weights than a new model's, so that answers differ
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
        source = language_model(model.eval(), kind) if kind == "llama" else None
        pair = None if source else encoder_decoder_source(model, kind, "text2text-generation")
        export(ExportOptions(source=kind, output=folder / kind, quantize="none", tokens=0), traced=source or pair)
        return cls(model, edgeformer.load(folder / kind, engine="cpu", threads=1))

    @property
    def has_encoder(self) -> bool:
        return bool(self.reference.config.is_encoder_decoder)

    def basis(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings` and those that the model needs to generate."""
        start = {"decoder_start_token_id": self.reference.config.decoder_start_token_id} if self.has_encoder else {}
        return {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 14} | start | settings

    def expected(self, prompt: Any, settings: Mapping[str, Any], **arguments: Any) -> list[int]:
        """transformers' new tokens for a prompt (or source), without the padding of beams that ended earlier.

        Raises:
            Exception: whatever transformers raises.
        """
        basis = {name: value for name, value in self.basis(settings).items() if value is not None}
        with quiet():
            self.reference.generation_config = tf.GenerationConfig(**basis)
            torch.manual_seed(0)
            values = torch.as_tensor(prompt)[None]
            if self.has_encoder and values.is_floating_point():
                out = tf.GenerationMixin.generate(self.reference, input_features=values, **arguments)
            else:
                out = self.reference.generate(values, **arguments)
        new = out[0, 1 if self.has_encoder else len(prompt) :].tolist()
        ends = set(listed(basis.get("eos_token_id")))
        first = next((place for place, token in enumerate(new) if token in ends), len(new) - 1)
        return new[: first + 1]

    def found(self, prompt: Any, settings: Mapping[str, Any], **arguments: Any) -> list[int]:
        """The bundle's new tokens, with `settings` as its generation_config.json."""
        return self.with_settings(settings).generate(prompt, **arguments).ids

    def with_settings(self, settings: Mapping[str, Any]) -> edgeformer.Model:
        """The loaded model with these settings in its bundle, without the warnings of `load`."""
        loaded = self.loaded
        bundle = replace(loaded.bundle, generation_config=self.basis(settings))
        engines = {"model": loaded.engine}
        if self.has_encoder:
            engines = {"encoder": loaded.pair.encoder, "decoder": loaded.engine}
        return edgeformer.Model(bundle, engines, loaded.explain(), loaded.tokenizer)


@contextlib.contextmanager
def quiet() -> Any:
    """Silences transformers' warnings about settings that the tests set on purpose."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def prompts(count: int, length: int) -> Sequence[list[int]]:
    """Random prompts without EOS and padding tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(11, VOCABULARY - 1, (count, length), generator=generator).tolist()
