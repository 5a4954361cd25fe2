"""What a call may ask for: schemas of all kinds, expressions, grammars, choices; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from enum import Enum
from typing import Annotated, Literal

import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("transformers")
pydantic = pytest.importorskip("pydantic")

import typing_extensions
from support.json_schema_suite import accepts, letters

from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint
from edgeformer.errors import InputError

EOS = 0


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = pydantic.Field(ge=1, le=9)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, pydantic.StringConstraints(pattern="^[A-Z][a-z]{1,5}$")]


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=8, description="of the person")
    colour: Colour
    pet: Cat | Dog = pydantic.Field(discriminator="kind")
    friends: list[Cat] = pydantic.Field(max_length=2)
    note: str | None = pydantic.Field(default=None, max_length=3)


@dataclasses.dataclass
class Point:
    x: int
    y: Literal[1, 2]


class Named(typing_extensions.TypedDict):
    label: Colour


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@pytest.fixture(scope="module")
def compiled(tokenizer):
    def get(**arguments):
        spec = ConstraintSpec.of(**arguments)
        assert spec is not None
        return compile_constraint(tokenizer, [EOS], tokenizer.size, spec)

    return get


def walk(grammar, tokenizer, seed):
    draw, constraint, ids = random.Random(seed), grammar.start(), []
    while not constraint.ended and not (constraint.may_end and draw.random() < 0.5):
        ids.append(int(draw.choice([t for t in np.flatnonzero(constraint.allowed_mask()) if t != EOS])))
        constraint.accept(ids[-1])
        if len(ids) > 600:  # a number without bound: the shortest way out
            return None
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", [Person, Annotated[Cat | Dog, pydantic.Field(discriminator="kind")], list[Dog]])
def test_answers_of_a_pydantic_model_are_accepted_by_it(compiled, tokenizer, kind):
    adapter = pydantic.TypeAdapter(kind)
    grammar = compiled(json_schema=kind)
    texts = [text for seed in range(10) if (text := walk(grammar, tokenizer, seed)) is not None]
    assert texts
    for text in texts:
        adapter.validate_json(text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Point, ['{"x": 5, "y": 1}'], ['{"x": 5, "y": 3}', '{"x": "a", "y": 1}', '{"x": 5}']),
        (Named, ['{"label": "red"}'], ['{"label": "green"}', "{}"]),
        (list[Point], ["[]", '[{"x": 5, "y": 1}]'], ['{"x": 5, "y": 1}']),
        (int, ["5"], ['"5"']),
        (Colour, ['"red"'], ['"green"']),
        (dict[str, int], ['{"a": 1}'], ['{"a": "b"}']),
        (True, ["1", '{"a":[null]}'], ["nul"]),
        ('{"type": "null"}', ["null"], ["1"]),
        ({"type": "object"}, ["{}"], ["[]"]),
    ],
)
def test_types_and_texts_are_schemas(compiled, tokenizer, kind, good, bad):
    grammar = compiled(json_schema=kind)
    assert all(accepts(grammar, tokenizer, text) for text in good)
    assert not any(accepts(grammar, tokenizer, text) for text in bad)


def test_response_format_is_that_of_openai(compiled, tokenizer):
    assert ConstraintSpec.of(response_format={"type": "text"}) is None
    assert ConstraintSpec.of() is None
    grammar = compiled(response_format={"type": "json_object"})
    assert accepts(grammar, tokenizer, '{"a": [1, null]}')
    assert not accepts(grammar, tokenizer, "[1]")
    for strict in (True, False, None):
        named = {"name": "n", "schema": {"type": "null"}, "strict": strict}
        assert accepts(compiled(response_format={"type": "json_schema", "json_schema": named}), tokenizer, "null")


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('start: "a" x?\nx: "b" x | "c"', ["a", "abbc"], ["ab", "b"]),
        ('start: A+\nA: /[0-9]/', ["1", "12"], ["", "a"]),
        ('root ::= "a" b+ # comment\nb ::= [0-9] | "x"', ["a1x"], ["a", "ay"]),
        ('root ::= [a-z]+ " " ("yes" | "no")', ["ab yes"], ["ab", "ab maybe"]),
        ('root ::= "\\"" [^"\\\\]* "\\""', ['"ab"', '""'], ['"', '"a"b"']),
        ('root ::= foo-bar{2,3}\nfoo-bar ::= "z"', ["zz", "zzz"], ["z", "zzzz"]),
        ('root ::= "\\u0041" [\\u00e9-\\u00ff] "\\U0001F642" "\\\\u0041" "\\x5d"', ["Aé🙂\\u0041]"], ["Ae🙂\\u0041]"]),
        ('start: "::= " /[a-z]/', ["::= a"], ["a"]),
        ('start: "<" %json {"type": "integer", "minimum": 3} ">"', ["<3>", "<12>"], ["<2>", "< 3>", "3"]),
        ('start: %json {"properties": {"a": {"enum": ["%json {"]}}, "required": ["a"], "type": "object"} "!"',
         ['{"a":"%json {"}!'], ['{"a":"x"}!']),
    ],
)  # fmt: skip
def test_grammars_in_both_syntaxes(compiled, tokenizer, grammar, good, bad):
    made = compiled(grammar=grammar)
    assert [text for text in good if not accepts(made, tokenizer, text)] == []
    assert [text for text in bad if accepts(made, tokenizer, text)] == []


TEXTS = [
    "",
    "a",
    "A",
    "ab",
    "abc",
    "1",
    "12",
    "a1",
    "é",
    "🙂",
    "a\nb",
    "a b",
    "-",
    "]",
    "[",
    "/",
    "\\",
    "x/y",
    "٣",
    "_",
]


@pytest.mark.parametrize(
    "expression",
    ["[a-z]+", "^ab$", "a|ab|abc", r"\d+", r"\w*", "a{1,2}b?", r"[^a-z]", r"\\|/|x/y", "(?:a|b)*c?", "é|🙂", r"[\]\[-]",
     "(?i)a", r"[^\W\d]", "", r"\S", "a\nb", "a[\\s]b"],
)  # fmt: skip
def test_an_expression_matches_what_python_matches_as_a_whole(compiled, tokenizer, expression):
    grammar = compiled(regex=expression)
    found = [text for text in TEXTS if accepts(grammar, tokenizer, text)]
    assert found == [text for text in TEXTS if re.fullmatch(expression, text)]


def test_choices_are_exact(compiled, tokenizer):
    choices = [
        "yes",
        "yes, sir",
        "no",
        'a "quoted" \\ text',
        "tab\t, line\n, \x7f\x01 and é🙂",
        " a",
        "a|b",
        "/x/i",
        "yes",
    ]
    grammar = compiled(choices=choices)
    assert all(accepts(grammar, tokenizer, text) for text in choices)
    assert not any(accepts(grammar, tokenizer, text) for text in ["", "y", "yes,", "yes, sirx", "a", "b", "x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regex": "a", "choices": ["a"]}, "has regex and choices"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "has regex and response_format"),
        ({"regex": 3}, "regex is int, expected str"),
        ({"regex": "("}, "regular expression is refused"),
        ({"regex": r"(?P<x>a)\1"}, "backreferences are not supported"),
        ({"regex": r"\bx"}, "lookarounds not supported"),
        ({"regex": "[a&&b]"}, "No answer can fulfil the regular expression"),
        ({"grammar": "start: ("}, "grammar is refused"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"grammar": 'x: "a"'}, "no start rule"),
        ({"grammar": "root ::= ("}, "GBNF grammar is malformed"),
        ({"grammar": 'root ::= "\\'}, "GBNF grammar is malformed"),
        ({"grammar": 'root ::= "\\ud800"'}, "is no character"),
        ({"grammar": "a ::= b"}, "GBNF grammar is malformed"),
        ({"grammar": 'start: %json {"not": {}}'}, "#/not is a keyword"),
        ({"grammar": "start: %json {x"}, "%json rule is not JSON"),
        ({"choices": []}, "at least one"),
        ({"choices": "abc"}, "choices is str"),
        ({"choices": ["a", ""]}, "not empty"),
        ({"choices": ["a", 3]}, "must be texts"),
        ({"choices": ["\ud800"]}, "lone surrogate"),
        ({"json_schema": [Cat]}, r"give list\[Cat\]"),
        ({"json_schema": Cat(kind="cat", lives=3)}, "give the class itself"),
        ({"json_schema": 3}, "json_schema is int"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": '{"minimum": NaN}'}, "has NaN"),
        ({"json_schema": {"const": float("inf")}}, "cannot be written as JSON"),
        ({"json_schema": {"const": {1, 2}}}, "cannot be written as JSON"),
        ({"json_schema": set[int]}, "#/uniqueItems is a keyword"),
        ({"json_schema": object.__class__}, "pydantic makes no JSON schema"),
        ({"json_schema": '"' + "a" * 1_000_001 + '"'}, "1,000,003 characters"),
        ({"json_schema": {}, "whitespace": -1}, "whitespace is -1"),
        ({"json_schema": {}, "whitespace": True}, "whitespace is True"),
        ({"response_format": {"type": "xml"}}, "has the type 'xml'"),
        ({"response_format": "json"}, "response_format is str"),
        ({"response_format": {"type": "json_schema"}}, "has no"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}, "strict"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}}, "has x"),
    ],
)
def test_what_is_malformed_is_refused(compiled, arguments, message):
    with pytest.raises(InputError, match=message):
        compiled(**arguments)


def test_types_without_pydantic_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydantic", None)
    with pytest.raises(InputError, match="the type Point, which needs pydantic: pip install pydantic"):
        ConstraintSpec.of(json_schema=Point)
    assert ConstraintSpec.of(json_schema={"type": "null"}) is not None


def test_a_spec_is_a_key(tokenizer):
    first, again = (ConstraintSpec.of(json_schema={"type": "null"}) for _ in range(2))
    assert first == again and hash(first) == hash(again)
    assert first != ConstraintSpec.of(json_schema={"type": "null"}, whitespace=0)
    assert json.loads(first.text)["x-guidance"]["lenient"] is False
