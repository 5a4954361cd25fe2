"""Embeddings through the official client, which asks for base64."""

from __future__ import annotations

import numpy as np
import pytest

import edgeformer

TEXTS = ["hello world", "The lazy dog."]


@pytest.fixture(scope="module")
def encoder(served):
    return edgeformer.load(served["encoder"], threads=1)


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_vectors_are_those_of_embed(client, encoder, form):
    more = {} if form is None else {"encoding_format": form}
    found = client.embeddings.create(model="encoder", input=TEXTS, **more)
    rows = [one.embedding for one in found.data]
    if form == "base64":
        import base64

        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_array_equal(np.array(rows, np.float32), encoder.embed(TEXTS))
    assert [one.index for one in found.data] == [0, 1]
    assert found.usage.prompt_tokens == sum(len(encoder.tokenizer.encode(text)) for text in TEXTS)


def test_one_text_and_token_ids_give_the_same(client, encoder):
    ids = encoder.tokenizer.encode(TEXTS[0], add_special_tokens=False)
    rows = [client.embeddings.create(model="encoder", input=one).data[0].embedding for one in (TEXTS[0], ids, [ids])]
    assert rows[0] == rows[1] == rows[2]


def test_dimensions_are_cut_and_have_length_1(client, encoder):
    row = np.array(client.embeddings.create(model="encoder", input=TEXTS[0], dimensions=4).data[0].embedding)
    whole = encoder.embed(TEXTS[:1])[0, :4]
    np.testing.assert_allclose(row, whole / np.linalg.norm(whole), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": "the lazy dog " * 40}, "input"),
        ({"input": "a", "dimensions": 1000}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "model": "lm"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_refused(client, given, param):
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": "encoder"} | given)
    assert caught.value.param == param
