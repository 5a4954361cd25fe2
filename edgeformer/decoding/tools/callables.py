"""The schema of a Python function, from its signature and its docstring.

As `transformers.utils.get_json_schema` (Google style docstrings: `Args:`, `Returns:`, `(choices: [...])`), with two
differences: an argument needs no description, and types that JSON does not have are refused.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeformer.errors import InputError

TYPES: Mapping[Any, str] = {
    int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", list: "array", tuple: "array",
    dict: "object",
}  # fmt: skip
SECTION = re.compile(r"^[ \t]*(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?):[ \t]*$", re.MULTILINE)
ARGUMENT = re.compile(r"^[ \t]*(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)$")
CHOICES = re.compile(r"\(choices:\s*(\[.*?\])\)\s*$", re.DOTALL | re.IGNORECASE)


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "description", "parameters"}} of a Python function.

    Raises:
        InputError: an argument has no type hint, or one that JSON has no type for; there is no docstring; the function
            takes `*args` or `**kwargs`.
    """
    name = getattr(function, "__name__", type(function).__name__)
    document = inspect.getdoc(function)
    if not document:
        raise InputError(f"The function {name}() has no docstring; the model needs a description of it.")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError, NameError) as error:
        raise InputError(f"The function {name}() cannot be described: {error}.") from error
    description, described = _document(document)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InputError(f"The function {name}() takes {parameter}; a tool's arguments need names.")
        if key not in hints:
            raise InputError(f"The argument {key!r} of {name}() has no type hint.")
        properties[key] = _typed(hints[key], f"The argument {key!r} of {name}()")
        if parameter.default is parameter.empty:
            required.append(key)
        text, choices = _choices(described.get(key, ""), f"The argument {key!r} of {name}()")
        if choices is not None:
            properties[key]["enum"] = choices
        if text:
            properties[key]["description"] = text
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _typed(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is None and hint in TYPES:
        return {"type": TYPES[hint]}
    if origin is typing.Literal:
        kinds = {TYPES[type(value)] for value in inner}
        return {"type": kinds.pop() if len(kinds) == 1 else sorted(kinds), "enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return _union(inner, where)
    if origin in (list, Sequence):
        return {"type": "array", "items": _typed(inner[0], where)}
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return {"type": "array", "items": _typed(inner[0], where)}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_typed(one, where) for one in inner]}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _typed(inner[1], where)}
    raise InputError(
        f"{where} has the type {getattr(hint, '__name__', hint)}; expected int, float, str, bool, None, list, tuple, "
        "dict, Literal, or a union of them."
    )


def _union(members: Sequence[Any], where: str) -> dict[str, Any]:
    schemas = [_typed(one, where) for one in members if one is not type(None)]
    if len(schemas) == 1:
        made = schemas[0]
    elif all(set(one) == {"type"} and isinstance(one["type"], str) for one in schemas):
        made = {"type": sorted(one["type"] for one in schemas)}
    else:
        made = {"anyOf": schemas}
    if len(schemas) < len(members):
        made["nullable"] = True
    return made


def _document(text: str) -> tuple[str, dict[str, str]]:
    """The description of a function, and those of its arguments."""
    parts = SECTION.split(text)
    described: dict[str, str] = {}
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title.startswith("Arg"):
            described |= _arguments(body)
    return parts[0].strip(), described


def _arguments(body: str) -> dict[str, str]:
    lines = inspect.cleandoc("\n" + body).splitlines()
    found: dict[str, list[str]] = {}
    last: list[str] = []
    for line in lines:
        begins = ARGUMENT.match(line) if not line[:1].isspace() else None
        if begins:
            last = found.setdefault(begins.group(1), [])
            last.append(begins.group(2))
        else:
            last.append(line.strip())
    return {key: " ".join(part for part in parts if part) for key, parts in found.items()}


def _choices(text: str, where: str) -> tuple[str, list[Any] | None]:
    found = CHOICES.search(text)
    if found is None:
        return text, None
    try:
        choices = json.loads(found.group(1))
    except ValueError as error:
        raise InputError(f"{where} has the choices {found.group(1)}, expected a JSON list.") from error
    return text[: found.start()].strip(), choices
