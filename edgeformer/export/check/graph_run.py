"""Graph files on plain onnxruntime, without edgeformer's runtime: an independent reference for the checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgeformer.bundle.signature import Array
from edgeformer.engines.interruptible import interruptible
from edgeformer.errors import ExportError, first_line
from edgeformer.machine import default_threads

# name of the graph -> its file; an encoder-decoder's are named as in Hugging Face's ONNX folders
FILES = {"model": "model.onnx", "encoder": "encoder_model.onnx", "decoder": "decoder_model.onnx"}
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OrtGraph:
    """A graph file that can be run. `optimized=False` runs each operator as written: weights really are dequantized.

    `mapped` reads the weights from the mapped file: onnxruntime neither transposes nor packs them beforehand, which
    would copy each. Use it for float graphs; the kernels for integer weights need that copy.
    """

    def __init__(self, path: Path, *, optimized: bool = True, mapped: bool = False) -> None:
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = False  # the arena would keep all memory that a run needed
        options.intra_op_num_threads = default_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self.session = interruptible(
                lambda: ort.InferenceSession(
                    str(path),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=["ConstantFolding"] if mapped else None,
                )
            )
        except Exception as error:  # onnxruntime's own classes share no base but this one
            raise ExportError(
                f"onnxruntime {ort.__version__} cannot load the exported graph: {str(error).splitlines()[0]} "
                "Use another operation for it in the forward."
            ) from error
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        # The encoder's keys and values are a decoder's inputs named like a cache, but they do not grow.
        pasts = (name for name in self.inputs if name.startswith("past_key_values."))
        self.past = [name for name in pasts if name.replace("past_key_values", "present") in self.outputs]

    def __call__(
        self, feeds: Mapping[str, Array], past: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """(outputs, present) for `feeds` after `past` (None: an empty one); present has the names of past."""
        batch = next(iter(feeds.values())).shape[0]
        cache = dict(past) if past is not None else {name: self._empty(name, batch) for name in self.past}
        wanted = {name: value for name, value in feeds.items() if name in self.inputs or name == "logits_to_keep"}
        for name, value in wanted.items():
            kind = _NUMPY.get(self.inputs[name].type) if name in self.inputs else None
            if kind is not None and value.dtype != kind:
                wanted[name] = value.astype(kind)
        values = self._run({**wanted, **cache})
        results = dict(zip(self.outputs, values, strict=True))
        present = {name: results.pop(name.replace("past_key_values", "present")) for name in self.past}
        outputs = {name: _wide(value) for name, value in results.items()}
        return outputs, present

    def values(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output under its own name, those of the cache too, for `feeds` after an empty past."""
        batch = next(iter(feeds.values())).shape[0]
        given = {name: value for name, value in feeds.items() if name in self.inputs}
        values = self._run({**given, **self.empty_past(batch)})
        return dict(zip(self.outputs, values, strict=True))

    def _run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """All outputs; Ctrl-C comes between two nodes of the graph.

        Raises:
            ExportError: onnxruntime has no kernel for a node, or one fails.
        """
        options = ort.RunOptions()
        try:
            values: list[Array] = interruptible(
                lambda: self.session.run(None, feeds, options), lambda: setattr(options, "terminate", True)
            )
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's own classes share no base but this one
            raise ExportError(
                f"onnxruntime {ort.__version__} cannot run the exported graph: {first_line(error)[:500]} "
                "Use another operation for it in the forward, or another --dtype."
            ) from error
        return values

    def empty_past(self, batch: int) -> dict[str, Array]:
        """Empty arrays for all inputs that are a cache, also of a graph that was cut before its presents."""
        return {name: self._empty(name, batch) for name in self.inputs if name.startswith("past_key_values.")}

    def _empty(self, name: str, batch: int) -> Array:
        value = self.inputs[name]
        shape = [dim if isinstance(dim, int) else 0 for dim in value.shape]
        return np.zeros([batch, *shape[1:]], _NUMPY[value.type])


def _wide(value: Array) -> Array:
    return value.astype(np.float32) if value.dtype == np.float16 else value


def open_graphs(
    folder: Path, names: Iterable[str], *, optimized: bool = True, mapped: bool = False
) -> dict[str, OrtGraph]:
    """{name: graph} of a model's files in `folder`; for the options see `OrtGraph`."""
    return {name: OrtGraph(folder / FILES[name], optimized=optimized, mapped=mapped) for name in names}
