"""The manifest `edgeformer.json`: a strict JSON parser, and the checks of its fields."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from edgeformer.errors import BundleError

MANIFEST = "edgeformer.json"
FORMAT = "edgeformer"
FORMAT_VERSION = 1
SCHEMES = ("q4a", "q4", "q8", "keep", "none")
MAX_JSON = 64 << 20  # bytes; far above any file parsed here, because vocabularies are in tokenizer.json

Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """The object in a JSON file. Strict: UTF-8, no duplicate keys, no NaN or infinity, limited size and depth.

    Raises:
        BundleError: the file cannot be read, is not strict JSON, or its top level is not an object.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"the key {twice[0]!r} occurs twice")
        return found

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{path} is not a plain file.")
        if info.st_size > MAX_JSON:
            raise BundleError(f"{path} holds {info.st_size:,} bytes, expected at most {MAX_JSON:,}.")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=refuse_constant)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise BundleError(f"{path} is not valid JSON: {reason}. Export or copy the bundle again.") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds {_type_name(value)}, expected an object.")
    return value


def manifest_problems(manifest: object) -> list[str]:
    """The problems of a manifest, one sentence each; empty if it is valid."""
    if not isinstance(manifest, dict):
        return [f"{MANIFEST} holds {_type_name(manifest)}, expected an object"]
    if manifest.get("format") != FORMAT:
        return [f"{MANIFEST}: format is {_short(manifest.get('format'))}, expected {FORMAT!r}"]
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        advice = "update edgeformer" if newer else "export the model again"
        return [f"{MANIFEST}: format_version is {_short(version)}, this edgeformer reads {FORMAT_VERSION}; {advice}"]
    problems: list[str] = []

    def field(owner: Json, where: str, name: str, *kinds: type) -> Any:
        """The value; None, and a new entry in `problems`, if it is missing or of no type in `kinds`."""
        if name not in owner:
            problems.append(f"{MANIFEST}: {where}{name} is missing")
            return None
        value = owner[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            problems.append(f"{MANIFEST}: {where}{name} is {_type_name(value)}, expected {expected}")
            return None
        return value

    task = field(manifest, "", "task", str)
    if task == "":
        problems.append(f"{MANIFEST}: task is empty")
    field(manifest, "", "producer", dict)
    field(manifest, "", "provenance", dict)
    field(manifest, "", "accuracy", dict, type(None))
    field(manifest, "", "parity", dict, type(None))
    files = field(manifest, "", "files", dict) or {}
    for name, entry in files.items():
        if not plain_name(name):
            problems.append(f"{MANIFEST}: files has {name!r}, expected a plain file name inside the folder")
        if not isinstance(entry, dict):
            problems.append(f"{MANIFEST}: files.{name} is {_type_name(entry)}, expected an object")
            continue
        size = field(entry, f"files.{name}.", "size", int)
        if size is not None and size < 0:
            problems.append(f"{MANIFEST}: files.{name}.size is {size}, expected at least 0")
        digest = field(entry, f"files.{name}.", "sha256", str)
        if digest is not None and (len(digest) != 64 or not set(digest) <= set("0123456789abcdef")):
            problems.append(f"{MANIFEST}: files.{name}.sha256 is not 64 hex digits")
    graphs = field(manifest, "", "graphs", dict) or {}
    if graphs == {} and isinstance(manifest.get("graphs"), dict):
        problems.append(f"{MANIFEST}: graphs is empty, expected at least one")
    for name, graph in graphs.items():
        if not isinstance(graph, dict):
            problems.append(f"{MANIFEST}: graphs.{name} is {_type_name(graph)}, expected an object")
            continue
        file = field(graph, f"graphs.{name}.", "file", str)
        if file is not None and file not in files:
            problems.append(f"{MANIFEST}: graphs.{name}.file is {file!r}, which is not in files")
        for side in ("inputs", "outputs"):
            for tensor, info in (field(graph, f"graphs.{name}.", side, dict) or {}).items():
                problems += _tensor_problems(f"graphs.{name}.{side}.{tensor}", info)
    quantization = field(manifest, "", "quantization", dict)
    if quantization is not None:
        scheme = field(quantization, "quantization.", "scheme", str)
        if scheme is not None and scheme not in SCHEMES:
            problems.append(f"{MANIFEST}: quantization.scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
        block = field(quantization, "quantization.", "block_size", int, type(None))
        if block is not None and block < 1:
            problems.append(f"{MANIFEST}: quantization.block_size is {block}, expected at least 1")
    reference = field(manifest, "", "reference", dict, type(None))
    if reference is not None:
        file = field(reference, "reference.", "file", str)
        if file is not None and file not in files:
            problems.append(f"{MANIFEST}: reference.file is {file!r}, which is not in files")
        for name, value in (field(reference, "reference.", "tolerance", dict) or {}).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and (not number or value <= 0):
                problems.append(f"{MANIFEST}: reference.tolerance.{name} is {_short(value)}, expected a number above 0")
    if (cost := field({"kv_cache": None, **manifest}, "", "kv_cache", dict, type(None))) is not None:
        problems += _cache_cost_problems(cost)
    return problems


def _cache_cost_problems(cost: Json) -> list[str]:
    """Of the entry that `edgeformer.bundle.cache_cost` reads: `unmeasured`, or numbers and layers."""
    if "unmeasured" in cost:
        why = cost["unmeasured"]
        return [] if isinstance(why, str) else [f"{MANIFEST}: kv_cache.unmeasured is {_type_name(why)}, expected text"]
    problems = []
    for kind in ("float32", "int8", "auto"):
        numbers = cost.get(kind)
        kl = numbers.get("mean_kl") if isinstance(numbers, dict) else None
        if isinstance(kl, bool) or not isinstance(kl, (int, float)) or not math.isfinite(kl):
            problems.append(f"{MANIFEST}: kv_cache.{kind}.mean_kl is {_short(kl)}, expected a number")
    layers = cost.get("float32_layers")
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        problems.append(f"{MANIFEST}: kv_cache.float32_layers is {_short(layers)}, expected a list of layers from 0 on")
    return problems


def _tensor_problems(where: str, info: object) -> list[str]:
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str) or not isinstance(info.get("shape"), list):
        return [f"{MANIFEST}: {where} is {_short(info)}, expected {{dtype: text, shape: list}}"]
    bad = [d for d in info["shape"] if not isinstance(d, str) and (type(d) is not int or d < 0)]
    return [f"{MANIFEST}: {where}.shape holds {_short(d)}, expected sizes or axis names" for d in bad]


def plain_name(name: str) -> bool:
    """Whether `name` is a file name without a path, on every operating system."""
    return bool(name) and name not in (".", "..") and all(ord(c) >= 32 and c not in "/\\:" for c in name)


_KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    type(None): "null",
}


def _type_name(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
