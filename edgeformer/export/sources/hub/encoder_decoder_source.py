"""Encoder-decoder models of transformers: one model object becomes two sources, traced apart."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.inputs import Input, axes
from edgeformer.export.source import (
    ENCODER_MASK,
    ENCODER_OUTPUT,
    ENCODER_STATES,
    SOURCE_AXIS,
    EncoderDecoderSource,
    Source,
    pytorch_outputs,
)
from edgeformer.export.sources.generation import generation_settings
from edgeformer.export.sources.hub import heads
from edgeformer.export.trace import attention_interface


class Encoding(torch.nn.Module):
    """The encoder of a transformers model. Contains the whole model, so that weights have one name in both graphs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """float32 [batch, source, size]: the encoder's last hidden state."""
        states: torch.Tensor = self.model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        return states


class Decoding(torch.nn.Module):
    """The decoder of a transformers model with its head, given the encoder's output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float32 [batch, sequence, vocab]: the logits."""
        from transformers.modeling_outputs import BaseModelOutput

        logits: torch.Tensor = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            use_cache=False,
            **({} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}),
        ).logits
        return logits


def encoder_decoder_source(
    model: Any, origin: str, task: str, files: Mapping[str, bytes] | None = None
) -> EncoderDecoderSource:
    """The source of any transformers encoder-decoder model object with a language head.

    Raises:
        ExportError: the model has no head, or its encoder takes neither tokens nor audio frames of a fixed length.
    """
    attention_interface.register()
    model = model.eval().float()
    if model.get_output_embeddings() is None:
        raise ExportError(f"{type(model).__name__} has no head that gives logits; export the class with one.")
    files = files or {}
    inputs = _encoder_inputs(model, files)
    config = {key: value for key, value in model.config.to_dict().items() if key not in heads.NOT_CONFIG}
    encoder = Source(
        module=Encoding(model),
        inputs=inputs,
        outputs=(ENCODER_OUTPUT,),
        task=task,
        origin=origin,
        config=config,
        generation_config=generation_settings(getattr(model, "generation_config", None)),
        files=files,
        tracing=lambda: heads.masks_as_arrays(model),
    )
    length, size = _states_shape(encoder)
    states = Input(ENCODER_STATES, torch.float32, ("batch", length, size))
    ids = Input(
        "input_ids", torch.int64, ("batch", "sequence"), high=int(model.get_output_embeddings().weight.shape[0])
    )
    mask = (Input(ENCODER_MASK, torch.int64, ("batch", SOURCE_AXIS)),) if len(inputs) > 1 else ()

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(attention_interface.CAUSAL_ATTENTION)
        except (ValueError, ImportError) as error:
            raise ExportError(
                f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
                f"traced: {error}"
            ) from error
        try:
            yield
        finally:
            model.set_attn_implementation(before)

    decoder = dataclasses.replace(
        encoder,
        module=Decoding(model),
        inputs=(ids, states, *mask),
        outputs=("logits",),
        task="text-generation",
        tracing=tracing,
    )
    return EncoderDecoderSource(encoder, decoder)


def _encoder_inputs(model: Any, files: Mapping[str, bytes]) -> tuple[Input, ...]:
    encoder, main = model.get_encoder(), model.main_input_name
    if main == "input_ids":
        rows = int(model.get_input_embeddings().weight.shape[0])
        ids = Input(main, torch.int64, ("batch", SOURCE_AXIS), high=rows)
        masked = "attention_mask" in inspect.signature(encoder.forward).parameters
        return (ids, Input("attention_mask", torch.int64, ids.shape)) if masked else (ids,)
    if main in ("input_features", "input_values"):
        found = heads.sound_inputs(model, main, files)
        if all(isinstance(dim, int) for dim in found[0].shape[1:]):
            return found
    raise ExportError(f"the encoder of {type(model).__name__} takes {main} of any length; known are tokens and frames.")


def _states_shape(encoder: Source) -> tuple[int | str, int]:
    sizes = dict(zip(axes(encoder.inputs), (2, 5), strict=False))
    states = pytorch_outputs(encoder, {value.name: value.sample(sizes, 0) for value in encoder.inputs})[ENCODER_OUTPUT]
    return (SOURCE_AXIS if SOURCE_AXIS in sizes else int(states.shape[1])), int(states.shape[2])
