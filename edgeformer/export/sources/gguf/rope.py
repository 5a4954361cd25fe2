"""Rotary positions of a GGUF file: base, rotated width, scaling by metadata, and scaling by tensors of factors.

llama.cpp's reader is the definition: a factor without a type is linear scaling; `rope_freqs.weight` divides the
frequencies; `rope_factors_short` does so up to the trained length, `rope_factors_long` beyond it.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import torch

from edgeformer.errors import ExportError
from edgeformer.export.blocks import F32
from edgeformer.export.sources.gguf.config_builder import ConfigBuilder, RotaryScaling

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (FREQUENCIES, SHORT, LONG)
BASE = 10000.0  # llama.cpp's, where a file does not say it


def set_rope(settings: ConfigBuilder) -> None:
    """Sets `rope_parameters`, and `settings.rotary` for what goes beyond them.

    Raises:
        ExportError: the file's scaling is of a kind that transformers cannot express.
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
                raise settings.refuse(short, "this structure has no rotary positions.")
        if names:
            raise ExportError(f"{settings.model.name} has {names[0]}, but its structure has no rotary positions.")
        return
    base = _base(settings)
    scaling = _scaling(settings)
    nested = "full_attention" in plain
    if nested:
        swa = settings.number("rope.freq_base_swa") or plain["sliding_attention"]["rope_theta"]
        # llama.cpp scales the layers without a window alone
        settings.fields["rope_parameters"] = {
            "full_attention": {"rope_theta": base} | scaling,
            "sliding_attention": {"rope_theta": swa, "rope_type": "default"},
        }
    else:
        if settings.number("rope.freq_base_swa") not in (None, base):
            raise settings.refuse("rope.freq_base_swa", f"the config has one base for all layers, and it is {base}.")
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
        raise settings.refuse("rope.dimension_sections", "positions of several axes cannot be expressed here.")
    settings.rotary = _rotary(settings, names, nested)


def _base(settings: ConfigBuilder) -> float:
    base = settings.number("rope.freq_base")
    if base is None:
        settings.notes.append(f"The file does not say rope.freq_base; it is {BASE:g}, as llama.cpp takes it.")
        return BASE
    if base <= 0:
        raise settings.refuse("rope.freq_base", "expected a number above 0.")
    return base


def _scaling(settings: ConfigBuilder) -> dict[str, Any]:
    """The part of `rope_parameters` that is about scaling."""
    kind = settings.get("rope.scaling.type")
    key = "rope.scaling.factor" if settings.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = settings.number(key) or 1.0  # 0 says that there is none
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise settings.refuse("rope.scaling.type", "known are none, linear, yarn and longrope.")
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
    """How many values of a head are rotated."""
    heads, hidden = settings.size("attention.head_count"), settings.size("embedding_length")
    assert heads is not None and hidden is not None
    size = settings.size("attention.key_length") or hidden // heads
    width = settings.size("rope.dimension_count") or size  # the specification's default
    if settings.size("rope.dimension_count_swa") not in (None, size):
        raise settings.refuse("rope.dimension_count_swa", f"heads have {size} values, and all of them are rotated.")
    sections = settings.fields["rope_parameters"]
    if not nested and ("partial_rotary_factor" in plain or "partial_rotary_factor" in sections):
        sections["partial_rotary_factor"] = width / size
    elif "rotary_dim" in settings.fields:
        settings.fields["rotary_dim"] = width
    elif width != size:
        raise settings.refuse("rope.dimension_count", f"heads have {size} values, and this structure rotates all.")


def _rotary(settings: ConfigBuilder, names: list[str], nested: bool) -> RotaryScaling | None:
    """The tensors of factors; the same for all layers, as llama.cpp writes them, or refused."""
    kinds = {next(kind for kind in TENSORS if name.endswith(kind)) for name in names}
    kind = settings.get("rope.scaling.type")
    scale = _product(settings) if kind != "yarn" else 1.0
    if kind == "longrope" and kinds != {SHORT, LONG}:
        raise settings.refuse("rope.scaling.type", f"it needs the tensors {SHORT} and {LONG}.")
    if not kinds:
        return None if scale == 1.0 else RotaryScaling(None, scale)
    if nested:
        raise ExportError(f"{settings.model.name} has {names[0]}, and layers with rotary positions of two kinds.")
    trained, context = settings.size("rope.scaling.original_context_length"), settings.size("context_length")
    if FREQUENCIES in kinds:
        if len(kinds) > 1:
            raise ExportError(f"{settings.model.name} has both {FREQUENCIES} and rope_factors: one of them is meant.")
        chosen = FREQUENCIES
    else:
        chosen = SHORT
        if trained is None or context is None:
            raise ExportError(
                f"{settings.model.name} has {names[0]} but does not say {settings.model.architecture}.rope.scaling."
                "original_context_length, beyond which the long factors hold."
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
        f"The file has other rotary factors for texts longer than {trained} tokens ({LONG}). A graph has one set: the "
        f"bundle has the short ones, and its limit is {trained} tokens, not {context}."
    )


def _rotated(settings: ConfigBuilder) -> int:
    heads, hidden = settings.size("attention.head_count"), settings.size("embedding_length")
    assert heads is not None and hidden is not None
    return settings.size("rope.dimension_count") or settings.size("attention.key_length") or hidden // heads


def read_tensor(settings: ConfigBuilder, name: str) -> F32:
    """The values of a tensor of the file, float32."""
    for shard in settings.model.shards:
        for tensor in gguf.GGUFReader(shard.path).tensors:
            if tensor.name == name:
                return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    raise ExportError(f"{settings.model.name} has no tensor {name}.")


def apply(module: torch.nn.Module, rotary: RotaryScaling, name: str) -> None:
    """Gives the module's rotary parts the file's frequencies, in place.

    Raises:
        ExportError: the module has none whose frequencies can be set.
    """
    done = 0
    for part in module.modules():
        frequencies = getattr(part, "inv_freq", None)
        if not isinstance(frequencies, torch.Tensor):
            continue
        if rotary.factors is not None:
            if len(frequencies) != len(rotary.factors):
                raise ExportError(f"{name}: {len(rotary.factors)} rotary factors for {len(frequencies)} frequencies.")
            with torch.no_grad():
                frequencies.div_(torch.from_numpy(rotary.factors.astype(np.float32)))
            part.original_inv_freq = frequencies.clone()
        if rotary.scale != 1.0:
            if not hasattr(part, "attention_scaling"):
                raise ExportError(f"{name}: rope.scaling.attn_factor {rotary.scale} cannot be expressed.")
            part.attention_scaling = float(part.attention_scaling) * rotary.scale  # type: ignore[arg-type, assignment]
        done += 1
    if not done:
        raise ExportError(f"{name}: the model has no rotary frequencies that the file's factors could divide.")
