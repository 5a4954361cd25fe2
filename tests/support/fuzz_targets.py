"""Fuzz targets: functions of bytes that may raise edgeformer's own errors and nothing else.

`tests/robustness/test_fuzz_targets.py` replays the seeds and the inputs in `tests/robustness/crashes/TARGET/`;
`python -m support.fuzz TARGET` runs one under atheris.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from edgeformer.errors import EdgeformerError

Target = Callable[[bytes], None]
LARGEST = 1 << 20  # bytes of an input


@cache
def folder() -> Path:
    """A folder with the bundle `lm`, an input file and a GGUF file; it lives as long as the process."""
    from support import gguf_files, tiny

    place = Path(tempfile.mkdtemp(prefix="edgeformer-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    tiny.write_lm(place / "lm")
    shutil.copytree(place / "lm", place / "work")
    gguf_files.write(place / "whole.gguf", gguf_files.keys(), gguf_files.tensors())
    return place


def bundle_file(name: str) -> Target:
    """The bundle with this content of one file; the other files and the manifest's hashes fit."""

    def run(data: bytes) -> None:
        from support.damage import renew

        from edgeformer.bundle.bundle import Bundle
        from edgeformer.engines.native.program.lowering import lower_bundle
        from edgeformer.engines.reference import read_reference
        from edgeformer.processing.tokenizer import Tokenizer

        work = folder() / "work"
        (work / name).write_bytes(data)
        try:
            renew(work)
            bundle = Bundle.open(work)
            if name == "model.onnx":
                lower_bundle(work / name)
            elif name == "reference.npz":
                read_reference(bundle)
            elif name.startswith("tokenizer"):
                tokenizer = Tokenizer.of(bundle)
                if tokenizer is not None:
                    tokenizer.decode(tokenizer.encode("The quick\n brown 🙂 <|im_end|>"))
                    tokenizer.encode_chat([{"role": "user", "content": "x"}])
            else:
                from edgeformer.decoding.generation_config import GenerationConfig, file_settings

                GenerationConfig.of(file_settings(bundle), None, bundle.vocab_size)
        finally:
            for path in (name, "edgeformer.json"):
                shutil.copyfile(folder() / "lm" / path, work / path)

    return run


def gguf(data: bytes) -> None:
    """A GGUF file: header, tokenizer, and the values of its tensors."""
    from edgeformer.export.sources.gguf.gguf_tokenizer import read_gguf_tokenizer
    from edgeformer.export.sources.gguf.shards import open_gguf
    from edgeformer.export.sources.gguf.tensors import check_types, tensor_values

    path = folder() / "input.gguf"
    path.write_bytes(data)
    model = open_gguf(path)
    check_types(model)
    read_gguf_tokenizer(model)
    for _ in tensor_values(model):
        pass


def safetensors(data: bytes) -> None:
    """A checkpoint file."""
    from edgeformer.export.sources.checkpoint_files import read_headers, read_object

    path = folder() / "input.safetensors"
    path.write_bytes(data)
    read_headers(path)
    read_object(path)


def adapter(data: bytes) -> None:
    """A LoRA adapter: the first line is adapter_config.json, the rest its weights."""
    from edgeformer.export.sources.adapters.adapter_folder import read_adapter

    place = folder() / "adapter"
    place.mkdir(exist_ok=True)
    config, _, weights = data.partition(b"\n")
    (place / "adapter_config.json").write_bytes(config)
    (place / "adapter_model.safetensors").write_bytes(weights)
    read_adapter(place)


def template(data: bytes) -> None:
    """A chat template, rendered with messages."""
    from edgeformer.processing.chat_template import ChatTemplate

    text = data.decode("utf-8", "replace")
    made = ChatTemplate(text)
    made.render({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True, "bos_token": "<s>"})


def cache_entry(data: bytes) -> None:
    """Entries of the disk cache, small and mapped: a damaged one counts as missing."""
    import os

    from edgeformer import disk_cache

    place = folder() / "cache"
    place.mkdir(exist_ok=True)
    (place / "x").write_bytes(data)
    before = os.environ.get("EDGEFORMER_CACHE")
    os.environ["EDGEFORMER_CACHE"] = str(place)
    try:
        disk_cache.read("x")
        disk_cache.read_mapped("x")
    finally:
        os.environ["EDGEFORMER_CACHE"] = before or ""


def request(data: bytes) -> None:
    """Bodies of all routes of the server: what msgspec takes must become a call, or be refused."""
    import msgspec

    from edgeformer.server.app import GROUPS

    for body in {one.body for group in GROUPS for one in group.ENDPOINTS if one.body is not None}:
        try:
            msgspec.json.decode(data, type=body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def generation(data: bytes) -> None:
    """Settings of a generation."""
    from edgeformer.decoding.generation_config import GenerationConfig

    try:
        settings = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(settings, dict):
        GenerationConfig.of(settings, None, 320)


TARGETS: dict[str, Target] = {
    "manifest": bundle_file("edgeformer.json"),
    "graph": bundle_file("model.onnx"),
    "reference": bundle_file("reference.npz"),
    "tokenizer": bundle_file("tokenizer.json"),
    "tokenizer_config": bundle_file("tokenizer_config.json"),
    "generation_config": bundle_file("generation_config.json"),
    "gguf": gguf,
    "safetensors": safetensors,
    "adapter": adapter,
    "template": template,
    "cache_entry": cache_entry,
    "request": request,
    "generation": generation,
}
NEED_TORCH = ("gguf", "safetensors", "adapter")


def seeds(name: str) -> list[bytes]:
    """Valid inputs of a target."""
    import hashlib

    import numpy as np

    place = folder()
    files = {"manifest": "edgeformer.json", "graph": "model.onnx", "reference": "reference.npz"}
    if name in ("tokenizer", "tokenizer_config", "generation_config"):
        files[name] = f"{name}.json"
    if name in files:
        return [(place / "lm" / files[name]).read_bytes()]
    if name == "gguf":
        return [(place / "whole.gguf").read_bytes()]
    if name in ("safetensors", "adapter"):
        from safetensors.numpy import save

        weights = save({"base_model.model.x.lora_A.weight": np.zeros((2, 4), np.float32)})
        config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x"]}).encode()
        return [weights if name == "safetensors" else config + b"\n" + weights]
    if name == "template":
        from support import tiny

        return [tiny.TEMPLATE.encode(), b"{% set n = namespace(x=1) %}{{ n.x ~ messages[0]['content'] | tojson }}"]
    if name == "cache_entry":
        return [hashlib.sha256(b"abc").digest() + b"abc"]
    if name == "generation":
        return [b'{"temperature": 0.7, "top_p": 0.9, "eos_token_id": [0, 2], "stop_strings": ["x"], "num_beams": 1}']
    chat = b'{"model": "lm", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.5}'
    return [chat, b'{"model": "lm", "prompt": "hi", "stop": ["x"], "logit_bias": {"5": 1}}']


def run(target: Target, data: bytes) -> str:
    """The class of edgeformer's error, or "ok". Any other exception is a finding."""
    if len(data) > LARGEST:
        return "too large"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target(data)
        except EdgeformerError as error:
            return type(error).__name__
    return "ok"
