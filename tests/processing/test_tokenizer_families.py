"""Every family of tokenizers: the ids, pairs and texts of transformers; streams; what is refused at export."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from support import odd_texts

tf = pytest.importorskip("transformers")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tokenizer_families as families
from support.tokenizer_files import folder_read, runtime_of

from edgeformer.errors import ExportError, InputError, ParityError
from edgeformer.export import ExportOptions
from edgeformer.export.sources import tokenizer_export
from edgeformer.export.sources.load import load_source
from edgeformer.processing.detokenizer import REPLACEMENT, CleanUp, clean_up
from edgeformer.processing.tokenizer import Tokenizer


def bundled(folder: Path, place: Path) -> tuple[Tokenizer, tf.PreTrainedTokenizerBase]:
    """The runtime's tokenizer of a Hugging Face folder, and transformers' own."""
    runtime = runtime_of(tokenizer_export.tokenizer_files(str(folder), folder_read(folder)), place)
    return runtime, tf.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: (the runtime's tokenizer, transformers' own) of a family, made once."""
    known = {}

    def get(name):
        if name not in known:
            place = tmp_path_factory.mktemp("family")
            known[name] = bundled(families.save(name, place / "hf"), place / "bundle")
        return known[name]

    return get


every_family = pytest.mark.parametrize("name", families.FAMILIES)


@every_family
def test_odd_texts_have_the_ids_of_transformers(made, name):
    runtime, theirs = made(name)
    for text in [*odd_texts.TEXTS, odd_texts.VERY_LONG_WORD]:
        assert runtime.encode(text) == theirs(text)["input_ids"], text[:80]
        assert runtime.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        split = theirs(text, split_special_tokens=True)["input_ids"]
        assert runtime.encode(text, split_special_tokens=True) == split, text[:80]
        assert runtime.encode(text) == theirs(text, split_special_tokens=False)["input_ids"]  # no state was left


@every_family
def test_ids_have_the_text_of_transformers(made, name):
    runtime, theirs = made(name)
    for text in odd_texts.TEXTS:
        ids = runtime.encode(text)
        for skip in (True, False):
            assert runtime.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text[:80]


@every_family
def test_pairs_and_truncated_texts_are_those_of_transformers(made, name):
    runtime, theirs = made(name)
    short = [text for text in odd_texts.TEXTS if len(text) < 50]  # the library makes all that is cut off, too: slow
    pairs = list(itertools.pairwise(short))
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    batch = theirs(firsts, seconds, return_token_type_ids=True)
    cut = theirs(firsts, seconds, truncation=True, max_length=12)["input_ids"]
    for place, pair in enumerate(pairs):
        found = runtime.encode_for_encoder(pair)
        # Where a class gives no types to its model, transformers' models count all as 0.
        types = batch["token_type_ids"][place] if "token_type_ids" in theirs.model_input_names else [0] * len(found.ids)
        assert (found.ids, found.type_ids) == (batch["input_ids"][place], types), pair
        assert runtime.encode_for_encoder(pair, 12).ids == cut[place], pair


@every_family
def test_lone_surrogates_are_refused(made, name):
    runtime, _ = made(name)
    for text in odd_texts.NOT_TEXT:
        with pytest.raises(InputError, match="lone surrogate"):
            runtime.encode(text)
        with pytest.raises(InputError, match="lone surrogate"):
            runtime.encode_for_encoder(("a", text), 12)


# -------------------------------------------------------------------------------------------------------------- streams


def streamed(runtime: Tokenizer, ids) -> list[str]:
    stream = runtime.detokenizer()
    return [*(stream.push(token) for token in ids), stream.flush()]


@every_family
def test_a_streamed_text_is_whole_characters_and_the_decoded_text(made, name):
    runtime, _ = made(name)
    for text in odd_texts.TEXTS:
        ids = runtime.encode(text)
        whole = runtime.decode(ids)
        pieces = streamed(runtime, ids)
        assert "".join(pieces) == whole
        if REPLACEMENT not in whole:
            assert not any(REPLACEMENT in piece for piece in pieces)


@every_family
@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_ids_stream_to_what_they_decode_to(made, name, data):
    runtime, _ = made(name)
    added = runtime._backend.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    one = st.integers(0, runtime.size - 1) | st.sampled_from(special or [0])
    ids = data.draw(st.lists(one, max_size=40))
    assert "".join(streamed(runtime, ids)) == runtime.decode(ids)


def test_a_space_behind_a_special_token_is_kept(made):
    runtime, _ = made("Llama")
    ids = runtime.encode("hello world", add_special_tokens=False)
    ids = [ids[0], *[2] * 100, *ids[1:]]  # </s>, which a text leaves out
    assert "".join(streamed(runtime, ids)) == runtime.decode(ids)


def test_wrong_bytes_beside_a_character_stream_as_they_decode(made):
    """Byte fallback makes U+FFFD of every byte of a run that is not UTF-8 as a whole."""
    runtime, theirs = made("Llama")
    run = [theirs.convert_tokens_to_ids(f"<0x{b:02X}>") for b in (*"é".encode(), 0x80)]
    assert runtime.decode(run) == 3 * REPLACEMENT
    assert "".join(streamed(runtime, run)) == 3 * REPLACEMENT
    assert streamed(runtime, run[:2])[-1] == "é"
    assert streamed(runtime, run[:1]) == ["", REPLACEMENT]


@given(st.lists(st.text(alphabet=" .?!,'ntmsvreab", max_size=4), max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_text_cleaned_in_pieces_is_the_cleaned_text(pieces):
    clean = CleanUp()
    assert "".join([*map(clean.push, pieces), clean.flush()]) == clean_up("".join(pieces))


# ------------------------------------------------------------------------------------------------------------- settings


def test_clean_up_is_done_for_words_and_not_for_byte_pairs(tmp_path):
    text = "don 't stop . now !"
    for name, on in (("BERT, cased", True), ("GPT-2", False)):
        folder = families.save(name, tmp_path / name, clean_up_tokenization_spaces=True)
        runtime, theirs = bundled(folder, tmp_path / f"{name} bundle")
        ids = runtime.encode(text)
        assert runtime.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert (" ." in runtime.decode(ids)) is not on


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["BERT", "T5", "GPT-2"])
def test_a_text_is_cut_on_the_side_that_the_tokenizer_says(tmp_path, name, side):
    folder = families.save(name, tmp_path / "hf", truncation_side=side)
    runtime, theirs = bundled(folder, tmp_path / "bundle")
    for text in odd_texts.PLAIN:
        expected = theirs(text, truncation=True, max_length=7)["input_ids"]
        assert runtime.encode_for_encoder(text, 7).ids == expected
    whole = runtime.encode(odd_texts.PLAIN[-1], add_special_tokens=False)
    assert (whole[1] in expected) is (side == "right")


def test_split_special_tokens_is_kept(tmp_path):
    runtime, theirs = bundled(families.save("Qwen2", tmp_path / "hf", split_special_tokens=True), tmp_path / "bundle")
    text = "a<|im_start|>b <|im_end|>"
    assert runtime.encode(text) == theirs(text)["input_ids"]
    assert runtime.encode_for_encoder(text, 100).ids == runtime.encode(text)
    assert runtime.encode(text) != runtime.encode(text, split_special_tokens=False)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_keep_their_flags(tmp_path, flag, special):
    made = families.FAMILIES["BERT"]()
    token = families.AddedToken("extra", special=special, **{"normalized": False, flag: True})
    made.add_tokens([token], special_tokens=special)
    made.save_pretrained(tmp_path / "hf")
    runtime, theirs = bundled(tmp_path / "hf", tmp_path / "bundle")
    for text in odd_texts.LITERAL:
        assert runtime.encode(text) == theirs(text)["input_ids"]
        assert runtime.decode(runtime.encode(text)) == theirs.decode(
            theirs(text)["input_ids"], skip_special_tokens=True
        )


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_folder_without_tokenizer_json_is_converted_with_its_settings(tmp_path, bos, eos):
    """There, `add_bos_token` and `add_eos_token` count; with a tokenizer.json, that file says it."""
    backend = families.byte_bpe(["<|endoftext|>"])
    backend.model.save(str(tmp_path))  # vocab.json and merges.txt
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": bos, "add_eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    runtime, theirs = bundled(tmp_path, tmp_path / "bundle")
    for text in odd_texts.TEXTS:
        assert runtime.encode(text) == theirs(text)["input_ids"]
    assert len(runtime.encode("a")) == 1 + bos + eos


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_is_converted(tmp_path, kind):
    sentencepiece = pytest.importorskip("sentencepiece")
    name = "LlamaTokenizer" if kind == "bpe" else "T5Tokenizer"
    (tmp_path / "text.txt").write_text("\n".join(line for text in families.TRAINED for line in text.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), model_type=kind, vocab_size=420,
        byte_fallback=kind == "bpe", hard_vocab_limit=False, minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    (tmp_path / "m.model").rename(tmp_path / ("tokenizer.model" if kind == "bpe" else "spiece.model"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "legacy": False}))
    runtime, theirs = bundled(tmp_path, tmp_path / "bundle")
    assert type(theirs).__name__ == name
    for text in odd_texts.TEXTS:
        ids = theirs(text)["input_ids"]
        assert runtime.encode(text) == ids
        assert runtime.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------------- refusals


def model_folder(folder: Path) -> Path:
    config = tf.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model's folder without a tokenizer."""
    return model_folder(tmp_path_factory.mktemp("llama"))


def with_files(llama: Path, folder: Path, **files: str) -> Path:
    shutil.copytree(llama, folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def load(folder: Path, **options):
    return load_source(ExportOptions(str(folder), folder / "out", **options))


def test_a_python_tokenizer_is_refused_by_name_and_another_is_taken(llama, tmp_path):
    folder = with_files(llama, tmp_path / "m", tokenizer_config__json='{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ExportError, match=r"ByT5Tokenizer, is Python code.*--tokenizer none"):
        load(folder)
    assert load(folder, tokenizer=Path("none")).files == {}
    other = families.save("GPT-2", tmp_path / "gpt2")
    assert (
        json.loads(load(folder, tokenizer=other).files["tokenizer_config.json"])["tokenizer_class"] == "GPT2Tokenizer"
    )


def test_a_damaged_tokenizer_is_refused_and_not_left_out(llama, tmp_path):
    folder = with_files(llama, tmp_path / "m", tokenizer__json='{"version": "1.0"}')
    with pytest.raises(ExportError, match=r"cannot load the tokenizer of .*tokenizer\.json"):
        load(folder)


def test_a_model_without_tokenizer_files_gets_no_empty_tokenizer(tmp_path):
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tf.BertModel(config).save_pretrained(tmp_path)
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path)) == 5  # transformers makes one of nothing
    assert "tokenizer.json" not in load(tmp_path).files


def test_a_model_that_takes_no_ids_goes_without_its_tokenizer_and_says_so(tmp_path):
    config = tf.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    tf.ViTModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert "ByT5Tokenizer" in load(tmp_path).notes[-1]


@pytest.mark.parametrize(
    "fault", ["another merge", "no prefix space", "special tokens split", "another end", "another template"]
)
def test_a_tokenizer_that_differs_is_refused_with_the_text_and_both_results(tmp_path, fault):
    """The proof must see each of these, or it proves nothing."""
    made = families.FAMILIES["Llama, legacy" if fault == "another end" else "Llama"]()
    made.chat_template = "{{ messages[0].content }}"
    made.save_pretrained(tmp_path)
    files = tokenizer_export.tokenizer_files(str(tmp_path), folder_read(tmp_path))
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer_export.check_tokenizer(theirs, files, "of the test")
    written, config = json.loads(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])
    if fault == "another merge":
        written["model"]["merges"].pop(0)
    elif fault == "no prefix space":
        written["pre_tokenizer"]["prepend_scheme"] = "never"
    elif fault == "special tokens split":
        config["split_special_tokens"] = True
    elif fault == "another end":
        written["post_processor"]["single"].pop()
    else:
        files["chat_template.jinja"] = b"{{ messages[0].content }}!"
    files |= {"tokenizer.json": json.dumps(written).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    with pytest.raises(ParityError, match=r"for .* transformers gives .*, and the bundle would give"):
        tokenizer_export.check_tokenizer(theirs, files, "of the test")
