"""Pieces of a grammar in llguidance's Lark dialect: literals with special tokens, rules, JSON schemas.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeformer.errors import InputError

ANY = "/(?s:.*)/"  # any text without special tokens


@dataclass(frozen=True)
class GrammarTokens:
    """The tokens that a grammar must name by number.

    Attributes:
        special: text -> id of the special tokens: text in a grammar never matches them.
        ends: ids that end an answer.
    """

    special: Mapping[str, int] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()


class Rules:
    """A grammar in the making."""

    def __init__(self, tokens: GrammarTokens) -> None:
        self.tokens = tokens
        self._rules: dict[str, str] = {}
        self._special = re.compile(
            "|".join(re.escape(text) for text in sorted(tokens.special, key=len, reverse=True)) or "(?!)"
        )

    def add(self, name: str, body: str, lazy: bool = False) -> str:
        """Adds a rule; returns its name."""
        self._rules[name] = f"{name}{'[lazy]' if lazy else ''}: {body}"
        return name

    def segments(self, text: str) -> list[str]:
        """`text`, divided at special tokens; these are parts of their own. No part is empty."""
        found: list[str] = []
        place = 0
        for match in self._special.finditer(text):
            found += [text[place : match.start()], match.group()]
            place = match.end()
        return [part for part in (*found, text[place:]) if part]

    def text(self, text: str) -> str:
        """An expression that matches exactly `text`."""
        return " ".join(
            f"<[{self.tokens.special[part]}]>" if part in self.tokens.special else quoted(part)
            for part in self.segments(text)
        )

    def until(self, name: str, text: str, characters: str = ".*") -> str:
        """An expression that matches any characters, up to the first `text` and with it."""
        parts = self.segments(text)
        if not parts:
            return self.add(name, f"/(?s:{characters})/")
        if parts[0] in self.tokens.special:
            self.add(f"{name}_text", f"/(?s:{characters})/")
            return sequence(f"{name}_text", self.text(text))
        self.add(name, f"/(?s:{characters}){pattern(parts[0])}/", lazy=True)
        return sequence(name, self.text("".join(parts[1:])))

    def source(self) -> str:
        """The grammar."""
        return "\n".join(["%llguidance {}", *self._rules.values(), ""])


def quoted(text: str) -> str:
    """A string of the grammar: that of JSON, but for the control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def sequence(*parts: str) -> str:
    """The parts one after another; empty ones are left out."""
    return " ".join(part for part in parts if part)


def either(*options: str) -> str:
    """One of the options; an empty one makes the others optional."""
    given = list(dict.fromkeys(option for option in options if option))
    if not given:
        return ""
    joined = given[0] if len(given) == 1 and len(given) == len(options) else f"({' | '.join(given)})"
    return joined if all(options) else f"{joined}?"


@dataclass(frozen=True)
class Frame:
    """The texts around the members of a list, as expressions: `start` member (`join` member)* `end`, or `empty`."""

    start: str
    join: str
    end: str
    empty: str | None  # None: there must be a member


def members(rules: Rules, prefix: str, pairs: Sequence[tuple[str, bool]], frame: Frame) -> str:
    """An expression for the pairs in their order; each is (expression, whether it must be there)."""
    after: str = frame.end  # what follows a member
    first: str | None = frame.empty  # what there is if no member came before
    for index, (pair, must) in reversed(list(enumerate(pairs))):
        name = rules.add(f"{prefix}_m{index}", pair)
        begins = sequence(frame.start, name, after)
        goes_on = sequence(frame.join, name, after)
        first = begins if must or first is None else either(begins, first)
        first = rules.add(f"{prefix}_f{index}", first)
        after = rules.add(f"{prefix}_n{index}", goes_on if must else either(goes_on, after))
    if first is None:
        raise InputError("A call without arguments is needed here, and the chat template does not show one.")
    return first


def pattern(text: str) -> str:
    """A regular expression, for between slashes, that matches `text`."""
    return "".join(_escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    if letter.isalnum() or letter in " _,;:'\"=<>%@!~`#&":
        return letter
    codes = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return codes.get(letter) or (f"\\{letter}" if letter.isascii() else letter)


def json_rule(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> str:
    """An expression that matches JSON of `schema`, on one line with at most one space behind a comma or colon.

    `root` is the schema whose definitions `schema` refers to.
    """
    made = dict(standard(schema))
    for name in ("$defs", "definitions"):
        if root is not None and name in root and name not in made:
            made[name] = standard(root[name])
    made["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    return f"%json {json.dumps(made, ensure_ascii=False)}"


def standard(schema: Any) -> Any:
    """`schema` with OpenAPI's `nullable` as JSON Schema says it."""
    if isinstance(schema, Mapping):
        made = {key: standard(value) for key, value in schema.items() if key != "nullable"}
        if schema.get("nullable") is True:
            return _or_null(made)
        # An argument may have the name "nullable": then it is no keyword.
        return (
            made
            if isinstance(schema.get("nullable", True), bool)
            else {**made, "nullable": standard(schema["nullable"])}
        )
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [standard(one) for one in schema]
    return schema


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    types = schema.get("type")
    if types is None or "enum" in schema or "const" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [*([types] if isinstance(types, str) else types), "null"]}
