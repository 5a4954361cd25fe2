"""The filters of sampling on large vocabularies, compared with transformers'; XTC with its author's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers.generation import logits_process as hf

from edgeformer.decoding import filters
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.sampling import Candidates

# ours, transformers' class, an argument
PAIRS = [
    *((filters.top_k, hf.TopKLogitsWarper, k) for k in (1, 2, 40, 700, 5000)),
    *((filters.top_p, hf.TopPLogitsWarper, p) for p in (1e-6, 0.2, 0.9, 0.99)),
    *((filters.min_p, hf.MinPLogitsWarper, p) for p in (1e-6, 0.05, 1.0)),
    *((filters.typical_p, hf.TypicalLogitsWarper, p) for p in (0.05, 0.5, 0.95)),
    *((filters.epsilon_cutoff, hf.EpsilonLogitsWarper, p) for p in (1e-5, 3e-4, 0.9)),
    *((filters.eta_cutoff, hf.EtaLogitsWarper, p) for p in (1e-5, 3e-4, 0.9)),
    *((filters.top_h, hf.TopHLogitsWarper, p) for p in (0.1, 0.9)),
]


def logits(seed, size, spread):
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


@pytest.mark.parametrize("least", [1, 5])
@pytest.mark.parametrize("spread", [0.5, 3.0, 9.0])
@pytest.mark.parametrize(
    ("ours", "theirs", "argument"), PAIRS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_each_filter_keeps_the_tokens_of_transformers(ours, theirs, argument, spread, least):
    if ours is filters.top_h and least > 1:
        pytest.skip("transformers' top-h has no such argument")
    for seed, size in enumerate((3, 50, 997, 20_011)):
        scores = logits(seed, size, spread)
        if ours is filters.top_k:
            places = ours(scores, max(argument, least))
        else:
            places = ours(scores, argument) if least == 1 else ours(scores, argument, least)
        more = {} if ours is filters.top_h else {"min_tokens_to_keep": min(least, size)}
        expected = theirs(argument, **more)(None, torch.tensor(scores[None]))[0].numpy()
        found = Candidates(scores).at(places).spread(size)
        kept, wanted = np.isfinite(found), np.isfinite(expected)
        # Both sum float32 numbers: one token at the end of a long sum may fall on the other side.
        assert int((kept != wanted).sum()) <= (size > 10_000), (int(kept.sum()), int(wanted.sum()))
        assert np.array_equal(found[kept], scores[kept])


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.8, 0.95, 1 - 1e-9])
def test_top_p_is_the_smallest_set_that_reaches_p(p, spread):
    """A reference in float64 that sorts everything."""
    for seed in range(5):
        scores = logits(seed, 30_001, spread)
        likely = np.exp(scores.astype(np.float64) - scores.max())
        likely /= likely.sum()
        kept = filters.top_p(scores, p)
        kept = np.arange(len(scores)) if kept is None else kept
        assert np.array_equal(kept, np.unique(kept))
        rest = np.delete(likely, kept)
        tolerance = 3e-7  # of the float32 exponentials and their sum
        assert likely[kept].sum() >= p - tolerance
        assert likely[kept].sum() - likely[kept].min() <= p + tolerance, "one fewer would do"
        assert not len(rest) or rest.max() <= likely[kept].min() * (1 + tolerance)


def test_of_equally_likely_tokens_top_p_keeps_the_first():
    scores = np.zeros(1000, np.float32)
    assert filters.top_p(scores, 0.2505).tolist() == list(range(251))
    scores[[7, 500]] = 5
    assert filters.top_p(scores, 0.05).tolist() == [7]


@given(
    arrays(np.float32, st.integers(1, 400), elements=st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 2.0, 30.0])),
    st.sampled_from(["top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]),
    st.floats(1e-4, 0.999),
    st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_a_filter_keeps_the_best_and_at_least_so_many(scores, name, argument, least):
    scores[0] = 1.0
    kept = getattr(filters, name)(scores, argument, least)
    kept = np.arange(len(scores)) if kept is None else kept
    assert np.array_equal(kept, np.unique(kept)) and np.isfinite(scores[kept]).sum() >= min(
        least, np.isfinite(scores).sum()
    )
    if name != "typical_p":
        assert scores[kept].max() == scores.max()
    assert np.isfinite(scores[kept]).any(), "something can be drawn"


@pytest.mark.parametrize("size", [40, 3000])
def test_a_p_that_rounds_to_one_leaves_all_that_may_follow(size):
    for seed in range(20):
        scores = logits(seed, size, 3.0)
        scores[::3] = -np.inf
        kept = filters.top_p(scores, 1 - 1e-15)
        kept = np.arange(size) if kept is None else kept
        assert np.isfinite(scores[kept]).sum() > 0.9 * np.isfinite(scores).sum()


def test_filters_after_the_first_see_only_its_tokens():
    scores = logits(0, 5000, 2.0)
    config = GenerationConfig(do_sample=True, top_k=40, top_p=0.9, min_p=0.01, temperature=1.3)
    whole, few = Candidates(scores), []
    for each in filters.filters(config):
        whole = each(whole, None)
        few.append(len(whole.scores))
    assert few[0] == few[1] == 40 and few[2] < 40 and whole.tokens is not None
    assert np.array_equal(whole.scores, (scores / 1.3)[whole.tokens])


def test_a_tiny_temperature_leaves_the_most_likely_token():
    scores = logits(0, 100, 1.0)
    (heat,) = filters.filters(GenerationConfig(do_sample=True, top_k=0, temperature=1e-39))
    left = heat(Candidates(scores), None).scores
    assert left.argmax() == scores.argmax() and left.max() == 0
    assert np.delete(left, left.argmax()).max() < -1e30


# ----------------------------------------------------------------------------------------------------------------- XTC


class Numbers:
    """A random generator that gives these numbers."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def xtc_reference(scores, threshold, kept):
    """Which tokens stay, by sorting: of those that meet the threshold all but the least likely go."""
    likely = torch.tensor(scores, dtype=torch.float64).softmax(-1).tolist()
    order = sorted(range(len(scores)), key=lambda token: -likely[token])
    meet = [token for token in order if likely[token] >= threshold]
    gone = set(meet[:-1])
    return set(range(len(scores))) if gone & set(kept) else set(range(len(scores))) - gone


def xtc(**setting):
    (found,) = filters.filters(GenerationConfig(do_sample=True, top_k=0, **setting))
    return found


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.1, 0.3, 0.6])
def test_xtc_excludes_all_top_choices_but_the_least_likely(threshold):
    changed = 0
    for seed in range(40):
        scores = logits(seed, 60, 2.0)
        apply = xtc(xtc_probability=0.5, xtc_threshold=threshold)
        found = apply(Candidates(scores), Numbers(0.49))
        tokens = set(left(found))
        assert tokens == xtc_reference(scores, threshold, ())
        changed += len(tokens) < 60
        assert len(left(apply(Candidates(scores), Numbers(0.5)))) == 60, "the other half of the time nothing happens"
    assert bool(changed) == (threshold < 0.5), "two tokens cannot both be likelier than one half"


def left(candidates):
    """The tokens that may be drawn."""
    return [candidates.token(place) for place in np.flatnonzero(np.isfinite(candidates.scores)).tolist()]


def test_xtc_leaves_all_where_an_end_or_a_newline_would_go():
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.05, 0.05], np.float32))
    for kept, tokens in (([0], [0, 1, 2, 3, 4]), ([1], [0, 1, 2, 3, 4]), ([2], [2, 3, 4]), ([3], [2, 3, 4])):
        for setting in ({"eos_token_id": tuple(kept)}, {"xtc_kept_ids": tuple(kept)}):
            apply = xtc(xtc_probability=1.0, **setting)
            assert left(apply(Candidates(scores), Numbers(0.0))) == tokens
    few = Candidates(scores[1:], np.array([11, 12, 13, 14]))  # of a larger vocabulary
    assert left(xtc(xtc_probability=1.0, eos_token_id=(1,))(few, Numbers(0.0))) == [12, 13, 14]
    assert left(xtc(xtc_probability=1.0, eos_token_id=(11,))(few, Numbers(0.0))) == [11, 12, 13, 14]


def test_xtc_takes_one_number_at_each_step_whatever_it_does():
    for scores in (np.zeros(3, np.float32), np.array([0, -50], np.float32)):
        numbers = Numbers(0.9, 0.1, 0.5)
        apply = xtc(xtc_probability=0.3)
        for left in (2, 1, 0):
            apply(Candidates(scores), numbers)
            assert len(numbers.numbers) == left
