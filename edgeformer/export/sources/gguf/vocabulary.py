"""The tokenizer of a GGUF file as the tokenizers library has it: byte-level BPE, or SentencePiece's BPE by scores.

llama.cpp's reading of the metadata is the definition, because the metadata were written for it.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LIST = "tokenizer.ggml."


class Vocabulary:
    """The `tokenizer.ggml.*` keys of a file, checked against each other."""

    def __init__(self, name: str, metadata: dict[str, Any]) -> None:
        self._name, self._metadata = name, metadata
        self.tokens: list[str] = self._list("tokens", str)
        count = len(self.tokens)
        self.types: list[int] = self._list("token_type", int, count)
        self.scores: list[float] | None = self._list("scores", float, count) if self.given("scores") else None
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        if len(self.ids) < count:
            twice = next(token for id, token in enumerate(self.tokens) if self.ids[token] != id)
            raise self.refuse("tokens", f"it holds {twice!r} twice, so a text has two readings.")
        if unknown := sorted(set(self.types) - set(range(1, 7))):
            raise self.refuse("token_type", f"the types {unknown} are not known; expected 1 to 6.")

    @property
    def kind(self) -> str:
        return str(self.get("model"))

    def get(self, key: str) -> Any:
        return self._metadata.get(_LIST + key)

    def given(self, key: str) -> bool:
        return self.get(key) is not None

    def refuse(self, key: str, why: str) -> ExportError:
        value = repr(self.get(key)) if not isinstance(self.get(key), list) else f"a list of {len(self.get(key))}"
        return ExportError(f"{self._name}: {_LIST}{key} is {value}; {why}")

    def flag(self, key: str, default: bool) -> bool:
        """Raises:
        ExportError: the value is not true or false.
        """
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise self.refuse(key, "expected true or false.")
        return default if value is None else value

    def id(self, name: str) -> int | None:
        """The special token `name` (bos, eos, ...); None where the file names none.

        Raises:
            ExportError: the vocabulary has no such token.
        """
        key = f"{name}_token_id"
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.refuse(key, f"the vocabulary has the tokens 0 to {len(self.tokens) - 1}.")
        return value

    def _list(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        value = self.get(key)
        if value is None and key == "token_type":
            return [NORMAL] * (count or 0)
        if not isinstance(value, list) or not all(isinstance(one, kind) for one in value) or not value:
            raise self.refuse(key, f"expected a list of {kind.__name__}.")
        if count is not None and len(value) != count:
            raise self.refuse(key, f"the file has {count} tokens.")
        return value


def build_tokenizer(vocabulary: Vocabulary, notes: list[str]) -> Tokenizer:
    """The tokenizer; what was assumed goes to `notes`.

    Raises:
        ExportError: its model or its pre-tokenizer is not known, or its lists do not fit together.
    """
    begins = vocabulary.kind == "llama"
    if vocabulary.kind == "gpt2":
        cut = _cut(vocabulary, notes)
        tokenizer, begins = _byte_level(vocabulary, cut), cut.begins
    elif vocabulary.kind == "llama":
        tokenizer = _sentencepiece(vocabulary, notes)
    else:
        raise vocabulary.refuse(
            "model",
            "known are gpt2 (byte-level BPE) and llama (SentencePiece BPE). Export the original model, whose "
            "tokenizer.json has all of it.",
        )
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary, begins)
    return tokenizer


def _cut(vocabulary: Vocabulary, notes: list[str]) -> PreTokenizer:
    name = vocabulary.get("pre")
    if name is None:
        notes.append(
            "The file does not say tokenizer.ggml.pre; texts are cut as by llama.cpp's `default`, which may not be how "
            "the model was trained."
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise vocabulary.refuse(
            "pre",
            f"known are {', '.join(PRE_TOKENIZERS)}. If one of them cuts text in the same way, write it into the file with "
            "gguf-new-metadata --pre-tokenizer; else export the original model.",
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: Vocabulary, cut: PreTokenizer) -> Tokenizer:
    merges = vocabulary.get("merges")
    if not isinstance(merges, list):
        raise vocabulary.refuse("merges", "byte-level BPE needs the list of merges.")
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1) if isinstance(merge, str) else -1
        if at < 0:
            raise vocabulary.refuse("merges", f"{merge!r} is no pair of tokens with a space between them.")
        pairs.append((merge[:at], merge[at + 1 :]))
    try:
        model = models.BPE(vocabulary.ids, pairs, ignore_merges=cut.whole)
    except Exception as error:  # the library raises bare Exception
        raise vocabulary.refuse("merges", f"they do not fit the tokens: {error}.") from error
    tokenizer = Tokenizer(model)
    if vocabulary.flag("add_space_prefix", False):
        tokenizer.normalizer = normalizers.Prepend(" ")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, notes: list[str]) -> Tokenizer:
    if vocabulary.scores is None:
        raise vocabulary.refuse("scores", "SentencePiece's BPE merges by scores.")
    unknown = vocabulary.id("unknown")
    byte_fallback = BYTE in vocabulary.types
    if not byte_fallback and unknown is None:
        raise vocabulary.refuse("unknown_token_id", "a vocabulary without byte tokens needs one.")
    pairs = _merges_by_score(vocabulary, notes)
    try:
        model = models.BPE(
            vocabulary.ids,
            pairs,
            unk_token=vocabulary.tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    except Exception as error:
        raise vocabulary.refuse("tokens", f"they make no SentencePiece model: {error}.") from error
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", True)
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape] if prefix else [escape])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, notes: list[str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the highest score first, as SentencePiece merges them.

    A list of merges that some converters wrote beside the scores is not read, by llama.cpp neither.
    """
    assert vocabulary.scores is not None
    parts = {token: id for token, id in vocabulary.ids.items() if vocabulary.types[id] in (NORMAL, UNUSED)}
    pairs = [
        (-vocabulary.scores[id], parts[token[:at]], parts[token[at:]], token[:at], token[at:])
        for token, id in parts.items()
        for at in range(1, len(token))
        if token[:at] in parts and token[at:] in parts
    ]
    pairs.sort()
    scores = {left + right: score for score, _, _, left, right in pairs}
    if len(set(scores.values())) < len(scores):
        notes.append(
            f"{len(scores) - len(set(scores.values()))} tokens of the vocabulary share their score with another; of "
            "two such merges the one with the lower token ids is made first."
        )
    return [(left, right) for *_, left, right in pairs]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens (special) and the user's (plain) are found in a text before anything else."""
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED) or not token:
            continue
        special = kind != USER_DEFINED
        added = AddedToken(token, special=special, normalized=False)
        _ = tokenizer.add_special_tokens([added]) if special else tokenizer.add_tokens([added])
        if tokenizer.token_to_id(token) != id:
            raise vocabulary.refuse("tokens", f"the library gives {token!r} the id {tokenizer.token_to_id(token)}.")


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, begins: bool) -> None:
    if vocabulary.flag("add_sep_token", False):
        raise vocabulary.refuse("add_sep_token", "a decoder's prompt has no separator.")
    begins = vocabulary.flag("add_bos_token", begins)
    template: dict[str, list[str]] = {}
    for name, wanted in (("bos", begins), ("eos", vocabulary.flag("add_eos_token", False))):
        id = vocabulary.id(name)
        if wanted and id is None:
            raise vocabulary.refuse(f"{name}_token_id", f"texts begin or end with it (add_{name}_token).")
        template[name] = [vocabulary.tokens[id]] if wanted and id is not None else []
    tokens = dict.fromkeys(template["bos"] + template["eos"])
    if not tokens:
        return
    single, pair = [*template["bos"], "$A", *template["eos"]], [*template["bos"], "$B:1", *template["eos"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *pair], special_tokens=[(token, vocabulary.ids[token]) for token in tokens]
    )
