"""User-defined encoder-decoders: encode and decode become two graphs with the same results."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from torch import nn

import edgeformer
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, export, module_source
from edgeformer.tools.verify import verify

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))

VOCAB, WIDTH, HEADS, FEATURES, START = 41, 32, 4, 6, 1


class Attention(nn.Module):
    """[B, Q, WIDTH] from x to y [B, K, WIDTH]; written by hand, or with PyTorch's own function."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand = by_hand
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, y, seen=None, causal=False):
        q, k, v = (
            linear(value).view(value.shape[0], value.shape[1], HEADS, -1).transpose(1, 2)
            for linear, value in ((self.q, x), (self.k, y), (self.v, y))
        )
        if not self.by_hand:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen, is_causal=causal)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if causal:
                scores = scores + torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
            if seen is not None:
                scores = scores.masked_fill(~seen, -1e9)
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Pair(nn.Module):
    """Tokens to tokens, with a padding mask."""

    def __init__(self, by_hand=False):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.tokens, self.places = (nn.Embedding(size, WIDTH) for size in (VOCAB, VOCAB, 64))
        self.own, self.answered, self.crossing = (Attention(by_hand) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        for linear in (self.head, self.crossing.v, self.crossing.out):  # large enough for the source to matter
            nn.init.normal_(linear.weight, std=0.5)
        self.config = {"vocab_size": VOCAB, "max_position_embeddings": 64, "decoder_start_token_id": START}

    def encode(self, input_ids, attention_mask):
        x = self.source(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        return x + self.own(x, x, seen=(attention_mask > 0)[:, None, None, :])

    def decode(self, input_ids, encoder_hidden_states, encoder_attention_mask):
        return self.answer(input_ids, encoder_hidden_states, (encoder_attention_mask > 0)[:, None, None, :])

    def answer(self, input_ids, states, seen):
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = x + self.answered(x, x, causal=True)
        return self.head(x + self.crossing(x, states, seen))


class Frames(Pair):
    """Numbers to tokens, without a mask."""

    input_spec = {"frames": f"float32[batch,time,{FEATURES}]"}  # noqa: RUF012

    def __init__(self, by_hand=False):
        super().__init__(by_hand)
        self.first = nn.Linear(FEATURES, WIDTH)

    def encode(self, frames):
        x = self.first(frames)
        return x + self.own(x, x)

    def decode(self, input_ids, encoder_hidden_states):
        return self.answer(input_ids, encoder_hidden_states, None)


class Assigned(Pair):
    """Padding overwritten with zeros, and a head that is tied to the embedding."""

    def __init__(self, by_hand=False):
        super().__init__(by_hand)
        nn.init.normal_(self.tokens.weight, std=0.5)
        self.head.weight = self.tokens.weight

    def encode(self, input_ids, attention_mask):
        states = super().encode(input_ids, attention_mask)
        states[attention_mask == 0] = 0
        return states


def bundle(module, folder, **more):
    options = ExportOptions("test", folder / "bundle", quantize="none", **more)
    return export(options, traced=module_source(module.eval(), options, "test", module.config))


def greedy(module, count, *source):
    """[count] tokens after START, of PyTorch, without a cache."""
    ids = [START]
    with torch.no_grad():
        states = module.encode(*source)
        for _ in range(count):
            ids.append(int(module.decode(torch.tensor([ids]), states, *source[1:])[0, -1].argmax()))
    return ids[1:]


@pytest.mark.parametrize(
    ("kind", "by_hand"), [(Pair, False), (Pair, True), (Frames, False), (Frames, True), (Assigned, False)]
)
def test_encode_and_decode_become_two_graphs(kind, by_hand, tmp_path):
    module = kind(by_hand)
    manifest = bundle(module, tmp_path)
    assert manifest["task"] == "text2text-generation"
    assert manifest["parity"]["float"]["worst"] < 1e-5
    graphs = manifest["graphs"]
    assert {"present.0.encoder.key", "present.0.encoder.value"} < set(graphs["encoder"]["outputs"])
    assert {"past_key_values.0.encoder.key", "past_key_values.0.decoder.key"} < set(graphs["decoder"]["inputs"])
    assert "encoder_hidden_states" not in graphs["decoder"]["inputs"], "crossing keys would be computed at each step"
    answers = set()
    for engine in ("cpu", "native"):
        model = edgeformer.load(tmp_path / "bundle", engine, **({"kv": "float32"} if engine == "native" else {}))
        assert verify(tmp_path / "bundle", engine).passed
        for length in (1, 4, 13):
            if kind is not Frames:
                ids = torch.from_numpy(np.random.default_rng(length).integers(2, VOCAB, (1, length)))
                given, source = ids[0].numpy(), (ids, torch.ones_like(ids))
            else:
                frames = torch.randn(1, length, FEATURES, generator=torch.Generator().manual_seed(length))
                given, source = frames[0].numpy(), (frames,)
            found = model.generate(given, max_new_tokens=12, ignore_eos=True).ids
            assert found == greedy(module, 12, *source)
            answers.add(tuple(found))
    assert len(answers) > 1, "the answers do not depend on the source"


class Counted(Pair):
    def decode(self, input_ids, position_ids, encoder_hidden_states, encoder_attention_mask):
        return self.answer(input_ids, encoder_hidden_states, None)


class Unmasked(Pair):
    def decode(self, input_ids, encoder_hidden_states):
        return self.answer(input_ids, encoder_hidden_states, None)


class Otherwise(Pair):
    def decode(self, target, encoder_hidden_states, encoder_attention_mask):
        return self.answer(target, encoder_hidden_states, None)


class Pooled(Pair):
    def encode(self, input_ids, attention_mask):
        return super().encode(input_ids, attention_mask).mean(1)


class Halved(Frames):
    def encode(self, frames):
        return super().encode(frames)[:, ::2]


class LastOnly(Frames):
    def decode(self, input_ids, encoder_hidden_states):
        return super().decode(input_ids, encoder_hidden_states)[:, -1]


class BothWays(Frames):
    def answer(self, input_ids, states, seen):
        x = self.tokens(input_ids)
        return self.head(self.answered(x, x) + self.crossing(x, states))


class Undeclared(Frames):
    input_spec = None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Counted, r"decode takes position_ids; .*torch\.arange\(input_ids\.shape\[1\]\)"),
        (Unmasked, r"encode takes a padding mask and decode has no encoder_attention_mask"),
        (Otherwise, r"decode has the arguments target, .*; expected encode\(input_ids, attention_mask\)"),
        (Pooled, r"encode returns the shape \[2, 32\]; expected \[batch, source, size\]"),
        (Halved, r"encode returns 3 states for a source of 5, and 6 for 11; expected the length of the source"),
        (LastOnly, r"decode returns the shape \[2, 41\]; expected \[batch, sequence, vocab\]"),
        (BothWays, r"No causal attention was recognized in the decoder.*is_causal=True"),
        (Undeclared, r"encode\(frames\) takes inputs of unknown shape: frames.*input_spec"),
    ],
)
def test_a_broken_contract_is_named_with_its_fix(kind, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        bundle(kind(), tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_an_autoencoder_stays_one_graph(tmp_path):
    class Auto(nn.Module):
        input_spec = {"x": "float32[batch,8]"}  # noqa: RUF012
        config = {}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

        def encode(self, x):
            return self.down(x)

        def decode(self, states):
            return self.up(states)

        def forward(self, x):
            return self.decode(self.encode(x))

    assert set(bundle(Auto(), tmp_path)["graphs"]) == {"model"}


def test_the_translation_example_reads_numbers_it_never_saw(tmp_path):
    import translate

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module, loaded = translate.main(tmp_path / "bundle", steps=300)
    torch.set_num_threads(threads)
    numbers = translate.split()[1]
    same = 0
    for number in numbers[:40]:
        ids = torch.tensor([list(translate.words(number).encode())])
        answer = [translate.START]
        with torch.no_grad():
            states = module.encode(ids, torch.ones_like(ids))
            while answer[-1] != translate.END and len(answer) < 9:
                logits = module.decode(torch.tensor([answer]), states, torch.ones_like(ids))
                answer.append(int(logits[0, -1].argmax()))
        same += loaded.generate(list(translate.words(number).encode()), max_new_tokens=8).ids == answer[1:]
    assert same >= 38, f"{same} of 40 answers are PyTorch's; the weights have 8 bits"
    assert loaded.engine.name == "native"
    for model in (loaded, edgeformer.load(tmp_path / "bundle", "cpu")):
        right = sum(translate.read(model, translate.words(number)) == str(number) for number in numbers)
        assert right >= 190, f"{right} of 200 numbers are right on {model.engine.name}"
