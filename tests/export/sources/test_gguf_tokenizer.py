"""Tokenizers, templates and ends of GGUF files, against readings of the same metadata written here."""

from __future__ import annotations

import itertools
import json

import pytest
from support import gguf_files

pytest.importorskip("gguf", reason="the toolchain needs gguf")
pytest.importorskip("transformers", reason="the toolchain needs transformers")
regex = pytest.importorskip("regex", reason="pip install regex: patterns with Unicode classes")

from tokenizers import Tokenizer, pre_tokenizers

from bench.sources import gguf as sweep
from bench.sources._gguf_trials import REPORTED, SCORES, TEXTS
from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.gguf_tokenizer import read_gguf_tokenizer
from edgeformer.export.sources.gguf.pretokenizers import PRE_TOKENIZERS
from edgeformer.export.sources.gguf.shards import open_gguf

LINES = (
    "the tHe 12345 + 7 = thé!", "  two  spaces\n\n\tand tabs\r\n", "I'll DON'T we'VE it's", "日本語テキスト 한국어 ไทย",
    "naïve café ÀÉÎ ß 👩‍🚀 \u200d", "x_1+=y[2]; // done...", "th the t h e", "", " ", "\n", "a\u0301b 1\u0661\u0967 ½",
    "<|bos|>the<|end|> the<|eot|>", "ABCdefGHI $100 (50%)", "'S 'Re 1,000,000.00",
)  # fmt: skip


def texts_of(folder, **more):
    metadata = gguf_files.keys() | {key.replace("__", "."): value for key, value in more.items()}
    return read_gguf_tokenizer(open_gguf(gguf_files.write(folder / "t.gguf", metadata, {})))


def tokenizer_of(folder, **more):
    return Tokenizer.from_str(texts_of(folder, **more).files["tokenizer.json"].decode())


def cut(text, patterns):
    """`text` in pieces as llama.cpp cuts it: each pattern cuts the pieces of the one before; gaps are pieces too."""
    pieces = [text]
    for pattern in patterns:
        after = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(pattern, piece):
                if match.end() == match.start():
                    continue
                after += [piece[at : match.start()], match.group()]
                at = match.end()
            after.append(piece[at:])
        pieces = [piece for piece in after if piece]
    return pieces


def merged(symbols, rank):
    """`symbols` with the pair of the lowest `rank(pair)` joined, leftmost first, until none has a rank."""
    symbols = list(symbols)
    while True:
        pairs = [(rank(pair), at) for at, pair in enumerate(itertools.pairwise(symbols))]
        pairs = [pair for pair in pairs if pair[0] is not None]
        if not pairs:
            return symbols
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def split_specials(text, specials):
    return [piece for piece in regex.split("(" + "|".join(map(regex.escape, specials)) + ")", text) if piece]


def in_alphabet(text):
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in step.pre_tokenize_str(text))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_bpe_gives_the_ids_of_a_plain_reading(pre, tmp_path):
    tokenizer = tokenizer_of(tmp_path, tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=False)
    ids = {token: index for index, token in enumerate(gguf_files.TOKENS)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(gguf_files.MERGES)}
    for line in LINES:
        expected = []
        for part in split_specials(line, gguf_files.SPECIAL):
            if part in gguf_files.SPECIAL:
                expected.append(ids[part])
                continue
            for piece in cut(part, PRE_TOKENIZERS[pre].patterns):
                letters = in_alphabet(piece)
                whole = PRE_TOKENIZERS[pre].ignore_merges and letters in ids
                expected += [ids[t] for t in ([letters] if whole else merged(letters, ranks.get))]
        assert tokenizer.encode(line).ids == expected, line
        assert tokenizer.decode(expected, skip_special_tokens=False) == line


def test_pre_tokenizers_differ(tmp_path):
    """Three families split digits in three ways."""
    counts = {pre: len(tokenizer_of(tmp_path, tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=False)
                       .encode("123 th").ids) for pre in ("gpt-2", "smollm", "llama-bpe")}  # fmt: skip
    assert counts == {"gpt-2": 2, "smollm": 4, "llama-bpe": 2}


def sentencepiece(prefix=True):
    """(metadata, a plain reading) of a vocabulary whose merges are found by score, as llama.cpp finds them."""
    words = ["▁", "t", "h", "e", "a", "n", "d", "th", "the", "▁the", "an", "and", "▁and", "▁a", "▁t", "nd", "▁▁"]
    scores = [-20.0 - at for at in range(7)] + [-3.0, -5.0, -6.0, -4.0, -8.0, -9.0, -7.0, -2.0, -1.0, -10.0]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<user> x"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words) + [4]
    all_scores = [0.0] * 259 + scores + [0.0]
    metadata = SCORES | {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": all_scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }  # fmt: skip
    ids = {token: index for index, token in enumerate(tokens)}
    rank = {token: -score for token, score in zip(words, scores, strict=True)}

    def read(text):
        found = [1]
        for part in split_specials(text, ["<unk>", "<s>", "</s>", "<user> x"]):
            if part in ids and types[ids[part]] in (2, 3, 4):
                found.append(ids[part])
                continue
            letters = (" " * prefix + part).replace(" ", "▁")
            for symbol in merged(letters, lambda pair: rank.get("".join(pair))):
                if symbol in rank:
                    found.append(ids[symbol])
                else:
                    found += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return found

    return metadata, read


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_ids_of_a_plain_reading(prefix, tmp_path):
    metadata, read = sentencepiece(prefix)
    metadata["tokenizer.ggml.merges"] = ["a n"]  # some converters write them; scores decide
    tokenizer = tokenizer_of(tmp_path, **metadata)
    for line in (*LINES, "the and andthe  a the", "<s>the</s>and<user> x the", " the", "<user> xthe"):
        assert tokenizer.encode(line).ids == read(line), line
    assert tokenizer.decode(read("the and 日本")[1:]) == "the and 日本"


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_a_tokenizer_key_has_its_meaning_or_is_refused(key, tmp_path):
    row = sweep._text(key, tmp_path)
    assert row.outcome in (("irrelevant",) if key in REPORTED else ("honoured", "refused")), row.detail


def test_all_three_end_tokens_end_an_answer(tmp_path):
    ids = dict.fromkeys(("eos", "eot", "eom"))
    ids = {f"tokenizer__ggml__{name}_token_id": 257 + at for at, name in enumerate(ids)}
    assert texts_of(tmp_path, **ids).generation["eos_token_id"] == [257, 258, 259]
    ids["tokenizer__ggml__eot_token_id"] = 257  # the same as eos
    assert texts_of(tmp_path, **ids).generation["eos_token_id"] == [257, 259]


def test_a_file_without_end_tokens_gets_none_from_its_class(tmp_path):
    none = {f"tokenizer__ggml__{name}_token_id": None for name in ("bos", "eos")}
    assert texts_of(tmp_path, **none).config == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def test_control_tokens_outside_of_the_byte_alphabet_stay_whole(tmp_path):
    tokens = [*gguf_files.TOKENS, "<｜end▁of▁sentence｜>"]
    more = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": [1] * (len(tokens) - 1) + [3]}
    assert tokenizer_of(tmp_path, **more).encode("<｜end▁of▁sentence｜>").ids == [len(tokens) - 1]


def test_named_templates_are_in_tokenizer_config_json(tmp_path):
    more = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    texts = texts_of(tmp_path, **more)
    assert texts.files["chat_template.jinja"] == b"plain"
    assert json.loads(texts.files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    assert any("tool_use" in note for note in texts.notes)


def test_a_tokenizer_json_in_the_file_is_used_if_it_agrees(tmp_path):
    whole = texts_of(tmp_path).files["tokenizer.json"].decode()
    texts = texts_of(tmp_path, **{"tokenizer.huggingface.json": whole, "tokenizer.ggml.pre": "nobody-knows-this"})
    assert json.loads(texts.files["tokenizer.json"]) == json.loads(whole)
    other = whole.replace("<|eom|>", "<|xyz|>")
    with pytest.raises(ExportError, match=r"do not agree about '<\|xyz\|>'"):
        texts_of(tmp_path, **{"tokenizer.huggingface.json": other})
    with pytest.raises(ExportError, match="add_bos_token is True"):
        texts_of(tmp_path, **{"tokenizer.huggingface.json": whole, "tokenizer.ggml.add_bos_token": True})


def test_a_missing_pre_tokenizer_is_noted(tmp_path):
    texts = texts_of(tmp_path, tokenizer__ggml__pre=None)
    assert any("has no tokenizer.ggml.pre" in note for note in texts.notes)


def test_an_unknown_key_of_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"tokenizer\.ggml\.new_rule.*this key is unknown"):
        texts_of(tmp_path, tokenizer__ggml__new_rule=True)


def test_a_file_without_a_tokenizer_takes_ids_and_says_so(tmp_path):
    metadata = gguf_files.keys() | {"llama.vocab_size": 267, "tokenizer.ggml.model": "no_vocab"}
    metadata |= {key: None for key in metadata if key.startswith("tokenizer.ggml.") and not key.endswith("model")}
    texts = read_gguf_tokenizer(open_gguf(gguf_files.write(tmp_path / "t.gguf", metadata, {})))
    assert texts.files == {}
    assert any("takes token ids" in note for note in texts.notes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_reads_the_files_with_the_same_ids(kind, tmp_path):
    from transformers import AutoTokenizer

    more = sentencepiece()[0] if kind == "llama" else {"tokenizer.ggml.add_bos_token": True}
    texts = texts_of(tmp_path, **more)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, data in texts.files.items():
        (tmp_path / name).write_bytes(data)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for line in (*LINES, "the and andthe"):
        assert theirs(line)["input_ids"] == ours.encode(line).ids, line
