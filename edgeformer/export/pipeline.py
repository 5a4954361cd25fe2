"""The export from source to bundle: trace, check, quantize, check again, measure, write, check the engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeformer.bundle.write import check_target, seal, write_bundle
from edgeformer.errors import ExportError, ParityError
from edgeformer.export.cache_choice import CacheChoice
from edgeformer.export.check import parity
from edgeformer.export.check.accuracy import Text, accuracy_report
from edgeformer.export.check.checks import ModelChecks, checks_of
from edgeformer.export.check.graph_run import FILES, OrtGraph, open_graphs
from edgeformer.export.engine_gate import engine_gate, engine_tolerance, float16_tolerance
from edgeformer.export.graphs import TracedModel, trace_model
from edgeformer.export.graphs.traced_model import CAUSAL_ADVICE
from edgeformer.export.interrupts import no_interrupt_lost
from edgeformer.export.options import ExportOptions
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.float16 import to_float16
from edgeformer.export.progress import Progress, Silent
from edgeformer.export.quantize.calibrate import Calibration, calibrates, calibration
from edgeformer.export.quantize.dequantized import dequantized_weights
from edgeformer.export.quantize.plan import Plan, Quantization, quantize_graph
from edgeformer.export.quantize.weights import QuantizedWeight
from edgeformer.export.short_collections import short_collections
from edgeformer.export.source import AnySource, Source
from edgeformer.export.sources.generation import generation_notes
from edgeformer.export.sources.load import load_source
from edgeformer.export.write import manifest, save_models, write_reference, write_texts
from edgeformer.files import temporary_folder

_NO_CACHE = (
    "No causal attention was recognized, so the graph has no KV cache: every step reads the whole text again. "
    f"{CAUSAL_ADVICE}"
)


def export(
    options: ExportOptions,
    progress: Progress | None = None,
    traced: AnySource | TracedModel | None = None,
) -> dict[str, Any]:
    """Writes the bundle that `options` describe and returns its manifest.

    `traced` is a model that the caller has loaded (`module_source`, `language_model`) or traced already; without it
    `options.source` is loaded.

    Raises:
        ExportError: the source cannot be loaded, traced or quantized.
        ParityError: the numbers of a graph, or of all engines, are not PyTorch's. Nothing is written.
        BundleError: `options.output` exists and `options.overwrite` is false.
    """
    if not isinstance(options, ExportOptions):
        raise ExportError(f"options is {options!r:.200}, expected ExportOptions(source, output).")
    if traced is not None and not isinstance(traced, AnySource | TracedModel):
        raise ExportError(f"traced is {traced!r:.200}, expected what module_source or language_model return.")
    with short_collections():
        return _run(options, progress or Silent(), traced)


def _run(options: ExportOptions, progress: Progress, traced: AnySource | TracedModel | None) -> dict[str, Any]:
    """See `export`."""
    check_target(options.output, options.overwrite)
    if traced is None:
        progress.stage(f"load {options.source}" + (f" and merge {options.adapter}" if options.adapter else ""))
        with no_interrupt_lost(progress) as watched:
            traced = load_source(options, watched)
    elif options.adapter is not None:
        raise ExportError(
            f"adapter is {options.adapter}, and the export merges it into a model that it loads; merge it into yours: "
            "PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    source = traced.source if isinstance(traced, TracedModel) else traced
    scheme, notes = _scheme(options, source), generation_notes(source)
    calibrates(options, scheme, source)  # refuses before the trace, which takes long
    with (
        write_bundle(options.output, overwrite=options.overwrite) as folder,
        temporary_folder() as scratch,
        no_interrupt_lost(progress) as watched,
    ):
        if not isinstance(traced, TracedModel):
            watched.stage("trace")
            traced = trace_model(traced)
        return _export(_Job(options, scheme, notes, watched, folder, scratch), traced)


def _scheme(options: ExportOptions, source: AnySource) -> str:
    """The quantization scheme of linear layers."""
    kept = source.first.kept
    scheme = options.quantize or ("keep" if kept else "q4a")
    if scheme == "keep" and kept is None:
        raise ExportError(
            "--quantize keep is for GGUF files: this source has no blocks of its own; use q4a, q4, q8 or none."
        )
    return scheme


@dataclass(frozen=True)
class _Job:
    """One export: its options, and where files go."""

    options: ExportOptions
    scheme: str
    notes: tuple[str, ...]  # rules of generation_config.json that the bundle does not follow
    progress: Progress
    folder: Path  # becomes the bundle
    scratch: Path  # for graphs that are only measured

    @property
    def quantized(self) -> bool:
        return self.scheme != "none"

    @property
    def half(self) -> bool:
        return self.options.dtype == "float16"

    @property
    def exact(self) -> bool:
        """Whether the bundle is the float32 graph itself."""
        return not (self.quantized or self.half)


def _export(job: _Job, traced: TracedModel) -> dict[str, Any]:
    """The stages in their order. After each change the graphs are compared with PyTorch, or a ParityError is raised."""
    source, stage = traced.source, job.progress.stage
    models = {name: model.clone() for name, model in traced.models.items()}
    checks = checks_of(source, cached=traced.layers > 0)

    stage("check the float graph against PyTorch")
    float_folder = job.folder if job.exact else job.scratch
    save_models(models, float_folder)
    expected = checks.expected()
    report: dict[str, Any] = {"dequantized": None}
    report["float"] = _float_parity(checks, expected, open_graphs(float_folder, models, mapped=True))
    tolerance = parity.FLOAT32

    quantization = Quantization(job.scheme)
    if job.quantized:
        del expected  # memory: the quantized graph is compared with other outputs
        quantization = _quantize(job, traced, models, float_folder)
        expected, report["dequantized"] = _check_quantized(job, checks, models, quantization)
        stage("measure the error of int8 activations")
        tolerance = engine_tolerance(models, quantization.weights, job.options.block, expected, job.scratch)

    if job.half:
        stage("measure the error of half precision")
        tolerance += float16_tolerance(models, expected, job.scratch)
        report["float16"] = _convert_to_float16(job, models, expected, tolerance)

    measured = _accuracy(job, source, float_folder, models, traced.layers)
    stage("write")
    tolerances = write_reference(checks, job.folder, quantization, exact=job.exact)
    write_texts(source.first, job.folder)
    reports = {
        "parity": report,
        **measured,
        "reference": {"file": "reference.npz", "tolerance": tolerances},
        **_notes(job, traced),
    }
    content = manifest(models, source, job.options, quantization, reports)
    report["engines"] = engine_gate(job.folder, content, expected, tolerance, job.progress)
    return seal(job.folder, content)


def _float_parity(checks: ModelChecks, expected: parity.Expected, graphs: Mapping[str, OrtGraph]) -> dict[str, Any]:
    try:
        return parity.gate(expected.against(graphs))
    except ParityError as error:
        if advice := checks.advice(error):
            raise ParityError(f"{error} {advice}") from error
        raise


def _quantize(job: _Job, traced: TracedModel, models: Mapping[str, ir.Model], float_folder: Path) -> Quantization:
    """Quantizes the graphs in place; fits weights to calibration text if the model and the options allow it."""
    source, text = traced.source, _calibration(job, traced, models, float_folder)
    plan = Plan(job.scheme, job.options.head, job.options.block, traced.transposed, text)
    weights: list[QuantizedWeight] = []
    for name, part in source.parts.items():
        known = {weight.name for weight in weights}  # the graphs of an encoder-decoder share weights
        weights += [
            weight for weight in quantize_graph(models[name], part, plan, job.progress) if weight.name not in known
        ]
        finish(models[name], f"{part.origin}, quantized {job.scheme}")
    return Quantization(job.scheme, weights, text)


def _calibration(
    job: _Job, traced: TracedModel, models: Mapping[str, ir.Model], float_folder: Path
) -> Calibration | None:
    source = traced.source
    if not calibrates(job.options, job.scheme, source, traced.layers):
        return None
    assert isinstance(source, Source)
    job.progress.stage("calibrate")
    return calibration(source, job.options, models["model"], float_folder / FILES["model"], job.progress)


def _check_quantized(
    job: _Job, checks: ModelChecks, models: Mapping[str, ir.Model], quantization: Quantization
) -> tuple[parity.Expected, dict[str, Any]]:
    """(PyTorch's outputs with the dequantized weights, the parity report of the quantized graphs)."""
    folder = job.scratch / "quantized" if job.half else job.folder
    save_models(models, folder)
    job.progress.stage("check the quantized graph against PyTorch with the same weights")
    with dequantized_weights(checks.source.first.module, quantization.weights):
        expected = checks.expected()
    return expected, parity.gate(expected.one_sample().against(open_graphs(folder, models, optimized=False)))


def _convert_to_float16(
    job: _Job, models: Mapping[str, ir.Model], expected: parity.Expected, tolerance: parity.Tolerance
) -> dict[str, Any]:
    """Converts the graphs in place and returns their parity report."""
    for model in models.values():
        to_float16(model)
    save_models(models, job.folder)
    job.progress.stage("check the float16 graph against PyTorch")
    return parity.gate(expected.one_sample().against(open_graphs(job.folder, models)), tolerance)


def _accuracy(
    job: _Job, source: AnySource, float_folder: Path, models: Mapping[str, ir.Model], layers: int
) -> dict[str, Any]:
    """{"accuracy": the report of a language model; None for other models, a float32 bundle, or `--tokens 0`,
    "kv_cache": what an int8 cache costs, for a model with one}.
    """
    options = job.options
    if job.exact or not options.tokens or not (isinstance(source, Source) and source.is_language_model):
        return {"accuracy": None, **({"kv_cache": {"unmeasured": _unmeasured(job, source)}} if layers else {})}
    job.progress.stage("measure accuracy")
    reference = OrtGraph(float_folder / FILES["model"], mapped=True)
    path, text = job.folder / FILES["model"], Text.of(source, options.text, options.tokens)
    caches = None
    graphs: dict[str, parity.Runs] = {"bundle": OrtGraph(path)}
    if job.quantized and layers:
        inputs = [value.name or "" for value in models["model"].graph.inputs]
        caches = CacheChoice(path, inputs, text)
        graphs |= caches.graphs
    scores = text.score(reference, graphs, job.progress)
    graphs.clear()
    found: dict[str, Any] = {"accuracy": accuracy_report(scores["bundle"], text)}
    if layers:
        cost = {"unmeasured": _unmeasured(job, source)}
        found["kv_cache"] = caches.report(scores, text, reference, job.progress) if caches else cost
    return found


def _unmeasured(job: _Job, source: AnySource) -> str:
    """Why the cost of an int8 cache is not measured."""
    if not job.quantized:
        return "weights are float, so the export expected a float32 cache"
    if not isinstance(source, Source):
        return "the export does not measure it for encoder-decoders"
    if not source.is_language_model:
        return "the export measures it for language models only"
    return "the export measured no accuracy (--tokens 0)"


def _notes(job: _Job, traced: TracedModel) -> dict[str, Any]:
    """{"notes": limitations of the bundle}, empty if it has none."""
    source = traced.source.first
    uncached = isinstance(traced.source, Source) and source.is_language_model and not traced.layers
    notes = [*source.notes, *job.notes, *([_NO_CACHE] if uncached else [])]
    return {"notes": notes} if notes else {}
