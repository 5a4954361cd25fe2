"""Encoders of many texts: batches by length, the same numbers in any company, progress."""

from __future__ import annotations

import io
import itertools
import sys

import numpy as np
import pytest
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

import edgeformer
from bench.sources import _sentences as tiny
from edgeformer.errors import InputError
from edgeformer.export import ExportOptions, export
from edgeformer.tasks.encoder_batches import BATCH_ITEMS, BATCH_TOKENS, MANY, Batching

WORDS = tiny.WORDS
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i * 7 % 60)) for i in range(40)]  # 1 to 60 words
LENGTHS = st.lists(st.integers(0, 300), max_size=60)
LIMITS = st.tuples(st.none() | st.integers(1, 40), st.none() | st.integers(1, 600))


@given(LENGTHS, LIMITS)
def test_every_item_is_in_one_batch_and_no_batch_is_over_the_limits(lengths, limits):
    size, tokens = limits
    batches = list(Batching(size).by_length(lengths, tokens))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= (size or (BATCH_ITEMS if tokens is None else len(lengths)))
        if tokens is not None and len(batch) > 1:
            assert len(batch) * max(lengths[place] for place in batch) <= tokens


@given(LENGTHS, st.integers(1, 600))
def test_batches_are_as_full_as_the_budget_allows(lengths, tokens):
    """One more item would not have fitted; so each item is beside those of the nearest lengths."""
    batches = list(Batching().by_length(lengths, tokens))
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * max(1, lengths[batch[0]]) > tokens
        assert min(lengths[place] for place in batch) >= max(lengths[place] for place in following)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_a_wrong_batch_size_is_refused(size):
    with pytest.raises(InputError, match="batch_size is"):
        Batching(size)


def test_a_wrong_progress_is_refused():
    with pytest.raises(InputError, match="show_progress is 'yes'"):
        Batching(None, "yes")


# -------------------------------------------------------------------------------------------------------------- numbers


def labelled():
    config = tf.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, num_labels=3, **tiny.SIZES)
    return tf.BertForSequenceClassification(config)


@pytest.fixture(scope="module", params=["none", "q8"])
def bundles(request, tmp_path_factory):
    """(an encoder's bundle, a classifier's)."""
    place = tmp_path_factory.mktemp("bundles")
    found = []
    for name, make in (("vectors", tiny.bert), ("labels", labelled)):
        folder = tiny.base(place / name, make)
        export(ExportOptions(str(folder), place / f"{name}-bundle", quantize=request.param))
        found.append(place / f"{name}-bundle")
    return found


@pytest.mark.parametrize("engine", ["cpu", "native"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last", "mean_sqrt_len", "weightedmean"])
def test_a_vector_does_not_depend_on_the_texts_beside_it(engine, pooling, bundles):
    """The native engine gives the same bits; ONNX Runtime rounds."""
    if engine == "native":
        pytest.importorskip("edgeformer._native", reason="the native extension is not built")
    model = edgeformer.load(bundles[0], engine=engine, threads=1)
    alone = np.concatenate([model.embed([text], pooling=pooling) for text in TEXTS])
    for limit in ({}, {"batch_size": 7}, {"batch_size": 1}):
        together = model.embed(TEXTS, pooling=pooling, **limit)
        if engine == "native":
            np.testing.assert_array_equal(together, alone)
        else:
            quantized = model.info["quantization"]["scheme"] != "none"
            assert np.abs(together - alone).max() < (2e-2 if quantized else 1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3, "all texts have one vector"


def test_labels_and_scores_do_not_depend_on_the_texts_beside_them(bundles):
    pytest.importorskip("edgeformer._native", reason="the native extension is not built")
    model = edgeformer.load(bundles[1], engine="native", threads=1)
    assert model.classify(TEXTS) == [model.classify([text])[0] for text in TEXTS]
    pairs = list(itertools.pairwise(text[:60] for text in TEXTS))
    np.testing.assert_array_equal(model.score(pairs), np.concatenate([model.score([pair]) for pair in pairs]))


def test_batches_stay_within_the_budget_of_tokens(bundles, monkeypatch):
    model = edgeformer.load(bundles[0], engine="cpu", threads=1)
    shapes, forward = [], type(model.engine).forward

    def seen(self, batch):
        shapes.extend(inputs["input_ids"].shape for inputs, _ in batch)
        return forward(self, batch)

    monkeypatch.setattr(type(model.engine), "forward", seen)
    model.embed(TEXTS)
    assert sum(rows for rows, _ in shapes) == len(TEXTS)
    assert all(rows * length <= BATCH_TOKENS for rows, length in shapes)
    assert len(shapes) < len(TEXTS) / 3
    lengths = [len(model.tokenizer.encode_for_encoder(text, 64).ids) for text in TEXTS]
    assert sum(rows * length for rows, length in shapes) < 1.3 * sum(lengths)


# ------------------------------------------------------------------------------------------------------------- progress


def test_a_function_hears_of_every_batch(bundles):
    model, heard = edgeformer.load(bundles[0], engine="cpu", threads=1), []
    model.embed(TEXTS, batch_size=9, show_progress=lambda done, total: heard.append((done, total)))
    dones = [done for done, _ in heard]
    assert dones == sorted(set(dones)) and dones[-1] == len(TEXTS) and {total for _, total in heard} == {len(TEXTS)}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "count", "shown"),
    [
        (False, True, MANY, False),
        (True, False, 1, True),
        (None, True, MANY, True),
        (None, True, MANY - 1, False),
        (None, False, MANY, False),
    ],
)
def test_a_bar_is_shown_where_it_helps(monkeypatch, capsys, progress, terminal, count, shown):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Batching(None, progress).reporting(count) as report:
        report(count)
    assert (f"{count}/{count}" in stream.getvalue()) == shown
    assert shown or not stream.getvalue()
    assert capsys.readouterr().out == ""


def test_texts_of_a_graph_without_an_attention_mask_are_not_padded(tmp_path):
    from support import serving

    model = edgeformer.load(serving.write_text_encoder(tmp_path / "encoder"), "native", threads=1)
    texts = ["hello", "hello world, and more of it", "world", "a b c d", "hello world"]
    together = model.embed(texts)
    np.testing.assert_array_equal(together, np.concatenate([model.embed([text]) for text in texts]))


# ---------------------------------------------------------------------------------------------------- wrong arguments

NAN = float("nan")
NO_TEXTS = {
    "one text": "x", "bytes": b"x", "None": None, "a number": 5, "no texts": [], "a list with a number": ["x", 5],
    "a list with None": [None], "a list with bytes": [b"x"], "a lone surrogate": ["\ud800"], "a set": {"x"},
    "numbers": np.zeros((2, 3)), "a dict": {"x": 1}, "a pair of numbers": [(1, 2)],
}  # fmt: skip
OPTIONS = {
    "batch_size": (0, -1, 1.5, "8", True),
    "show_progress": ("yes", 5),
    "prompt_name": ("no such", 5),
    "prompt": (5, b"x"),
    "pooling": ("median", 5, [], ["mean", 5]),
    "normalize": ("yes", 2),
    "dimensions": (0, -1, 10**9, 1.5, "3", True),
    "top_k": (0, -1, 1.5, "x", True),
    "activation": ("no such", 5),
}
TAKES = {
    "embed": ("prompt_name", "prompt", "pooling", "normalize", "dimensions", "batch_size", "show_progress"),
    "classify": ("batch_size", "show_progress"),
    "score": ("prompt_name", "prompt", "activation", "batch_size", "show_progress"),
    "rank": ("top_k", "prompt_name", "prompt", "batch_size", "show_progress"),
}
WRONG = [(method, name, value) for method, names in TAKES.items() for name in names for value in OPTIONS[name]]


@pytest.fixture(scope="module")
def loaded(bundles):
    """{method: a model that has it}"""
    vectors, labels = (edgeformer.load(path, "cpu", threads=1) for path in bundles)
    return {"embed": vectors, "classify": labels, "score": labels, "rank": labels}


def called(loaded, method, items, **options):
    model = loaded[method]
    return model.rank("x", items, **options) if method == "rank" else getattr(model, method)(items, **options)


@pytest.mark.parametrize("method", TAKES)
@pytest.mark.parametrize("case", NO_TEXTS)
def test_what_are_no_texts_is_refused(loaded, method, case):
    with pytest.raises(InputError, match=r".{20}"):
        called(loaded, method, NO_TEXTS[case])


@pytest.mark.parametrize(("method", "name", "value"), WRONG, ids=lambda value: repr(value)[:20])
def test_an_option_out_of_its_range_is_refused_by_name(loaded, method, name, value):
    with pytest.raises(InputError, match=name.partition("_name")[0]):
        called(loaded, method, ["a text", "another"], **{name: value})


@pytest.mark.parametrize(
    ("a", "b", "function"),
    [
        ([[1.0, 2]], [[1.0]], None), ([1.0], [[[1.0]]], None), ("x", "y", None), (None, [[1.0]], None),
        ([[1.0]], [[1.0]], "nearest"), ([[1.0]], [[1.0]], 5), ([[1j]], [[1.0]], None), ([["x"]], [["y"]], None),
    ],
)  # fmt: skip
def test_what_are_no_vectors_is_refused(loaded, a, b, function):
    with pytest.raises(InputError):
        loaded["embed"].similarity(a, b, function)
