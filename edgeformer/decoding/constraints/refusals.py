"""Where in a JSON Schema lies what llguidance refuses: its messages name no place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# A part of llguidance's message -> the keywords that it is about, and what to do.
_CAUSES = (
    ("oneOf", ("oneOf",), "It is not proven that only one can fit; use anyOf, or a required const that differs."),
    ("not disjoint", ("patternProperties",), "One name may fit both; anchor the patterns with ^ and $."),
    ("min/maxProperties", ("minProperties", "maxProperties"), "Name all properties in required."),
    ("multipleOf", ("multipleOf",), "Use a number with fewer digits."),
    ("circular references", ("$ref",), "Move the keywords beside $ref into the schema that it names."),
    ("float range", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "Use a smaller range."),
    ("regex", ("pattern", "patternProperties"), "Look-around, backreferences and \\b are unsupported."),
    ("lookaround", ("pattern", "patternProperties"), "Look-around, anchors inside and \\b are unsupported."),
)
_MOST = 3  # paths in a message


def blamed(schema: Any, problem: str) -> str:
    """The paths of the keywords that `problem` is about, and what to do; empty if that is not known."""
    for part, keywords, advice in _CAUSES:
        if part in problem:
            paths = [path for path, keyword in _keywords(schema, "#") if keyword in keywords]
            if paths:
                more = " or others" if len(paths) > _MOST else ""
                return f"{' or '.join(paths[:_MOST])}{more}. {advice} The engine says: "
    return ""


def _keywords(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, name) of all members of objects."""
    if isinstance(value, dict):
        for name, part in value.items():
            place = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
            yield place, name
            yield from _keywords(part, place)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _keywords(part, f"{path}/{number}")
