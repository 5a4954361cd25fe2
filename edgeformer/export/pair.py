"""One export of an encoder-decoder model: both graphs checked together, quantized, checked again, written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeformer.bundle.write import seal, write_bundle
from edgeformer.export.check import parity
from edgeformer.export.check.graph_run import Graph
from edgeformer.export.check.parity import Check
from edgeformer.export.engine_gate import bound, engine_gate, sum_roundings
from edgeformer.export.graphs.encoder_decoder import FILES, MASK, RESULT, TracedPair, pair_graphs
from edgeformer.export.inputs import axes
from edgeformer.export.options import ExportOptions
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.float16 import to_float16
from edgeformer.export.passes.hoist import STATES
from edgeformer.export.passes.rounding import round_activations
from edgeformer.export.progress import Progress
from edgeformer.export.quantize.plan import Quantized, holding, quantize_graph
from edgeformer.export.source import Pair, run
from edgeformer.export.write import graph_shapes, manifest, save_graph, write_texts

_STEPS = ((5, 1, 1, 1, 2), (3, 1, 2), (7,))
_REFERENCE = (1, 24, 12)  # batch, tokens of the source, decoded tokens


def export_pair(
    options: ExportOptions, progress: Progress, traced: Pair | TracedPair, scheme: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes the bundle and returns its manifest, which holds the `notes` too.

    Raises:
        ExportError: the pair cannot be traced or quantized.
        ParityError: the graphs' numbers are not PyTorch's. Nothing is written.
        BundleError: `options.output` exists and `options.overwrite` is false.
    """
    with write_bundle(options.output, overwrite=options.overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        if isinstance(traced, Pair):
            progress.stage("trace")
            traced = pair_graphs(traced)
        pair, models = traced.pair, (traced.encoder.clone(), traced.decoder.clone())
        half, quantized = options.dtype == "float16", scheme != "none"

        progress.stage("check the float graphs against PyTorch")
        place = Path(scratch) if half or quantized else folder
        _save(models, place)
        expected = pair_samples(pair)
        report: dict[str, Any] = {"float": parity.gate(pair_checks(expected, PairGraphs.of(place)))}
        allowed = parity.TOLERANCE

        weights: list[Quantized] = []
        if quantized:
            for model, source in zip(models, (pair.encoder, pair.decoder), strict=True):
                done = quantize_graph(model, source, options, scheme, traced.transposed, progress)
                weights += [weight for weight in done if weight.name not in {w.name for w in weights}]
                finish(model, f"{source.origin}, quantized {scheme}")
            place = Path(scratch) / "quantized" if half else folder
            _save(models, place)
            progress.stage("check the quantized graphs against PyTorch with the same weights")
            with holding(pair.encoder.module, weights):
                expected = pair_samples(pair)
            report["dequantized"] = parity.gate(pair_checks(expected[1:2], PairGraphs.of(place, optimized=False)))
            progress.stage("measure what int8 activations move")
            allowed = bound(
                check
                for sums in sum_roundings(weights)
                for check in pair_checks(expected, _rounding(models, options.block, Path(scratch), sums))
            )
        if half:
            for model in models:
                to_float16(model)
            _save(models, folder)
            progress.stage("check the float16 graphs")
            allowed += parity.FLOAT16_TOLERANCE
            report["float16"] = parity.gate(pair_checks(expected[1:2], PairGraphs.of(folder)), allowed)

        progress.stage("write")
        tolerance = _write_reference(pair, folder, weights, exact=not (half or quantized))
        write_texts(pair.encoder, folder)
        report = {"dequantized": None, **report}
        parts: dict[str, Any] = {
            "parity": report,
            "accuracy": None,
            "reference": {"file": "reference.npz", "tolerance": tolerance},
        }
        if notes:
            parts["notes"] = list(notes)
        if pair.encoder.processing:
            parts["processing"] = dict(pair.encoder.processing)
        content = manifest(models[1], pair.encoder, options, scheme, weights, **parts)
        sources = (pair.encoder, pair.decoder)
        content["graphs"] = {
            name: graph_shapes(model, FILES[name], source.positions)
            for name, model, source in zip(FILES, models, sources, strict=True)
        }
        report["engines"] = engine_gate(
            folder,
            content,
            lambda engines: pair_checks(expected, PairGraphs(engines["encoder"], engines["decoder"])),
            allowed,
            progress,
        )
        return seal(folder, content)


def _rounding(models: Sequence[ir.Model], block: int, scratch: Path, sums: bool) -> PairGraphs:
    """Both quantized graphs with their activations rounded as engines round them; see `round_activations`."""
    copies, folder = [model.clone() for model in models], scratch / f"rounded-{sums:d}"
    for model in copies:
        round_activations(model, max(32, block), sums=sums)
    _save(copies, folder)
    return PairGraphs.of(folder, optimized=False)


def _save(models: Sequence[ir.Model], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for model, file in zip(models, FILES.values(), strict=True):
        save_graph(model, folder / file)


def _write_reference(pair: Pair, folder: Path, weights: Sequence[Quantized], exact: bool) -> dict[str, float]:
    """`reference.npz`: a source and an answer with PyTorch's logits and the bundle's; see `write.write_reference`."""
    feeds, ids = sample_pair(pair, *_REFERENCE, 99)
    arrays = {name: value.numpy() for name, value in feeds.items()}
    _, fixed = (graphs := PairGraphs.of(folder)).encode(arrays)
    found = {"logits": graphs.decode(ids.numpy(), fixed, (ids.shape[1],))}
    original = {"logits": truth(pair, feeds, ids)["logits"]}
    moved = 0.0
    if not exact:
        with holding(pair.encoder.module, weights):
            held = {"logits": truth(pair, feeds, ids)["logits"]}
        moved = parity.compare("reference", held, found).worst
    stored = {f"input.{name}": value for name, value in arrays.items()} | {"input.decoder_input_ids": ids.numpy()}
    stored |= {f"float.{name}": value for name, value in original.items()}
    stored |= {f"bundle.{name}": value for name, value in found.items()}
    np.savez_compressed(folder / "reference.npz", **stored)  # type: ignore[arg-type]
    return {"logits": 3 * moved + 10 * parity.TOLERANCE}


@dataclass(frozen=True)
class PairGraphs:
    """Both graphs, on plain onnxruntime or on one of our engines."""

    encoder: parity.Runs
    decoder: parity.Runs

    @classmethod
    def of(cls, folder: Path, *, optimized: bool = True) -> PairGraphs:
        """The files in `folder`, on plain onnxruntime."""
        return cls(*(Graph(folder / FILES[name], optimized=optimized) for name in ("encoder", "decoder")))

    def encode(self, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(last_hidden_state, what the decoder needs of the source)."""
        outputs, _ = self.encoder(feeds)
        states = outputs.pop(RESULT)
        fixed = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
        if "attention_mask" in feeds:
            fixed[MASK] = feeds["attention_mask"]
        return states, fixed

    def decode(self, ids: np.ndarray, fixed: Mapping[str, np.ndarray], lengths: tuple[int, ...]) -> np.ndarray:
        """float32 [batch, sum(lengths), vocab]: logits of `ids` fed in pieces, the cache between them."""
        past, logits, start = None, [], 0
        for length in lengths:
            outputs, past = self.decoder({"input_ids": ids[:, start : start + length], **fixed}, past)
            logits.append(outputs["logits"])
            start += length
        return np.concatenate(logits, axis=1)


def truth(pair: Pair, feeds: Mapping[str, torch.Tensor], ids: torch.Tensor) -> dict[str, np.ndarray]:
    """{last_hidden_state, logits} of PyTorch, without any cache."""
    states = run(pair.encoder, feeds)[RESULT]
    given = {"input_ids": ids, STATES: torch.from_numpy(states)}
    if "attention_mask" in feeds:
        given[MASK] = feeds["attention_mask"]
    return {RESULT: states, "logits": run(pair.decoder, given)["logits"]}


@dataclass(frozen=True)
class PairSample:
    """A source and an answer, with PyTorch's outputs for them and the pieces in which a graph is fed the answer."""

    name: str
    feeds: Mapping[str, torch.Tensor]
    ids: torch.Tensor
    pieces: tuple[int, ...]
    reference: Mapping[str, np.ndarray]


def pair_samples(pair: Pair) -> list[PairSample]:
    """PyTorch's outputs for several lengths and paddings of the source, and one answer as long as the decoder takes."""
    done = []
    for seed, (batch, other, steps) in enumerate(zip((1, 2, 3), (9, 12, 5), _STEPS, strict=True)):
        feeds, ids = sample_pair(pair, batch, other, sum(steps), seed)
        done.append(_pair_sample(pair, feeds, ids, steps, f"batch {batch}"))

    def made(length: int) -> PairSample:
        feeds, ids = sample_pair(pair, 1, 37, length, 3)
        return _pair_sample(pair, feeds, ids, parity.pieces(length), f"{length} tokens")

    # Decoders of translation and speech take a few hundred tokens: those of `parity.LONG` are not tried.
    long = parity.at_longest(parity.SHORTER, pair.decoder, made)
    return done if long is None else [*done, long]


def _pair_sample(
    pair: Pair, feeds: Mapping[str, torch.Tensor], ids: torch.Tensor, steps: tuple[int, ...], name: str
) -> PairSample:
    shape = tuple(feeds[pair.encoder.inputs[0].name].shape[1:])
    return PairSample(f"{name}, source {shape}", feeds, ids, steps, truth(pair, feeds, ids))


def pair_checks(expected: Sequence[PairSample], graphs: PairGraphs) -> Iterator[Check]:
    """The encoder's output, then the logits of the answer fed piece by piece."""
    for sample in expected:
        arrays = {name: value.numpy() for name, value in sample.feeds.items()}
        states, fixed = graphs.encode(arrays)
        shown = [parity.without_padding({RESULT: v}, sample.feeds) for v in (sample.reference[RESULT], states)]
        yield parity.compare(f"encoder, {sample.name}", shown[0], shown[1])
        logits = graphs.decode(sample.ids.numpy(), fixed, sample.pieces)
        name = f"decoder in steps of {sample.pieces}, {sample.name}"
        yield parity.compare(name, {"logits": sample.reference["logits"]}, {"logits": logits})


def sample_pair(
    pair: Pair, batch: int, source: int, target: int, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(encoder's inputs, decoder's ids [batch, target]), random; no decoded token is padding, as in any real answer."""
    sizes = {axis: batch if index == 0 else source for index, axis in enumerate(axes(pair.encoder.inputs))}
    feeds = {value.name: value.sample(sizes, seed + index) for index, value in enumerate(pair.encoder.inputs)}
    ids = pair.decoder.inputs[0].sample({"batch": batch, "sequence": target}, seed + 50)
    return feeds, parity.unpadded(ids, pair.decoder)
