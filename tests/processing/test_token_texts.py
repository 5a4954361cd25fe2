"""The bytes of each token: joined, they are the text that the tokenizer decodes, for every family of tokenizers."""

from __future__ import annotations

import pytest
from support import tokenizer_families as families

from edgeformer.processing.tokenizer import Tokenizer

TEXTS = [
    "Hello world, it's 2026!",
    "tabs\tand\n\nlines",
    "naïve café – ünïcödé",
    "日本語 и русский",
    "🙂🙃",
    "def f(x):\n    x",
]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_bytes_of_tokens_joined_are_the_decoded_text(name, tmp_path):
    folder = families.save(name, tmp_path, clean_up_tokenization_spaces=False)
    tokenizer = Tokenizer.read(folder / "tokenizer.json", folder / "tokenizer_config.json", None)
    told = 0
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = [token for token in ids if token not in tokenizer.special_ids]
        data = b"".join(tokenizer.token_texts.of(token) for token in ids)
        # Whether a space stands before the first word depends on the tokenizer; bytes that are no text decode alike.
        assert data.decode(errors="replace").strip(" ") == tokenizer.decode(ids).strip(" ")
        told += len(ids)
    assert told > 10


def test_special_tokens_have_their_names_and_unknown_ids_nothing(tmp_path):
    folder = families.save("Llama 3", tmp_path)
    tokenizer = Tokenizer.read(folder / "tokenizer.json", None, None)
    assert tokenizer.token_texts.of(0) == b"<|begin|>" and tokenizer.token_texts.of(10**6) is None
    assert tokenizer.token_texts is tokenizer.token_texts


def test_a_byte_token_is_its_byte(tmp_path):
    folder = families.save("Llama", tmp_path)
    tokenizer = Tokenizer.read(folder / "tokenizer.json", None, None)
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert b"".join(tokenizer.token_texts.of(token) for token in ids).endswith("🙂".encode())
    assert any(len(tokenizer.token_texts.of(token)) == 1 for token in ids)
