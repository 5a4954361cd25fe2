"""JSON-Schema-Test-Suite: no invalid document is accepted, and the rest is as good as ratchet.json says, or better."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("transformers")

from support import json_schema_suite as suite

from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint
from edgeformer.errors import InputError

VALIDATORS = {
    "draft4": jsonschema.Draft4Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft2020-12": jsonschema.Draft202012Validator,
}
STORED = json.loads(suite.RATCHET.read_text())


@pytest.fixture(scope="module")
def found():
    return suite.outcomes()


def worse(stored, now) -> bool:
    """Whether an outcome is worse than the stored one."""
    ranks = [suite.RANKS.index(suite.category(outcome)) for outcome in (stored, now)]
    if ranks[0] != ranks[1]:
        return ranks[1] < ranks[0]
    return isinstance(now, dict) and not set(now[suite.category(now)]) <= set(stored[suite.category(stored)])


@pytest.mark.parametrize("draft", suite.DRAFTS)
def test_outcomes_are_as_stored_or_better(found, draft):
    known = {(file, name): now for file, cases in found[draft].items() for name, now in cases.items()}
    before = {(file, name): now for file, cases in STORED[draft].items() for name, now in cases.items()}
    assert set(known) == set(before)
    bad = {case: (before[case], now) for case, now in known.items() if worse(before[case], now)}
    assert not bad, "if this is wanted: PYTHONPATH=.:tests python -m support.json_schema_suite"


@pytest.mark.parametrize("draft", suite.DRAFTS)
def test_no_invalid_document_is_accepted(found, draft):
    outcomes = [now for cases in found[draft].values() for now in cases.values()]
    counts = {rank: sum(suite.category(now) == rank for now in outcomes) for rank in suite.RANKS}
    assert counts["wrong"] == 0
    assert counts["enforced"] > 130  # the suite was read, and the schemas are not just refused


def answer(grammar, draw):
    """The tokens of a random answer; None if it grows long."""
    constraint, ids = grammar.start(), []
    while not constraint.ended and not (constraint.may_end and draw.random() < 0.3):
        ids.append(int(draw.choice([t for t in np.flatnonzero(constraint.allowed_mask()) if t != suite.EOS])))
        constraint.accept(ids[-1])
        if len(ids) > 80:
            return None
    return ids


@pytest.mark.parametrize("draft", suite.DRAFTS)
def test_random_answers_to_the_schemas_of_the_suite_are_valid(draft):
    tokenizer, tried = suite.letters(), 0
    validator = VALIDATORS[draft]
    for file, case in suite.cases(draft):
        schema = case["schema"]
        try:
            spec = ConstraintSpec.of(
                json_schema={"$schema": suite.DRAFTS[draft], **schema} if isinstance(schema, dict) else schema
            )
            grammar = compile_constraint(tokenizer, [suite.EOS], tokenizer.size, spec)
        except InputError:
            continue
        checker = validator(schema, format_checker=validator.FORMAT_CHECKER)
        for seed in range(4):
            ids = answer(grammar, random.Random(seed))
            if ids is None:
                continue
            text = tokenizer.decode(ids)
            try:
                valid = checker.is_valid(json.loads(text))
            except re.error:  # \p{...}, which Python's re does not know
                continue
            assert valid, (file, case["description"], text)
            tried += 1
    assert tried > 200


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        ("enforced", "enforced", False),
        ("enforced", "refused", True),
        ("refused", "enforced", False),
        ("refused", {"wrong": ["a"]}, True),
        ({"strict": ["a"]}, {"strict": ["a", "b"]}, True),
        ({"strict": ["a", "b"]}, {"strict": ["a"]}, False),
    ],
)
def test_a_worse_outcome_is_seen(stored, now, expected):
    assert worse(stored, now) is expected


def test_an_accepted_invalid_document_is_seen():
    case = {"schema": {"type": "integer"}, "tests": [{"description": "one", "data": 1, "valid": False}]}
    assert suite.outcome(suite.letters(), "draft7", case) == {"wrong": ["one"]}
    assert list(suite.written({"a": 1, "b": [2.0]}))[:2] == ['{"a":1,"b":[2.0]}', '{"a":1,"b":[2]}']
