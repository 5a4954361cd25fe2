"""RoPE settings of a GGUF file: base, rotated width, scaling by metadata, scaling by tensors of factors.

As in llama.cpp: a factor without a type is linear scaling; `rope_freqs.weight` divides the frequencies, and so does
`rope_factors_short` up to the trained length and `rope_factors_long` beyond it.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import torch

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.config_builder import EDIT, ConfigBuilder, RotaryScaling

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (FREQUENCIES, SHORT, LONG)
BASE = 10000.0  # llama.cpp's default


def set_rope(settings: ConfigBuilder) -> None:
    """Sets `rope_parameters`, and `settings.rotary` for scaling that these cannot express.

    Raises:
        ExportError: transformers does not have the file's scaling.
    """
    plain = settings.defaults.get("rope_parameters")
    names = [name for name in settings.model.tensors if name.endswith(TENSORS)]
    if not isinstance(plain, dict):
        for key in (key for key in settings.model.metadata if ".rope." in key):
            short = key.partition(".")[2]
            if short not in ("rope.dimension_count", "rope.scaling.finetuned") and settings.get(short) not in (
                0,
                1.0,
                "none",
            ):
                raise settings.refuse(short, "models of this architecture have no RoPE.")
        if names:
            raise ExportError(f"{settings.model.name} has {names[0]}, but its architecture has no RoPE. {EDIT}")
        return
    base = _base(settings)
    scaling = _scaling(settings)
    nested = "full_attention" in plain
    if nested:
        swa = settings.number("rope.freq_base_swa") or plain["sliding_attention"]["rope_theta"]
        # llama.cpp scales only the layers without a sliding window
        settings.fields["rope_parameters"] = {
            "full_attention": {"rope_theta": base} | scaling,
            "sliding_attention": {"rope_theta": swa, "rope_type": "default"},
        }
    else:
        if settings.number("rope.freq_base_swa") not in (None, base):
            raise settings.refuse("rope.freq_base_swa", f"expected {base}: the config has one base for all layers.")
        ours = settings.fields.get("rope_parameters")
        sections = ours if isinstance(ours, dict) and "mrope_section" in ours else {}
        extra = {k: v for k, v in plain.items() if k == "truncate" and plain.get("rope_type") == scaling["rope_type"]}
        settings.fields["rope_parameters"] = extra | sections | {"rope_theta": base} | scaling
    for name in ("rope_theta", "rope_scaling"):
        settings.fields.pop(name, None)
    _width(settings, plain, nested)
    if settings.get("rope.dimension_sections") is not None and "mrope_section" not in str(
        settings.fields["rope_parameters"]
    ):
        raise settings.refuse("rope.dimension_sections", "the config has no field for positions of several axes.")
    settings.rotary = _rotary(settings, names, nested)


def _base(settings: ConfigBuilder) -> float:
    base = settings.number("rope.freq_base")
    if base is None:
        settings.notes.append(f"The file has no rope.freq_base; it is {BASE:g}, llama.cpp's default.")
        return BASE
    if base <= 0:
        raise settings.refuse("rope.freq_base", "expected a number above 0.")
    return base


def _scaling(settings: ConfigBuilder) -> dict[str, Any]:
    """The fields of `rope_parameters` for scaling."""
    kind = settings.get("rope.scaling.type")
    key = "rope.scaling.factor" if settings.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = settings.number(key) or 1.0  # 0 means no scaling
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise settings.refuse("rope.scaling.type", "expected none, linear, yarn or longrope.")
    if factor < 0:
        raise settings.refuse(key, "expected a number above 0.")
    trained = settings.size("rope.scaling.original_context_length")
    if kind == "yarn":
        # llama.cpp: cosines and sines grow by 1 + 0.1 ln(factor), times the file's own factors
        magnitude = _product(settings) * (1.0 + 0.1 * math.log(max(factor, 1.0)))
        betas = [settings.number(f"rope.scaling.yarn_beta_{name}") for name in ("fast", "slow")]
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": trained or settings.size("context_length"),
            "attention_factor": magnitude,
            "beta_fast": betas[0] or 32.0,
            "beta_slow": betas[1] or 1.0,
        }
    for name in ("yarn_beta_fast", "yarn_beta_slow"):
        if settings.get(f"rope.scaling.{name}") is not None:
            settings.notes.append(f"rope.scaling.{name} is given but rope.scaling.type is {kind}: it has no effect.")
    if kind in (None, "linear") and factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "default"}


def _product(settings: ConfigBuilder) -> float:
    factors = [settings.number(f"rope.scaling.{name}") for name in ("attn_factor", "yarn_attn_factor")]
    product = math.prod(factor for factor in factors if factor)
    if product <= 0:
        raise settings.refuse("rope.scaling.attn_factor", "expected a number above 0.")
    return product


def _width(settings: ConfigBuilder, plain: dict[str, Any], nested: bool) -> None:
    """Sets the number of rotated values of a head."""
    heads, hidden = settings.size("attention.head_count"), settings.size("embedding_length")
    assert heads is not None and hidden is not None
    size = settings.size("attention.key_length") or hidden // heads
    width = settings.size("rope.dimension_count") or size  # the specification's default
    if settings.size("rope.dimension_count_swa") not in (None, size):
        raise settings.refuse("rope.dimension_count_swa", f"expected {size}, all values of a head.")
    sections = settings.fields["rope_parameters"]
    if not nested and ("partial_rotary_factor" in plain or "partial_rotary_factor" in sections):
        sections["partial_rotary_factor"] = width / size
    elif "rotary_dim" in settings.fields:
        settings.fields["rotary_dim"] = width
    elif width != size:
        raise settings.refuse("rope.dimension_count", f"expected {size}: this model rotates all values of a head.")


def _rotary(settings: ConfigBuilder, names: list[str], nested: bool) -> RotaryScaling | None:
    """Scaling by tensors of factors, which must be equal in all layers, as llama.cpp writes them."""
    kinds = {next(kind for kind in TENSORS if name.endswith(kind)) for name in names}
    kind = settings.get("rope.scaling.type")
    scale = _product(settings) if kind != "yarn" else 1.0
    if kind == "longrope" and kinds != {SHORT, LONG}:
        raise settings.refuse("rope.scaling.type", f"it needs the tensors {SHORT} and {LONG}.")
    if not kinds:
        return None if scale == 1.0 else RotaryScaling(None, scale)
    if nested:
        raise ExportError(f"{settings.model.name} has {names[0]} and two kinds of RoPE layers; expected one. {EDIT}")
    trained, context = settings.size("rope.scaling.original_context_length"), settings.size("context_length")
    if FREQUENCIES in kinds:
        if len(kinds) > 1:
            raise ExportError(f"{settings.model.name} has both {FREQUENCIES} and rope_factors; expected one. {EDIT}")
        chosen = FREQUENCIES
    else:
        chosen = SHORT
        if trained is None or context is None:
            raise ExportError(
                f"{settings.model.name} has {names[0]} but no {settings.model.architecture}.rope.scaling."
                f"original_context_length, beyond which the long factors apply. {EDIT}"
            )
        if context > trained:
            _limit(settings, trained, context)
    found = [read_tensor(settings, name) for name in names if name.endswith(chosen)]
    width = _rotated(settings) // 2
    for factors in found:
        if factors.shape != (width,) or not np.array_equal(factors, found[0]) or not (factors > 0).all():
            raise ExportError(
                f"{settings.model.name}: {chosen} has the shape {list(factors.shape)}; expected {width} numbers above "
                "0, the same for all layers."
            )
    return RotaryScaling(found[0], scale)


def _limit(settings: ConfigBuilder, trained: int, context: int) -> None:
    name = next(n for n in ("max_position_embeddings", "n_positions") if n in settings.defaults)
    settings.fields[name] = trained
    if "original_max_position_embeddings" in settings.defaults:
        settings.fields["original_max_position_embeddings"] = trained
    settings.notes.append(
        f"The file has other RoPE factors for texts longer than {trained} tokens ({LONG}). A graph has one set: the "
        f"bundle has the short ones, and its limit is {trained} tokens, not {context}."
    )


def _rotated(settings: ConfigBuilder) -> int:
    heads, hidden = settings.size("attention.head_count"), settings.size("embedding_length")
    assert heads is not None and hidden is not None
    return settings.size("rope.dimension_count") or settings.size("attention.key_length") or hidden // heads


def read_tensor(settings: ConfigBuilder, name: str) -> F32:
    """The values of a tensor of the file, float32.

    Raises:
        ExportError: the file has no such tensor.
    """
    for shard in settings.model.shards:
        for tensor in gguf.GGUFReader(shard.path).tensors:
            if tensor.name == name:
                return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    raise ExportError(f"{settings.model.name} has no tensor {name}.")


def apply(module: torch.nn.Module, rotary: RotaryScaling, name: str) -> None:
    """Applies the scaling to the module's rotary embeddings, in place.

    Raises:
        ExportError: the module has no rotary frequencies, or another number of them.
    """
    done = 0
    for part in module.modules():
        frequencies = getattr(part, "inv_freq", None)
        if not isinstance(frequencies, torch.Tensor):
            continue
        if rotary.factors is not None:
            if len(frequencies) != len(rotary.factors):
                raise ExportError(f"{name} has {len(rotary.factors)} RoPE factors; expected {len(frequencies)}.")
            with torch.no_grad():
                frequencies.div_(torch.from_numpy(rotary.factors.astype(np.float32)))
            part.original_inv_freq = frequencies.clone()
        if rotary.scale != 1.0:
            if not hasattr(part, "attention_scaling"):
                raise ExportError(f"{name}: rope.scaling.attn_factor is {rotary.scale}; expected 1 for this model.")
            part.attention_scaling = float(part.attention_scaling) * rotary.scale  # type: ignore[arg-type, assignment]
        done += 1
    if not done:
        raise ExportError(f"{name} has RoPE factors, but the model has no rotary frequencies.")
