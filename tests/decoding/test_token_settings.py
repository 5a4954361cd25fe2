"""Settings that are texts, as token ids: DRY's breakers, the newline of XTC; and through `generate`."""

from __future__ import annotations

import pytest
from support import tokenizer_families as families

import edgeformer
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.token_settings import with_token_ids
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["Llama 3", "Llama", "T5"])
def tokenizer(request, tmp_path_factory):
    folder = families.save(request.param, tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.read(folder / "tokenizer.json", None, None)


def test_the_default_breakers_are_the_tokens_that_hold_them(tokenizer):
    config = with_token_ids(GenerationConfig(dry_multiplier=0.8), tokenizer)
    single = {ids[0] for ids in config.dry_breaker_ids if len(ids) == 1}
    texts = {token: tokenizer.token_texts.of(token) for token in range(tokenizer.size)}
    assert single == {token for token, text in texts.items() if any(mark in text for mark in (b"\n", b":", b'"', b"*"))}
    assert all(len(ids) == 1 for ids in config.dry_breaker_ids) and single
    assert config.dry_sequence_breakers == () and with_token_ids(config, tokenizer) == config


def test_a_breaker_of_several_tokens_breaks_where_its_text_stands(tokenizer):
    breaker = "\n* the"
    config = with_token_ids(GenerationConfig(dry_multiplier=0.8, dry_sequence_breakers=(breaker,)), tokenizer)
    ids = tuple(tokenizer.encode("def f():" + breaker, add_special_tokens=False))
    if "\n" in tokenizer.decode(ids):  # T5 has no newline
        assert any(
            ids[place : place + len(found)] == found for place in range(len(ids)) for found in config.dry_breaker_ids
        )


def test_xtc_keeps_the_last_token_of_a_newline(tokenizer):
    config = with_token_ids(GenerationConfig(xtc_probability=0.5, xtc_kept_ids=(1,)), tokenizer)
    assert config.xtc_kept_ids == (1, *tokenizer.encode("\n", add_special_tokens=False)[-1:])


def test_settings_that_are_off_need_no_tokenizer():
    config = GenerationConfig(xtc_threshold=0.2)
    assert with_token_ids(config, None) is config
    assert with_token_ids(GenerationConfig(xtc_probability=0.5), None).xtc_kept_ids == ()
    ids = GenerationConfig(dry_multiplier=1.0, dry_sequence_breakers=(), dry_breaker_ids=((5,),))
    assert with_token_ids(ids, None) is ids


def test_breakers_that_are_texts_need_a_tokenizer():
    with pytest.raises(InputError, match=r"no tokenizer; pass dry_sequence_breakers=\[\]"):
        with_token_ids(GenerationConfig(dry_multiplier=0.8), None)


def test_generate_follows_dry_and_xtc(lm):
    model = edgeformer.load(lm, "cpu", threads=1)
    prompt, settings = [5, 17, 90] * 8, {"max_new_tokens": 24, "ignore_eos": True}
    plain = model.generate(prompt, **settings).ids
    dry = model.generate(prompt, dry_multiplier=50.0, dry_allowed_length=1, dry_sequence_breakers=[], **settings).ids
    pairs = list(zip(prompt + dry, (prompt + dry)[1:], strict=False))
    assert len(set(pairs[len(prompt) - 1 :])) == len(dry), "no pair of tokens comes again"
    assert dry != plain

    sampled = settings | {"temperature": 1.5, "seed": 7}
    xtc = {"xtc_probability": 1.0, "xtc_threshold": 0.01}
    assert model.generate(prompt, **sampled, **xtc).ids == model.generate(prompt, **sampled, **xtc).ids
    assert model.generate(prompt, **sampled, **xtc).ids != model.generate(prompt, **sampled).ids
    beams = settings | {"num_beams": 2, "do_sample": True, "seed": 3, **xtc}
    assert model.generate(prompt, **beams).ids == model.generate(prompt, **beams).ids
    forced = model.generate(prompt, forced_tokens={1: 42, 3: 43}, logit_bias={44: 100}, **settings).ids
    assert forced[:5] == [44, 42, 44, 43, 44]
