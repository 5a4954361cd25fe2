"""User-defined modules: which export, which get a KV cache, and the message for each broken one."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
ort = pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from torch import nn

import edgeformer
from edgeformer.export import ExportOptions, export, module_source

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
import broken

VOCAB, WIDTH, HEADS = 61, 32, 4


def fill(scores, v, length, table):
    return nn.functional.softmax(scores.masked_fill(table[:, :, :length, :length] == 0, float("-inf")), -1) @ v


def added(scores, v, length, _):
    return torch.softmax(scores + torch.triu(torch.full((length, length), float("-inf")), 1), -1) @ v


def summed(scores, v, length, _):
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.einsum("bhqk,bhkd->bhqd", torch.where(seen, scores, -1e9).softmax(-1), v)


def by_distance(scores, v, length, _):
    """ALiBi: a bias by distance, with one slope per head."""
    place = torch.arange(length)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1).float()
    bias = -(place[:, None] - place[None, :]).abs().float() * slopes[:, None, None]
    hidden = torch.triu(torch.full((length, length), float("-inf")), 1)
    return (scores + bias + hidden).softmax(-1) @ v


def two_ways(scores, v, *_):
    return scores.softmax(-1) @ v


class ByHand(nn.Module):
    """A decomposed attention; `mix` maps (scores, v) to the output."""

    def __init__(self, mix, positions=True):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.given = mix, positions
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("table", torch.ones(64, 64).tril().view(1, 1, 64, 64), persistent=False)
        self.config = {"vocab_size": VOCAB, "max_position_embeddings": 64}

    def forward(self, input_ids, position_ids):
        return self.logits(self.tokens(input_ids) + self.places(position_ids))

    def logits(self, x):
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).split(WIDTH, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        y = self.mix(scores, v, length, self.table)
        return self.head(x + y.transpose(1, 2).reshape(batch, length, WIDTH))


class Counting(ByHand):
    """The same without `position_ids`: it computes positions itself."""

    def forward(self, input_ids):
        return self.logits(self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1])))


class Layers(nn.Module):
    """A language model on PyTorch's own layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, position_ids):
        x = self.tokens(input_ids) + self.places(position_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(x, mask=mask, is_causal=True))


def bundle(module, folder):
    options = ExportOptions("test", folder / "bundle", quantize="none", tokens=0)
    manifest = export(options, traced=module_source(module, options, "test", getattr(module, "config", {})))
    return manifest, edgeformer.load(folder / "bundle", engine="cpu")


def greedy(module, ids, count):
    ids = list(ids)
    for _ in range(count):
        places = torch.arange(len(ids))[None]
        more = () if isinstance(module, Counting) else (places,)
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids]), *more)[0, -1].argmax()))
    return ids[-count:]


CACHED = {
    "masked_fill": lambda: ByHand(fill), "added mask": lambda: ByHand(added), "einsum": lambda: ByHand(summed),
    "bias by distance": lambda: ByHand(by_distance), "own positions": lambda: Counting(fill),
    "own positions, bias": lambda: Counting(by_distance), "nn.TransformerEncoder": Layers,
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_causal_attention_gets_a_cache_however_it_is_written(name, tmp_path):
    module = CACHED[name]().eval()
    manifest, model = bundle(module, tmp_path)
    inputs = manifest["graphs"]["model"]["inputs"]
    assert "past_key_values.0.key" in inputs
    assert "notes" not in manifest
    assert model.generate([1, 5, 9], max_new_tokens=12, ignore_eos=True).ids == greedy(module, [1, 5, 9], 12)


def test_bidirectional_attention_has_no_cache_and_a_note(tmp_path):
    module = ByHand(two_ways).eval()
    manifest, model = bundle(module, tmp_path)
    assert not any(name.startswith("past") for name in manifest["graphs"]["model"]["inputs"])
    assert "no KV cache" in manifest["notes"][0]
    assert "is_causal=True" in manifest["notes"][0]
    with torch.no_grad():
        expected = module(torch.tensor([[1, 5, 9]]), torch.arange(3)[None])[0].numpy()
    assert np.abs(model.logits([1, 5, 9]) - expected).max() < 1e-5


class Padded(nn.Module):
    input_spec = {"x": "float32[batch,sequence,5]", "attention_mask": "bool[batch,sequence]"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.first, self.layers = nn.Linear(5, WIDTH), nn.TransformerEncoder(layer, 2)

    def forward(self, x, attention_mask):
        return self.layers(self.first(x), src_key_padding_mask=~attention_mask)


class Pair(nn.Module):
    input_spec = {"source": "float32[batch,length,32]", "target": "float32[batch,sequence,32]"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.both = nn.Transformer(WIDTH, HEADS, 1, 1, 64, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.both(source, target, tgt_mask=mask, tgt_is_causal=True)


class Heads(nn.Module):
    input_spec = {"x": "float32[batch,sequence,32]"}  # noqa: RUF012
    output_names = ("mixed", "weights")

    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x)


@pytest.mark.parametrize("kind", [Padded, Pair, Heads])
def test_layers_of_pytorch_export_with_dynamic_batch_and_length(kind, tmp_path):
    torch.manual_seed(0)
    module = kind().eval()
    _, model = bundle(module, tmp_path)
    for batch, length in ((1, 1), (3, 4), (2, 19)):
        feeds = {}
        for name, spec in kind.input_spec.items():
            width = int(spec.split(",")[-1].rstrip("]")) if "float" in spec else None
            feeds[name] = torch.randn(batch, length, width) if width else torch.arange(length) < length - batch // 3
        if "attention_mask" in feeds:
            feeds["attention_mask"] = feeds["attention_mask"].expand(batch, length).contiguous()
        with torch.no_grad():
            expected = module(**feeds)
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = model(**{name: value.numpy() for name, value in feeds.items()})
        for reference, value in zip(expected, found.values(), strict=True):
            seen = feeds.get("attention_mask", torch.ones(batch, length, dtype=torch.bool)).numpy()
            assert np.abs(np.where(seen[..., None], value - reference.numpy(), 0)).max() < 1e-5


TOLD = {
    "Loop": r"axis 1 \('sequence'\) of input 'x' was frozen at \d+\. .*a loop over it",
    "Table": r"axis 1 \('sequence'\) of input 'x' was frozen at 7\. .*slice tables",
    "SizeBranch": r"An `if` on a size is decided once",
    "ValueBranch": r"broken\.py:\d+.*branches on the values of a tensor.*torch\.where",
    "GuessedMask": r"compare a mask's values.*is_causal=True to nn\.TransformerEncoder",
    "NoShapes": r"inputs of unknown shape: x.*--input x=float32",
    "OwnPositions": r"cached tokens.*forward\(input_ids, position_ids\)",
    "Complex": r"broken\.py:\d+.*complex numbers, which ONNX does not have.*cos and sin",
    "GraphBreak": r"broken\.py:\d+.*leaves PyTorch \(\.numpy\(\).*use torch operations",
    "Wrapper": r"Wrapper\.forward\(\*args.*names no argument.*export the module inside",
    "scripted": r"TorchScript.*return the nn\.Module before",
    "UnknownInput": r"forward has no argument mask; it has x",
    "Random": r"other numbers.*the same inputs.*dropout with training=True",
    "no_such_layer": r"torch\.nn has no TransformerLayer: write nn\.TransformerEncoderLayer",
}


@pytest.mark.parametrize("name", broken.BROKEN)
def test_a_broken_contract_is_named_with_its_fix(name):
    import re

    assert re.search(TOLD[name], broken.message(name), re.DOTALL)


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, lambda m: torch.nn.DataParallel(torch.compile(m))]
)
def test_the_module_inside_a_known_wrapper_is_exported(wrap, tmp_path):
    module = torch.nn.Linear(8, 8)
    module.input_spec = {"input": "float32[batch,8]"}
    source = module_source(wrap(module), ExportOptions("x", tmp_path / "b"), "wrapped")
    assert source.module is module


def test_the_gpt_example_writes_text(tmp_path, capsys):
    import gpt

    model = gpt.main(tmp_path / "gpt", steps=2)
    assert "past_key_values.1.value" in model.bundle.manifest["graphs"]["model"]["inputs"]
    assert "The statement " in capsys.readouterr().out


def test_the_digits_example_is_as_right_as_pytorch(tmp_path):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    import digits

    reference, found = digits.main(tmp_path / "digits", epochs=12)
    assert reference > 0.85
    assert abs(reference - found) <= 0.01


def test_a_factory_may_have_a_tokenizer(tmp_path, monkeypatch):
    from support import tiny

    (tmp_path / "letters").mkdir()
    monkeypatch.setattr(sys.modules[__name__], "VOCAB", tiny.tokenizer(tmp_path / "letters"))
    (tmp_path / "mine.py").write_text(f"import {__name__} as t\nmake = lambda: t.ByHand(t.fill)\n")
    for place in (tmp_path / "letters", tmp_path / "letters" / "tokenizer.json"):
        options = {"quantize": "none", "tokenizer": place, "overwrite": True}
        export(ExportOptions(f"{tmp_path / 'mine.py'}:make", tmp_path / "bundle", **options))
        model = edgeformer.load(tmp_path / "bundle", engine="cpu")
        ids = model.tokenizer.encode("hello world")
        assert model.generate("hello world", max_new_tokens=5).ids == model.generate(ids, max_new_tokens=5).ids
    for wrong, told in ((tmp_path / "mine.py", "is neither a tokenizer.json"), (tmp_path, "nor a folder with one")):
        options = ExportOptions(f"{tmp_path / 'mine.py'}:make", tmp_path / "other", tokenizer=wrong)
        with pytest.raises(edgeformer.ExportError, match=told):
            export(options)
    with pytest.raises(edgeformer.ExportError, match=r"without a config\.json"):
        export(ExportOptions(str(tmp_path / "letters"), tmp_path / "other", tokenizer=tmp_path / "letters"))
