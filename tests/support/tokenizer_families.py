"""A tiny tokenizer of every family, as a Hugging Face folder: `save(name, folder)`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as tf
from support import odd_texts, tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINED = [tiny.TEXT, *odd_texts.PLAIN, *odd_texts.SCRIPTS, *odd_texts.CODE] * 2
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
EXTRA = "<extra>"


def train(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(TRAINED, trainer)
    return backend


def byte_bpe(special: list[str], size: int = 360, regex: str | None = None, prefix: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        backend,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )


def gpt2(prefix: bool) -> tf.PreTrainedTokenizerBase:
    return _of_json(tf.GPT2Tokenizer, byte_bpe(["<|endoftext|>"], prefix=prefix), add_prefix_space=prefix)


def llama3() -> tf.PreTrainedTokenizerBase:
    backend = byte_bpe(["<|begin|>", "<|eot|>"], regex=LLAMA3)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|>:1 $B:1", [("<|begin|>", 0)]),
        ]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|eot|>")


def qwen2() -> tf.PreTrainedTokenizerBase:
    made = _of_json(tf.Qwen2Tokenizer, byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("<|im_end|>", special=True)])
    return made


def roberta() -> tf.PreTrainedTokenizerBase:
    return _of_json(tf.RobertaTokenizer, byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def sentencepiece_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges as in SentencePiece, with all byte tokens."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    train(backend, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, limit_alphabet=70))
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama(**more: Any) -> tf.PreTrainedTokenizerBase:
    vocab, merges = sentencepiece_bpe()
    return tf.LlamaTokenizer(vocab=vocab, merges=merges, **more)


def llama2_json() -> tf.PreTrainedTokenizerBase:
    """As Llama 2's tokenizer.json: the normalizer adds the space, which is also "legacy"."""
    vocab, merges = sentencepiece_bpe()
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(scheme: str) -> tf.PreTrainedTokenizerBase:
    vocab, merges = sentencepiece_bpe()
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme=scheme), decoders.Fuse()]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma() -> tf.PreTrainedTokenizerBase:
    vocab, merges = sentencepiece_bpe()
    for name in ("<pad>", "<bos>", "<eos>", "<mask>"):
        vocab[name] = len(vocab)
    return tf.GemmaTokenizer(vocab=vocab, merges=merges)


def unigram(special: list[str]) -> list[tuple[str, float]]:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    train(
        backend,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]


def t5() -> tf.PreTrainedTokenizerBase:
    return tf.T5Tokenizer(vocab=unigram(["<pad>", "</s>", "<unk>"]), extra_ids=4)


def xlm_roberta() -> tf.PreTrainedTokenizerBase:
    return tf.XLMRobertaTokenizer(vocab=unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def albert(**more: Any) -> tf.PreTrainedTokenizerBase:
    return tf.AlbertTokenizer(vocab=unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]), **more)


def bert(lower: bool, **more: Any) -> tf.PreTrainedTokenizerBase:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    train(backend, trainers.WordPieceTrainer(vocab_size=320, special_tokens=special, show_progress=False))
    return tf.BertTokenizer(vocab=backend.get_vocab(), do_lower_case=lower, **more)


def word_level() -> tf.PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    train(backend, trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<unk>", "<pad>"], show_progress=False))
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def characters() -> tf.PreTrainedTokenizerBase:
    letters = sorted(set("".join(TRAINED)))
    backend = Tokenizer(models.WordLevel({"<unk>": 0, **{c: i for i, c in enumerate(letters, 1)}}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def suffixed() -> tf.PreTrainedTokenizerBase:
    """BPE of words that end in `</w>`, as in CLIP and the first GPT."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=train(backend, trainer), unk_token="<unk>")


def _of_json(kind: Any, backend: Tokenizer, **more: Any) -> tf.PreTrainedTokenizerBase:
    model = json.loads(backend.to_str())["model"]
    return kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **more)


FAMILIES: dict[str, Callable[[], tf.PreTrainedTokenizerBase]] = {
    "GPT-2": lambda: gpt2(False),
    "GPT-2 with prefix space": lambda: gpt2(True),
    "Llama 3": llama3,
    "Qwen2": qwen2,
    "RoBERTa": roberta,
    "Llama": llama,
    "Llama without prefix space": lambda: llama(add_prefix_space=False),
    "Llama, legacy": lambda: llama(legacy=True, add_bos_token=True, add_eos_token=True),
    "Llama 2's tokenizer.json": llama2_json,
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"),
    "Gemma": gemma,
    "T5": t5,
    "XLM-RoBERTa": xlm_roberta,
    "ALBERT": albert,
    "ALBERT, cased": lambda: albert(do_lower_case=False, keep_accents=True, remove_space=False),
    "BERT": lambda: bert(True),
    "BERT, cased": lambda: bert(False, clean_up_tokenization_spaces=True),
    "BERT with accents": lambda: bert(True, strip_accents=False, tokenize_chinese_chars=False),
    "words": word_level,
    "characters": characters,
    "words with suffix": suffixed,
}


def save(name: str, folder: Path, **settings: Any) -> Path:
    """The folder of the family `name` with `settings` in its tokenizer_config.json."""
    FAMILIES[name]().save_pretrained(folder)
    return change(folder, **settings)


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder
