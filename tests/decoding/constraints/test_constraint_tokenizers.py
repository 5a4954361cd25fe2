"""Constraints with every kind of tokenizer: what random walks through the masks write is what the grammar allows."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("transformers")

from support import tokenizer_families as families
from support.tokenizer_files import folder_read, runtime_of

from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint
from edgeformer.decoding.constraints.token_bytes import TokenBytes
from edgeformer.decoding.constraints.token_trie import token_trie
from edgeformer.errors import InputError, StateError
from edgeformer.export.sources import tokenizer_export

SUFFIXED = "words with suffix"
USABLE = [name for name in families.FAMILIES if name != SUFFIXED]
# Their tokens put a space before each sign, which no JSON string or number has.
WORDS = ["BERT", "BERT, cased", "BERT with accents", "words"]
JSON = [name for name in USABLE if name not in WORDS]
EXPRESSION = r"[a-z]+( [a-z]+){0,3}[.!]?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -5, "maximum": 120},
        "kind": {"enum": ["a", "bé", "a b", ""]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z ]{1,3}$"}, "maxItems": 2},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: the runtime's tokenizer of a family, made once."""
    known = {}

    def get(name):
        if name not in known:
            place = tmp_path_factory.mktemp("family")
            folder = families.save(name, place / "hf")
            files = tokenizer_export.tokenizer_files(str(folder), folder_read(folder))
            known[name] = runtime_of(files, place / "bundle")
        return known[name]

    return get


def vocabulary_size(tokenizer):
    return max(tokenizer.vocabulary.values()) + 1


def walks(tokenizer, count=40, **arguments):
    """Texts of answers whose tokens are drawn from what each mask allows."""
    eos = next(iter(tokenizer.skipped_ids), 0)
    # More logits than tokens, as many models have.
    grammar = compile_constraint(tokenizer, [eos], vocabulary_size(tokenizer) + 40, ConstraintSpec.of(**arguments))
    for seed in range(count):
        draw, constraint, ids = random.Random(seed), grammar.start(), []
        while not constraint.ended and not (constraint.may_end and draw.random() < 0.3):
            allowed = np.flatnonzero(constraint.allowed_mask())
            assert (eos in allowed) == constraint.may_end
            others = [int(token) for token in allowed if token != eos]
            if not others:  # the vocabulary has no more for what the grammar still allows
                break
            ids.append(draw.choice(others))
            constraint.accept(ids[-1])
        assert constraint.valid([eos]) == 1
        assert not tokenizer.skipped_ids & set(ids)
        yield tokenizer.decode(ids)


@pytest.mark.parametrize("name", USABLE)
def test_random_answers_match_the_expression(made, name):
    texts = list(walks(made(name), regex=EXPRESSION))
    assert all(re.fullmatch(EXPRESSION, text) for text in texts), texts
    assert len(set(texts)) > 10


@pytest.mark.parametrize("whitespace", [None, 0, 2])
@pytest.mark.parametrize("name", JSON)
def test_random_answers_fit_the_schema(made, name, whitespace):
    texts = list(walks(made(name), 15, json_schema=SCHEMA, whitespace=whitespace))
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
        gaps = map(len, re.findall(r"\s+", re.sub(r'"(?:[^"\\]|\\.)*"', '"', text)))
        assert max(gaps, default=0) <= (1 if whitespace is None else whitespace)
    assert len(set(texts)) > 10


# "words" has no parts of words: after "t", which is a word, no token writes the rest of "the".
@pytest.mark.parametrize("name", [name for name in USABLE if name != "words"])
def test_random_answers_are_choices(made, name):
    choices = ["the time", "hello world", "a small device", "the"]
    assert set(walks(made(name), choices=choices)) == set(choices)


def test_a_choice_with_a_space_before_it_is_written_where_that_is_possible(made):
    """The first token of a SentencePiece text loses its space, so that two spaces must be written."""
    for name in ("GPT-2", "Llama", "Metaspace never", "characters"):
        assert set(walks(made(name), choices=[" hello", "hello"])) == {" hello", "hello"}
    with pytest.raises(InputError, match="cannot write the choice ' hello'"):
        list(walks(made("BERT"), choices=[" hello", "hello"]))


@pytest.mark.parametrize("name", WORDS)
def test_a_text_that_words_cannot_write_ends_with_an_error(made, name):
    with pytest.raises((InputError, StateError), match="No token of the vocabulary can continue"):
        list(walks(made(name), json_schema=SCHEMA))


def test_a_tokenizer_whose_texts_depend_on_the_next_token_is_refused(made):
    with pytest.raises(InputError, match="depends on its neighbours"):
        list(walks(made(SUFFIXED), regex=EXPRESSION))


@pytest.mark.parametrize("name", USABLE)
def test_bytes_of_tokens_join_to_the_decoded_text(made, name):
    tokenizer = made(name)
    data = TokenBytes.of(tokenizer)
    draw = random.Random(1)
    whole = [i for i in range(len(data.later)) if data.later[i] and data.first[i] and _is_text(data.later[i])]
    for _ in range(100):
        ids = draw.choices(whole, k=5)
        assert data.joined(ids) == tokenizer.decode(ids).encode()
    wrong = TokenBytes(list(data.first), [text + b"x" for text in data.later])
    with pytest.raises(InputError, match="depends on its neighbours"):
        wrong._check(tokenizer)


@pytest.mark.parametrize("name", USABLE)
def test_every_text_can_be_spelled_and_tokens_are_preferred(made, name):
    trie = token_trie(made(name))
    for text in (b"the time", b"hello", '{"é": "東🙂"}'.encode(), b""):
        ids = trie.spell(text)
        forms = [trie._later[i] if i < trie.size else bytes([i - trie._bytes]) for i in ids]
        assert b"".join(forms) == text
    assert all(number < trie.size for number in trie.spell(b" hello"))


def _is_text(data):
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False
