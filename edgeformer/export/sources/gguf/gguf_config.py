"""A transformers config from the metadata of a GGUF file: every key is set, ignored for a reason, or stops the export.

transformers' own reader omits keys that its mapping does not have (attention scales, softcaps, RoPE scaling, expert
sizes, ...), so the config class's defaults, which belong to another model, would be used. This module sets every field
from the file instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf import keys, rope
from edgeformer.export.sources.gguf.config_builder import EDIT, ConfigBuilder, shown_value
from edgeformer.export.sources.gguf.keys import Setting
from edgeformer.export.sources.gguf.shards import GgufFile


def build_config(model: GgufFile, started: Mapping[str, Any], config_class: Any) -> ConfigBuilder:
    """The config of `model`, starting from the fields `started` of transformers' reader.

    Raises:
        ExportError: a size is missing, or a key is unsupported; the message names it.
    """
    own = {f.name for f in dataclasses.fields(config_class)}
    plain = config_class()
    defaults = {name: getattr(plain, name, None) for name in {*own, *config_class.attribute_map}}
    settings = ConfigBuilder(model, dict(started), defaults)
    _required(settings)
    _optional(settings)
    _only_neutral(settings)
    _experts(settings)
    _attention_scale(settings)
    _window(settings)
    rope.set_rope(settings)
    _biases(settings)
    settings.fields["tie_word_embeddings"] = "output.weight" not in model.tensors
    _nothing_unread(settings)
    return settings


def _required(settings: ConfigBuilder) -> None:
    absent = [key for key in (*keys.REQUIRED,) if settings.get(key) is None]
    if not any(settings.get(key) is not None for key in keys.EPSILONS):
        absent.append(f"{keys.EPSILONS[0]} (or {keys.EPSILONS[1].rpartition('.')[2]})")
    if absent:
        arch = settings.model.architecture
        raise ExportError(
            f"{settings.model.name} has no {', '.join(f'{arch}.{key}' for key in absent)}; expected all sizes, which "
            f"have no default. {EDIT}"
        )
    extra = settings.size("nextn_predict_layers") if settings.get("nextn_predict_layers") else 0
    if extra and settings.fields.get("num_hidden_layers") != settings.size("block_count") - extra:  # type: ignore[operator]
        raise settings.refuse("nextn_predict_layers", "transformers does not know which layers these are.")
    for key, setting in keys.REQUIRED.items():
        value = settings.checked(key, setting) - (extra if key == "block_count" and extra else 0)
        name = settings.field(setting.fields)
        if name is not None:
            settings.fields[name] = value
        elif key != "context_length":  # a model without learned positions has no limit
            raise settings.refuse(key, "the model's config has no field for it.")
    if extra:
        settings.notes.append(f"{extra} layers for multi-token prediction are not exported: no logit depends on them.")
    for key in keys.EPSILONS:
        if settings.get(key) is not None:
            name = settings.field(keys.EPSILON_FIELDS)
            if name is None:
                raise settings.refuse(key, "the model's config has no field for it.")
            settings.fields[name] = settings.checked(key, Setting(()))
    _vocabulary(settings)
    _feed_forward(settings)
    _heads(settings)


def _vocabulary(settings: ConfigBuilder) -> None:
    tokens = settings.model.metadata.get("tokenizer.ggml.tokens")
    count = settings.size("vocab_size")
    if count is None and not isinstance(tokens, list):
        raise ExportError(
            f"{settings.model.name} has neither {settings.model.architecture}.vocab_size nor tokenizer.ggml.tokens; "
            f"expected one, since a size has no default. {EDIT}"
        )
    table = settings.model.tensors.get("token_embd.weight")
    rows = table.shape[0] if table is not None else None
    found = {"vocab_size": count, "tokens": len(tokens) if isinstance(tokens, list) else None, "token_embd": rows}
    if (rows is not None and (count or rows) != rows) or (found["tokens"] or 0) > (rows or count or 0):
        raise ExportError(
            f"{settings.model.name} has different sizes of the vocabulary: vocab_size {count}, {found['tokens']} "
            f"tokens, {rows} rows of token_embd.weight. {EDIT}"
        )
    settings.fields["vocab_size"] = rows or count or found["tokens"]


def _feed_forward(settings: ConfigBuilder) -> None:
    key, setting = "feed_forward_length", keys.FEED_FORWARD
    name = settings.field(setting.fields)
    dense = any(".ffn_up.weight" in tensor or ".ffn_gate.weight" in tensor for tensor in settings.model.tensors)
    if settings.get(key) is None:
        if name is not None and dense:
            raise ExportError(
                f"{settings.model.name} has no {settings.model.architecture}.{key}; expected it, since a size has no "
                f"default. {EDIT}"
            )
    elif name is not None:
        settings.fields[name] = settings.checked(key, setting)
    elif settings.checked(key, setting) != 4 * settings.size("embedding_length"):  # type: ignore[operator]
        raise settings.refuse(key, "the model's config has no field for it and uses four times the hidden size.")


def _heads(settings: ConfigBuilder) -> None:
    heads, hidden = settings.size("attention.head_count"), settings.size("embedding_length")
    assert heads is not None and hidden is not None
    kv = settings.get("attention.head_count_kv")
    mixed = isinstance(kv, list)  # 0 for layers without attention, which transformers' reader handles
    if mixed and not settings.fields.get("layer_types"):
        raise settings.refuse("attention.head_count_kv", "expected the same number for all layers.")
    groups = heads if kv is None or mixed else settings.size("attention.head_count_kv")  # the specification's default
    name = settings.field(keys.KV_HEADS.fields)
    if name is not None and not mixed:
        settings.fields[name] = groups
    elif groups != heads:
        why = f"the model's config has no field for it; expected {heads}, the number of heads."
        raise settings.refuse("attention.head_count_kv", why)
    size = settings.size("attention.key_length")
    if size is None:
        if hidden % heads:
            raise settings.refuse("attention.head_count", f"it does not divide embedding_length {hidden}.")
        size = hidden // heads
    if settings.size("attention.value_length") not in (None, size):
        raise settings.refuse("attention.value_length", f"the model's config has one size for both; keys have {size}.")
    for key in ("attention.key_length_swa", "attention.value_length_swa"):
        if settings.size(key) not in (None, size):
            raise settings.refuse(key, f"expected {size}, the head size of the other layers.")
    # Set even where the class computes the same: some classes have another default.
    if "head_dim" in settings.defaults or size != hidden // heads or hidden % heads:
        settings.fields["head_dim"] = size
    settings.fields.pop("global_head_dim", None)


def _optional(settings: ConfigBuilder) -> None:
    for key, setting in keys.OPTIONAL.items():
        name = settings.field(setting.fields)
        if settings.get(key) is None:
            default = settings.defaults.get(name) if name else None
            mixture = key.startswith(("expert_", "leading", "moe_"))
            if name is None or name in settings.fields or default in (None, False, *setting.neutral):
                continue
            if (mixture and not _is_mixture(settings)) or key in ("moe_every_n_layers", "expert_weights_norm"):
                continue
            raise ExportError(
                f"{settings.model.name} has no {settings.model.architecture}.{key}; the config class's default is "
                f"{default!r}, another model's value. {EDIT}"
            )
        value = settings.checked(key, setting)
        if name is None:
            if value not in setting.neutral:
                raise settings.refuse(key, f"{settings.fields['model_type']} in transformers has no field for it.")
        elif value or setting.kind is bool:
            settings.fields[name] = value
        elif setting.kind is float:  # in llama.cpp 0 means no cap or no factor
            settings.fields[name] = None if "softcapping" in key else 1.0
        elif not key.startswith("expert_"):
            settings.fields[name] = value


def _is_mixture(settings: ConfigBuilder) -> bool:
    return any("_exps." in name for name in settings.model.tensors)


def _experts(settings: ConfigBuilder) -> None:
    count = settings.get("expert_count")
    if _is_mixture(settings) and not count:
        raise ExportError(
            f"{settings.model.name} has expert tensors but no {settings.model.architecture}.expert_count. {EDIT}"
        )
    gating = settings.get("expert_gating_func")
    if gating is not None:
        sigmoid = "scoring_func" in settings.defaults or "scoring_func" in settings.fields
        if sigmoid and gating in (1, 2):
            settings.fields["scoring_func"] = {1: "softmax", 2: "sigmoid"}[gating]
        elif not (gating == 1 and "norm_topk_prob" in settings.defaults) and (gating != 0 or count):
            raise settings.refuse(
                "expert_gating_func", "expected 1 (softmax) or, if the config has a field for it, 2 (sigmoid)."
            )
    inner = settings.get("ssm.inner_size")
    if inner is not None:
        heads, each = settings.fields.get("linear_num_value_heads"), settings.fields.get("linear_value_head_dim")
        if not (heads and each and heads * each == inner) and settings.fields.get("intermediate_size") != inner:
            raise settings.refuse("ssm.inner_size", "the model's config has no field for it.")


def _only_neutral(settings: ConfigBuilder) -> None:
    for key, neutral in keys.ONLY_NEUTRAL.items():
        value = settings.get(key)
        if value is not None and value not in neutral:
            expected = f"; expected {' or '.join(map(repr, neutral))}" if neutral else ""
            raise settings.refuse(key, f"{settings.fields['model_type']} in transformers does not have it{expected}.")


def _attention_scale(settings: ConfigBuilder) -> None:
    """Sets the scale of attention scores: `attention.scale`, by default 1 / sqrt(key_length)."""
    scale = settings.number("attention.scale")
    size = settings.size("attention.key_length") or (
        settings.fields.get("head_dim") or settings.size("embedding_length") // settings.size("attention.head_count")  # type: ignore[operator]
    )
    if scale is not None and scale < 0:
        raise settings.refuse("attention.scale", "expected a number above 0.")
    if "query_pre_attn_scalar" in settings.defaults:
        default = settings.defaults["query_pre_attn_scalar"]
        if not scale and default != size:
            raise ExportError(
                f"{settings.model.name} has no {settings.model.architecture}.attention.scale. Its heads have {size} "
                f"values, the config class's default is for {default}, and models of this kind differ. {EDIT}"
            )
        scalar = scale**-2 if scale else default
        whole = round(scalar)
        if not math.isclose(whole, scalar, rel_tol=1e-5):  # the field is an int
            raise settings.refuse(
                "attention.scale", f"it is 1 / sqrt({scalar:.6g}); the config expects a whole number there."
            )
        settings.fields["query_pre_attn_scalar"] = whole
    elif "attention_multiplier" in settings.defaults:
        settings.fields["attention_multiplier"] = scale or size**-0.5
    elif scale and not math.isclose(scale, size**-0.5, rel_tol=1e-5):
        raise settings.refuse("attention.scale", f"{settings.fields['model_type']} scales by 1 / sqrt({size}).")


def _window(settings: ConfigBuilder) -> None:
    window, pattern = settings.get("attention.sliding_window"), settings.get("attention.sliding_window_pattern")
    context = settings.size("context_length")
    if window is not None and (type(window) is not int or window < 0):
        raise settings.refuse("attention.sliding_window", "expected a whole number.")
    kinds = settings.defaults.get("layer_types")
    mixes = isinstance(kinds, list) and "sliding_attention" in kinds
    if "sliding_window" not in settings.defaults or settings.defaults.get("use_sliding_window") is not None:
        if window and context and window < context:
            raise settings.refuse("attention.sliding_window", "transformers and llama.cpp have none for this model.")
        settings.fields.pop("sliding_window", None)
    elif mixes and not window:
        raise ExportError(
            f"{settings.model.name} has no {settings.model.architecture}.attention.sliding_window; expected it, since "
            f"some layers of this architecture have one and a size has no default. {EDIT}"
        )
    else:
        settings.fields["sliding_window"] = window or None
    if pattern is not None:
        _pattern(settings, mixes)


def _pattern(settings: ConfigBuilder, mixes: bool) -> None:
    key, layers = "attention.sliding_window_pattern", settings.fields.get("num_hidden_layers")
    raw = settings.model.metadata[f"{settings.model.architecture}.{key}"]
    assert isinstance(layers, int)
    if isinstance(raw, list) and len(raw) == layers and all(type(one) in (bool, int) for one in raw):
        slides = [bool(one) for one in raw]
    elif type(raw) is int and raw > 0:
        slides = [layer % raw < raw - 1 for layer in range(layers)]
    else:
        raise settings.refuse(key, f"expected a whole number, or 0 or 1 for each of {layers} layers.")
    if mixes:
        settings.fields["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    elif len(set(slides)) > 1 and settings.fields.get("sliding_window"):
        raise settings.refuse(key, f"{settings.fields['model_type']} has one window for all layers.")
    elif not any(slides):
        settings.fields["sliding_window"] = None


def _biases(settings: ConfigBuilder) -> None:
    """Sets the flags of the config class for biases and norms from the names of the tensors."""
    names = settings.model.tensors
    for flag, tensors in (
        ("attention_bias", ("attn_q.bias", "attn_qkv.bias")),
        ("qkv_bias", ("attn_q.bias", "attn_qkv.bias")),
        ("use_qkv_bias", ("attn_q.bias", "attn_qkv.bias")),
        ("mlp_bias", ("ffn_up.bias",)),
        ("qk_layernorm", ("attn_q_norm.weight",)),
    ):
        if flag in settings.defaults:
            settings.fields[flag] = any(name.endswith(tensors) for name in names)


def _nothing_unread(settings: ConfigBuilder) -> None:
    """Raises ExportError for a key of the model that is in no table."""
    prefix = f"{settings.model.architecture}."
    known = (
        keys.REQUIRED.keys() | keys.OPTIONAL.keys() | keys.ONLY_NEUTRAL.keys() | keys.SPECIAL | keys.IGNORED_KEYS.keys()
    )
    unknown = [key for key in settings.model.metadata if key.startswith(prefix) and key[len(prefix) :] not in known]
    if unknown:
        key = unknown[0]
        raise ExportError(
            f"{settings.model.name}: {key} is {shown_value(settings.model.metadata[key])}; this key is unknown and may "
            f"change results. {EDIT}"
        )
