"""Malformed text files of a bundle: config.json, tokenizers and templates. The rest is in test_malformed_bundles.py."""

from __future__ import annotations

import json

import pytest
from support.malformed import ENGINES, answer, typed

from edgeformer import load
from edgeformer.errors import TemplateError

# -------------------------------------------------------------------------------------------- numbers in the text files

CONFIGS = {
    "max_position_embeddings": (0, -1, 2**31, 2**63, 1e400, None, "256", [256], True),
    "vocab_size": (0, -1, 2**31, "x", None, [320], {}),
}
CASES = [(field, value) for field, found in CONFIGS.items() for value in found]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("field", "value"), CASES)
def test_odd_numbers_in_config_json_change_no_token_or_are_refused(lm, copy_of, reseal, field, value, engine):
    damaged = copy_of(lm)
    config = json.loads((damaged / "config.json").read_text()) | {field: value}
    (damaged / "config.json").write_text(json.dumps(config))
    reseal(damaged)
    found = typed(lambda: answer(damaged, engine))
    assert found == answer(lm, engine) or "config.json" in found or "context" in found


# -------------------------------------------------------------------------------------------- tokenizers and templates


def edit_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def long_id(tree):
    tree["model"]["vocab"]["quick"] = 2**31


def duplicate(tree):
    tree["model"]["vocab"]["quick"] = 5


def nested(tree):
    tree["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def cyclic(tree):
    tree["model"]["merges"] = [["a", "b"], ["ab", "a"], ["ab", "ab"]] * 3


TOKENIZERS = {
    "an id of 2**31": long_id,
    "two texts with one id": duplicate,
    "a nested quantifier": nested,
    "merges in a circle": cyclic,
    "no vocabulary": lambda tree: tree["model"].update(vocab={}),
    "another model": lambda tree: tree["model"].update(type="Unheard"),
    "added tokens without ids": lambda tree: tree.update(added_tokens=[{"content": "x"}]),
    "an added token of id 2**32 - 1": lambda tree: tree["added_tokens"][0].update(id=2**32 - 1),
    "text for a vocabulary": lambda tree: tree["model"].update(vocab="x"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_an_odd_tokenizer_is_refused_or_encodes_within_a_bound(lm, copy_of, reseal, case):
    damaged = copy_of(lm)
    edit_json(damaged / "tokenizer.json", TOKENIZERS[case])
    reseal(damaged)

    def use():
        model = load(damaged, "cpu", threads=1)
        model.tokenizer.encode("ab" * 5_000)
        model.tokenizer.encode("a" * 25 + "!")
        model.generate("the quick brown fox", max_new_tokens=3)
        return "the tokenizer works"

    assert "token" in typed(use)


def test_many_repeated_characters_are_encoded(lm):
    tokenizer = load(lm, "cpu", threads=1).tokenizer
    for text in ("A" * 10_000, " " * 10_000, "\n" * 10_000, "é" * 10_000, "🙂" * 2_000, "\0" * 10_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


TEMPLATES = {
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a long loop": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a large text": "{{ 'x' * 10**10 }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "texts that grow": "{% set n = namespace(x='x') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "undefined": "{{ nothing.at.all }}",
    "an exception": "{{ raise_exception('no') }}",
    "a syntax error": "{% for %}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a list of 2**30": "{{ range(2**30) | list }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_template_is_stopped(lm, copy_of, reseal, case):
    damaged = copy_of(lm)
    (damaged / "chat_template.jinja").write_text(TEMPLATES[case])
    reseal(damaged)
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError):
        load(damaged, "cpu", threads=1).tokenizer.render_chat(messages)
    assert messages == [{"role": "user", "content": "x"}]
