"""Models of well-known shapes with random weights, made here from a seed: what speed needs of a model, and no download.

Each is a Hugging Face folder in float16, and for llama.cpp a GGUF with the same numbers. Tensors are drawn and written
one by one, so a model needs little more memory than its largest matrix. What they say is noise: they measure cost only.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import models

SEED = 20_240_917
DEVIATION = 0.02  # of every matrix, as the models' own initializers have it
LIKE_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True)
class Shape:
    """A model's config; `name` is what tables call it, `parameters` what its matrices hold, in billions."""

    name: str
    of: str
    parameters: float
    config: dict[str, Any]

    @property
    def root(self) -> Path:
        return models.OUT / "sizes" / self.name


SHAPES = (
    Shape(
        "0.5B",
        "Qwen2.5-0.5B",
        0.494,
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
        },
    ),
    Shape(
        "1B",
        "Llama-3.2-1B",
        1.236,
        LIKE_LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
        },
    ),
    Shape(
        "3B",
        "Llama-3.2-3B",
        3.213,
        LIKE_LLAMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
        },
    ),
)
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's or Qwen2's weights; the head is the embedding."""
    d, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim", d // heads)
    q, kv = heads * size, config["num_key_value_heads"] * size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (rows, d)
            if config["model_type"] == "qwen2":
                found[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        found[f"{layer}self_attn.o_proj.weight"] = (d, q)
        found[f"{layer}mlp.gate_proj.weight"] = found[f"{layer}mlp.up_proj.weight"] = (inner, d)
        found[f"{layer}mlp.down_proj.weight"] = (d, inner)
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (d,)
    return found | {"model.norm.weight": (d,)}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float16]]:
    """The tensor `name`: norms are 1, the rest is normal. It depends on its name and shape alone."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float16)
    generator, rows = np.random.default_rng([SEED, zlib.crc32(name.encode())]), shape[0]
    out, step = np.empty(shape, np.float16), 4096  # a part at a time: the draws are float32
    for start in range(0, rows, step):
        part = (min(step, rows - start), *shape[1:])
        out[start : start + step] = generator.standard_normal(part, np.float32) * DEVIATION
    return out


def write_safetensors(path: Path, config: dict[str, Any]) -> None:
    """All tensors of `config` in one file, one after the other (https://huggingface.co/docs/safetensors)."""
    shapes, header, at = tensors(config), {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(drawn(name, shape).tobytes())


def float_folder(shape: Shape) -> Path:
    """The Hugging Face folder, with SmolLM2's tokenizer: converters want one, and ids below its size exist here too."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(COMMON | shape.config, indent=1))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(models.float_folder() / name, folder / name)
        write_safetensors(folder / "model.safetensors", shape.config)

    return models.write_whole(shape.root / "float", make)


def float_gguf(shape: Shape) -> Path:
    """The same numbers for llama.cpp: a float16 GGUF without a tokenizer."""
    return models.write_whole(shape.root / "llama.cpp" / "F16.gguf", lambda file: write_gguf(file, shape.config))


def write_gguf(path: Path, config: dict[str, Any]) -> None:
    """A GGUF of `config`: float16 matrices, float32 vectors."""
    import gguf

    arch, heads, layers = config["model_type"], config["num_attention_heads"], config["num_hidden_layers"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(COMMON["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)

    def converted() -> Iterator[tuple[str, tuple[int, ...], Any]]:
        for name, shape in tensors(config).items():
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise ValueError(f"gguf knows no name for {name} of {arch}")
            yield found, shape, name

    for found, shape, _ in converted():
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(found, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, name in converted():
        tensor = drawn(name, shape)
        turned = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2], 0)
        if turned and arch == "llama":
            tensor = adjacent_pairs(tensor, turned)
        writer.write_tensor_data(tensor if tensor.ndim > 1 else tensor.astype(np.float32))
    writer.close()


def adjacent_pairs(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a head from Hugging Face's order (halves turn together) to llama.cpp's of `llama` (neighbours do)."""
    rows = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(matrix.shape))
