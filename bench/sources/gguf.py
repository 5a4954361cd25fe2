"""Every metadata key and tensor type of the gguf package, and forms of files, on tiny models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import ROOT
from bench.sources._gguf_forms import FORMS
from bench.sources._gguf_trials import NUMBERS, REPORTED, SIZES, TEXTS
from bench.sources.row import Row

sys.path.insert(0, str(ROOT / "tests"))

TITLE = "GGUF"
ABOUT = (
    "All keys of `gguf.constants.Keys`, all types of `gguf.GGMLQuantizationType`, and forms of files. The "
    "reference is a decoder in numpy float64 that reads the file itself (tests/support/gguf_reference.py); for "
    "the tokenizer it is the meaning of the key in llama.cpp."
)
TESTS = (
    "tests/export/sources/test_gguf_header.py, tests/export/sources/test_gguf_config.py, "
    "tests/export/sources/test_gguf_tensors.py, tests/export/sources/test_gguf_tokenizer.py, "
    "tests/export/sources/test_gguf_bundle.py"
)
TOLERANCE = 1e-4  # of the largest logit: the tolerance of the exporter's parity check


def all_keys() -> list[str]:
    """All keys of the package, with `{arch}` for the architecture."""
    from gguf.constants import Keys

    found: list[str] = []

    def collect(group: Any) -> None:
        for name, value in vars(group).items():
            if isinstance(value, str) and not name.startswith("_") and "." in value:
                found.append(value)
            elif isinstance(value, type) and not name.startswith("_"):
                collect(value)

    collect(Keys)
    return list(dict.fromkeys(found))


def settings() -> list[str]:
    import gguf

    types = [f"type {kind.name}" for kind in gguf.GGMLQuantizationType]
    return [*all_keys(), "{arch}.rope.scale_linear", *(f"tensor {name}" for name in TENSORS), *types, *FORMS]


def rows(work: Path) -> Iterator[Row]:
    for setting in settings():
        if setting in FORMS:
            yield FORMS[setting](setting, work)
        elif setting.startswith("type "):
            yield _type(setting, work)
        elif setting.startswith("tensor "):
            yield _tensor(setting, work)
        elif setting.startswith("tokenizer.") or setting in TEXTS:
            yield _text(setting, work)
        else:
            yield _key(setting.replace("{arch}.", ""), setting, work)


def outcome_of(path: Path, *shards: Path) -> tuple[str, Any]:
    """("refused", message) or ("made", the relative difference from the reference)."""
    import torch
    from support import gguf_files
    from support.gguf_reference import Reference

    from edgeformer.errors import ExportError
    from edgeformer.export.sources.gguf.gguf_source import gguf_source

    try:
        source = gguf_source(path)
    except ExportError as error:
        return "refused", str(error)
    with torch.no_grad():
        got = source.module(torch.tensor([gguf_files.IDS])).logits[0].numpy()
    expected = Reference(*(shards or (path,))).logits(gguf_files.IDS)
    return "made", (float(np.abs(got - expected).max() / np.abs(expected).max()), expected, source)


def _short(message: str) -> str:
    return message if len(message) <= 200 else message[:197] + "..."


def _key(key: str, setting: str, work: Path) -> Row:
    from support import gguf_files

    from edgeformer.export.sources.gguf import keys as known

    if key in SIZES:
        return _size(key, setting, work)
    arch, value, more = NUMBERS.get(key, ("llama", 3, {}))
    name = setting.replace("{arch}", arch)
    name = name.replace("{dense}", "dense_2").replace("{id}", "0")
    metadata = gguf_files.keys(arch) | {k.replace("ARCH", arch): v for k, v in more.items()}
    kind = "Q8_0" if key == "general.quantization_version" else None  # it matters only with blocks
    plain = gguf_files.write(work / "plain.gguf", metadata, gguf_files.tensors(arch), arch, kind)
    path = gguf_files.write(work / "key.gguf", metadata | {name: value}, gguf_files.tensors(arch), arch, kind)
    what, seen = outcome_of(path)
    said = f"{name} = {value!r}"
    if what == "refused":
        named = name in seen or key in seen
        return Row(setting, "refused" if named else "ignored", f"{said}: {_short(seen)}")
    from support.gguf_reference import Reference

    error, expected, source = seen
    moved = float(np.abs(expected - Reference(plain).logits(gguf_files.IDS)).max() / np.abs(expected).max())
    if error > TOLERANCE:
        return Row(setting, "ignored", f"{said}: {error:.1e} from the reference", "numpy")
    if moved > TOLERANCE:
        return Row(setting, "honoured", f"{said} moves logits by {moved:.0%}; ours differ by {error:.0e}", "numpy")
    if key in known.IGNORED_KEYS:
        return Row(setting, "irrelevant", known.IGNORED_KEYS[key], "numpy")
    if name.startswith("general.") or key.startswith("split."):
        return Row(setting, "irrelevant", "it describes the file, not the model", "numpy")
    noted = [note for note in source.notes if key.rpartition(".")[2] in note]
    return Row(setting, "irrelevant" if noted else "ignored", noted[0] if noted else f"{said}: nothing said", "numpy")


def _size(key: str, setting: str, work: Path) -> Row:
    """A size is honoured if a missing and a wrong value are refused and the right one gives the right results."""
    from support import gguf_files

    arch, wrong = SIZES[key]
    name, values = f"{arch}.{key}", gguf_files.tensors(arch)
    metadata = gguf_files.keys(arch)
    trials = {"absent": None, str(wrong): wrong}
    said = []
    for label, value in trials.items():
        what, seen = outcome_of(gguf_files.write(work / "size.gguf", metadata | {name: value}, values, arch))
        if what == "made" and seen[0] > TOLERANCE:
            return Row(setting, "ignored", f"{label}: {seen[0]:.1e} from the reference", "numpy")
        said.append(f"{label}: {_short(seen) if what == 'refused' else f'as the reference, {seen[0]:.0e}'}")
    return Row(setting, "honoured", "; ".join(said), "numpy")


TENSORS: dict[str, Callable[[], Any]] = {
    "rope_freqs.weight": lambda: np.linspace(1, 8, 4, dtype=np.float32),
    "rope_factors_short.weight": lambda: np.linspace(1, 3, 4, dtype=np.float32),
    "rope_factors_long.weight": lambda: np.linspace(2, 9, 4, dtype=np.float32),
    "blk.0.attn_sinks.weight": lambda: np.ones(4, np.float32),
    "cls.weight": lambda: np.ones((3, 32), np.float32),
}


def _tensor(setting: str, work: Path) -> Row:
    from support import gguf_files
    from support.gguf_reference import Reference

    name, arch = setting.removeprefix("tensor "), "phi3" if "factors" in setting else "llama"
    metadata, values = gguf_files.keys(arch), gguf_files.tensors(arch)
    plain = gguf_files.write(work / "plain.gguf", metadata, values, arch)
    if "factors" in name:
        values |= {other: TENSORS[other]() for other in TENSORS if "factors" in other}
        metadata |= {f"{arch}.rope.scaling.type": "longrope", f"{arch}.rope.scaling.attn_factor": 1.2}
        metadata |= {f"{arch}.rope.scaling.original_context_length": 64}
    path = gguf_files.write(work / "tensor.gguf", metadata, values | {name: TENSORS[name]()}, arch)
    what, seen = outcome_of(path)
    if what == "refused":
        return Row(setting, "refused" if name in seen else "ignored", _short(seen))
    error, expected, source = seen
    moved = float(np.abs(expected - Reference(plain).logits(gguf_files.IDS)).max() / np.abs(expected).max())
    fine = error < TOLERANCE and moved > TOLERANCE
    notes = " ".join(note for note in source.notes if "factors" in note)
    detail = f"moves logits by {moved:.0%}; ours differ by {error:.0e}. {notes}"
    return Row(setting, "honoured" if fine else "ignored", detail, "numpy")


def _type(setting: str, work: Path) -> Row:
    """Tries a matrix of this type: random blocks with realistic scales."""
    import gguf
    from support import gguf_files

    kind = gguf.GGMLQuantizationType[setting.removeprefix("type ")]
    values, name = gguf_files.tensors(size=64), "blk.0.attn_output.weight"  # rows of 256, as K types need
    metadata = gguf_files.keys() | {"llama.attention.key_length": 64}
    path = work / "type.gguf"
    try:
        gguf_files.write(path, metadata, values, kind={name: kind.name})
    except NotImplementedError:
        gguf_files.write(path, metadata, values | {name: _blocks(kind)}, raw={name: kind})
    what, seen = outcome_of(path)
    if what == "refused":
        return Row(setting, "refused" if kind.name in seen and name in seen else "ignored", _short(seen))
    error, _, source = seen
    fine = error < TOLERANCE and (source.kept is not None or kind.name in " ".join(source.notes))
    kept = "kept as blocks" if source.kept is not None else "read as float"
    return Row(setting, "honoured" if fine else "ignored", f"{kept}; ours differ by {error:.0e}", "numpy")


def _blocks(kind: Any) -> Any:
    """uint8 [32, bytes]: of many random blocks those with finite and the smallest values."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    columns = 256 // block
    raw = rng.integers(0, 256, (32 * columns * 64, size), dtype=np.uint8)
    try:
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.dequantize(raw, kind).astype(np.float64)).max(-1)
    except NotImplementedError:
        return raw[: 32 * columns].reshape(32, -1)
    order = np.argsort(np.where(np.isfinite(largest), largest, np.inf))
    return raw[order[: 32 * columns]].reshape(32, -1)


def _text(setting: str, work: Path) -> Row:
    from support import gguf_files

    from edgeformer.errors import ExportError
    from edgeformer.export.sources.gguf import keys as known
    from edgeformer.export.sources.gguf.gguf_tokenizer import read_gguf_tokenizer
    from edgeformer.export.sources.gguf.shards import open_gguf

    short = setting.removeprefix("tokenizer.ggml.")
    if short in known.IGNORED_TOKENIZER_KEYS and setting not in TEXTS:
        value: Any = "x" if "charsmap" in short else True if "remove" in short else 1
        path = gguf_files.write(work / "text.gguf", gguf_files.keys() | {setting: value}, {})
        same = (
            read_gguf_tokenizer(open_gguf(path)).files
            == read_gguf_tokenizer(open_gguf(gguf_files.write(work / "plain.gguf", gguf_files.keys(), {}))).files
        )
        return Row(setting, "irrelevant" if same else "ignored", known.IGNORED_TOKENIZER_KEYS[short])
    outcome, detail = "ignored", ""
    for more, expected in TEXTS[setting]:
        path = gguf_files.write(work / "text.gguf", gguf_files.keys() | more, {})
        try:
            texts = read_gguf_tokenizer(open_gguf(path))
        except ExportError as error:
            named = setting.partition("{")[0] in str(error)
            if not named or not isinstance(expected, str):
                return Row(setting, "ignored", f"{error}")
            outcome, detail = ("refused" if outcome == "ignored" else outcome), detail + f" {_short(str(error))}"
            continue
        if isinstance(expected, str) or not expected(texts):
            return Row(setting, "ignored", f"{more}: not as expected")
        if setting in REPORTED:
            return Row(setting, "irrelevant", "no logit depends on it; the bundle's notes name it and its value")
        outcome, detail = "honoured", detail + f" {_said(more)}: as expected."
    return Row(setting, outcome, detail.strip(), "llama.cpp's meaning")


def _said(more: dict[str, Any]) -> str:
    return _short(", ".join(f"{key.rpartition('.')[2]} = {str(value)[:40]}" for key, value in more.items()))
