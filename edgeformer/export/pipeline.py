"""One export from source to bundle: trace, passes, gate, quantize, gate again, measure, write."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeformer.bundle.write import check_target, seal, write_bundle
from edgeformer.errors import ExportError, ParityError
from edgeformer.export.check import accuracy, parity
from edgeformer.export.check.graph_run import Graph
from edgeformer.export.engine_gate import bound, engine_gate, sum_roundings
from edgeformer.export.graphs.encoder_decoder import TracedPair
from edgeformer.export.graphs.standard import standard_graph
from edgeformer.export.options import SAMPLES, ExportOptions
from edgeformer.export.pair import export_pair
from edgeformer.export.passes.attention_node import window_masks
from edgeformer.export.passes.cache_positions import count_past
from edgeformer.export.passes.causal import name_causality
from edgeformer.export.passes.edit import infer_shapes
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.float16 import to_float16
from edgeformer.export.passes.kv_cache import insert_cache, join_cache
from edgeformer.export.passes.logits import keep_logits
from edgeformer.export.passes.masks import spread_rows
from edgeformer.export.passes.rounding import round_activations
from edgeformer.export.progress import Progress, Silent
from edgeformer.export.quantize.calibrate import Calibration, calibration
from edgeformer.export.quantize.plan import Quantized, holding, quantize_graph
from edgeformer.export.source import Pair, Source
from edgeformer.export.sources.generation import generation_notes
from edgeformer.export.sources.load import load_source
from edgeformer.export.write import GRAPH, manifest, save_graph, write_reference, write_texts

NO_CACHE = (
    "No causal attention was recognized, so the graph has no KV cache: every step reads the whole text again. Use "
    "F.scaled_dot_product_attention(q, k, v, is_causal=True), or softmax(scale * q @ k^T + causal mask) @ v."
)


@dataclass(frozen=True)
class Traced:
    """A source with its decode-ready float graph: what several exports of one model share."""

    source: Source
    model: ir.Model
    layers: int  # attention layers with a cache
    transposed: frozenset[str]  # names of weights that the graph holds transposed to the module's


def export(
    options: ExportOptions,
    progress: Progress | None = None,
    traced: Source | Traced | Pair | TracedPair | None = None,
) -> dict[str, Any]:
    """Writes the bundle that `options` describe and returns its manifest.

    A caller that has the model at hand passes it as `traced`; otherwise `options.source` is loaded.

    Raises:
        ExportError: the source cannot be loaded, traced or quantized.
        ParityError: the graph's numbers are not PyTorch's. Nothing is written.
        BundleError: `options.output` exists and `options.overwrite` is false.
    """
    progress = progress or Silent()
    check_target(options.output, options.overwrite)
    if traced is None:
        progress.stage(f"load {options.source}" + (f" and merge {options.adapter}" if options.adapter else ""))
        traced = load_source(options, progress)
    elif options.adapter is not None:
        raise ExportError(
            f"adapter is {options.adapter}, and the export merges it into a model that it loads; merge it into yours: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    rules = generation_notes(traced if isinstance(traced, Source | Pair) else _untraced(traced))
    if isinstance(traced, Pair | TracedPair):
        decoder = (traced if isinstance(traced, Pair) else traced.pair).decoder
        scheme = _scheme(options, decoder)
        _calibrates(options, decoder, scheme, layers=0)
        return export_pair(options, progress, traced, scheme, rules)
    with write_bundle(options.output, overwrite=options.overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        if isinstance(traced, Source):
            _calibrates(options, traced, _scheme(options, traced))
            progress.stage("trace")
            traced = float_graph(traced)
        source, model, scheme = traced.source, traced.model.clone(), _scheme(options, traced.source)
        half, quantized = options.dtype == "float16", scheme != "none"
        calibrated = _calibrates(options, source, scheme, traced.layers)

        progress.stage("check the float graph against PyTorch")
        float_path = (Path(scratch) if half or quantized else folder) / GRAPH
        save_graph(model, float_path)
        cached = traced.layers > 0 and source.is_language_model
        expected = _expected(source, cached)
        report: dict[str, Any] = {"float": _gate(source, Graph(float_path, mapped=True), expected)}
        allowed = parity.TOLERANCE

        weights: list[Quantized] = []
        fitted: Calibration | None = None
        if quantized:
            del expected
            if calibrated:
                progress.stage("calibrate")
                fitted = calibration(source, options, model, float_path, progress)
            weights = quantize_graph(model, source, options, scheme, traced.transposed, progress, fitted)
            finish(model, f"{source.origin}, quantized {scheme}")
            path = (Path(scratch) / "quantized" if half else folder) / GRAPH
            save_graph(model, path)
            progress.stage("check the quantized graph against PyTorch with the same weights")
            with holding(source.module, weights):
                expected = _expected(source, cached)
            report["dequantized"] = parity.gate(parity.against(Graph(path, optimized=False), expected[0][:1]))
            progress.stage("measure what int8 activations move")
            allowed = bound(
                check
                for sums in sum_roundings(weights)
                for check in parity.against(_rounding(model, options.block, Path(scratch), sums), *expected)
            )
        if half:
            to_float16(model)
            save_graph(model, folder / GRAPH)
            progress.stage("check the float16 graph")
            allowed += parity.FLOAT16_TOLERANCE
            report["float16"] = parity.gate(parity.against(Graph(folder / GRAPH), expected[0][:1]), allowed)

        measured = None
        if source.is_language_model and options.tokens and (half or quantized):
            progress.stage("measure accuracy")
            measured = accuracy.measure(source, float_path, folder / GRAPH, options.text, options.tokens, progress)
        progress.stage("write")
        tolerance = write_reference(source, folder, weights, exact=not (half or quantized))
        write_texts(source, folder)
        reference = {"file": "reference.npz", "tolerance": tolerance}
        report = {"dequantized": None, **report}
        parts: dict[str, Any] = {"parity": report, "accuracy": measured, "reference": reference}
        notes = [*source.notes, *rules, *([NO_CACHE] if source.is_language_model and not traced.layers else [])]
        if notes:
            parts["notes"] = notes
        if source.processing:
            parts["processing"] = dict(source.processing)
        content = manifest(model, source, options, scheme, weights, fitted, **parts)
        report["engines"] = engine_gate(
            folder, content, lambda engines: parity.against(engines["model"], *expected), allowed, progress
        )
        return seal(folder, content)


def _untraced(traced: Traced | TracedPair) -> Source | Pair:
    return traced.pair if isinstance(traced, TracedPair) else traced.source


def float_graph(source: Source) -> Traced:
    """Traces the module and makes the graph decode-ready.

    Raises:
        ExportError: the module cannot be traced, or a pass finds what it cannot handle.
    """
    model, transposed = standard_graph(source)
    layers = join_cache(model) if source.past else 0
    if source.is_language_model and not source.past:
        name_causality(model)
        layers = insert_cache(model)
        count_past(model)
    spread_rows(model)
    window_masks(model)
    if source.is_language_model and layers:
        keep_logits(model)
    finish(model, source.origin)
    infer_shapes(model)
    return Traced(source, model, layers, frozenset(transposed))


Expected = tuple[list[parity.Sample], list[parity.Text]]


def _expected(source: Source, cached: bool) -> Expected:
    """PyTorch's own outputs, for all that is compared with them."""
    return parity.samples(source), parity.texts(source) if cached else []


def _rounding(model: ir.Model, block: int, scratch: Path, sums: bool) -> Graph:
    """The quantized graph with its activations rounded as engines round them; see `round_activations`."""
    copy = model.clone()
    round_activations(copy, max(32, block), sums=sums)
    path = scratch / f"rounded-{sums:d}" / GRAPH
    save_graph(copy, path)
    return Graph(path, optimized=False)


def _gate(source: Source, graph: Graph, expected: Expected) -> dict[str, Any]:
    try:
        return parity.gate(parity.against(graph, *expected))
    except ParityError as error:
        positioned = any(value.name == "position_ids" for value in source.inputs)
        if positioned or not source.is_language_model or parity.IN_CACHE not in str(error):
            raise
        raise ParityError(
            f"{error} All at once the graph is right, so its positions do not go on where the cache ends: take them as "
            "an argument, forward(input_ids, position_ids), and use them where they are counted now."
        ) from error


def _calibrates(options: ExportOptions, source: Source, scheme: str, layers: int | None = None) -> bool:
    """Whether weights are fitted to calibration text; `layers` with a cache are None while that is not known.

    Raises:
        ExportError: it is asked for where it cannot be done.
    """
    wanted = options.calibrates(scheme)
    asked = wanted and (options.calibration is not None or options.calibration_tokens is not None)
    if asked and not (source.is_language_model and layers != 0):
        raise ExportError(
            "calibration runs a language model with a KV cache on text; this model "
            f"{'has no cache' if source.is_language_model else f'is made for {source.task}'}. Leave it out: weights "
            "are then rounded to the nearest."
        )
    text = options.calibration_text
    if asked and text is not None and not text.is_file():
        raise ExportError(f"there is no text {text} to calibrate on; name a file, or {SAMPLES} or none.")
    return wanted and source.is_language_model and layers != 0


def _scheme(options: ExportOptions, source: Source) -> str:
    scheme = options.quantize or ("keep" if source.kept else "q4a")
    if scheme == "keep" and source.kept is None:
        raise ExportError(
            "--quantize keep is for GGUF files: this source has no blocks of its own; use q4a, q4, q8 or none."
        )
    return scheme
