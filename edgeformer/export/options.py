"""All options of one export: flags of the command line and keys of a recipe have the same names."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeformer.errors import ExportError
from edgeformer.export.sizes import parse_size

SCHEMES = ("q4a", "q4", "q8", "keep", "none")
HEADS = ("tied", "q4a", "q4", "q8", "none")
CALIBRATED = ("q4a", "q4")  # eight bits lose too little to be worth it
SAMPLES = "samples"


@dataclass(frozen=True)
class ExportOptions:
    """One export.

    Raises:
        ExportError: a value is none of those that the field names.
    """

    source: str  # a GGUF file, a Hugging Face folder or hub name, a checkpoint folder, or module:factory
    output: Path
    quantize: str | None = None  # q4a | q4 | q8 | keep | none; by default keep for GGUF, else q4a
    block: int = 32  # weights that share a scale: 16 | 32 | 64 | 128
    head: str | None = None  # tied | q4a | q4 | q8 | none; by default tied if the model ties it, else as `quantize`
    calibration: str | None = None  # for q4a and q4: samples (the model's own) | none | a text file
    calibration_tokens: int | None = None  # by default as many as the widest layer needs; see calibrate.enough
    dtype: str = "float32"  # float32 | float16 (for CUDA)
    adapter: Path | None = None  # the folder of a PEFT adapter (LoRA, DoRA, IA3, ...) to merge into the model
    weights: Path | None = None  # for module:factory: .safetensors, or plain tensors in .pt, .ckpt; a folder of shards
    tokenizer: Path | None = None  # instead of the source's own: a folder; for a factory, a tokenizer.json too; or none
    input: tuple[str, ...] = ()  # for module:factory: name=dtype[axis,...], for example x=float32[batch,sequence,3]
    output_names: tuple[str, ...] = ()  # for module:factory: names of what forward returns
    architecture: str | None = None  # for a Hugging Face source: load this class, not the one that config.json names
    task: str | None = None  # a word for people and apps: text-generation, forecasting, ...
    text: Path | None = None  # accuracy is measured on this text; by default on the Python language reference
    tokens: int = 1024  # how many tokens of it; 0 leaves accuracy unmeasured
    overwrite: bool = False
    allow_missing: tuple[str, ...] = ()  # patterns of tensors that may be missing or unused: classifier.*
    memory_limit: str | int | None = None  # refuse above it: 6G, or bytes; by default what the machine has

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("quantize", self.quantize, (None, *SCHEMES)),
            ("block", self.block, (16, 32, 64, 128)),
            ("head", self.head, (None, *HEADS)),
            ("dtype", self.dtype, ("float32", "float16")),
        ):
            if value not in allowed:
                raise ExportError(f"{name} is {value!r}; choose one of {', '.join(str(a) for a in allowed if a)}.")
        parse_size(self.memory_limit)
        if self.tokens < 0:
            raise ExportError(f"tokens is {self.tokens}; expected 0 or more.")
        if self.calibration_tokens is not None and (self.calibration_tokens < 1 or self.calibration == "none"):
            raise ExportError(
                f"calibration_tokens is {self.calibration_tokens} and calibration is {self.calibration or SAMPLES}; "
                "expected 1 or more, and a calibration that reads them."
            )
        fitted = self.calibration_text
        if fitted is not None and self.text is not None and fitted.resolve() == self.text.resolve():
            raise ExportError(
                f"accuracy would be measured on {self.text}, the text that the weights are calibrated on; "
                "give another text, or leave one of the two out."
            )

    @property
    def calibration_text(self) -> Path | None:
        """The user's own text to calibrate on, if one is given."""
        return None if self.calibration in (None, "none", SAMPLES) else Path(self.calibration)

    def calibrates(self, scheme: str) -> bool:
        """Whether some weights are to be calibrated, if linear layers become `scheme`.

        Raises:
            ExportError: calibration is asked for where no weight has four bits to choose.
        """
        four_bits = scheme in CALIBRATED or self.head in CALIBRATED
        if not four_bits and (self.calibration not in (None, "none") or self.calibration_tokens is not None):
            raise ExportError(
                f"calibration is for {' and '.join(CALIBRATED)}; with {scheme} no weight is rounded to four bits here. "
                "Leave it out, or choose another --quantize or --head."
            )
        return four_bits and self.calibration != "none"


def read_recipe(path: Path, **flags: Any) -> ExportOptions:
    """The options in a recipe (TOML); `flags` that are not None win over it. Paths are relative to the recipe's folder.

    Raises:
        ExportError: the file is missing, is not TOML, or has a key that no option has.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"the recipe {path} cannot be read: {error}") from error
    known = {field.name for field in dataclasses.fields(ExportOptions)}
    if unknown := sorted(recipe.keys() - known):
        raise ExportError(f"{path}: unknown {', '.join(unknown)}; a recipe may have {', '.join(sorted(known))}.")
    if "source" not in recipe:
        raise ExportError(f'{path} names no source; add source = "...".')
    beside = path.parent / str(recipe["source"])
    if beside.exists():
        recipe["source"] = str(beside)
    for name in ("weights", "tokenizer", "text", "adapter"):
        if name in recipe and (name, recipe[name]) != ("tokenizer", "none"):
            recipe[name] = path.parent / recipe[name]
    if recipe.get("calibration") not in (None, "none", SAMPLES):
        recipe["calibration"] = str(path.parent / recipe["calibration"])
    recipe.setdefault("output", path.stem)
    merged = recipe | {name: value for name, value in flags.items() if value not in (None, ())}
    return make_options(**merged)


def make_options(**values: Any) -> ExportOptions:
    """ExportOptions from plain values (strings for paths, lists for tuples)."""
    for name in ("output", "weights", "tokenizer", "text", "adapter"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    for name in ("input", "output_names", "allow_missing"):
        if name in values:
            values[name] = tuple(values[name] or ())
    return ExportOptions(**values)
