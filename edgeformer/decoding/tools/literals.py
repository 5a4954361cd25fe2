"""Grammar rules for values that are not JSON: Python literals, and strings in a template's own quotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeformer.decoding.tools.rules import Frame, Rules, either, json_rule, members, pattern, sequence, standard
from edgeformer.errors import InputError
from edgeformer.processing.tool_values import to_json

ANNOTATIONS = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "example", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
KEYWORDS: Mapping[str, set[str]] = {
    "string": {"minLength", "maxLength"},
    "integer": NUMBERS,
    "number": NUMBERS,
    "boolean": set(),
    "null": set(),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
SINGLE = r"/'(?:[^'\\\x00-\x1f]|\\[\\'\"nrt])*'/"
DOUBLE = r"/\"(?:[^\"\\\x00-\x1f]|\\[\\'\"nrt])*\"/"


class LiteralRules:
    """Turns schemas into rules. It obeys the keywords of `KEYWORDS`, `enum`, `const`, `anyOf`, `oneOf` and `$ref`."""

    def __init__(self, rules: Rules, prefix: str, root: Mapping[str, Any], quotes: tuple[str, str] | None) -> None:
        """`prefix` begins the names of rules; `quotes` enclose strings without escapes, None: those of Python."""
        self._rules = rules
        self._prefix = prefix
        self._root = root
        self._quotes = quotes
        self._count = 0
        self._depth = 0  # of lists and objects around the value: there, templates also use JSON's quotes
        self._references: dict[str, str] = {}

    def value(self, schema: Any) -> str:
        """An expression that matches a value of `schema`.

        Raises:
            InputError: the schema has a keyword that this way of writing values cannot obey.
        """
        schema = standard(schema)
        if schema is True or schema == {} or not isinstance(schema, Mapping):
            return self._anything()
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        options = schema.get("anyOf", schema.get("oneOf"))
        if options is not None:
            self._refuse(schema, {"anyOf", "oneOf"}, "a union")
            return either(*(self.value(one) for one in options))
        if "enum" in schema or "const" in schema:
            return either(*(self._rules.text(text) for one in schema.get("enum", [schema.get("const")])
                            for text in self._written(one)))  # fmt: skip
        types = schema.get("type")
        if types is None:
            self._refuse(schema, set(), "a value without a type")
            return self._anything()
        types = [types] if isinstance(types, str) else list(types)
        known = set().union(*(KEYWORDS.get(one, set()) for one in types))
        self._refuse(schema, known | {"type"}, "a value")
        return either(*(self._typed(one, schema) for one in types))

    def _refuse(self, schema: Mapping[str, Any], known: set[str], what: str) -> None:
        extra = sorted(set(schema) - known - ANNOTATIONS)
        if extra:
            raise InputError(
                f"The schema keyword {extra[0]!r} of {what} cannot be obeyed: this model's chat template writes "
                "arguments in another way than JSON. Leave the keyword out, or use tool_choice='auto'."
            )

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}_v{self._count}"

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "string":
            return self._string(schema.get("minLength", 0), schema.get("maxLength"))
        if kind in ("integer", "number"):
            return json_rule({"type": kind, **{key: schema[key] for key in NUMBERS if key in schema}})
        if kind == "boolean":
            return '("true" | "false" | "True" | "False")'
        if kind == "null":
            return '("null" | "None")'
        return self._list(schema) if kind == "array" else self._object(schema)

    def _string(self, least: int, most: int | None) -> str:
        count = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        if self._quotes is None:
            return f"({SINGLE.replace('*', count)} | {DOUBLE.replace('*', count)})"
        opening, closing = self._quotes
        if opening == closing and len(opening) == 1:
            own = f"/{pattern(opening)}[^{pattern(opening)}\\\\\\x00-\\x1f]{count}{pattern(opening)}/"
            return f"({own} | {DOUBLE.replace('*', count)})" if self._depth and opening != '"' else own
        return sequence(self._rules.text(opening), self._rules.until(self._name(), closing, f".{count}"))

    def _inner(self, schema: Any) -> str:
        self._depth += 1
        try:
            return self.value(schema)
        finally:
            self._depth -= 1

    def _list(self, schema: Mapping[str, Any]) -> str:
        item = self._inner(schema.get("items", {}))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        more = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        full = f'"[" {item} (/, ?/ {item}){more} "]"'
        return self._rules.add(self._name(), either(full, '"[]"') if not least else full)

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties", {})
        if not properties and schema.get("additionalProperties") is not False:
            value = self._inner(schema.get("additionalProperties", {}))
            pair = self._rules.add(self._name(), f"{self._any_key()} /: ?/ {value}")
            return self._rules.add(self._name(), f'"{{" ({pair} (/, ?/ {pair})*)? "}}"')
        pairs = [(f"{self._key(key)} /: ?/ {self._inner(one)}", key in schema.get("required", ()))
                 for key, one in properties.items()]  # fmt: skip
        return members(self._rules, self._name(), pairs, Frame('"{"', "/, ?/", '"}"', '"{}"'))

    def _key(self, key: str) -> str:
        return either(*(self._rules.text(text) for text in (key, f"'{key}'", to_json(key))))

    def _any_key(self) -> str:
        return r'/[A-Za-z_][\w.-]*|"[^"\\\x00-\x1f]*"|\'[^\'\\\x00-\x1f]*\'/'

    def _anything(self) -> str:
        name = f"{self._prefix}_any"
        if name not in self._references:
            self._references[name] = name
            scalars = [self._typed(kind, {}) for kind in ("string", "number", "boolean", "null")]
            self._rules.add(f"{name}_pair", f"{self._any_key()} /: ?/ {name}")
            many = f'"[" ({name} (/, ?/ {name})*)? "]" | "{{" ({name}_pair (/, ?/ {name}_pair)*)? "}}"'
            self._rules.add(name, f"{' | '.join(scalars)} | {many}")
        return name

    def _reference(self, reference: str) -> str:
        if reference not in self._references:
            target: Any = self._root
            for part in reference.removeprefix("#").strip("/").split("/"):
                target = target.get(part) if isinstance(target, Mapping) else None
            if target is None or not reference.startswith("#"):
                raise InputError(f"The schema refers to {reference!r}, which it does not have.")
            name = self._references[reference] = f"{self._prefix}_r{len(self._references)}"
            self._rules.add(name, self.value(target))
        return self._references[reference]

    def _written(self, value: Any) -> list[str]:
        """How a constant may be written."""
        if isinstance(value, str):
            if self._quotes is not None:
                own = self._quotes[0] + value + self._quotes[1]
                return [own, to_json(value)] if self._depth and len(self._quotes[0]) == 1 else [own]
            return [repr(value), to_json(value)]
        if value is None or isinstance(value, bool):
            return [to_json(value), repr(value)]
        return [to_json(value), repr(value)]
