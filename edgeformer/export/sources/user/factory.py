"""Sources of user-defined modules: a factory function that returns an nn.Module, or a folder of `edgeformer.train`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from edgeformer.errors import BundleError, ExportError
from edgeformer.export.inputs import Input
from edgeformer.export.options import ExportOptions
from edgeformer.export.source import TOKENIZER_FILES, EncoderDecoderSource, Source
from edgeformer.export.sources.checkpoint_files import read_headers
from edgeformer.export.sources.hub.hub_weights import LoadRules
from edgeformer.export.sources.memory_bounds import construction
from edgeformer.export.sources.tokenizer_export import NO_TOKENIZER, folder_files
from edgeformer.export.sources.user.user_encoder_decoder import has_encode_and_decode, user_encoder_decoder
from edgeformer.export.sources.user.user_weights import load_user_weights
from edgeformer.export.sources.user.wrappers import unwrap_module

_RULES = LoadRules()
_SPEC = re.compile(r"^(?P<name>\w+)=(?P<dtype>\w+)\[(?P<shape>[\w, ]*)\](?:<(?P<high>\d+))?$")
_TOKENS = {"input_ids": "int64[batch,sequence]", "position_ids": "int64[batch,sequence]"}
_SOURCE = {"input_ids": "int64[batch,source]", "attention_mask": "int64[batch,source]"}  # inputs of `encode`
_NO_SUCH = {  # names that torch.nn does not have -> what to write instead
    "TransformerLayer": " torch.nn has no TransformerLayer: write nn.TransformerEncoderLayer (with a causal mask it is "
    "a decoder without cross-attention).",
    "TransformerBlock": " torch.nn has no TransformerBlock: write nn.TransformerEncoderLayer.",
    "SelfAttention": " torch.nn has no SelfAttention: write nn.MultiheadAttention.",
}


def factory_source(options: ExportOptions, rules: LoadRules = _RULES) -> Source | EncoderDecoderSource:
    """The module that `package.module:factory` or `path/to/file.py:factory` returns, with `options.weights` loaded.

    Raises:
        ExportError: the factory does not exist, fails, or returns no nn.Module; an input has no declared shape; or the
            weights do not fit.
    """
    module = _call(options.source)
    rules.room(sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter)))
    module, removed = unwrap_module(module)
    record: dict[str, Any] = {}
    if options.weights is not None:
        record = load_user_weights(module, options.weights, rules.allow)
    elif rules.allow:
        raise ExportError("--allow-missing is for weights that are loaded; pass a checkpoint with --weights.")
    if removed:
        record["notes"] = [*record.get("notes", ()), removed]
    config = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}
    return _recorded(module_source(module, options, f"factory {Path(options.source).name}", config), record)


def _recorded(source: Source | EncoderDecoderSource, record: Mapping[str, Any]) -> Source | EncoderDecoderSource:
    """The source with the record of its load for the manifest; in an encoder-decoder the encoder has it."""
    if isinstance(source, EncoderDecoderSource):
        return dataclasses.replace(source, encoder=dataclasses.replace(source.encoder, completeness=record))
    return dataclasses.replace(source, completeness=record)


def checkpoint_source(folder: Path, rules: LoadRules = _RULES) -> Source | EncoderDecoderSource:
    """A checkpoint folder of `python -m edgeformer.train`.

    Raises:
        BundleError: the folder is damaged, or a weight is missing or unused.
        ExportError: config.json describes a larger model than the weights, or memory or disk are too small.
    """
    from edgeformer.models.checkpoint import find_factory, load_checkpoint, read_config

    record: dict[str, Any] = {}
    if (folder / "model.safetensors").is_file():
        elements = [math.prod(stored.shape) for stored in read_headers(folder / "model.safetensors").values()]
        rules.room(sum(elements))
        make, settings = find_factory(read_config(folder), folder), read_config(folder)
        guard = construction(sum(elements), len(elements), f"config.json of {folder}")
        # `load_checkpoint` reports other errors in the settings.
        with guard, torch.device("meta"), contextlib.suppress(TypeError, ValueError, KeyError):
            make(settings)
        record = {"tensors": len(elements), "missing": [], "unused": []}  # otherwise `load_checkpoint` raises
    module, config = load_checkpoint(folder)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        try:
            generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"{folder / 'generation_config.json'} is not JSON: {error}") from error
    options = ExportOptions(source=str(folder), output=folder)
    source = module_source(module, options, f"checkpoint {folder.name}", config, generation, files)
    return _recorded(source, record)


def module_source(
    module: torch.nn.Module,
    options: ExportOptions,
    origin: str,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Source | EncoderDecoderSource:
    """The source of any module.

    Its inputs are declared by `options.input`, else by `module.input_spec` (name -> "dtype[axes]"), else by the names
    `input_ids` and `position_ids`. `options.tokenizer` becomes part of the bundle. A module with the methods
    `encode(input_ids, attention_mask)` and `decode(input_ids, encoder_hidden_states, encoder_attention_mask)` becomes
    an EncoderDecoderSource.

    Raises:
        ExportError: an argument of forward has no declared shape, or `encode` and `decode` have other arguments.
    """
    if not isinstance(module, torch.nn.Module):
        raise ExportError(f"module is {module!r:.200}, expected a torch.nn.Module.")
    module, _ = unwrap_module(module)
    paired = has_encode_and_decode(module)
    config = dict(config or {})
    declared = dict(getattr(module, "input_spec", None) or {})
    declared |= dict(text.split("=", 1) for text in options.input if "=" in text)
    known = _SOURCE if paired else _TOKENS
    vocabulary = int(config.get("vocab_size") or _vocabulary(module))
    inputs = _inputs(module, "encode" if paired else "forward", declared, known, vocabulary)
    tokens = inputs[0].name == "input_ids"
    outputs = options.output_names or tuple(getattr(module, "output_names", ("logits",) if tokens else ("output",)))
    task = options.task or str(config.get("task") or _task(paired, tokens))
    source = Source(
        module=module.eval().float(),
        inputs=inputs,
        outputs=outputs,
        task=task,
        origin=origin,
        config=config,
        generation_config=generation_config or {},
        files={**(files or {}), **_tokenizer(options.tokenizer)},
    )
    return user_encoder_decoder(source) if paired else source


def _task(paired: bool, tokens: bool) -> str:
    return "text2text-generation" if paired else "text-generation" if tokens else "feature-extraction"


def _tokenizer(path: Path | None) -> dict[str, bytes]:
    """{name: content} of a tokenizer's files, from a folder or a tokenizer.json."""
    if path is None or path == NO_TOKENIZER:
        return {}
    if not path.is_file():
        return folder_files(path)
    found = {"tokenizer.json": path.read_bytes()}
    try:
        json.loads(found["tokenizer.json"])["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"the tokenizer {path} is neither a tokenizer.json nor a folder with one; save it with "
            "tokenizer.save_pretrained(folder), or Tokenizer.save(file)."
        ) from error
    return found


def _call(source: str) -> torch.nn.Module:
    place, _, name = source.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).is_file():
                raise ExportError(f"{place} does not exist.")
            found = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = found
            sys.path.insert(0, str(Path(place).resolve().parent))
            spec.loader.exec_module(found)
        else:
            sys.path.insert(0, "")
            found = importlib.import_module(place)
        factory = getattr(found, name)
    except (ImportError, AttributeError) as error:
        hint = next((fix for word, fix in _NO_SUCH.items() if f"'{word}'" in str(error)), "")
        advice = hint or " Expected package.module:factory or path/to/file.py:factory."
        raise ExportError(f"{source}: {error}.{advice}") from error
    try:
        module = factory()
    except Exception as error:
        hint = next((fix for word, fix in _NO_SUCH.items() if f"'{word}'" in str(error)), "")
        raise ExportError(f"{source}: the factory failed: {type(error).__name__}: {error}.{hint}") from error
    if not isinstance(module, torch.nn.Module):
        raise ExportError(
            f"{source} returned a {type(module).__name__}; expected an nn.Module from a factory without arguments."
        )
    return module


def _inputs(
    module: torch.nn.Module, method: str, declared: Mapping[str, str], known: Mapping[str, str], vocabulary: int
) -> tuple[Input, ...]:
    every = inspect.signature(getattr(module, method)).parameters.values()
    parameters = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not parameters:
        raise ExportError(
            f"{type(module).__name__}.{method}({', '.join(map(str, every))}) names no argument, so its inputs are "
            f"unknown; name them: def {method}(self, x), with input_spec = "
            '{"x": "float32[batch,sequence,3]"}. Or export the module inside of a wrapper.'
        )
    wanted = set(known) - {"input_ids"}  # used if forward has such an argument, with a default or without
    names = [p.name for p in parameters if p.default is p.empty or p.name in declared or p.name in wanted]
    missing = [name for name in names if name not in declared and name not in known]
    if missing or not names:
        raise ExportError(
            f"{method}({', '.join(p.name for p in parameters)}) takes inputs of unknown shape: "
            f"{', '.join(missing) or 'none'}. "
            f"Pass --input {missing[0] if missing else 'x'}=float32[batch,sequence,3], or give the module an attribute "
            'input_spec = {"x": "float32[batch,sequence,3]"}; named axes are dynamic.'
        )
    if unknown := sorted(declared.keys() - {p.name for p in parameters}):
        raise ExportError(
            f"{method} has no argument {', '.join(unknown)}; it has {', '.join(p.name for p in parameters)}."
        )
    return tuple(_parse(name, declared.get(name, known.get(name, "")), vocabulary) for name in names)


def _parse(name: str, spec: str, vocabulary: int) -> Input:
    match = _SPEC.match(f"{name}={spec.strip()}")
    dtype = getattr(torch, match["dtype"], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise ExportError(
            f"the input {name}={spec} cannot be read; write name=float32[batch,sequence,3] or "
            "name=int64[batch,sequence]<1000."
        )
    dims = [dim.strip() for dim in match["shape"].split(",") if dim.strip()]
    shape = tuple(int(dim) if dim.isdigit() else dim for dim in dims)
    return Input(name, dtype, shape, high=int(match["high"] or vocabulary))


def _vocabulary(module: torch.nn.Module) -> int:
    """The number of rows of the first embedding: token ids are smaller."""
    return next((m.num_embeddings for m in module.modules() if isinstance(m, torch.nn.Embedding)), 2)
