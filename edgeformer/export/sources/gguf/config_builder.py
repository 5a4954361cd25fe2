"""Builds the fields of a transformers config from GGUF metadata, one checked value at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.keys import Setting
from edgeformer.export.sources.gguf.shards import GgufFile

EDIT = "Correct the file (gguf-set-metadata, gguf-new-metadata), or export the original model."


@dataclass(frozen=True)
class RotaryScaling:
    """Rotary scaling of the file that no field of transformers' config expresses; applied to the loaded model."""

    factors: F32 | None  # [rotated width / 2]: the frequencies are divided by them
    scale: float  # of sines and cosines


@dataclass
class ConfigBuilder:
    """Config fields by name, notes for the manifest, and rotary scaling to apply after the load."""

    model: GgufFile
    fields: dict[str, Any]  # of the config; initially those that transformers' reader sets
    defaults: Mapping[str, Any]  # fields of the config class with their defaults
    notes: list[str] = field(default_factory=list)
    rotary: RotaryScaling | None = None

    def get(self, key: str) -> Any:
        """The value of a key of the architecture; None if the file has none."""
        value = self.model.metadata.get(f"{self.model.architecture}.{key}")
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            return value[0]  # one value per layer, all equal
        return value

    def refuse(self, key: str, why: str) -> ExportError:
        """The error for an unsupported value of `key`."""
        name = f"{self.model.architecture}.{key}"
        return ExportError(f"{self.model.name}: {name} is {shown_value(self.model.metadata.get(name))}; {why} {EDIT}")

    def field(self, names: tuple[str, ...]) -> str | None:
        """The first of `names` that the config class has."""
        return next((name for name in names if name in self.defaults), None)

    def size(self, key: str) -> int | None:
        """The checked whole number of `key`; None if the file has none."""
        return None if self.get(key) is None else int(self.checked(key, Setting((), int)))

    def number(self, key: str) -> float | None:
        """The checked number of `key`; None if the file has none."""
        return None if self.get(key) is None else float(self.checked(key, Setting(())))

    def checked(self, key: str, setting: Setting) -> Any:
        """The value of `key`.

        Raises:
            ExportError: it has another type than `setting`, or is not finite.
        """
        value = self.get(key)
        if setting.kind is bool and type(value) is bool:
            return value
        if setting.kind is int and type(value) is int and (value > 0 or value in setting.neutral):
            return value
        if setting.kind is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        expected = {int: "a whole number of 1 or more", float: "a finite number", bool: "true or false"}[setting.kind]
        raise self.refuse(key, f"expected {expected}{', the same for all layers' * isinstance(value, list)}.")


def shown_value(value: Any) -> str:
    """`repr(value)`, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
