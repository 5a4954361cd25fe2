"""Encoder-decoder models: two graphs from one module, and what moves between them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from edgeformer.errors import ExportError
from edgeformer.export.graphs.standard import standard_graph
from edgeformer.export.inputs import Input, axes
from edgeformer.export.passes.attention_node import window_masks
from edgeformer.export.passes.cache_positions import count_past
from edgeformer.export.passes.causal import name_causality
from edgeformer.export.passes.edit import infer_shapes
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.hoist import STATES, hoist
from edgeformer.export.passes.kv_cache import insert_cache
from edgeformer.export.passes.logits import keep_logits
from edgeformer.export.passes.masks import spread_rows
from edgeformer.export.source import Pair, Source, run
from edgeformer.export.sources.generation import generation_settings
from edgeformer.export.sources.hub import heads
from edgeformer.export.trace import attention_interface

RESULT = "last_hidden_state"
MASK = "encoder_attention_mask"
SOURCE_AXIS = "source_sequence"
FILES = {"encoder": "encoder_model.onnx", "decoder": "decoder_model.onnx"}  # as Hugging Face's ONNX folders name them


class Encoding(torch.nn.Module):
    """The encoder of a transformers model; holds the whole of it, so that weights have one name in both halves."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        return states


class Decoding(torch.nn.Module):
    """The decoder with its head, given what the encoder made."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        logits: torch.Tensor = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            use_cache=False,
            **({} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}),
        ).logits
        return logits


def pair_source(model: Any, origin: str, task: str, files: Mapping[str, bytes] | None = None) -> Pair:
    """Both halves of any transformers encoder-decoder model object with a language head.

    Raises:
        ExportError: the model has no head, or its encoder's input is of no known kind.
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
        outputs=(RESULT,),
        task=task,
        origin=origin,
        config=config,
        generation_config=generation_settings(getattr(model, "generation_config", None)),
        files=files,
        tracing=lambda: heads.masks_as_arrays(model),
    )
    length, size = _states_shape(encoder)
    states = Input(STATES, torch.float32, ("batch", length, size))
    ids = Input(
        "input_ids", torch.int64, ("batch", "sequence"), high=int(model.get_output_embeddings().weight.shape[0])
    )
    mask = (Input(MASK, torch.int64, ("batch", SOURCE_AXIS)),) if len(inputs) > 1 else ()

    @contextlib.contextmanager
    def tracing() -> Iterator[None]:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(attention_interface.CAUSAL_ATTENTION)
        except (ValueError, ImportError) as error:
            raise ExportError(
                f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
                f"seen: {error}"
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
    return Pair(encoder, decoder)


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
    states = run(encoder, {value.name: value.sample(sizes, 0) for value in encoder.inputs})[RESULT]
    return (SOURCE_AXIS if SOURCE_AXIS in sizes else int(states.shape[1])), int(states.shape[2])


@dataclass(frozen=True)
class TracedPair:
    """A pair with its two float graphs, ready to decode."""

    pair: Pair
    encoder: ir.Model
    decoder: ir.Model
    transposed: frozenset[str]  # names of weights that a graph holds transposed to the module's


def pair_graphs(pair: Pair) -> TracedPair:
    """Traces both halves, adds the cache of decoded tokens, and moves to the encoder what no decoded token changes.

    Raises:
        ExportError: a half cannot be traced, or a pass finds what it cannot handle.
    """
    encoder, transposed = standard_graph(pair.encoder)
    decoder, others = standard_graph(pair.decoder)
    name_causality(decoder)
    if not insert_cache(decoder):
        raise ExportError(
            "No causal attention was recognized in the decoder, and without one it cannot decode step by step. Use "
            "F.scaled_dot_product_attention(q, k, v, is_causal=True), or softmax(scale * q @ k^T + causal mask) @ v."
        )
    _name_caches(decoder)
    count_past(decoder)
    for model in (encoder, decoder):
        spread_rows(model)
        window_masks(model)
    hoist(encoder, decoder, RESULT)
    keep_logits(decoder)
    for model, source in ((encoder, pair.encoder), (decoder, pair.decoder)):
        finish(model, source.origin)
        infer_shapes(model)
    return TracedPair(pair, encoder, decoder, frozenset(transposed | others))


def _name_caches(decoder: ir.Model) -> None:
    """`past_key_values.0.key` becomes `past_key_values.0.decoder.key`: beside it stands that of the encoder."""
    for value in (*decoder.graph.inputs, *decoder.graph.outputs):
        for part in (".key", ".value"):
            if str(value.name).startswith(("past_key_values.", "present.")) and str(value.name).endswith(part):
                value.name = f"{str(value.name).removesuffix(part)}.decoder{part}"
