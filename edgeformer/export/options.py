"""The options of an export. Flags of the command line and keys of a recipe are made from `ExportOptions`."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from edgeformer.bundle.manifest import SCHEMES
from edgeformer.engines.options import option
from edgeformer.errors import ExportError
from edgeformer.export.sizes import parse_size

HEADS = ("tied", "q4a", "q4", "q8", "none")
CALIBRATED = ("q4a", "q4")  # schemes that calibration helps; eight bits lose too little
SAMPLES = "samples"
MOST_TOKENS = 2**31 - 1  # of a text; more than any text here has
_KINDS = {
    "str": "a text",
    "Path": "a path",
    "int": "a whole number",
    "bool": "true or false",
    "tuple": "a list of texts",
}


@dataclass(frozen=True)
class ExportOptions:
    """The options of one export. The metadata of a field describe its flag; `source` is an argument.

    Raises:
        ExportError: a value is not one of those allowed.
    """

    source: str
    output: Path = option(MISSING, "The bundle's folder.", flags=("-o", "--output"))  # noqa: RUF009 (a field)
    quantize: str | None = option(
        None,
        "q4a (4 bits, scale and minimum), q4, q8, keep (GGUF), none.",
        default_text="keep for GGUF, else q4a",
    )
    block: int = option(32, "Weights that share a scale: 16, 32, 64, 128.")
    head: str | None = option(
        None,
        "The output layer: tied, q4a, q4, q8, none.",
        default_text="tied if the model ties it, else as --quantize",
    )
    calibration: str | None = option(
        None,
        "Text that q4a and q4 weights of a language model are fitted to (GPTQ): samples (drawn from the model), a "
        "text file, or none (round to nearest).",
        default_text=SAMPLES,
    )
    calibration_tokens: int | None = option(
        None, "Tokens of calibration text.", default_text="by the model's width, 512 to 16384"
    )
    dtype: str = option("float32", "float32, or float16 for CUDA.")
    adapter: Path | None = option(  # noqa: RUF009 (a field)
        None, "Merge the PEFT adapter in this folder (LoRA, DoRA, IA3, ...) into the model."
    )
    weights: Path | None = option(  # noqa: RUF009 (a field)
        None, "For a factory: its checkpoint: .safetensors, .pt, .ckpt, or a folder of shards."
    )
    tokenizer: Path | None = option(  # noqa: RUF009 (a field)
        None, "Use the tokenizer in this folder instead; for a factory, also a tokenizer.json; none: no tokenizer."
    )
    input: tuple[str, ...] = option(
        (), "For a factory: name=dtype[axis,...], such as x=float32[batch,sequence,3]; named axes are dynamic."
    )
    output_names: tuple[str, ...] = option(
        (), "For a factory: the name of an output; repeat it for each.", flags=("--output-name",)
    )
    architecture: str | None = option(
        None, "For a Hugging Face source: the class to load.", default_text="as config.json says"
    )
    task: str | None = option(None, "The model's task, for the manifest: text-generation, forecasting, ...")
    text: Path | None = option(  # noqa: RUF009 (a field)
        None, "Measure accuracy on this text.", default_text="Python's language reference"
    )
    tokens: int = option(1024, "Tokens to measure accuracy on; 0: do not measure it.")
    overwrite: bool = option(False, "Replace an existing bundle.")
    allow_missing: tuple[str, ...] = option(
        (), "A pattern of tensors that may be missing or unused: 'pooler.*'; may be repeated."
    )
    memory_limit: str | int | None = option(
        None, "Refuse an export that needs more memory: 6G.", default_text="the machine's"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, str(field.type), getattr(self, field.name)))
        for name, value, allowed in (
            ("quantize", self.quantize, (None, *SCHEMES)),
            ("block", self.block, (16, 32, 64, 128)),
            ("head", self.head, (None, *HEADS)),
            ("dtype", self.dtype, ("float32", "float16")),
        ):
            if value not in allowed:
                raise ExportError(f"{name} is {value!r}; choose one of {', '.join(str(a) for a in allowed if a)}.")
        parse_size(self.memory_limit)
        if not self.source:
            raise ExportError("source is empty; give a file, a folder, a hub name or module:factory.")
        if not 0 <= self.tokens <= MOST_TOKENS:
            raise ExportError(f"tokens is {self.tokens}; expected 0 to {MOST_TOKENS:,}.")
        fitted_to = self.calibration_tokens
        if fitted_to is not None and (not 1 <= fitted_to <= MOST_TOKENS or self.calibration == "none"):
            raise ExportError(
                f"calibration_tokens is {fitted_to} and calibration is {self.calibration or SAMPLES}; "
                f"expected 1 to {MOST_TOKENS:,} tokens, and a calibration that uses them."
            )
        fitted = self.calibration_text
        if fitted is not None and self.text is not None and fitted.resolve() == self.text.resolve():
            raise ExportError(
                f"accuracy would be measured on {self.text}, the text that the weights are calibrated on; "
                "give another text, or leave one of the two out."
            )

    @property
    def calibration_text(self) -> Path | None:
        """The user's calibration text, if one is given."""
        return None if self.calibration in (None, "none", SAMPLES) else Path(self.calibration)

    def calibrates(self, scheme: str) -> bool:
        """Whether some weights are to be calibrated if linear layers are quantized as `scheme`.

        Raises:
            ExportError: calibration is requested, but no weight gets four bits.
        """
        four_bits = scheme in CALIBRATED or self.head in CALIBRATED
        if not four_bits and (self.calibration not in (None, "none") or self.calibration_tokens is not None):
            raise ExportError(
                f"calibration is for {' and '.join(CALIBRATED)}; with {scheme} no weight is rounded to four bits here. "
                "Leave it out, or choose another --quantize or --head."
            )
        return four_bits and self.calibration != "none"


def read_recipe(path: Path, **flags: Any) -> ExportOptions:
    """The options in a recipe (TOML file). `flags` that are not None override it; its paths are relative to its folder.

    Raises:
        ExportError: the file is missing, is not TOML, or has an unknown key.
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
    for field in dataclasses.fields(ExportOptions):
        if field.name in recipe:  # before its paths are joined
            _typed(field.name, str(field.type), recipe[field.name])
    relative = path.parent / str(recipe["source"])
    if relative.exists():
        recipe["source"] = str(relative)
    for name in ("weights", "tokenizer", "text", "adapter"):
        if name in recipe and (name, recipe[name]) != ("tokenizer", "none"):
            recipe[name] = path.parent / recipe[name]
    if recipe.get("calibration") not in (None, "none", SAMPLES):
        recipe["calibration"] = str(path.parent / recipe["calibration"])
    recipe.setdefault("output", path.stem)
    merged = recipe | {name: value for name, value in flags.items() if value not in (None, ())}
    return make_options(**merged)


def make_options(**values: Any) -> ExportOptions:
    """ExportOptions from plain values: strings for paths, lists for tuples, None for an empty one."""
    lists = ("input", "output_names", "allow_missing")
    made: dict[str, Any] = {name: () if name in lists and value is None else value for name, value in values.items()}
    return ExportOptions(**made)


def _typed(name: str, annotation: str, value: object) -> object:
    """`value` of a field, as a Path where that is a text, and as a tuple where that is a list.

    Raises:
        ExportError: it has another type, or is no path.
    """
    kinds = [kind.partition("[")[0] for kind in annotation.split(" | ")]
    found: object = None
    if "tuple" in kinds and isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        found = tuple(value)
    elif "Path" in kinds and isinstance(value, str | Path) and _is_name(str(value)):
        found = Path(value)
    elif (
        ("str" in kinds and isinstance(value, str) and (_is_name(value) or not value))
        or ("int" in kinds and type(value) is int)  # a bool is an int too
        or ("bool" in kinds and isinstance(value, bool))
    ):
        found = value
    if found is None and not (value is None and "None" in kinds):
        wanted = " or ".join(_KINDS[kind] for kind in kinds if kind != "None")
        raise ExportError(f"{name} is {value!r:.200}, expected {wanted}; see `python -m edgeformer.export --help`.")
    return found


def _is_name(text: str) -> bool:
    """Whether the system can have a file of that name."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except ValueError:  # half of a surrogate pair
        return False
