"""Proof that at most one schema of a `oneOf` can fit, so that `anyOf` says the same.

llguidance proves it too, but not through `$ref`, which is how pydantic writes unions with a discriminator.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_TYPES = ("null", "boolean", "number", "string", "array", "object")


def exclude_each_other(schemas: Sequence[Any], root: Any) -> bool:
    """Whether no value fits two of `schemas`, which are parts of the schema `root`.

    Their types differ, or they are objects that require one property with different texts.
    """
    found = [_resolved(schema, root) for schema in schemas]
    return all(_disjoint(a, b, root) for a, b in itertools.combinations(found, 2))


def _disjoint(a: Any, b: Any, root: Any) -> bool:
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return False
    if not _types(a) & _types(b):
        return True
    if _types(a) != {"object"} or _types(b) != {"object"}:
        return False
    shared = _required(a) & _required(b)
    texts = ((_texts(a, name, root), _texts(b, name, root)) for name in shared)
    return any(one is not None and other is not None and not one & other for one, other in texts)


def _types(schema: Mapping[str, Any]) -> set[str]:
    named = schema.get("type", list(_TYPES))
    named = [named] if isinstance(named, str) else named if isinstance(named, list) else list(_TYPES)
    return {"number" if name == "integer" else str(name) for name in named}


def _required(schema: Mapping[str, Any]) -> set[str]:
    names = schema.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _texts(schema: Mapping[str, Any], name: str, root: Any) -> set[str] | None:
    """The texts that a property may be; None if it may be anything else."""
    properties = schema.get("properties")
    value = _resolved(properties.get(name) if isinstance(properties, Mapping) else None, root)
    if not isinstance(value, Mapping):
        return None
    values = [value["const"]] if "const" in value else value.get("enum")
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        return None
    return set(values)


def _resolved(schema: Any, root: Any) -> Any:
    """The schema that `$ref` names; what stands beside a `$ref` can only exclude more."""
    for _ in range(10):  # a chain of references; one that never ends proves nothing
        if not (isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str)):
            return schema
        schema = _at(schema["$ref"], root)
    return None


def _at(reference: str, root: Any) -> Any:
    found = root
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found if reference.startswith("#/") else None
