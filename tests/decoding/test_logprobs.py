"""Log probabilities, compared with PyTorch's log softmax and topk; texts and bytes of tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgeformer.decoding.logprobs import TopToken, check_count, prompt_logprobs, row_logprobs, token_logprobs
from edgeformer.errors import InputError


class Texts:
    """The bytes of a token: its number; tokens from 90 have none."""

    def of(self, token):
        return None if token >= 90 else b"\xe3" if token == 7 else f" {token}".encode()


def rows(count, vocab, spread=5.0):
    return (np.random.default_rng(vocab).standard_normal((count, vocab)) * spread).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, -300.0, 5000.0])
@pytest.mark.parametrize(("vocab", "count"), [(2, 2), (100, 0), (100, 5), (49_152, 5), (49_152, 20)])
def test_log_probabilities_are_those_of_log_softmax(vocab, count, offset):
    logits = rows(3, vocab) + np.float32(offset)
    chosen = np.array([0, vocab - 1, vocab // 2])
    found = row_logprobs(logits, chosen, count)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    # The differences of float32 logits are exact to 2**-24 of them, the sum of n float32 exponentials to 2**-23.
    tolerance = 1e-6 + 2**-23 * abs(offset)
    np.testing.assert_allclose(found.own, expected[range(3), chosen].numpy(), rtol=0, atol=tolerance)
    values, ids = expected.topk(count)
    for (ours, logprobs), theirs, wanted in zip(found.top, ids, values, strict=True):
        if offset == 0:
            assert ours.tolist() == theirs.tolist()
        np.testing.assert_allclose(logprobs, wanted.numpy(), rtol=0, atol=tolerance)


def test_a_forbidden_token_is_never_among_the_likeliest():
    logits = np.full((1, 5000), -np.inf, np.float32)
    logits[0, [3, 4000]] = 1.0, 2.0
    found = row_logprobs(logits, [7], 5)
    assert found.own[0] == -math.inf and found.top[0][0].tolist() == [4000, 3]
    assert math.isclose(math.exp(found.top[0][1][0]) + math.exp(found.top[0][1][1]), 1, rel_tol=1e-6)


def test_the_logits_stay_as_they_are():
    logits = rows(2, 3000)
    before = logits.copy()
    row_logprobs(logits, [1, 2], 3)
    assert np.array_equal(logits, before)


def test_tokens_have_their_texts_and_bytes():
    logits = np.zeros((3, 100), np.float32)
    logits[:, [95, 7, 5]] = 3.0, 2.0, 1.0
    found = token_logprobs(logits, [5, 7, 95], 3, Texts())
    assert [each.bytes for each in found] == [b" 5", b"\xe3", None]
    assert [each.text for each in found] == [" 5", "\N{REPLACEMENT CHARACTER}", None]
    assert [(top.id, top.bytes) for top in found[0].top] == [(95, None), (7, b"\xe3"), (5, b" 5")]
    assert found[0].top[2] == TopToken(5, " 5", b" 5", found[0].logprob)
    assert [each.text for each in token_logprobs(logits, [5, 7, 95], 0, None)] == [None] * 3
    assert token_logprobs(logits, [5, 7, 95], 0, Texts())[0].top == ()


def test_the_first_token_of_a_prompt_has_no_log_probability():
    logits, ids = rows(4, 50), [9, 8, 7, 6]
    found = prompt_logprobs(logits, ids, 2, Texts())
    assert [each.id for each in found] == ids and found[0].logprob is None and found[0].top == ()
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    assert [each.logprob for each in found[1:]] == pytest.approx(
        [float(expected[i, ids[i + 1]]) for i in range(3)], abs=1e-6
    )
    assert prompt_logprobs(logits[:0], [9], 2, None)[0].id == 9


@pytest.mark.parametrize("bad", [-1, 21, True, 1.0, "5"])
def test_a_wrong_count_is_refused(bad):
    with pytest.raises(InputError, match="logprobs is"):
        check_count(bad)
    for fine in (None, 0, 20):
        check_count(fine)
