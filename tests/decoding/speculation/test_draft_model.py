"""A draft model: its guesses against its own greedy answers; its state against wrong guesses; its vocabulary."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from support import tiny

from edgeformer.decoding.limits import Limits
from edgeformer.decoding.speculation.draft_model import DraftModel, ModelDrafts, check_vocabulary
from edgeformer.errors import InputError
from edgeformer.model import load


@pytest.fixture(scope="module")
def model(q8):
    return load(q8, "native", threads=1)


@pytest.fixture
def drafter(model):
    return DraftModel(model.engine, Limits.of(model.bundle, model.engine))


def greedy(model, ids, count):
    """`count` greedy tokens after `ids`: every step runs the whole text again, in a new state."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(tiny.logits(model.engine, np.array([ids]))[0, -1].argmax()))
    return ids[len(ids) - count :]


def test_guesses_are_greedy_after_right_and_wrong_ones(model, drafter):
    rng, ids = random.Random(0), [5, 17, 90]
    drafts = ModelDrafts(drafter)
    drafts.extend(ids)
    for _ in range(25):
        count = rng.randint(0, 6)
        guessed = drafts.propose(count).tokens
        assert guessed == greedy(model, ids, count)
        right = rng.randint(0, len(guessed))
        new = [*guessed[:right], rng.randrange(3, 300)]
        drafts.extend(new)
        ids += new


def test_guesses_after_other_tokens_leave_no_trace(model, drafter):
    drafts = ModelDrafts(drafter)
    drafts.extend([5, 17, 90])
    assert drafts.propose(4, [31, 8]).tokens == greedy(model, [5, 17, 90, 31, 8], 4)
    assert drafts.propose(4).tokens == greedy(model, [5, 17, 90], 4)
    drafts.extend([31, 9])
    assert drafts.propose(4).tokens == greedy(model, [5, 17, 90, 31, 9], 4)


def test_sequences_in_a_batch_guess_as_alone(model, drafter):
    prompts = [[5, 17, 90], [8], list(range(3, 60)), [7, 7, 7, 7]]
    many = [ModelDrafts(drafter) for _ in prompts]
    for drafts, prompt in zip(many, prompts, strict=True):
        drafts.extend(prompt)
    counts = [3, 0, 5, 1]
    expected = [greedy(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert drafter.propose_batch(many, counts) == expected


def test_a_long_prompt_runs_in_chunks(model, drafter, monkeypatch):
    monkeypatch.setattr("edgeformer.decoding.speculation.draft_model.CHUNK", 7)
    drafts, prompt = ModelDrafts(drafter), [3 + i % 300 for i in range(50)]
    drafts.extend(prompt)
    assert drafts.propose(3).tokens == greedy(model, prompt, 3)


def test_a_full_context_gives_no_guesses(model, drafter):
    drafts = ModelDrafts(drafter)
    drafts.extend([5] * (tiny.POSITIONS - 2))
    assert len(drafts.propose(2).tokens) == 2
    assert drafts.propose(3).tokens == []


def test_other_vocabularies_are_refused(model, bundles, tmp_path):
    check_vocabulary(model.tokenizer, load(bundles / "float", "native", threads=1).tokenizer, "float")
    with pytest.raises(InputError, match="both need a tokenizer"):
        check_vocabulary(model.tokenizer, None, "plain")
    other = tiny.write_lm(tmp_path / "other")
    path = other / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(settings))
    tokenizer = type(model.tokenizer).read(path, other / "tokenizer_config.json", None)
    with pytest.raises(InputError, match=r"Token \d+ is .* in other and .* in the model"):
        check_vocabulary(model.tokenizer, tokenizer, "other")
    settings["model"]["vocab"] = dict(list(vocabulary.items())[:-1])
    settings["model"]["merges"] = settings["model"]["merges"][:-1]
    path.write_text(json.dumps(settings))
    tokenizer = type(model.tokenizer).read(path, other / "tokenizer_config.json", None)
    with pytest.raises(InputError, match="tokens, the model"):
        check_vocabulary(model.tokenizer, tokenizer, "other")


@pytest.mark.parametrize(("field", "missing"), [("cached", "KV cache"), ("keeps_logits", "logits_to_keep")])
def test_a_graph_that_cannot_draft_is_refused(model, field, missing):
    limits = replace(Limits.of(model.bundle, model.engine), **{field: False})
    with pytest.raises(InputError, match=missing):
        DraftModel(model.engine, limits)
