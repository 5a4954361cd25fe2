r"""A JSON Schema, checked and rewritten for llguidance: what its grammar does not enforce is refused, with its path.

llguidance refuses most of what it cannot do. It ignores keywords that the schema's draft does not know, formats of
numbers, and a few details below; a schema must mean the same with and without the model, so all of them are refused
here. Keywords: JSON Schema draft 2020-12, with `items` as a list, `additionalItems`, boolean `exclusiveMinimum` and
`definitions` of the older drafts.

The grammar fixes the order of properties: those of `properties` in their order, then those of `required` that
`properties` lacks, then others. With `allOf` and `$ref`, the order is that in which the schemas are written.
Escapes in strings are \n \r \b \t \f \\ \" alone: with \u one could write the name of a property in a second
way. Control characters are therefore not written.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from edgeformer.decoding.constraints.json_formats import ENFORCED, STRICTER
from edgeformer.decoding.constraints.json_one_of import exclude_each_other
from edgeformer.errors import InputError

# What a keyword's value is: a schema, a list of them, a mapping of them, or something else.
_SCHEMA = frozenset(["additionalProperties", "items", "additionalItems"])
_SCHEMAS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
_NAMED_SCHEMAS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
_VALUES = frozenset(
    ["type", "enum", "const", "$ref", "$anchor", "required", "minProperties", "maxProperties", "minItems", "maxItems",
     "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
     "multipleOf"]
)  # fmt: skip
KEYWORDS = _SCHEMA | _SCHEMAS | _NAMED_SCHEMAS | _VALUES
ANNOTATIONS = frozenset(
    ["$comment", "title", "description", "default", "examples", "example", "readOnly", "writeOnly", "deprecated",
     "discriminator", "externalDocs", "xml"]
)  # fmt: skip
_NO_EFFECT: Mapping[str, Any] = {
    "uniqueItems": False, "nullable": False, "unevaluatedProperties": True, "unevaluatedItems": True,
    "propertyNames": True,
}  # fmt: skip
UNSUPPORTED = {
    "not": "say what is allowed instead",
    "if": "use anyOf with one schema for each case",
    "then": "use anyOf with one schema for each case",
    "else": "use anyOf with one schema for each case",
    "uniqueItems": "a grammar cannot compare items; for a Python type, use list instead of set",
    "contains": "use prefixItems or items",
    "minContains": "use prefixItems or items",
    "maxContains": "use prefixItems or items",
    "propertyNames": "use patternProperties with additionalProperties: false",
    "dependentRequired": "use anyOf with one schema for each case",
    "dependentSchemas": "use anyOf with one schema for each case",
    "dependencies": "use anyOf with one schema for each case",
    "unevaluatedProperties": "use additionalProperties: false in each object",
    "unevaluatedItems": "use items: false beside prefixItems",
    "$dynamicRef": "use $ref",
    "$dynamicAnchor": "use $anchor",
    "$recursiveRef": "use $ref",
    "$recursiveAnchor": "use $ref",
    "$vocabulary": "remove it",
    "contentEncoding": "describe the text with pattern",
    "contentMediaType": "describe the text with pattern",
    "contentSchema": "describe the value as JSON, not as text",
    "nullable": 'write "type": [..., "null"]',
    "divisibleBy": "use multipleOf",
    "disallow": "say what is allowed instead",
    "extends": "use allOf",
}
_DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09|draft/2020-12)/schema#?")
_EXACT = 2**53  # larger integers are not exact in llguidance, which computes with float64
_DEEPEST = 100  # nested values; llguidance reads 127
_COUNTS = frozenset(["minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"])
_NUMBERS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
_LARGEST_COUNT = 100_000  # of a single repetition; llguidance's own limits end a compilation later

Path = tuple[str, ...]


def checked(schema: Any) -> dict[str, Any]:
    """`schema`, a parsed JSON Schema, as a schema that llguidance enforces completely.

    Raises:
        InputError: it is no JSON Schema, or a part of it cannot be enforced; the message has its path.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    walk = _Walk(schema)
    found = walk.schema(schema, ())
    walk.check_references()
    assert isinstance(found, dict)
    return found


@dataclass
class _Walk:
    """Copies a schema, and collects what `$ref` may name."""

    root: Any
    places: set[Path] = field(default_factory=set)  # of all schemas that were copied
    anchors: set[str] = field(default_factory=set)
    references: list[tuple[Path, str]] = field(default_factory=list)

    def schema(self, schema: Any, path: Path) -> dict[str, Any] | bool:
        if len(path) > _DEEPEST:
            raise InputError(f"The JSON schema is nested more than {_DEEPEST} deep, the most that is supported.")
        self.places.add(path)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise _error(path, f"is {_short(schema)}, expected a schema: an object, true or false")
        found: dict[str, Any] = {}
        for keyword, value in schema.items():
            self._keyword(found, keyword, value, path)
        _check_items(schema, path)
        _check_property_count(schema, path)
        options = schema.get("oneOf")
        if isinstance(options, list) and "anyOf" not in schema and exclude_each_other(options, self.root):
            found = {"anyOf" if keyword == "oneOf" else keyword: value for keyword, value in found.items()}
        return _with_format(found, path)

    def _keyword(self, found: dict[str, Any], keyword: str, value: Any, path: Path) -> None:
        place = (*path, keyword)
        if keyword in ("$schema", "$id", "id"):
            _check_identity(keyword, value, path)
        elif keyword in ANNOTATIONS or keyword.startswith("x-") or _without_effect(keyword, value):
            return
        elif keyword not in KEYWORDS:
            raise _error(place, _unsupported(keyword))
        elif keyword in _SCHEMAS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise _error(place, f"is {_short(value)}, expected a list of schemas")
            found[keyword] = [self.schema(part, (*place, str(i))) for i, part in enumerate(value)]
        elif keyword in _SCHEMA:
            found[keyword] = self.schema(value, place)
        elif keyword in _NAMED_SCHEMAS:
            if not isinstance(value, Mapping):
                raise _error(place, f"is {_short(value)}, expected an object of schemas")
            schemas = {name: self.schema(part, (*place, name)) for name, part in value.items()}
            found[keyword] = _ecma_names(schemas) if keyword == "patternProperties" else schemas
        else:
            found[keyword] = self._value(keyword, value, place)

    def _value(self, keyword: str, value: Any, place: Path) -> Any:
        if keyword == "$ref":
            self.references.append((place, str(value)))
        elif keyword == "$anchor":
            self.anchors.add(str(value))
        elif keyword == "const" or keyword == "enum":
            return _literal(value, place)
        elif keyword == "pattern" and isinstance(value, str):
            return _ecma(value)
        elif keyword in _COUNTS:
            return _count(value, place)
        elif keyword in _NUMBERS and not isinstance(value, bool):
            return _number(value, place)
        return value

    def check_references(self) -> None:
        """Every `$ref` names a schema that was copied, so that nothing unchecked is compiled."""
        for place, reference in self.references:
            if not reference.startswith("#"):
                raise _error(place, f"is {_short(reference)}; only references inside the schema (#...) are supported")
            pointer = unquote(reference[1:])
            if pointer and not pointer.startswith("/"):
                known = pointer in self.anchors
            else:
                parts = pointer.split("/")[1:]
                known = tuple(part.replace("~1", "/").replace("~0", "~") for part in parts) in self.places
            if not known:
                raise _error(place, f"is {_short(reference)}, and the schema has no schema there; put it in $defs")


def _check_identity(keyword: str, value: Any, path: Path) -> None:
    """The draft must be known; an `$id` below the root would change what `$ref` means."""
    if keyword == "$schema":
        if not isinstance(value, str) or not _DRAFTS.fullmatch(value):
            raise _error((*path, keyword), f"is {_short(value)}, expected draft 2020-12, 2019-09, 7, 6 or 4")
    elif path:
        raise _error((*path, keyword), "is supported at the root only; remove it, and use $anchor or #/$defs/...")


def _without_effect(keyword: str, value: Any) -> bool:
    return keyword in _NO_EFFECT and isinstance(value, bool) and value == _NO_EFFECT[keyword]


def _unsupported(keyword: str) -> str:
    if keyword in UNSUPPORTED:
        return f"is a keyword that the grammar cannot enforce; {UNSUPPORTED[keyword]}"
    close = difflib.get_close_matches(keyword, [*KEYWORDS, *UNSUPPORTED], 1)
    more = f"did you mean {close[0]}?" if close else "remove it, or name it x-... if it is a comment"
    return f"is no keyword of JSON Schema; {more}"


def _check_items(schema: Mapping[str, Any], path: Path) -> None:
    """Refuses `prefixItems`, which llguidance ignores, beside the keywords of older drafts."""
    if "prefixItems" in schema and ("additionalItems" in schema or isinstance(schema.get("items"), list)):
        raise _error((*path, "prefixItems"), "stands beside the items of an older draft; use prefixItems and items")


def _check_property_count(schema: Mapping[str, Any], path: Path) -> None:
    """A grammar cannot know whether two of the other properties have one name, which JSON then counts once."""
    least, required = schema.get("minProperties", 0), schema.get("required", ())
    if isinstance(least, int | float) and least > 1:
        sure = len(set(map(str, required))) if isinstance(required, list) else 0
        if least - sure > 1:
            raise _error(
                (*path, "minProperties"), f"is {least} with {sure} required names; name all but one of them in required"
            )


def _with_format(schema: dict[str, Any], path: Path) -> dict[str, Any]:
    """`format` counts for strings alone, and is refused where nothing enforces it."""
    if "format" not in schema:
        return schema
    name, types = schema["format"], schema.get("type", "string")
    if isinstance(types, str | list) and "string" not in ([types] if isinstance(types, str) else types):
        return {key: value for key, value in schema.items() if key != "format"}
    if name not in ENFORCED:
        known = ", ".join(sorted(ENFORCED))
        raise _error((*path, "format"), f"is {_short(name)}; the grammar enforces {known}. Use pattern instead")
    more = [{"pattern": pattern} for pattern in STRICTER.get(name, ())]
    return schema | ({"allOf": [*schema.get("allOf", ()), *more]} if more else {})


# Classes of characters, as ECMA 262 and Python's re both understand them: ECMA 262, which JSON Schema names, has ASCII
# letters and digits and U+FEFF as white space; validators in Python have Unicode.
_SPACES = r"\t\n\f\r \u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000"
_CLASSES = {
    r"\s": f"[{_SPACES}]",
    r"\S": rf"[^{_SPACES}\v\uFEFF\u001C-\u001F\u0085]",
    r"\W": r"[^\p{L}\p{M}\p{N}\p{Pc}]",
    r"\D": r"[^\p{Nd}]",
}


def _ecma(pattern: str) -> str:
    r"""A pattern for llguidance, which reads \w and \d as ECMA 262."""
    return re.sub(r"\\.", lambda found: _CLASSES.get(found[0], found[0]), pattern, flags=re.DOTALL)


def _ecma_names(schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {_ecma(pattern): schema for pattern, schema in schemas.items()}


def _literal(value: Any, place: Path) -> Any:
    """A value of `const` or `enum`, if a grammar can write it exactly."""
    if isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, list):
        return [_literal(part, (*place, str(i))) for i, part in enumerate(value)]
    elif isinstance(value, Mapping):
        for name in value:
            _check_text(name, place)
        return {name: _literal(part, (*place, name)) for name, part in value.items()}
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value, place)
    return value


def _check_text(text: str, place: Path) -> None:
    if re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]", text):
        raise _error(place, f"is {_short(text)}; the grammar writes no control characters")


def _number(value: Any, place: Path) -> Any:
    if not isinstance(value, int | float):
        raise _error(place, f"is {_short(value)}, expected a number")
    if abs(value) > _EXACT:
        raise _error(place, f"is {value}; the grammar is exact up to {_EXACT} (2**53) only")
    return 0 if value == 0 else value  # -0.0


def _count(value: Any, place: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise _error(place, f"is {_short(value)}, expected a whole number from 0")
    if value > _LARGEST_COUNT:
        raise _error(place, f"is {value}, the most that is supported is {_LARGEST_COUNT}")
    return int(value)


def _error(place: Path, problem: str) -> InputError:
    pointer = "/".join(["#", *(part.replace("~", "~0").replace("/", "~1") for part in place)])
    return InputError(f"JSON schema: {pointer} {problem}.")


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
