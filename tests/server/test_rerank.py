"""POST /v1/rerank: a cross-encoder's own scores, or how alike vectors are."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
import tokenizers
from onnx import TensorProto, helper
from support import serving, tiny

from edgeformer.bundle.write import seal, write_bundle

QUERY = "What jumps over the dog?"
DOCUMENTS = ["The lazy dog.", "A quick brown fox jumps over a lazy dog.", "Small things.", "A model on a device."]


def write_cross_encoder(path, labels=1):
    """Logits of a pair: the sums of rows of a table, `table.npy` beside the bundle."""
    with write_bundle(path) as folder:
        vocab = tiny.tokenizer(folder)
        g = tiny.GraphBuilder()
        table = np.random.default_rng(3).standard_normal((vocab, labels)).astype(np.float32) / 8
        rows = g.add("Gather", [g.weight("embed.weight", table), "input_ids"])
        mask = g.add(
            "Unsqueeze", [g.add("Cast", ["attention_mask"], to=TensorProto.FLOAT), g.weight("last", np.array([2]))]
        )
        g.add("ReduceSum", [g.add("Mul", [rows, mask]), g.weight("tokens", np.array([1]))], ["logits"], keepdims=0)
        info = helper.make_tensor_value_info
        names = ("input_ids", "attention_mask")
        inputs = [info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
        made = tiny.model(g, inputs, [info("logits", TensorProto.FLOAT, ["batch", labels])])
        (folder / "config.json").write_text(json.dumps({"vocab_size": vocab, "pad_token_id": 0}))
        tiny.save_graph(made, folder)
        seal(folder, tiny.manifest(made, task="text-classification", processing={"max_length": 64}))
    np.save(path.parent / "table.npy", table)
    return path


@pytest.fixture(scope="module")
def ranking(tmp_path_factory, served):
    """(a server of a cross-encoder, one with two labels, an encoder and a language model, the folder of the first)."""
    folder = tmp_path_factory.mktemp("ranking")
    cross = write_cross_encoder(folder / "cross" / "bundle")
    two = write_cross_encoder(folder / "two" / "bundle", labels=2)
    bundles = [f"cross={cross}", f"two={two}", f"encoder={served['encoder']}", f"lm={served['lm']}"]
    with serving.running(bundles) as one:
        yield one, cross


def asked(server, status=200, **body):
    found = httpx.post(server.url + "/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS} | body)
    assert found.status_code == status, found.text
    return found.json()


def tokens_of(bundle, *texts):
    encode = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json")).encode
    return [encode(*text).ids if isinstance(text, tuple) else encode(text).ids for text in texts]


def test_a_cross_encoder_ranks_by_its_own_scores(ranking):
    server, bundle = ranking
    table = np.load(bundle.parent / "table.npy")[:, 0].astype(np.float64)
    pairs = tokens_of(bundle, *[(QUERY, document) for document in DOCUMENTS])
    expected = [1 / (1 + np.exp(-table[ids].sum())) for ids in pairs]
    found = asked(server, model="cross")
    order = [one["index"] for one in found["results"]]
    assert order == sorted(range(4), key=lambda i: -expected[i])
    assert order != [0, 1, 2, 3]
    scores = [one["relevance_score"] for one in found["results"]]
    assert scores == pytest.approx([expected[i] for i in order], rel=1e-5)
    assert found["usage"]["total_tokens"] == sum(map(len, pairs))
    assert (found["object"], found["model"]) == ("list", "cross")
    assert all("document" not in one for one in found["results"])


def test_an_encoder_ranks_by_the_cosine(ranking):
    server, _ = ranking
    found = asked(server, model="encoder")
    with server.client() as client:
        asking, vectors = (
            [one.embedding for one in client.embeddings.create(model="encoder", input=texts).data]
            for texts in ([QUERY], DOCUMENTS)
        )
    expected = np.array(vectors) @ np.array(asking[0])
    assert [one["index"] for one in found["results"]] == np.argsort(-expected).tolist()
    assert [one["relevance_score"] for one in found["results"]] == pytest.approx(np.sort(expected)[::-1].tolist())


def test_the_best_with_their_texts(ranking):
    server, _ = ranking
    whole = asked(server, model="cross")["results"]
    documents = [DOCUMENTS[0], *({"text": text} for text in DOCUMENTS[1:])]
    found = asked(server, model="cross", documents=documents, top_n=2, return_documents=True)["results"]
    assert [one["index"] for one in found] == [one["index"] for one in whole[:2]]
    assert [one["document"]["text"] for one in found] == [DOCUMENTS[one["index"]] for one in found]
    assert len(asked(server, model="cross", top_n=99)["results"]) == 4


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", {"text": "b", "title": "c"}]}, "documents[1].title"),
        ({"documents": ["a", "hello " * 200]}, "documents"),
        ({"model": "encoder", "query": "hello " * 200}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"top_k": 1}, "top_k"),
        ({"max_tokens_per_doc": 10}, "max_tokens_per_doc"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"truncation": True}, "truncation"),
        ({"model": "two"}, "model"),
        ({"model": "lm"}, "model"),
    ],
)
def test_a_wrong_request_is_refused_by_name(ranking, change, param):
    body = {"model": "cross", "query": QUERY, "documents": DOCUMENTS} | change
    given = {name: value for name, value in body.items() if value is not None}
    found = httpx.post(ranking[0].url + "/v1/rerank", json=given)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["param"] == param
