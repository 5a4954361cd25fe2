"""User-defined encoder-decoders: a module with the methods `encode` and `decode` becomes two sources."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
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

_LENGTHS = (5, 11)  # of sources; if the states have both lengths too, their axis is the source's
_CONTRACT = (
    "encode(input_ids, attention_mask) -> states [batch, source, size], and "
    "decode(input_ids, encoder_hidden_states, encoder_attention_mask) -> logits [batch, sequence, vocab]; "
    "both masks are optional"
)


class MethodModule(torch.nn.Module):
    """One method of a module as its forward. Contains the whole module, so weights have one name in both graphs."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self._method = method

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The method's result."""
        result: torch.Tensor = getattr(self.model, self._method)(**inputs)
        return result


def has_encode_and_decode(module: torch.nn.Module) -> bool:
    """Whether the module has both methods; the `decode` of an autoencoder takes no `encoder_hidden_states`."""
    return callable(getattr(module, "encode", None)) and ENCODER_STATES in _arguments(module, "decode")


def user_encoder_decoder(encoder: Source) -> EncoderDecoderSource:
    """The source of a module with `encode` and `decode`; `encoder` describes `encode` and has the whole module.

    Named axes other than `batch` are the length of the source sequence.

    Raises:
        ExportError: the arguments or results of the methods are not as expected.
    """
    model = encoder.module
    length = {dim for value in encoder.inputs for dim in value.shape if isinstance(dim, str)} - {"batch"}
    if len(length) > 1:
        raise ExportError(
            f"encode takes inputs of {len(length)} dynamic lengths ({', '.join(sorted(length))}); expected one."
        )
    inputs = tuple(_renamed(value) for value in encoder.inputs)
    masked = any(value.name == "attention_mask" for value in inputs)
    _check_decode(model, masked)
    encoder = dataclasses.replace(
        encoder, module=MethodModule(model, "encode").eval(), inputs=inputs, outputs=(ENCODER_OUTPUT,)
    )
    states = _states(encoder)
    mask = (Input(ENCODER_MASK, torch.int64, ("batch", SOURCE_AXIS)),) if masked else ()
    ids = Input("input_ids", torch.int64, ("batch", "sequence"))
    decoder = dataclasses.replace(
        encoder,
        module=MethodModule(model, "decode").eval(),
        inputs=(ids, states, *mask),
        outputs=("logits",),
        task="text-generation",
    )
    rows = _vocabulary(decoder)
    return EncoderDecoderSource(
        encoder, dataclasses.replace(decoder, inputs=(dataclasses.replace(ids, high=rows), states, *mask))
    )


def _arguments(module: torch.nn.Module, method: str) -> Mapping[str, inspect.Parameter]:
    found: Any = getattr(module, method, None)
    return inspect.signature(found).parameters if callable(found) else {}


def _renamed(value: Input) -> Input:
    shape = tuple(dim if isinstance(dim, int) or dim == "batch" else SOURCE_AXIS for dim in value.shape)
    return dataclasses.replace(value, shape=shape)


def _check_decode(model: torch.nn.Module, masked: bool) -> None:
    given = _arguments(model, "decode")
    needed = [name for name, value in given.items() if value.default is value.empty]
    known = {"input_ids", ENCODER_STATES, ENCODER_MASK}
    if "position_ids" in needed:
        raise ExportError(
            "decode takes position_ids; expected that it computes positions itself, torch.arange(input_ids.shape[1]): "
            "the exporter adds the length of the KV cache to them."
        )
    if "input_ids" not in given or not set(needed) <= known:
        raise ExportError(f"decode has the arguments {', '.join(given)}; expected {_CONTRACT}.")
    if masked != (ENCODER_MASK in given):
        one, other = (
            ("encode", f"decode has no {ENCODER_MASK}") if masked else ("decode", "encode has no attention_mask")
        )
        raise ExportError(f"{one} takes a padding mask and {other}; expected {_CONTRACT}.")


def _states(encoder: Source) -> Input:
    """The input of `decode` that `encode` returns; its length is that of the source, or fixed."""
    shapes = []
    for length in _LENGTHS:
        sizes = {axis: length if index else 2 for index, axis in enumerate(axes(encoder.inputs))}
        feeds = {value.name: value.sample(sizes, seed) for seed, value in enumerate(encoder.inputs)}
        try:
            states = pytorch_outputs(encoder, feeds)[ENCODER_OUTPUT]
        except Exception as error:
            raise ExportError(f"encode fails at {sizes}: {type(error).__name__}: {error}") from error
        if states.ndim != 3:
            raise ExportError(f"encode returns the shape {list(states.shape)}; expected [batch, source, size].")
        shapes.append(states.shape)
    first, second = shapes
    if first[1] != second[1] and (first[1], second[1]) != _LENGTHS:
        raise ExportError(
            f"encode returns {first[1]} states for a source of {_LENGTHS[0]}, and {second[1]} for {_LENGTHS[1]}; "
            "expected the length of the source, or a fixed number."
        )
    return Input(
        ENCODER_STATES, torch.float32, ("batch", first[1] if first[1] == second[1] else SOURCE_AXIS, int(first[2]))
    )


def _vocabulary(decoder: Source) -> int:
    """The number of logits that `decode` returns for each token."""
    sizes = {"batch": 2, "sequence": 3, SOURCE_AXIS: _LENGTHS[0]}
    feeds = {value.name: value.sample(sizes, seed) for seed, value in enumerate(decoder.inputs)}
    try:
        logits = pytorch_outputs(decoder, feeds)["logits"]
    except Exception as error:
        raise ExportError(f"decode fails for 3 tokens of 2 sources: {type(error).__name__}: {error}") from error
    if logits.shape[:2] != (2, 3) or logits.ndim != 3:
        raise ExportError(f"decode returns the shape {list(logits.shape)}; expected [batch, sequence, vocab].")
    return int(logits.shape[2])
