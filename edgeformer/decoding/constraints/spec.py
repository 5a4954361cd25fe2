"""The constraint that a call asks for, from its arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeformer.decoding.constraints.json_schema import checked
from edgeformer.decoding.constraints.python_types import check_length, parsed_json, parsed_schema
from edgeformer.errors import InputError, first_line

Kind = Literal["json", "regex", "lark", "choices"]

_GBNF_RULE = re.compile(r"(?m)^\s*[A-Za-z0-9_-]+\s*::=")
_JSON_RULE = re.compile(r"%json\s*(?=[{\[tf])")
_GBNF_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_MOST_WHITESPACE = 1000


@dataclass(frozen=True)
class ConstraintSpec:
    """What an answer must be: a checked JSON Schema, a regular expression, a Lark grammar or a list of choices.

    `text` is the schema with llguidance's options, the expression, the grammar, or the list as JSON. Hashable.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in self.text):
            raise InputError("The constraint holds a lone surrogate, which is no character; take it out.")

    @classmethod
    def of(
        cls,
        *,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        whitespace: int | None = None,
    ) -> ConstraintSpec | None:
        """The constraint of these arguments of a call; None if all are None or `response_format` asks for text.

        Args:
            json_schema: A JSON Schema: a dict, JSON text, a pydantic model, a dataclass, a TypedDict, `list[Model]`.
                The answer is JSON of one line, its properties in the schema's order; see `json_schema.py`.
            regex: A regular expression (syntax of Rust's `regex`: no look-around, no backreferences) that the whole
                answer matches.
            grammar: A grammar with the rule `start` in llguidance's form of Lark, or with the rule `root` in GBNF
                (llama.cpp). `%json {...}` in a Lark grammar is a JSON Schema, checked as `json_schema`.
            choices: Texts, one of which is the answer.
            response_format: As in OpenAI's API: {"type": "text"}, {"type": "json_object"} (any object) or
                {"type": "json_schema", "json_schema": {"name": ..., "schema": ..., "strict": ...}}. The schema is
                enforced with and without `strict`.
            whitespace: Of JSON: None allows one space after a comma and a colon, 0 none, N up to N spaces, tabs and
                line breaks at each place where JSON allows them.

        Raises:
            InputError: more than one is given, or one is malformed or asks for what cannot be enforced.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choices": choices}
        given["response_format"] = None if _asks_for_text(response_format) else response_format
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise InputError(f"An answer has one constraint at most; the call has {' and '.join(names)}.")
        if not names:
            return None
        options = _json_options(whitespace)
        if regex is not None:
            return cls("regex", _checked_text(regex, "regex"))
        if grammar is not None:
            return cls("lark", lark_of(_checked_text(grammar, "grammar"), options))
        if choices is not None:
            return cls("choices", json.dumps(_checked_choices(choices)))
        schema = parsed_schema(json_schema) if json_schema is not None else _schema_of_format(given["response_format"])
        return cls("json", json.dumps({**checked(schema), "x-guidance": options}, ensure_ascii=False))


def lark_of(text: str, options: Mapping[str, Any]) -> str:
    """The Lark grammar of a Lark or GBNF grammar, with checked JSON Schemas.

    Raises:
        InputError: GBNF is malformed, or a JSON Schema is refused.
    """
    if _GBNF_RULE.search(text):
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return gbnf_to_lark(_GBNF_ESCAPE.sub(_plain_escape, text))
        except Exception as error:  # the converter raises bare Exception, and IndexError at an early end
            raise InputError(f"The GBNF grammar is malformed: {first_line(error) or 'it ends too early'}.") from error
    return "".join(_with_checked_json(text, options))


def _with_checked_json(text: str, options: Mapping[str, Any]) -> Iterator[str]:
    done = 0
    for found in _JSON_RULE.finditer(text):
        if found.start() < done:  # inside a schema
            continue
        try:
            _, end = json.JSONDecoder().raw_decode(text, found.end())
        except json.JSONDecodeError as error:
            raise InputError(f"The JSON schema of a %json rule is not JSON: {error}.") from error
        schema = checked(parsed_json(text[found.end() : end]))
        yield text[done : found.start()]
        yield "%json " + json.dumps({**schema, "x-guidance": dict(options)})
        done = end
    yield text[done:]


def _plain_escape(found: re.Match[str]) -> str:
    r"""The text of an escape with \u or \U: llguidance's converter writes them as its Lark reader refuses."""
    digits = found[1] or found[2]
    if digits is None:
        return found[0]
    number = int(digits, 16)
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise InputError(f"The GBNF grammar has {found[0]}, which is no character.")
    return f"\\x{number:02x}" if number < 0x80 else chr(number)


def _checked_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}, expected str.")
    check_length(text, f"The argument {name}")
    return text


def _checked_choices(choices: Any) -> list[str]:
    if isinstance(choices, str | bytes | Mapping) or not isinstance(choices, Sequence):
        raise InputError(f"choices is {type(choices).__name__}, expected a list of texts.")
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise InputError("choices must be texts that are not empty, at least one.")
    if any(0xD800 <= ord(letter) < 0xE000 for text in choices for letter in text):
        raise InputError("A choice holds a lone surrogate, which is no character.")
    check_length("".join(choices), "All choices together")
    return list(dict.fromkeys(choices))


def _asks_for_text(response_format: Any) -> bool:
    return isinstance(response_format, Mapping) and response_format.get("type") == "text"


def _schema_of_format(response_format: Any) -> Any:
    """The JSON Schema of OpenAI's `response_format`."""
    if not isinstance(response_format, Mapping):
        raise InputError(f"response_format is {type(response_format).__name__}, expected a mapping.")
    kind = response_format.get("type")
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise InputError(f"response_format has the type {kind!r}, expected text, json_object or json_schema.")
    named = response_format.get("json_schema")
    if not isinstance(named, Mapping) or "schema" not in named:
        raise InputError('response_format has no {"json_schema": {"name": ..., "schema": {...}}}.')
    unknown = sorted(set(named) - {"name", "description", "schema", "strict"})
    if unknown or not isinstance(named.get("strict", False), bool | None):
        raise InputError(f"response_format's json_schema has {', '.join(unknown) or 'a strict that is no bool'}.")
    return parsed_schema(named["schema"])


def _json_options(whitespace: int | None) -> dict[str, Any]:
    """The `x-guidance` of a schema: bounded whitespace, and nothing approximated."""
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}
    if whitespace is None:
        return options | {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    if isinstance(whitespace, bool) or not isinstance(whitespace, int) or not 0 <= whitespace <= _MOST_WHITESPACE:
        raise InputError(
            f"whitespace is {whitespace!r}, expected a whole number from 0 to {_MOST_WHITESPACE}, or None."
        )
    if whitespace == 0:
        return options | {"whitespace_flexible": False}
    return options | {"whitespace_pattern": rf"[\x20\x0A\x09]{{1,{whitespace}}}"}
