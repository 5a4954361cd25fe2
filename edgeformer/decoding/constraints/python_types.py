"""JSON Schemas from what callers have: mappings, JSON text, pydantic models, dataclasses and other types."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from edgeformer.errors import InputError, first_line

_LARGEST = 1_000_000  # characters of a schema or grammar


def parsed_schema(schema: Any) -> Any:
    """The JSON Schema that `schema` is or stands for, as parsed JSON.

    `schema` is a mapping, true or false, JSON text, or a type for pydantic's TypeAdapter: a model, a dataclass, a
    TypedDict, `list[Model]`, a union, ...

    Raises:
        InputError: it is none of these, or pydantic is needed and not installed, or pydantic refuses it.
    """
    if isinstance(schema, bool):
        return schema
    if isinstance(schema, str | bytes):
        return parsed_json(schema if isinstance(schema, str) else schema.decode(errors="replace"))
    if isinstance(schema, Mapping):
        try:
            return parsed_json(json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"The JSON schema cannot be written as JSON: {first_line(error)}.") from error
    if isinstance(schema, type) or typing.get_origin(schema) is not None:
        return _of_type(schema)
    if isinstance(schema, list | tuple):
        names = ", ".join(getattr(part, "__name__", "...") for part in schema) or "Model"
        raise InputError(f"json_schema is a {type(schema).__name__}; for a list of items give list[{names}].")
    if dataclasses.is_dataclass(schema) or hasattr(schema, "model_json_schema"):
        raise InputError(f"json_schema is an object of {type(schema).__name__}; give the class itself.")
    raise InputError(
        f"json_schema is {type(schema).__name__}, expected a dict, JSON text, a pydantic model, a dataclass, a "
        f"TypedDict or another type."
    )


def parsed_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: it is not JSON, too long, or has NaN or Infinity.
    """
    check_length(text, "The JSON schema")

    def refuse(name: str) -> None:
        raise InputError(f"The JSON schema has {name}, which is not JSON.")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InputError(f"The JSON schema is not JSON: {error}.") from error
    except RecursionError as error:
        raise InputError("The JSON schema is nested too deep.") from error


def check_length(text: str, what: str) -> None:
    """
    Raises:
        InputError: `text` is longer than a million characters.
    """
    if len(text) > _LARGEST:
        raise InputError(f"{what} has {len(text):,} characters, the most that is supported is {_LARGEST:,}.")


def _of_type(schema: Any) -> Any:
    try:
        import pydantic
    except ImportError as error:
        raise InputError(
            f"json_schema is the type {getattr(schema, '__name__', schema)}, which needs pydantic: pip install "
            f"pydantic, or give the schema as a dict."
        ) from error
    try:
        return pydantic.TypeAdapter(schema).json_schema()
    except (pydantic.errors.PydanticUserError, TypeError, NameError) as error:
        raise InputError(f"pydantic makes no JSON schema of {schema}: {first_line(error)}") from error
