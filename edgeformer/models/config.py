"""Reading a config.json into a frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def known_fields(cls: type[DataclassInstance], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `config` that `cls` has a field for; a config.json has keys for other programs too."""
    return {field.name: config[field.name] for field in fields(cls) if field.name in config}


def require_positive(config: DataclassInstance) -> None:
    """Raises ValueError: an integer field is not an integer, or is below 1; the message has its name and value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} is {value!r}, expected a positive integer")
