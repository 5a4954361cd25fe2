"""Every keyword of JSON Schema is enforced, an annotation, or refused with its path: a table, tried out.

What is invalid is what the library jsonschema finds invalid, with its checks of formats.
"""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("transformers")

from support.json_schema_suite import accepts, letters

from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint
from edgeformer.decoding.constraints import json_schema as rules
from edgeformer.errors import InputError

EOS = 0
S, INT = {"type": "string"}, {"type": "integer"}

# Keyword -> schema, documents that it accepts, documents that it rejects
ENFORCED = {
    "type": ({"type": ["string", "null"]}, ['"a"', "null"], ["1", "{}"]),
    "enum": ({"enum": [1, "a", None, {"b": [1]}]}, ["1", '"a"', "null", '{"b":[1]}'], ["2", '{"b":[2]}', "true"]),
    "const": ({"const": {"a": 1, "b": 0.1}}, ['{"a":1,"b":0.1}'], ['{"a":1}', '{"a":1,"b":0.2}']),
    "allOf": ({"allOf": [S, {"minLength": 2}]}, ['"ab"'], ['"a"', "1"]),
    "anyOf": ({"anyOf": [S, {"type": "null"}]}, ['"a"', "null"], ["1"]),
    "oneOf": ({"oneOf": [S, {"type": "null"}]}, ['"a"', "null"], ["1"]),
    "$ref": ({"$ref": "#/$defs/x", "maxLength": 1, "$defs": {"x": S}}, ['"a"'], ['"ab"', "1"]),
    "$anchor": ({"$ref": "#x", "$defs": {"y": {"$anchor": "x", **S}}}, ['"a"'], ["1"]),
    "$defs": ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": S}}, ['"a"'], ["1"]),
    "definitions": ({"$ref": "#/definitions/x", "definitions": {"x": S}}, ['"a"'], ["1"]),
    "properties": ({"properties": {"a": INT, "b": S}}, ['{"a":1,"b":"x"}', "{}", '{"c":1}', "1"], ['{"a":"x"}']),
    "patternProperties": ({"patternProperties": {"^a": S}}, ['{"a":"x","b":1}'], ['{"ab":1}']),
    "additionalProperties": (
        {"type": "object", "properties": {"a": S}, "additionalProperties": INT},
        ['{"a":"x","b":2}'],
        ['{"a":1}', '{"b":"x"}', '{"a":"x","a":1}', '{"\\u0061":1}'],
    ),
    "required": ({"type": "object", "required": ["a"]}, ['{"a":1}', '{"a":1,"b":2}'], ["{}", '{"b":1}']),
    "minProperties": ({"minProperties": 2, "required": ["a"]}, ['{"a":1,"b":2}'], ['{"a":1}']),
    "maxProperties": ({"maxProperties": 1}, ["{}", '{"a":1}'], ['{"a":1,"b":2}']),
    "items": ({"items": S}, ["[]", '["a","b"]'], ["[1]"]),
    "prefixItems": ({"prefixItems": [S, INT], "items": False}, ['["a",1]', '["a"]'], ["[1]", '["a",1,2]']),
    "additionalItems": ({"items": [S], "additionalItems": INT}, ['["a",1]'], ["[1]", '["a","b"]']),
    "minItems": ({"minItems": 2}, ["[1,2]"], ["[1]"]),
    "maxItems": ({"maxItems": 1.0}, ["[1]"], ["[1,2]"]),
    "minLength": ({"minLength": 2}, ['"ab"', '"é€"'], ['"a"', '"😀"']),
    "maxLength": ({"maxLength": 2}, ['"ab"', '"😀😀"'], ['"abc"']),
    "pattern": ({"pattern": "a\\d$"}, ['"xa1"'], ['"a1b"', '"a"']),
    "format": ({"format": "date"}, ['"2024-02-29"', "1"], ['"2023-02-29"', '"2023-13-01"', '"a"', '"0000-01-01"']),
    "minimum": ({"minimum": -1.5}, ["-1.5", "0", "7"], ["-1.6", "-2"]),
    "maximum": ({"maximum": 10}, ["10", "9.9", "-3"], ["10.1", "11"]),
    "exclusiveMinimum": ({"exclusiveMinimum": 0}, ["0.1", "1"], ["0", "-0", "0.0", "-1"]),
    "exclusiveMaximum": ({"exclusiveMaximum": 0}, ["-0.1"], ["0", "-0.0", "1"]),
    "multipleOf": ({"multipleOf": 2.5}, ["5", "2.5", "-7.5"], ["1", "2.4"]),
}
REFUSED = {
    "not": S, "if": S, "then": S, "else": S, "uniqueItems": True, "contains": S, "minContains": 1, "maxContains": 1,
    "propertyNames": {"maxLength": 1}, "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": S},
    "dependencies": {"a": ["b"]}, "unevaluatedProperties": False, "unevaluatedItems": False, "$dynamicRef": "#a",
    "$dynamicAnchor": "a", "$recursiveRef": "#", "$recursiveAnchor": True, "$vocabulary": {},
    "contentEncoding": "base64", "contentMediaType": "text/html", "contentSchema": S, "nullable": True,
    "divisibleBy": 2, "disallow": "string", "extends": S,
}  # fmt: skip
OF_DRAFT_2020_12 = {
    "$schema", "$id", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary", "$comment", "$defs",
    "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "prefixItems", "items", "contains",
    "properties", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties", "type", "const", "enum", "multipleOf", "maximum", "exclusiveMaximum", "minimum",
    "exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxContains",
    "minContains", "maxProperties", "minProperties", "required", "dependentRequired", "title", "description",
    "default", "deprecated", "readOnly", "writeOnly", "examples", "format", "contentEncoding", "contentMediaType",
    "contentSchema",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    tokenizer = letters()

    def get(schema, **more):
        spec = ConstraintSpec.of(json_schema=schema, **more)
        return compile_constraint(tokenizer, [EOS], tokenizer.size, spec), tokenizer

    return get


def valid(schema, text):
    return jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    ).is_valid(json.loads(text))


def test_the_table_has_every_keyword():
    mine = {*ENFORCED, *REFUSED, *rules.ANNOTATIONS, "$schema", "$id"}
    assert mine >= OF_DRAFT_2020_12
    assert set(ENFORCED) == rules.KEYWORDS
    assert set(REFUSED) == set(rules.UNSUPPORTED)


@pytest.mark.parametrize("keyword", ENFORCED)
def test_a_keyword_is_enforced(compiled, keyword):
    schema, good, bad = ENFORCED[keyword]
    grammar, tokenizer = compiled(schema)
    assert [text for text in good if not accepts(grammar, tokenizer, text)] == []
    assert [text for text in bad if accepts(grammar, tokenizer, text)] == []
    if keyword != "additionalItems":  # of an older draft
        assert all(valid(schema, text) for text in good)
        # In JSON text, a name can stand twice; and -0 and 0000 are what this library takes.
        assert not any(valid(schema, text) for text in bad if "0" not in text and text.count('"a"') < 2)


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_is_refused_with_its_path(compiled, keyword):
    schema = {"type": "object", "properties": {"a/b": {"items": {keyword: REFUSED[keyword]}}}}
    with pytest.raises(InputError, match=re.escape(f"#/properties/a~1b/items/{keyword} is a keyword that")):
        compiled(schema)


@pytest.mark.parametrize("keyword", sorted(rules.ANNOTATIONS | {"x-mine"}))
def test_an_annotation_changes_nothing(compiled, keyword):
    assert compiled({"type": "null", keyword: "text"})[0] is compiled({"type": "null"})[0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"minLenght": 3}, "#/minLenght is no keyword.*did you mean minLength"),
        ({"properties": {"a": {"foo": 3}}}, "#/properties/a/foo is no keyword"),
        ({"$ref": "http://x/y"}, "only references inside"),
        ({"$ref": "#/$defs/x"}, r'#/\$ref is "#/\$defs/x", and the schema has no schema there'),
        ({"$ref": "#/default", "default": {"type": "string"}}, "has no schema there"),
        ({"properties": {"a": {"$id": "x"}}}, r"#/properties/a/\$id is supported at the root only"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "expected draft 2020-12"),
        ({"prefixItems": [{}], "additionalItems": False}, "#/prefixItems stands beside"),
        ({"minProperties": 3, "required": ["a"]}, "#/minProperties is 3 with 1 required"),
        ({"type": "string", "format": "iri"}, '#/format is "iri"; the grammar enforces date'),
        ({"format": "unknown"}, '#/format is "unknown"'),
        ({"const": 2**53 + 1}, "#/const is 9007199254740993; the grammar is exact up to"),
        ({"enum": [[{"a": "\u0001"}]]}, "#/enum/0/0/a is .*no control characters"),
        ({"minimum": -(2**60)}, "#/minimum is -1152921504606846976"),
        ({"maxLength": -1}, "#/maxLength is -1, expected a whole number"),
        ({"maxItems": 10**9}, "#/maxItems is 1000000000, the most"),
        ({"minimum": "1"}, '#/minimum is "1", expected a number'),
        ({"properties": []}, "#/properties is .*expected an object of schemas"),
        ({"anyOf": {}}, "#/anyOf is {}, expected a list of schemas"),
        ({"items": 3}, "#/items is 3, expected a schema"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"pattern": "(?=a)"}, "#/pattern. Look-around"),
        ({"properties": {"a": {"pattern": "\\bx"}}}, "#/properties/a/pattern. Look-around"),
        ({"oneOf": [{"type": "number"}, INT]}, "#/oneOf. It is not proven that only one can fit"),
        ({"oneOf": [{"minimum": 2}, {"maximum": 5}]}, "#/oneOf"),
        ({"patternProperties": {"a": {}, "b": {}}}, "#/patternProperties. One name may fit both"),
        ({"maxProperties": 1, "properties": {"a": {}, "b": {}}}, "#/maxProperties. Name all properties in required"),
        ({"$ref": "#"}, "No answer can fulfil the JSON schema"),
        (False, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "Unsatisfiable"),
        (json.loads('{"items":' * 150 + "{}" + "}" * 150), "nested more than 100 deep"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(compiled, schema, message):
    with pytest.raises(InputError, match=message):
        compiled(schema)


def _tagged(*tags, **more):
    """An object whose property k is one of the tags."""
    return {"type": "object", "properties": {"k": {"enum": list(tags)}}, "required": ["k"], **more}


@pytest.mark.parametrize(
    ("options", "proven"),
    [
        ([_tagged("a"), _tagged("b", "c")], True),
        ([{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}], True),
        ([{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/one"}], False),
        ([_tagged("a", "b"), _tagged("b", "c")], False),
        ([_tagged("a"), _tagged("b", required=[])], False),
        ([_tagged("a"), {**_tagged("b"), "type": ["object", "null"]}], False),
        ([_tagged("a"), {"properties": {"k": {"const": "b"}}, "required": ["k"]}], False),
        ([_tagged("a"), _tagged(1)], False),
        ([{"$ref": "#/$defs/loop"}, _tagged("b")], False),
        ([S, INT, {"type": "null"}], True),
        ([{"type": ["string", "integer"]}, {"type": "number"}], False),
        ([S, True], False),
        ([{"$ref": "#/$defs/text"}, {"type": "array"}], True),
    ],
)
def test_one_of_is_any_of_only_where_that_is_proven(options, proven):
    tag = {"$ref": "#/$defs/tag"}
    defs = {"one": _tagged("a"), "two": _tagged("b", properties={"k": tag}), "tag": {"const": "b"}, "text": S}
    found = rules.checked({"oneOf": options, "$defs": {**defs, "loop": {"$ref": "#/$defs/loop"}}})
    assert ("anyOf" in found) is proven


@pytest.mark.parametrize("keyword", ["uniqueItems", "nullable"])
def test_a_keyword_that_says_nothing_is_left_out(compiled, keyword):
    assert compiled({"type": "null", keyword: False})[0] is compiled({"type": "null"})[0]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", ["2000-02-29", "1999-12-31"], ["1900-02-29", "2001-04-31", "2001-00-10"]),
        ("time", ["23:59:59Z", "01:02:03.5+05:30"], ["24:00:00Z", "12:00:00", "12:00:60Z", "12:00:00+24:00"]),
        ("date-time", ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z", "2024-02-29", "2024-02-29T23:59:60Z"]),
        ("hostname", ["a.example", "x-1.org"], ["-a", "a-", "a..b", "xn--X", "a" * 64]),
        ("ipv4", ["1.2.3.4"], ["256.1.1.1", "01.1.1.1", "1.2.3"]),
        ("ipv6", ["::1", "1:2:3:4:5:6:7:8"], ["::g", "1::2::3", "12345::"]),
        ("uuid", ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08"]),
        ("email", ["a@b.org"], ["a", "a@b@c", ".a@b.org"]),
        ("uri", ["http://a.org/b?c=d#e"], ["//a", "a b"]),
        ("duration", ["P1Y2M", "PT3S"], ["P", "PT", "P1", "1Y"]),
    ],
)
def test_formats_are_enforced(compiled, name, good, bad):
    grammar, tokenizer = compiled({"type": "string", "format": name})
    assert set(rules.ENFORCED) >= {name}
    assert [text for text in good if not accepts(grammar, tokenizer, json.dumps(text))] == []
    assert [text for text in bad if accepts(grammar, tokenizer, json.dumps(text))] == []


def test_every_enforced_format_is_tried():
    tried = {mark.args[1][i][0] for mark in test_formats_are_enforced.pytestmark for i in range(len(mark.args[1]))}
    assert tried == rules.ENFORCED


@pytest.mark.parametrize("seed", range(4))
def test_random_dates_are_dates(compiled, seed):
    grammar, tokenizer = compiled({"type": "array", "items": {"format": "date", **S}, "minItems": 20, "maxItems": 20})
    draw, constraint, ids = random.Random(seed), grammar.start(), []
    while not constraint.ended:
        ids.append(int(draw.choice([t for t in np.flatnonzero(constraint.allowed_mask()) if t != EOS])))
        constraint.accept(ids[-1])
    assert valid({"items": {"format": "date"}, "minItems": 20}, tokenizer.decode(ids))


def test_properties_come_in_the_order_of_the_schema(compiled):
    grammar, tokenizer = compiled({"type": "object", "properties": {"b": {}, "a": {}}, "required": ["c", "a", "b"]})
    assert accepts(grammar, tokenizer, '{"b":1,"a":1,"c":1,"d":1}')
    for text in ('{"a":1,"b":1,"c":1}', '{"c":1,"b":1,"a":1}', '{"b":1,"a":1,"d":1,"c":1}'):
        assert not accepts(grammar, tokenizer, text)


@pytest.mark.parametrize("name", list("dDwWsS"))
def test_classes_of_characters_are_what_both_readings_share(compiled, name):
    """As in ECMA 262 and as in Python's re."""
    grammar, tokenizer = compiled({"type": "string", "pattern": f"^\\{name}$"})
    shared = []
    for letter in "a1_-  é٣ª\x85\xa0\u2028\ufeff\u0301‿🙂/":
        ecma = {"d": letter in "0123456789", "w": letter.isascii() and (letter.isalnum() or letter == "_"),
                "s": letter in "\t\n\v\f\r \xa0\ufeff\u2028\u2029"}[name.lower()] is name.islower()  # fmt: skip
        if ecma and re.fullmatch(f"\\{name}", letter):
            shared.append(letter)
        assert not accepts(grammar, tokenizer, f'"{letter}"') or letter in shared
    assert any(accepts(grammar, tokenizer, f'"{letter}"') for letter in shared)


def test_a_name_cannot_be_written_in_a_second_way(compiled):
    grammar, tokenizer = compiled({"type": "object", "properties": {"a/b": S}, "additionalProperties": INT})
    assert accepts(grammar, tokenizer, '{"a/b":"x","\\n":1}')
    for text in ('{"a\\/b":1}', '{"\\u0061/b":1}', '{"a\\u002fb":1}'):
        assert not accepts(grammar, tokenizer, text)


@pytest.mark.parametrize(
    ("whitespace", "good", "bad"),
    [
        (None, ['{"a": 1, "b":2}', '{"a":1,"b":2}'], ['{"a":  1}', '{ "a":1}', '{"a" :1}', '{"a":1,\n"b":2}', " {}"]),
        (0, ['{"a":1,"b":[1,2]}'], ['{"a": 1}', '{"b":[1, 2]}']),
        (3, ['{\n  "a" :1 , "b": [ 1 ,2 ]\n}', '{"a":1}'], ['{    "a":1}', '{"a":1,\n\n\n\n"b":1}', " {}", "{} "]),
    ],
)
def test_whitespace_is_bounded(compiled, whitespace, good, bad):
    grammar, tokenizer = compiled({"type": "object"}, whitespace=whitespace)
    assert [text for text in good if not accepts(grammar, tokenizer, text)] == []
    assert [text for text in bad if accepts(grammar, tokenizer, text)] == []
