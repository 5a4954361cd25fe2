"""Complete and broken checkpoints: every weight is used and none is missing, or the export names it."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.sources import _hub_checkpoints, _user_checkpoints
from bench.sources._hub_checkpoints import Situation, prepared
from bench.sources.row import Row
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions
from edgeformer.export.sources.load import load_source

TITLE = "Completeness"
ABOUT = (
    "Situations of a checkpoint: model folders, and `--weights` for a user-defined module. The reference is the "
    "saved model: honoured means that all its tensors, and no others, are loaded bit for bit. The column beside "
    "it has what the library alone reports: transformers' loading info, or torch's `load_state_dict`."
)
TESTS = "`tests/export/sources/test_completeness.py`, `tests/export/test_memory_bounds.py`"
_ENORMOUS = "e+"  # in a name such as 1e+09: not loaded with transformers, which would allocate it
_CUT = 160


def settings() -> list[str]:
    return [situation.name for situation in _all()]


def rows(work: Path) -> Iterator[Row]:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for number, situation in enumerate(_all()):
        folder = work / str(number)
        folder.mkdir()
        yield _row(situation, folder)
        shutil.rmtree(folder)


def _all() -> list[Situation]:
    return [*_hub_checkpoints.situations(), *_user_checkpoints.situations()]


def _row(situation: Situation, folder: Path) -> Row:
    name, options = prepared(situation, folder)
    library = _library(situation, name, options)
    try:
        source = load_source(ExportOptions(name, folder / "b", **options))
    except ExportError as error:
        told = " ".join(str(error).replace(str(folder), "").split())
        return Row(situation.name, "refused", told if len(told) <= _CUT else f"{told[:_CUT]}...", library)
    if situation.model is None:
        return Row(situation.name, "ignored", "loaded, and nobody said so", library)
    found, expected = source.module.state_dict(), situation.model().state_dict()
    allowed = tuple(pattern.removesuffix("*") for pattern in options.get("allow_missing", ())) or ("-",)
    other = [
        n for n, v in expected.items() if n not in found or not (torch.equal(v, found[n]) or n.startswith(allowed))
    ]
    if other or found.keys() != expected.keys():
        return Row(situation.name, "ignored", f"other values: {', '.join(other[:4])}", library)
    record = source.completeness
    told = [f"{len(expected)} tensors equal", *record.get("notes", ())]
    told += [f"{key}: {', '.join(record[key])}" for key in ("missing", "unused", "ignored", "tied") if record.get(key)]
    if parts := record.get("other_parts"):
        told.append(f"{len(parts)} tensors of other parts left out, {parts[0]} for one")
    return Row(situation.name, "honoured", "; ".join(told), library)


def _library(situation: Situation, name: str, options: dict[str, Any]) -> str:
    """The library's own report of the load, in short."""
    try:
        if "weights" in options:
            module = _user_checkpoints.module("tied" if name.endswith(":tied") else "make")
            state = (
                torch.load(options["weights"], weights_only=True)
                if options["weights"].suffix != ".safetensors"
                else None
            )
            if state is None:
                from safetensors.torch import load_file

                state = load_file(options["weights"])
            module.load_state_dict(state)
            return "torch loads it"
        if _ENORMOUS in situation.name:
            return "not tried: it allocates what the config says"
        config = transformers.AutoConfig.from_pretrained(name)
        cls = getattr(transformers, options.get("architecture") or config.architectures[0])
        _, info = cls.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except Exception as error:
        library = "torch" if "weights" in options else "transformers"
        return f"{library}: {type(error).__name__}"
    missing, unexpected = len(info["missing_keys"]), len(info["unexpected_keys"])
    return (
        f"transformers: {missing} missing, {unexpected} unexpected"
        if missing or unexpected
        else "transformers loads it"
    )
