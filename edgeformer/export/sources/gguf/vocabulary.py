"""Builds a tokenizer of the tokenizers library from GGUF metadata: byte-level BPE, or SentencePiece BPE by scores.

The metadata mean what llama.cpp makes of them.
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
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < count:
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.refuse("tokens", f"it has {twice!r} twice; expected each token once.")
        if unknown := sorted(set(self.types) - set(range(1, 7))):
            raise self.refuse("token_type", f"the types {unknown} are unknown; expected 1 to 6.")

    @property
    def kind(self) -> str:
        """`tokenizer.ggml.model`."""
        return str(self.get("model"))

    def get(self, key: str) -> Any:
        """The value of `tokenizer.ggml.{key}`, or None."""
        return self._metadata.get(_LIST + key)

    def given(self, key: str) -> bool:
        """Whether the file has `tokenizer.ggml.{key}`."""
        return self.get(key) is not None

    def refuse(self, key: str, why: str) -> ExportError:
        """The error for an unsupported value of `key`."""
        value = repr(self.get(key)) if not isinstance(self.get(key), list) else f"a list of {len(self.get(key))}"
        return ExportError(f"{self._name}: {_LIST}{key} is {value}; {why}")

    def flag(self, key: str, default: bool) -> bool:
        """The boolean `key`, or `default`.

        Raises:
            ExportError: the value is not a boolean.
        """
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise self.refuse(key, "expected true or false.")
        return default if value is None else value

    def token_id(self, name: str) -> int | None:
        """The id of the special token `name` (bos, eos, ...); None if the file has none.

        Raises:
            ExportError: the vocabulary has no such id.
        """
        key = f"{name}_token_id"
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.refuse(key, f"expected an id from 0 to {len(self.tokens) - 1}.")
        return value

    def _list(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        value = self.get(key)
        if value is None and key == "token_type":
            return [NORMAL] * (count or 0)
        if not isinstance(value, list) or not all(isinstance(one, kind) for one in value) or not value:
            raise self.refuse(key, f"expected a list of {kind.__name__}.")
        if count is not None and len(value) != count:
            raise self.refuse(key, f"expected {count} values, one a token.")
        return value


def build_tokenizer(vocabulary: Vocabulary, notes: list[str]) -> Tokenizer:
    """The tokenizer; adds assumptions to `notes`.

    Raises:
        ExportError: its model or pre-tokenizer is unsupported, or its lists do not fit together.
    """
    add_bos = vocabulary.kind == "llama"
    if vocabulary.kind == "gpt2":
        pre = _pre_tokenizer(vocabulary, notes)
        tokenizer, add_bos = _byte_level(vocabulary, pre), pre.add_bos
    elif vocabulary.kind == "llama":
        tokenizer = _sentencepiece(vocabulary, notes)
    else:
        raise vocabulary.refuse(
            "model",
            "expected gpt2 (byte-level BPE) or llama (SentencePiece BPE). Export the original model, which has a "
            "complete tokenizer.json.",
        )
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary, add_bos)
    return tokenizer


def _pre_tokenizer(vocabulary: Vocabulary, notes: list[str]) -> PreTokenizer:
    name = vocabulary.get("pre")
    if name is None:
        notes.append(
            "The file has no tokenizer.ggml.pre; texts are split as by llama.cpp's `default`, which may differ from "
            "the training."
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise vocabulary.refuse(
            "pre",
            f"expected one of {', '.join(PRE_TOKENIZERS)}. If one of them splits text in the same way, write it into "
            "the file with gguf-new-metadata --pre-tokenizer; otherwise export the original model.",
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: Vocabulary, pre: PreTokenizer) -> Tokenizer:
    merges = vocabulary.get("merges")
    if not isinstance(merges, list):
        raise vocabulary.refuse("merges", "expected the list of merges, which byte-level BPE needs.")
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1) if isinstance(merge, str) else -1
        if at < 0:
            raise vocabulary.refuse("merges", f"{merge!r} is not a pair of tokens with a space between them.")
        pairs.append((merge[:at], merge[at + 1 :]))
    try:
        model = models.BPE(vocabulary.ids, pairs, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise vocabulary.refuse("merges", f"they do not fit the tokens: {error}.") from error
    tokenizer = Tokenizer(model)
    if vocabulary.flag("add_space_prefix", False):
        tokenizer.normalizer = normalizers.Prepend(" ")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, notes: list[str]) -> Tokenizer:
    if vocabulary.scores is None:
        raise vocabulary.refuse("scores", "expected scores, by which SentencePiece BPE merges.")
    unknown = vocabulary.token_id("unknown")
    byte_fallback = BYTE in vocabulary.types
    if not byte_fallback and unknown is None:
        raise vocabulary.refuse("unknown_token_id", "expected an id, since the vocabulary has no byte tokens.")
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
        raise vocabulary.refuse("tokens", f"they are not a SentencePiece model: {error}.") from error
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", True)
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape] if prefix else [escape])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, notes: list[str]) -> list[tuple[str, str]]:
    """All pairs of tokens whose concatenation is a token, the highest score first, as SentencePiece merges them.

    Some converters write a list of merges too; like llama.cpp this function ignores it.
    """
    assert vocabulary.scores is not None
    parts = {token: index for token, index in vocabulary.ids.items() if vocabulary.types[index] in (NORMAL, UNUSED)}
    pairs = [
        (-vocabulary.scores[index], parts[token[:at]], parts[token[at:]], token[:at], token[at:])
        for token, index in parts.items()
        for at in range(1, len(token))
        if token[:at] in parts and token[at:] in parts
    ]
    pairs.sort()
    scores = {left + right: score for score, _, _, left, right in pairs}
    if len(set(scores.values())) < len(scores):
        notes.append(
            f"{len(scores) - len(set(scores.values()))} tokens of the vocabulary have the score of another one; of "
            "two such merges the one with the lower token ids comes first."
        )
    return [(left, right) for *_, left, right in pairs]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds control tokens (special) and user-defined ones (plain), which are matched in a text before BPE."""
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED) or not token:
            continue
        special = kind != USER_DEFINED
        added = AddedToken(token, special=special, normalized=False)
        _ = tokenizer.add_special_tokens([added]) if special else tokenizer.add_tokens([added])
        if tokenizer.token_to_id(token) != index:
            found = tokenizer.token_to_id(token)
            raise vocabulary.refuse("tokens", f"the library gives {token!r} the id {found}, expected {index}.")


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
    """Adds BOS and EOS to every text as the file says; `add_bos` is the default for BOS."""
    if vocabulary.flag("add_sep_token", False):
        raise vocabulary.refuse("add_sep_token", "expected false: the prompt of a decoder has no separator.")
    add_bos = vocabulary.flag("add_bos_token", add_bos)
    template: dict[str, list[str]] = {}
    for name, wanted in (("bos", add_bos), ("eos", vocabulary.flag("add_eos_token", False))):
        index = vocabulary.token_id(name)
        if wanted and index is None:
            raise vocabulary.refuse(f"{name}_token_id", f"expected an id, since add_{name}_token is set.")
        template[name] = [vocabulary.tokens[index]] if wanted and index is not None else []
    tokens = dict.fromkeys(template["bos"] + template["eos"])
    if not tokens:
        return
    single, pair = [*template["bos"], "$A", *template["eos"]], [*template["bos"], "$B:1", *template["eos"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *pair], special_tokens=[(token, vocabulary.ids[token]) for token in tokens]
    )
