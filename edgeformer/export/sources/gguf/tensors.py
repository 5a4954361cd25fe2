"""Loads the tensors of a GGUF file into a transformers model.

transformers knows the names and layouts (llama.cpp's row order of queries and keys, stacks of experts, norms plus one).
This module checks first, on the meta device, that every tensor is used and every parameter has a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.config_builder import ConfigBuilder
from edgeformer.export.sources.gguf.header import TensorInfo
from edgeformer.export.sources.gguf.rope import TENSORS as ROTARY
from edgeformer.export.sources.gguf.shards import GgufFile

FLOATS = ("F32", "F16", "BF16")
_AT_ONCE = 4 << 20  # bytes of blocks that are dequantized at once
_LAYER = re.compile(r"blk\.(\d+)\.")


def check_types(model: GgufFile) -> None:
    """Raises ExportError for a type that the gguf package cannot dequantize; the message names tensor and type."""
    first = {tensor.type: tensor for tensor in reversed(model.tensors.values())}
    for tensor in first.values():
        if tensor.type.name in FLOATS:
            continue
        block, size = gguf.GGML_QUANT_SIZES[tensor.type]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), tensor.type)
        except NotImplementedError as error:
            raise ExportError(
                f"{model.name}: tensor {tensor.name} has the type {tensor.type.name} ({block} values in {size} bytes), "
                "which the gguf package cannot read. Convert the model to another type with llama-quantize."
            ) from error


def check_layers(model: GgufFile, count: int) -> None:
    """Raises ExportError if the tensors have another number of layers than the metadata."""
    found = {int(match[1]) for name in model.tensors if (match := _LAYER.match(name))}
    if found != set(range(count)):
        raise ExportError(
            f"{model.name}: block_count is {count}, the tensors have {len(found)} layers"
            f"{f' (numbers {min(found)} to {max(found)})' if found else ''}. The file is incomplete: copy or "
            "download it again."
        )


def parameters_of(meta: Any, settings: ConfigBuilder) -> dict[str, str]:
    """{tensor of the file: parameter of the model}; `meta` is the model on the meta device.

    Raises:
        ExportError: a tensor is unused, a parameter has no tensor, or a size differs.
    """
    model, state = settings.model, meta.state_dict()
    mapping = _mapping(meta, settings)
    places: dict[str, str] = {}
    unused = []
    for name, tensor in model.tensors.items():
        place = mapping.get(name) or mapping.get(name.removesuffix(".weight")) or ""
        if place.startswith("mtp."):
            continue  # layers for multi-token prediction: gguf_config.py adds a note
        if place in state:
            places[name] = place
        elif not name.endswith(ROTARY):
            unused.append(f"{name} {list(tensor.shape)}")
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise ExportError(
            f"{model.name}: {', '.join(unused[:3])}{more}: {type(meta).__name__} of transformers does not use this, so "
            "results would be wrong. Export the original model."
        )
    shared = set(getattr(meta, "all_tied_weights_keys", None) or {})
    absent = sorted(set(state) - set(places.values()) - shared)
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ExportError(
            f"{model.name} has no tensor for {', '.join(absent[:3])}{more} of {type(meta).__name__}. The file is "
            "incomplete or made for another version of the architecture: copy it again, or export the original model."
        )
    for place, value in state.items():
        names = [name for name, other in places.items() if other == place]
        if names and sum(model.tensors[name].elements for name in names) != value.numel():
            shapes = " + ".join(f"{name} {list(model.tensors[name].shape)}" for name in names)
            raise ExportError(
                f"{model.name}: {shapes} does not fit {place} {list(value.shape)}, the size in the metadata. Convert "
                "the model again."
            )
    return places


def _mapping(meta: Any, settings: ConfigBuilder) -> dict[str, str]:
    """{tensor: parameter} names of this architecture, from transformers."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf import utils

    architecture = settings.model.architecture
    if utils.is_gguf_arch_supported(architecture):
        entries = utils.get_gguf_conversion_mapping(architecture, meta.config)
        renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        return {name: rename_source_key(name, renamings, converters)[0] for name in settings.model.tensors}
    found: dict[str, str] = legacy.get_gguf_hf_weights_map(meta, _processor(settings))
    return found


def _processor(settings: ConfigBuilder) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor: Any = TENSOR_PROCESSORS.get(settings.model.architecture, TensorProcessor)
    return processor(config=settings.fields)


def tensor_values(model: GgufFile) -> Iterator[tuple[TensorInfo, NDArray[np.float32]]]:
    """Every tensor with its values, dequantized by the gguf package, in the order of the file.

    Raises:
        ExportError: a value is NaN or infinite.
    """
    for shard in model.shards:
        places = {tensor.name: tensor for tensor in shard.tensors}
        for tensor in gguf.GGUFReader(shard.path).tensors:
            found = dequantized(tensor)
            if not np.isfinite(found).all():
                raise ExportError(
                    f"{shard.path.name}: tensor {tensor.name} ({tensor.tensor_type.name}) has NaN or infinity; the "
                    "file is damaged. Copy or download it again."
                )
            yield places[tensor.name], found.reshape(places[tensor.name].shape)


def dequantized(tensor: Any) -> NDArray[np.float32]:
    """The values [rows, columns] of a tensor of gguf's reader; some rows at a time, so that Ctrl-C does not wait."""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    values = np.empty((len(rows), int(tensor.n_elements) // len(rows)), np.float32)
    count = max(1, _AT_ONCE // rows.shape[-1])
    for at in range(0, len(rows), count):
        values[at : at + count] = gguf.dequantize(rows[at : at + count], tensor.tensor_type)
    return values


def load_gguf_weights(meta: Any, settings: ConfigBuilder) -> Any:
    """The model of `meta`'s class with the file's weights, float32.

    Raises:
        ExportError: transformers' loading report is not empty.
    """
    parameters_of(meta, settings)
    mapping, processor = _mapping(meta, settings), _processor(settings)
    # Processors of stacked experts modify `parsed`; the others return the values.
    parsed: dict[str, Any] = {"tensors": {}}
    for tensor, found in tensor_values(settings.model):
        if tensor.name.endswith(ROTARY):
            continue
        result = processor.process(
            weights=found, name=tensor.name, tensor_key_mapping=mapping, parsed_parameters=parsed
        )
        if result.name is not None:
            parsed["tensors"][mapping[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights, np.float32))
    loaded, report = type(meta).from_pretrained(
        None,
        config=meta.config,
        state_dict=parsed["tensors"],
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    check_report(settings.model.name, report)
    return loaded


def check_report(name: str, report: Any) -> None:
    """Raises ExportError if parameters are missing, unexpected or of another shape."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        left = sorted(map(str, report.get(key) or ()))
        if left:
            raise ExportError(f"{name}: transformers reports {key.replace('_', ' ')}: {', '.join(left[:5])}.")
