"""Tiny GGUF files of several architectures, written with the gguf package, for tests and the sweep."""

from __future__ import annotations

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, LAYERS, HEADS, GROUPS, INNER, CONTEXT = 32, 2, 4, 2, 64, 256
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|bos|>", "<|end|>", "<|eot|>", "<|eom|>"]
MERGES = ["t h", "Ġ th", "1 2", "12 3", "h e", "th e", "Ġ t"]
TOKENS = [*BYTES, *SPECIAL, *(merge.replace(" ", "") for merge in MERGES)]
BOS, END, EOT, EOM = range(256, 260)
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 256 + [3] * len(SPECIAL) + [1] * len(MERGES),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": np.uint32(BOS),
    "tokenizer.ggml.eos_token_id": np.uint32(END),
}
IDS = [BOS, *range(40, 76)]


def keys(arch="llama", **more):
    """The metadata of a tiny model of `arch`; `more` replaces keys (with `__` for dots), None removes one."""
    layer_norm = arch in ("stablelm", "starcoder2", "gpt2")
    found = {
        "general.type": "model",
        f"{arch}.context_length": CONTEXT,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": HEADS if arch == "gpt2" else GROUPS,
        f"{arch}.attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon": 1e-5,
    }
    if arch != "gpt2":
        found[f"{arch}.rope.freq_base"] = 10000.0
    if arch.startswith("gemma"):
        found |= {f"{arch}.attention.key_length": 8, f"{arch}.attention.value_length": 8}
        found |= {f"{arch}.attention.scale": 16**-0.5, f"{arch}.attention.sliding_window": 8}
    if arch == "gemma2":
        found |= {f"{arch}.attn_logit_softcapping": 2.0, f"{arch}.final_logit_softcapping": 3.0}
    if arch in ("qwen3", "qwen3moe"):
        found |= {f"{arch}.attention.key_length": 16, f"{arch}.attention.value_length": 16}
    if arch.endswith("moe"):
        found |= {f"{arch}.expert_count": 4, f"{arch}.expert_used_count": 2, f"{arch}.expert_feed_forward_length": 24}
    if arch == "qwen2moe":
        found[f"{arch}.expert_shared_feed_forward_length"] = 40
    if arch == "stablelm":
        found[f"{arch}.rope.dimension_count"] = 4
    for name, value in more.items():
        found[name.replace("__", ".").replace("ARCH", arch)] = value
    return BYTE_LEVEL | found


def tensors(arch="llama", seed=0, layers=LAYERS, size=None):
    """Random float32 tensors of `arch`, in PyTorch's order of axes."""
    rng = np.random.default_rng(seed)
    size = size or (16 if arch in ("qwen3", "qwen3moe") else 8)
    q, kv = HEADS * size, (HEADS if arch == "gpt2" else GROUPS) * size
    layer_norm = arch in ("stablelm", "starcoder2", "gpt2")
    found = {}

    def linear(name, rows, columns, bias=False):
        found[name + ".weight"] = rng.standard_normal((rows, columns)) * 1.5 * columns**-0.5
        if bias:
            found[name + ".bias"] = rng.standard_normal(rows) * 0.1

    def norm(name, width=HIDDEN):
        found[name + ".weight"] = 1 + rng.standard_normal(width) * 0.1
        if layer_norm:
            found[name + ".bias"] = rng.standard_normal(width) * 0.1

    found["token_embd.weight"] = rng.standard_normal((len(TOKENS), HIDDEN)) * (0.3 if arch[:5] == "gemma" else 1.0)
    if arch == "gpt2":
        found["position_embd.weight"] = rng.standard_normal((CONTEXT, HIDDEN)) * 0.3
    norm("output_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        norm(at + "attn_norm")
        bias = arch in ("qwen2", "qwen2moe", "starcoder2", "gpt2")
        if arch in ("phi3", "gpt2"):
            linear(at + "attn_qkv", q + 2 * kv, HIDDEN, bias)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(at + f"attn_{name}", rows, HIDDEN, bias)
        if arch in ("qwen3", "qwen3moe", "gemma3"):
            norm(at + "attn_q_norm", size), norm(at + "attn_k_norm", size)
        linear(at + "attn_output", HIDDEN, q, arch in ("starcoder2", "gpt2"))
        norm(at + "ffn_norm")
        if arch.startswith("gemma"):
            norm(at + "post_attention_norm"), norm(at + "post_ffw_norm")
        if arch.endswith("moe"):
            linear(at + "ffn_gate_inp", 4, HIDDEN)
            for name, shape in (("gate", (4, 24, HIDDEN)), ("up", (4, 24, HIDDEN)), ("down", (4, HIDDEN, 24))):
                found[at + f"ffn_{name}_exps.weight"] = rng.standard_normal(shape) * 0.2
        if arch == "qwen2moe":
            found[at + "ffn_gate_inp_shexp.weight"] = rng.standard_normal(HIDDEN)
            for name, shape in (("gate", (40, HIDDEN)), ("up", (40, HIDDEN)), ("down", (HIDDEN, 40))):
                linear(at + f"ffn_{name}_shexp", *shape)
        if not arch.endswith("moe"):
            plain = arch in ("starcoder2", "gpt2")
            if arch != "phi3" and not plain:
                linear(at + "ffn_gate", INNER, HIDDEN)
            linear(at + "ffn_up", INNER * (2 if arch == "phi3" else 1), HIDDEN, plain)
            linear(at + "ffn_down", HIDDEN, INNER, plain)
    if arch not in ("gemma2", "gemma3", "gpt2", "starcoder2"):
        linear("output", len(TOKENS), HIDDEN)
    return {name: value.astype(np.float32) for name, value in found.items()}


def write(path, metadata, values, arch="llama", kind=None, raw=()):
    """Writes a file with `metadata` (without keys that are None) and the tensors `values`; returns its path.

    `kind` is the type of all matrices, or {name: type} of some. `raw` has the types of values that are bytes already.
    """
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", arch))
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":  # the writer sets it
            writer.add_custom_alignment(value) if key == "general.alignment" else add(writer, key, value)
    for name, value in values.items():
        wanted = kind.get(name) if isinstance(kind, dict) else kind
        if name in raw:
            writer.add_tensor(name, value, raw_dtype=raw[name])
        elif wanted is None or value.ndim < 2:
            writer.add_tensor(name, value)
        else:
            wanted = gguf.GGMLQuantizationType[wanted]
            writer.add_tensor(name, gguf.quantize(value, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    """Writes `value` with the type that converters use: unsigned for integers of 0 or more, float32, ..."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, (int, np.integer)):
        writer.add_uint32(key, int(value)) if value >= 0 else writer.add_int32(key, int(value))
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, tuple):  # (value, type name)
        writer.add_key_value(key, value[0], kinds[value[1]])
    else:
        writer.add_array(key, value)


def split(folder, metadata, values, arch="llama", kind=None, count=2):
    """Writes the model as shards in the format of llama.cpp's gguf-split; returns their paths."""
    names, paths = list(values), []
    for number in range(count):
        part = {"split.no": (number, "UINT16"), "split.count": (count, "UINT16")}
        part["split.tensors.count"] = (len(names), "INT32")
        path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        chosen = {name: values[name] for name in names[number::count]}
        paths.append(write(path, (metadata if number == 0 else {}) | part, chosen, arch, kind))
    return paths
