"""Checks that a source has every tensor of the model, and that the model uses every tensor of the source.

A loader reports what it did as a `Loaded`; `require_complete` rejects missing and unused tensors and returns the record
for edgeformer.json.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edgeformer.errors import ExportError

WRAPPER_PREFIXES = {  # prefix of tensor names -> what adds it
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "base_model.model.": "PEFT",
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "model.": "Lightning, or an attribute named model",
}
# Wrappers of a part of the model add these inside of names; no other module has them.
INNER_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SHOWN = 4  # names in a message
_LAYER = re.compile(r"\.\d+\.")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_packed|weight_shape|input_scale|SCB|absmax|quant_map"
    r"|nested_absmax|quant_state[\w.]*)$"
)
_ADAPTER = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)(\.|$)")


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shape differs from the model's."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """The result of loading a source into a model. Names are the model's where it has the tensor, else the source's.

    Tensors that a library declares as not needed are in `ignorable`, not in `missing` or `unexpected`.
    """

    missing: Sequence[str] = ()  # in the model only: their values are random
    unexpected: Sequence[str] = ()  # in the source only: their values are lost
    mismatched: Sequence[Mismatch] = ()
    tied: Mapping[str, str] = field(default_factory=dict)  # tensor that is not stored -> stored tensor with its values
    ignorable: Sequence[str] = ()  # in the source; the library declares that they are not needed
    derived: Sequence[str] = ()  # in the model, computed by its constructor
    tensors: int = 0  # in the source
    stored: Sequence[str] = ()  # all names in the source, unchanged: the message takes its reason from them
    notes: Sequence[str] = ()  # how names were changed

    @property
    def complete(self) -> bool:
        """Whether no tensor is missing, unused or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)


def require_complete(loaded: Loaded, source: str, model: str, allow: Sequence[str] = ()) -> dict[str, Any]:
    """The record of the load for edgeformer.json: {tensors: how many, missing: [], unused: []} and non-empty ones of
    {tied, derived, ignored, notes, allowed}.

    `allow` has shell patterns (`classifier.*`) of tensors that may be missing or unused; only these appear in `missing`
    and `unused`. Another shape is never allowed.

    Raises:
        ExportError: a tensor is missing, unused or of another shape; or a pattern of `allow` matches none of them.
    """
    missing, unexpected = sorted(loaded.missing, key=_natural), sorted(loaded.unexpected, key=_natural)
    allowed_missing, missing = _split(missing, allow)
    allowed_unused, unexpected = _split(unexpected, allow)
    useless = [p for p in allow if not any(_matches(n, p) for n in (*allowed_missing, *allowed_unused))]
    problems = []
    if missing:
        problems.append(
            f"{_count(missing)} of {model} {_is(missing)} not in it and would keep random values: {_names(missing)}"
        )
    if unexpected:
        problems.append(f"{_count(unexpected)} of it {_is(unexpected)} not used by {model}: {_names(unexpected)}")
    if loaded.mismatched:
        shapes = [f"{m.name} is {m.found}, expected {m.expected}" for m in loaded.mismatched]
        problems.append(f"{_count(shapes)} {_is(shapes)} of another shape: {_names(shapes)}")
    if problems:
        reason = _reason(loaded, missing, unexpected)
        flags = " ".join(f"--allow-missing '{p}'" for p in _patterns([*missing, *unexpected]))
        fits = _mostly_fits(loaded) and not loaded.mismatched
        fix = f" To export it anyway: {flags}." if flags and fits else ""
        raise ExportError(f"{source} does not fit {model}: {'; '.join(problems)}. {reason}{fix}")
    if useless:
        raise ExportError(
            f"--allow-missing {useless[0]!r} matches no tensor that is missing or unused in {source}; remove it."
        )
    found: dict[str, Any] = {
        "allowed": list(allow),
        "tied": dict(sorted(loaded.tied.items())),
        "derived": sorted(loaded.derived, key=_natural),
        "ignored": sorted(loaded.ignorable, key=_natural),
        "notes": list(loaded.notes),
    }
    record = {"tensors": loaded.tensors, "missing": allowed_missing, "unused": allowed_unused}
    return record | {key: value for key, value in found.items() if value}


def require_finite(module: torch.nn.Module, source: str) -> None:
    """Rejects weights that are NaN or infinite. Infinities in buffers are allowed: masks have them.

    Raises:
        ExportError: a parameter has a NaN or an infinity, or a buffer a NaN; the message names the first few.
    """
    bad = [
        f"{name} has {int((~torch.isfinite(values)).sum()):,} of {values.numel():,}"
        for name, values in module.named_parameters()
        if values.is_floating_point() and values.device.type != "meta" and not torch.isfinite(_sum(values))
        if not torch.isfinite(values).all()
    ]
    bad += [
        f"{name} has {int(torch.isnan(values).sum()):,} of {values.numel():,}"
        for name, values in module.named_buffers()
        if values.is_floating_point() and values.device.type != "meta" and torch.isnan(values).any()
    ]
    if bad:
        raise ExportError(
            f"{source} has weights that are not finite (NaN or infinity): {_names(bad)}. The training diverged, or a "
            "conversion to float16 overflowed; take an earlier checkpoint, or save it in bfloat16 or float32."
        )


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum, finite only if all values are. It needs no copy; it may overflow, so the caller tests again."""
    return values.detach().sum(dtype=torch.float32)


def unwrap(names: Iterable[str], expected: Iterable[str]) -> tuple[dict[str, str], str] | None:
    """({name in the source: name in the model}, a note) if removing wrapper prefixes makes `names` equal `expected`;
    else None.
    """
    found, wanted = list(names), set(expected)
    if len(found) != len(wanted):
        return None
    for inner in (found, [INNER_WRAPPERS.sub("", name) for name in found]):
        for prefix in common_prefixes(inner):
            stripped = [name.removeprefix(prefix) for name in inner]
            if set(stripped) == wanted:
                inside = (
                    {part for name in found for part in INNER_WRAPPERS.findall(name)} if inner is not found else set()
                )
                removed = " and ".join(repr(part) for part in (prefix, *sorted(inside)) if part)
                return dict(zip(found, stripped, strict=True)), f"{removed} stripped from the names of the checkpoint"
    return None


def common_prefixes(names: Sequence[str]) -> list[str]:
    """Prefixes common to all names, the shortest first: "", "module.", "module.model."."""
    found, rest = [""], list(names)
    while rest:
        steps = [*WRAPPER_PREFIXES, rest[0].partition(".")[0] + "."]
        step = next((step for step in steps if all(name.startswith(step) for name in rest)), None)
        if step is None:
            break
        found.append(found[-1] + step)
        rest = [name.removeprefix(step) for name in rest]
    return found


# --------------------------------------------------------------------------------------------------------- the message


def _reason(loaded: Loaded, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """The likely cause of the missing or unused tensors, and what to do."""
    stored = list(loaded.stored) or list(unexpected)
    if any(_ADAPTER.search(name) for name in unexpected):
        return (
            "The file is an adapter or contains one: merge it with peft (model.merge_and_unload()) and save the "
            "result, or pass the base model as the source and the adapter's folder with --adapter."
        )
    if any(_QUANTIZED.search(name) for name in unexpected):
        return (
            "The names are those of quantized weights (GPTQ, AWQ, bitsandbytes, FP8): export the original model, or "
            "save a dequantized one."
        )
    wrapper = next((w for w in WRAPPER_PREFIXES if all(name.startswith(w) for name in unexpected)), None)
    if missing and unexpected and wrapper is not None and not all(name.startswith(wrapper) for name in missing):
        return (
            f"The names have the prefix {wrapper!r} ({WRAPPER_PREFIXES[wrapper]}) and do not fit without it either: "
            "save the state_dict() of the wrapped module."
        )
    tops = {name.partition(".")[0] for name in stored}
    if missing and all(name.partition(".")[0] not in tops for name in missing) and _mostly_fits(loaded):
        if all(name.startswith("lm_head.") for name in missing):
            return (
                "The output layer is not stored: if the model ties it to its embedding, config.json must say "
                '"tie_word_embeddings": true; otherwise use a checkpoint that has it.'
            )
        return (
            "The checkpoint has no such head: it is a base model, or one for another task. Use a checkpoint that was "
            "trained for this task, or pass the class of this one with --architecture."
        )
    if missing and not unexpected and any(_LAYER.search(name) for name in missing):
        return "A shard is missing, the file is cut short, or config.json describes a larger model."
    if unexpected and not missing and not loaded.mismatched:
        if any(_LAYER.search(name) for name in unexpected):
            return "config.json describes a smaller model than the checkpoint, or another class of it."
        return "The checkpoint has a part that this class does not have: pass its class with --architecture."
    return "The checkpoint belongs to another model, or to another version of it."


def _mostly_fits(loaded: Loaded) -> bool:
    """Whether fewer tensors are missing than used: then the checkpoint is the right one except for a part."""
    return len(loaded.missing) < loaded.tensors - len(loaded.unexpected)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _split(names: Sequence[str], allow: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the names that a pattern allows, the rest)."""
    allowed = [name for name in names if any(_matches(name, pattern) for pattern in allow)]
    return allowed, [name for name in names if name not in set(allowed)]


def _patterns(names: Sequence[str]) -> list[str]:
    """At most a few patterns that match the names: one a module, or `top.*` if there are many modules; else []."""
    owners = list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in names))
    if len(owners) > _SHOWN:
        owners = list(dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in names))
    return owners if len(owners) <= _SHOWN else []


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _is(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"
