"""The constraint of one answer: masks, drafts, forks, the end of an answer, and the cache of grammars."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("transformers")

from support import tokenizer_families as families
from support.json_schema_suite import letters
from tokenizers import AddedToken

from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint
from edgeformer.decoding.constraints import compile as compiling
from edgeformer.decoding.constraints.token_bytes import TokenBytes
from edgeformer.decoding.constraints.token_trie import token_trie
from edgeformer.errors import InputError, StateError
from edgeformer.processing.tokenizer import Tokenizer

EOS = 0
OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


def made(tokenizer, size=None, eos=(EOS,), **arguments):
    return compile_constraint(tokenizer, eos, size or tokenizer.size, ConstraintSpec.of(**arguments))


def fed(constraint, tokenizer, text):
    for token in tokenizer.encode(text):
        constraint.accept(token)
    return constraint


@pytest.mark.parametrize("size", [None, 500, 513])
def test_apply_keeps_the_scores_of_allowed_tokens_alone(tokenizer, size):
    grammar = made(tokenizer, size, regex="[a-z é]{2,40}")
    constraint = fed(grammar.start(), tokenizer, "the ")
    for dtype in (np.float32, np.float64):
        scores = np.random.default_rng(0).normal(size=size or tokenizer.size).astype(dtype)
        before, allowed = scores.copy(), constraint.allowed_mask()
        found = constraint.apply(scores).spread(len(scores))
        assert found.dtype == dtype and found is not scores and (scores == before).all()
        assert (found == np.where(allowed, scores, -np.inf)).all()
        assert 0 < allowed.sum() < tokenizer.size
        assert not allowed[tokenizer.size :].any()


def test_few_and_many_allowed_tokens_give_the_same_scores(tokenizer, monkeypatch):
    from edgeformer.decoding.constraints import grammar as module

    scores = np.random.default_rng(0).normal(size=tokenizer.size).astype(np.float32)
    constraints = [made(tokenizer, regex="[a-z]{2,40}").start(), made(tokenizer, choices=["yes", "no"]).start()]
    few = [constraint.apply(scores) for constraint in constraints]
    monkeypatch.setattr(module, "_FEW", -1)
    many = [constraint.apply(scores) for constraint in constraints]
    assert [one.tokens is None for one in few + many] == [False, False, True, True]
    assert all((a.spread(len(scores)) == b.scores).all() for a, b in zip(few, many, strict=True))


def test_masks_are_those_of_brute_force(tokenizer):
    """A token may follow if a choice begins with the text and the token's bytes."""
    choices = ["the time", "the tall", "there", "what", "wh🙂", "wh🚀"]
    grammar = made(tokenizer, choices=choices)
    data = TokenBytes.of(tokenizer).later
    for seed in range(30):
        draw, constraint, written = random.Random(seed), grammar.start(), b""
        while not constraint.ended:
            expected = {i for i, text in enumerate(data) if text and _begins(choices, written + text)}
            expected |= {EOS} if written.decode(errors="replace") in choices else set()
            allowed = set(np.flatnonzero(constraint.allowed_mask()).tolist())
            forced = constraint._matcher.compute_ff_bytes()
            # In a forced text, llguidance allows the tokenizer's own spelling alone.
            assert allowed == expected if not forced else allowed and allowed <= expected
            token = draw.choice(sorted(allowed))
            if token == EOS:
                break
            constraint.accept(token)
            written += data[token]
        assert written.decode() in choices


def _begins(choices, data):
    return any(choice.encode().startswith(data) for choice in choices)


def test_an_end_token_may_follow_only_a_complete_answer(tokenizer):
    grammar = made(tokenizer, eos=(EOS, 5), regex="ab?")
    constraint = grammar.start()
    assert not constraint.allowed_mask()[[EOS, 5]].any()
    with pytest.raises(InputError, match="The token 0 may not follow"):
        constraint.accept(EOS)
    fed(constraint, tokenizer, "a")
    assert constraint.may_end and not constraint.ended
    assert constraint.allowed_mask()[[EOS, 5]].all()
    fed(constraint, tokenizer, "b")
    assert constraint.ended
    assert np.flatnonzero(constraint.allowed_mask()).tolist() == [EOS, 5]
    assert constraint.forced(5) == [] and constraint.valid([5, EOS]) == 1
    constraint.accept(5)
    assert constraint.ended and constraint.valid([EOS]) == 0 and constraint.forced(3) == []
    for call in (lambda: constraint.accept(EOS), lambda: constraint.apply(np.zeros(tokenizer.size))):
        with pytest.raises(StateError, match="has ended"):
            call()


def test_a_model_without_an_end_token_stops_where_the_grammar_does(tokenizer):
    constraint = fed(made(tokenizer, eos=(), regex="ab").start(), tokenizer, "ab")
    assert constraint.ended
    with pytest.raises(StateError, match="no end token in its logits; stop where"):
        constraint.apply(np.zeros(tokenizer.size))


def test_a_refused_token_changes_nothing(tokenizer):
    constraint = fed(made(tokenizer, json_schema=OBJECT).start(), tokenizer, '{"name"')
    before = constraint.allowed_mask()
    for token in (*tokenizer.encode("x"), EOS, -1, tokenizer.size, 10**9):
        with pytest.raises(InputError, match="may not follow"):
            constraint.accept(token)
        assert constraint.valid([token]) == 0
    assert (constraint.allowed_mask() == before).all()
    with pytest.raises(InputError, match=r"shape \(3,\), expected"):
        constraint.apply(np.zeros(3))


@pytest.mark.parametrize("arguments", [{"regex": "[a-z é]{2,12}"}, {"json_schema": OBJECT}, {"choices": ["ab", "abc"]}])
def test_a_prepared_mask_is_that_of_the_position(tokenizer, arguments):
    """Two walks side by side, one with its masks made by another thread; every call may come while that runs."""
    draw, grammar = random.Random(4), made(tokenizer, **arguments)
    for _ in range(12):
        plain, prepared = grammar.start(), grammar.start()
        for _ in range(30):
            prepared.prepare()
            prepared.prepare()
            for look in draw.sample(("ended", "may_end", "fork", "forced", "apply"), 2):
                if look == "apply":
                    prepared.apply(np.zeros(tokenizer.size, np.float32))
                elif look == "forced":
                    assert prepared.forced(4) == plain.forced(4)
                elif look == "fork":
                    assert (prepared.fork().allowed_mask() == plain.allowed_mask()).all()
                else:
                    assert getattr(prepared, look) == getattr(plain, look)
            prepared.prepare()
            allowed = prepared.allowed_mask()
            assert (allowed == plain.allowed_mask()).all()
            token = int(draw.choice(np.flatnonzero(allowed)))
            plain.accept(token)
            prepared.accept(token)
            if plain.ended:
                prepared.prepare()
                assert prepared.ended
                break


def test_a_token_is_accepted_where_the_mask_allows_it_and_refused_without_a_trace(tokenizer):
    constraint = fed(made(tokenizer, regex="[a-c]{3}x").start(), tokenizer, "ab")
    allowed = constraint.allowed_mask()
    for token in range(tokenizer.size):
        assert constraint.allows([token]) == [allowed[token]]
        if allowed[token]:
            constraint.fork().accept(token)
            continue
        with pytest.raises(InputError, match="may not follow"):
            constraint.accept(token)
    assert (constraint.allowed_mask() == allowed).all()
    assert constraint.allows([-1, tokenizer.size]) == [False, False]


def test_forced_tokens_are_allowed_and_write_what_must_follow(tokenizer):
    constraint = fed(made(tokenizer, json_schema=OBJECT, whitespace=0).start(), tokenizer, '{"name":"x",')
    drafts = constraint.forced(100)
    assert tokenizer.decode(drafts) in '"count":' and len(drafts) >= 2
    assert constraint.forced(2) == drafts[:2] and constraint.forced(0) == []
    for token in drafts:
        assert constraint.allowed_mask()[token]
        constraint.accept(token)
    open_string = fed(made(tokenizer, json_schema=OBJECT).start(), tokenizer, '{"name": "')
    assert open_string.forced(10) == []


@pytest.mark.parametrize("name", ["Llama", "T5", "BERT"])
def test_the_beginning_is_forced_where_a_tokenizer_writes_a_space(name, tmp_path):
    runtime = Tokenizer(families.FAMILIES[name]().backend_tokenizer, {})
    drafts = made(runtime, max(runtime.vocabulary.values()) + 1, choices=["the time"]).start().forced(10)
    assert drafts and "the time".startswith(runtime.decode(drafts))


def test_valid_counts_the_tokens_that_fit_and_does_not_advance(tokenizer):
    constraint = made(tokenizer, json_schema=OBJECT).start()
    ids = tokenizer.encode('{"name": "x", "count": 12}')
    wrong = [*ids[:5], *tokenizer.encode("]"), *ids[5:]]
    for _ in range(2):
        assert constraint.valid([*ids, EOS]) == len(ids) + 1
        assert constraint.valid([*ids, EOS, EOS]) == len(ids) + 1
        assert constraint.valid(wrong) <= 5 + 3  # "]" may stand in the string, the rest may not
        assert constraint.valid([]) == 0
    one_by_one = constraint.fork()
    for place, token in enumerate(ids):
        assert constraint.valid(ids[: place + 1]) == place + 1
        one_by_one.accept(token)
    assert one_by_one.ended


def test_a_fork_goes_its_own_way(tokenizer):
    first = fed(made(tokenizer, regex="[ab]{3}").start(), tokenizer, "a")
    second = first.fork()
    fed(first, tokenizer, "bb")
    assert first.ended and not second.ended
    fed(second, tokenizer, "a")
    assert not second.ended
    fed(second, tokenizer, "a")
    second.accept(EOS)
    assert second.fork().ended
    assert first.valid([EOS]) == 1


def test_special_tokens_are_never_text(tokenizer):
    constraint = fed(made(tokenizer, json_schema={"type": "string"}).start(), tokenizer, '"')
    assert not constraint.allowed_mask()[list(tokenizer.skipped_ids)].any()
    written = fed(constraint, tokenizer, "<|endoftext")  # its text is no token
    assert written.valid(tokenizer.encode('|>"')) > 0


def test_a_grammar_may_name_a_special_token():
    backend = families.byte_bpe(["<|end|>", "<|call|>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    runtime = Tokenizer(backend, {})
    constraint = made(runtime, grammar='start: <|call|> "<tool>" /[a-z]/').start()
    call, tool = runtime.vocabulary["<|call|>"], runtime.vocabulary["<tool>"]
    assert np.flatnonzero(constraint.allowed_mask()).tolist() == [call]
    constraint.accept(call)
    assert constraint.allowed_mask()[tool]
    assert constraint.valid([tool, *runtime.encode("a"), EOS]) == 3


def test_the_text_of_an_infilling_token_is_spelled_all_the_same():
    runtime = Tokenizer(families.byte_bpe(["<|end|>", "<FILL>"]), {"fill_token": "<FILL>"})
    for arguments in ({"choices": ["<FILL>"]}, {"regex": "a<FILL>"}):
        constraint = made(runtime, **arguments).start()
        drafts = constraint.forced(20)
        assert constraint.valid(drafts) == len(drafts) > 1
        assert 1 not in drafts


def test_random_walks_in_threads_do_not_disturb_each_other(tokenizer):
    grammar, errors = made(tokenizer, json_schema=OBJECT), []
    ids = tokenizer.encode('{"name": "some text", "count": 12345}')

    def work():
        try:
            for _ in range(20):
                constraint = grammar.start()
                for token in ids:
                    assert constraint.allowed_mask()[token]
                    constraint.accept(token)
                assert constraint.ended
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_grammars_are_kept_and_the_oldest_is_forgotten(tokenizer, monkeypatch):
    monkeypatch.setattr(compiling, "_KEPT", 3)
    first = made(tokenizer, regex="first")
    assert made(tokenizer, regex="first") is first
    assert made(tokenizer, 500, regex="first") is not first
    assert made(tokenizer, eos=(1,), regex="first") is not first
    for number in range(3):
        made(tokenizer, regex=f"other{number}")
    assert made(tokenizer, regex="first") is not first


def test_nothing_is_kept_of_a_tokenizer_that_is_gone():
    runtime = letters()
    grammar = made(runtime, regex="ab")
    grammar.start().forced(3)
    trie = weakref.ref(token_trie(runtime))
    assert token_trie(runtime) is trie()
    del grammar, runtime
    gc.collect()
    assert trie() is None


def test_import_does_not_load_llguidance():
    code = "import sys, edgeformer.decoding.constraints as c; assert not {'llguidance', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
