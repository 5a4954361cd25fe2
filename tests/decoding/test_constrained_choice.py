"""Choosing under a constraint without its whole mask: the tokens, or the distribution, of a choice with the mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")
pytest.importorskip("transformers")

from support.json_schema_suite import letters

from edgeformer.decoding import constrained_choice as module
from edgeformer.decoding.constrained_choice import ConstrainedChoice
from edgeformer.decoding.constraints import ConstraintSpec, GrammarConstraint, compile_constraint
from edgeformer.decoding.filters import Reach, reach
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import logits_processors, next_token, process
from edgeformer.errors import EdgeformerError, GrammarError

EOS = 0
OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
GRAMMARS = {
    "words": {"regex": "[A-Z][a-z]{1,5}( [a-z]{1,6}){1,4}[.]"},
    "text": {"regex": "[^.]{4,40}[.]"},
    "object": {"json_schema": OBJECT},
    "choices": {"choices": ["the time", "the tall", "there", "what"]},
    "end": {"regex": "(a|b|[^a]{3})?"},
}
# Top-k alone, or no filter: draws are repeated.
DRAWN = [
    {"top_k": 0},
    {"top_k": 0, "temperature": 2.0},
    {"top_k": 0, "repetition_penalty": 1.4, "renormalize_logits": True},
    {"top_k": 1},
    {"top_k": 3, "temperature": 0.7},
    {"top_k": 40, "temperature": 2.0},
    {"top_k": 200},
    {"top_k": 9, "repetition_penalty": 1.4, "logit_bias": {70: 4.0}, "suppress_tokens": [71, 75]},
    {"top_k": 5, "remove_invalid_values": True, "renormalize_logits": True},
]
# The first of several filters is top-k or min-p: the tokens are those of the whole mask.
ASKED = [
    {"top_k": 20, "temperature": 1.7, "top_p": 0.8, "min_p": 0.01},
    {"top_k": 60, "typical_p": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "min_p": 0.01, "temperature": 2.5, "eta_cutoff": 0.01},
    {
        "top_k": 9,
        "repetition_penalty": 1.4,
        "logit_bias": {70: 4.0},
        "suppress_tokens": [71, 75],
        "top_p": 0.9,
    },
    {"top_k": 5, "remove_invalid_values": True, "renormalize_logits": True, "min_p": 0.1},
]
WHOLE = [
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 0, "typical_p": 0.9},
    {"top_k": 200, "min_p": 0.01},
    {"top_k": 0, "top_h": 0.9},
]


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    made = {name: ConstraintSpec.of(**given) for name, given in GRAMMARS.items()}
    return {name: compile_constraint(tokenizer, (EOS,), tokenizer.size, spec) for name, spec in made.items()}


def config_of(given, size):
    return GenerationConfig.of({"do_sample": True, "eos_token_id": EOS}, given, size)


def masked(constraint, scores):
    return np.where(constraint.allowed_mask(), scores, -np.inf).astype(np.float32)


def rows(seed, size, spread, ties):
    """Logits of one step after another; with `ties` many are equal."""
    draw = np.random.default_rng(seed)
    while True:
        row = draw.standard_normal(size).astype(np.float32) * spread
        yield np.round(row * 2) / 2 if ties else row


def walk(grammar, given, seed, spread, ties, expected):
    """Chooses tokens up to the end of an answer; `expected(constraint, processors, ids, scores, rng)` has each."""
    constraint, size = grammar.start(), grammar.vocab_size
    config = config_of(given, size)
    processors = logits_processors(config, 1, 99, None)
    choice, ids = ConstrainedChoice(processors, config, constraint), [5]
    found, wanted = np.random.default_rng(seed), np.random.default_rng(seed)
    for _, scores in zip(range(25), rows(seed, size, spread, ties), strict=False):
        token = choice.token(np.array(ids), scores, found)
        assert token == expected(constraint, processors, np.array(ids), scores, wanted), (given, ids)
        assert found.bit_generator.state == wanted.bit_generator.state
        constraint.accept(token)
        ids.append(token)
        if constraint.ended:
            break
    return ids


@given(
    name=st.sampled_from(sorted(GRAMMARS)),
    given_=st.sampled_from(ASKED + WHOLE),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    ties=st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_tokens_are_those_of_a_choice_with_the_mask(grammars, name, given_, seed, spread, ties):
    def expected(constraint, processors, ids, scores, rng):
        return next_token(processors, ids, masked(constraint, scores), rng)

    walk(grammars[name], given_, seed, spread, ties, expected)


@given(
    name=st.sampled_from(sorted(GRAMMARS)),
    given_=st.sampled_from(DRAWN),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    ties=st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_without_other_filters_draws_are_repeated_until_one_may_follow(grammars, name, given_, seed, spread, ties):
    size = grammars[name].vocab_size
    every = logits_processors(config_of(given_ | {"top_k": 0}, size), 1, 99, None)

    def expected(constraint, processors, ids, scores, rng):
        allowed = constraint.allowed_mask()
        if allowed.sum() > 1 or not constraint._matcher.compute_ff_tokens():
            for _ in range(module._TRIES):
                token = next_token(every, ids, scores, rng)
                if allowed[token] and process(processors, ids, masked(constraint, scores))[token] > -np.inf:
                    return token
                if allowed[token]:
                    break
        return next_token(processors, ids, masked(constraint, scores), rng)

    walk(grammars[name], given_, seed, spread, ties, expected)


def test_the_mask_is_not_made_where_asking_suffices(grammars, monkeypatch):
    """A text leaves most tokens: no mask for top-k, min-p and plain draws, one a token for top-p."""
    made, apply = [], GrammarConstraint.apply
    monkeypatch.setattr(GrammarConstraint, "apply", lambda self, scores: made.append(1) or apply(self, scores))
    for given_, masks in (({"top_k": 40}, 0), ({"top_k": 0, "min_p": 0.1}, 0), ({"top_k": 0}, 0), (WHOLE[0], 1)):
        made.clear()
        config = config_of(given_, grammars["text"].vocab_size)
        constraint = grammars["text"].start()
        choice = ConstrainedChoice(logits_processors(config, 1, 99, None), config, constraint)
        assert choice.needs_mask == bool(masks)
        scores = next(rows(3, grammars["text"].vocab_size, 2.0, False))
        choice.token(np.array([5]), scores, np.random.default_rng(0))
        assert len(made) == masks, given_


@pytest.mark.parametrize("best", [0, 8, 25])
def test_rejection_draws_tokens_with_the_probabilities_of_those_that_may_follow(grammars, best):
    """Chi-square against softmax over what mask and top-k leave; a flat distribution fails the same test by far."""
    constraint, size = grammars["words"].start(), grammars["words"].vocab_size
    scores = next(rows(1, size, 1.0, False))
    config = config_of({"top_k": best}, size)
    processors = logits_processors(config, 1, 9, None)
    choice = ConstrainedChoice(processors, config, constraint)
    rng, draws = np.random.default_rng(0), 20_000
    counts = np.bincount([choice.token(np.array([5]), scores, rng) for _ in range(draws)], minlength=size)
    likely = np.exp(process(processors, np.array([5]), masked(constraint, scores)).astype(np.float64))
    expected = likely / likely.sum() * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 5
    others = expected[~kept].sum()
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    chi_square += float((counts[~kept].sum() - others) ** 2 / max(others, 1))
    freedom = int(kept.sum())
    assert freedom > 5 and chi_square < freedom + 4 * (2 * freedom) ** 0.5, (chi_square, freedom)  # 4 deviations
    flat = np.where(kept, draws / kept.sum(), 0)
    assert float(((counts - flat)[kept] ** 2 / flat[kept]).sum()) > 10 * freedom


@pytest.mark.parametrize("ties", [False, True])
def test_a_greedy_answer_takes_the_likeliest_token_that_may_follow(grammars, ties):
    for name, grammar in grammars.items():
        for seed in range(20):
            constraint, config = grammar.start(), GenerationConfig(eos_token_id=(EOS,))
            choice = ConstrainedChoice((), config, constraint)
            for _, scores in zip(range(20), rows(seed, grammar.vocab_size, 2.0, ties), strict=False):
                token = choice.token(np.array([5]), scores, None)
                best = int(scores.argmax())
                if constraint.allows([best])[0]:
                    assert token == best
                else:
                    assert token == masked(constraint, scores).argmax(), name
                constraint.accept(token)
                if constraint.ended:
                    break


def test_allows_says_what_the_mask_says_except_in_a_forced_text(tokenizer, grammars):
    draw = np.random.default_rng(0)
    for grammar in grammars.values():
        for _ in range(10):
            constraint = grammar.start()
            for _ in range(20):
                allowed = constraint.allowed_mask()
                asked = np.array(constraint.allows(range(tokenizer.size)))
                only = constraint.only()
                if only is None:
                    assert np.array_equal(asked, allowed)
                else:
                    assert np.flatnonzero(allowed).tolist() == [only] and asked[only]
                constraint.accept(int(draw.choice(np.flatnonzero(allowed))))
                if constraint.ended:
                    break
    assert constraint.allows([-1, tokenizer.size]) == [False, False]


def test_where_nothing_may_follow_the_reason_is_told(grammars):
    size = grammars["choices"].vocab_size
    for given_ in ({"top_k": 5}, {"top_k": 0}, {"top_k": 0, "top_p": 0.5}, None):
        config = GenerationConfig() if given_ is None else config_of(given_, size)
        rng = None if given_ is None else np.random.default_rng(0)
        choice = ConstrainedChoice((), config, grammars["choices"].start())
        allowed = choice.constraint.allowed_mask()
        with pytest.raises(EdgeformerError, match="forbid every token"):
            choice.token(np.array([5]), np.where(allowed, -np.inf, 1.0).astype(np.float32), rng)


def test_a_dead_end_is_a_grammar_error(tokenizer):
    grammar = compile_constraint(tokenizer, (), tokenizer.size, ConstraintSpec.of(regex="ab"))
    constraint = grammar.start()
    for token in tokenizer.encode("ab"):
        constraint.accept(token)
    for given_ in ({"top_k": 5}, {"top_k": 0}):
        config = config_of(given_, tokenizer.size)
        choice = ConstrainedChoice(logits_processors(config, 1, 9, None), config, constraint)
        with pytest.raises(GrammarError, match="no end token"):
            choice.token(np.array([5]), np.ones(tokenizer.size, np.float32), np.random.default_rng(0))


def test_the_reach_of_the_first_filter():
    def of(**given):
        return reach(GenerationConfig(do_sample=True, **given))

    assert of(typical_p=0.5) == of(top_p=0.5, min_p=0.1) == Reach(best=50)
    assert of(temperature=0.2) == Reach(best=50, is_alone=True)
    assert of(top_k=0) == of(top_k=0, temperature=0.2) == Reach(is_alone=True)
    assert of(top_k=0, min_p=0.5, temperature=2.0, typical_p=0.5) == Reach(distance=-2 * np.log(0.5))
    whole = [{"top_p": 0.5, "min_p": 0.1}, {"typical_p": 0.5}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}]
    whole += [{"xtc_probability": 0.1}, {"top_h": 0.5}]
    assert [of(top_k=0, **given) for given in whole] == [Reach()] * len(whole)
    assert of(top_h=0.5) == Reach()
