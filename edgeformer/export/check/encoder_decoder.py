"""Parity of an encoder-decoder: the encoder's output, and logits of an answer fed through the decoder's KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgeformer.bundle.signature import F32
from edgeformer.errors import ParityError
from edgeformer.export.check.parity import (
    SHORT_PIECES,
    SHORTER,
    Comparison,
    Runs,
    at_longest,
    compare_outputs,
    long_pieces,
    unpadded,
    without_padding,
)
from edgeformer.export.inputs import axes
from edgeformer.export.source import ENCODER_MASK, ENCODER_OUTPUT, ENCODER_STATES, EncoderDecoderSource, pytorch_outputs

_SAMPLES = (
    (1, 9, SHORT_PIECES),
    (2, 12, (3, 1, 2)),
    (3, 5, (7,)),
)  # (batch, tokens of the source, pieces of the answer)
_LONG_SOURCE = 37  # tokens of the source beside the longest answer
_REFERENCE = (1, 24, 12)  # batch, tokens of the source, decoded tokens
_ANSWER = "decoder_input_ids"  # the decoder's input_ids, as reference.npz names them


@dataclass(frozen=True)
class EncoderDecoderSample:
    """A source and an answer, PyTorch's outputs for them, and the pieces in which the decoder is fed the answer."""

    name: str
    feeds: Mapping[str, torch.Tensor]  # inputs of the encoder
    ids: torch.Tensor  # [batch, tokens] of the answer
    pieces: tuple[int, ...]
    reference: Mapping[str, F32]  # the encoder's output, and the logits

    def against(self, graphs: Mapping[str, Runs]) -> Iterator[Comparison]:
        """Compares the encoder's output, then the logits of the answer fed piece by piece."""
        arrays = {name: value.numpy() for name, value in self.feeds.items()}
        states, static = _encode(graphs["encoder"], arrays)
        encoded = [
            without_padding({ENCODER_OUTPUT: value}, self.feeds) for value in (self.reference[ENCODER_OUTPUT], states)
        ]
        yield compare_outputs(f"encoder, {self.name}", *encoded)
        logits = _decode(graphs["decoder"], self.ids.numpy(), static, self.pieces)
        name = f"decoder in steps of {self.pieces}, {self.name}"
        yield compare_outputs(name, {"logits": self.reference["logits"]}, {"logits": logits})


@dataclass(frozen=True)
class EncoderDecoderExpected:
    """PyTorch's outputs for all samples."""

    samples: Sequence[EncoderDecoderSample]

    def against(self, graphs: Mapping[str, Runs]) -> Iterator[Comparison]:
        """Compares what the two graphs give for the same inputs."""
        for sample in self.samples:
            yield from sample.against(graphs)

    def one_sample(self) -> EncoderDecoderExpected:
        """The second sample alone: of two sequences, with padding."""
        return EncoderDecoderExpected(self.samples[1:2])

    def in_one_piece(self) -> EncoderDecoderExpected:
        """All samples, each answer in one run of the decoder."""
        return EncoderDecoderExpected([replace(one, pieces=(one.ids.shape[1],)) for one in self.samples])


@dataclass(frozen=True)
class EncoderDecoderChecks:
    """The checks of an encoder-decoder."""

    source: EncoderDecoderSource

    def expected(self) -> EncoderDecoderExpected:
        """PyTorch's outputs for several lengths and paddings of the source, and one answer as long as possible."""
        samples = [self._sample(*sizes, seed) for seed, sizes in enumerate(_SAMPLES)]
        # Decoders of translation and speech have contexts of a few hundred tokens: `SHORTER` is long enough.
        long = at_longest(
            SHORTER,
            self.source.decoder,
            lambda length: self._sample(1, _LONG_SOURCE, long_pieces(length), len(_SAMPLES), f"{length} tokens"),
        )
        return EncoderDecoderExpected(samples if long is None else [*samples, long])

    def advice(self, error: ParityError) -> str:  # noqa: ARG002  one interface for both kinds of checks
        """Nothing: no common mistake shows in the error."""
        return ""

    def reference_inputs(self) -> dict[str, torch.Tensor]:
        """The source and the answer that are stored in the bundle for `edgeformer verify`."""
        feeds, ids = self._inputs(*_REFERENCE, 99)
        return {**feeds, _ANSWER: ids}

    def in_pytorch(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, F32]:
        """PyTorch's logits for `reference_inputs`."""
        return {"logits": self._in_pytorch(inputs, inputs[_ANSWER])["logits"]}

    def in_graphs(self, inputs: Mapping[str, torch.Tensor], graphs: Mapping[str, Runs]) -> dict[str, Any]:
        """The logits that the graphs give for `reference_inputs`."""
        arrays = {name: value.numpy() for name, value in inputs.items()}
        ids = arrays.pop(_ANSWER)
        _, static = _encode(graphs["encoder"], arrays)
        return {"logits": _decode(graphs["decoder"], ids, static, (ids.shape[1],))}

    @property
    def reference_rows(self) -> slice:
        """The positions whose outputs are stored: all."""
        return slice(None)

    def _sample(
        self, batch: int, tokens: int, steps: tuple[int, ...], seed: int, name: str = ""
    ) -> EncoderDecoderSample:
        feeds, ids = self._inputs(batch, tokens, sum(steps), seed)
        shape = tuple(feeds[self.source.encoder.inputs[0].name].shape[1:])
        name = f"{name or f'batch {batch}'}, source {shape}"
        return EncoderDecoderSample(name, feeds, ids, steps, self._in_pytorch(feeds, ids))

    def _inputs(self, batch: int, source: int, target: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Random (inputs of the encoder, ids of the answer [batch, target]); an answer has no padding tokens."""
        encoder, decoder = self.source.encoder.inputs, self.source.decoder
        sizes = {axis: batch if index == 0 else source for index, axis in enumerate(axes(encoder))}
        feeds = {value.name: value.sample(sizes, seed + index) for index, value in enumerate(encoder)}
        ids = decoder.inputs[0].sample({"batch": batch, "sequence": target}, seed + 50)
        return feeds, unpadded(ids, decoder)

    def _in_pytorch(self, feeds: Mapping[str, torch.Tensor], ids: torch.Tensor) -> dict[str, F32]:
        """{last_hidden_state, logits} of PyTorch, without any cache."""
        states = pytorch_outputs(self.source.encoder, feeds)[ENCODER_OUTPUT]
        given = {"input_ids": ids, ENCODER_STATES: torch.from_numpy(states)}
        if "attention_mask" in feeds:
            given[ENCODER_MASK] = feeds["attention_mask"]
        return {ENCODER_OUTPUT: states, "logits": pytorch_outputs(self.source.decoder, given)["logits"]}


def _encode(encoder: Runs, feeds: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(last_hidden_state, the decoder's static inputs: what the encoder gives it once for each source)."""
    outputs, _ = encoder(feeds)
    states = outputs.pop(ENCODER_OUTPUT)
    static = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
    if "attention_mask" in feeds:
        static[ENCODER_MASK] = feeds["attention_mask"]
    return states, static


def _decode(decoder: Runs, ids: Any, static: Mapping[str, Any], lengths: tuple[int, ...]) -> F32:
    """float32 [batch, sum(lengths), vocab]: the logits of `ids`, fed in pieces of `lengths` with a KV cache."""
    past, logits, start = None, [], 0
    for length in lengths:
        outputs, past = decoder({"input_ids": ids[:, start : start + length], **static}, past)
        logits.append(outputs["logits"])
        start += length
    return np.concatenate(logits, axis=1)
