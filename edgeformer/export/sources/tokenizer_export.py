"""The tokenizer files of a bundle: written by transformers' `save_pretrained`, checked against the runtime's Tokenizer.

The runtime reads `tokenizer.json` with the tokenizers library, without transformers' classes, so anything that a class
does beyond the file would be lost. Before the bundle is written, the runtime's Tokenizer is built from the files and
compared with transformers' on unusual texts: token ids, pairs, truncation, decoding, chat templates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from edgeformer.errors import ExportError, ParityError, first_line
from edgeformer.export.quiet import quiet
from edgeformer.export.source import TOKENIZER_FILES, EncoderDecoderSource, Source
from edgeformer.export.sources.model_files import ReadFile, file_reader
from edgeformer.files import temporary_folder
from edgeformer.processing.tokenizer import Tokenizer

# A model with any of these files has a tokenizer. Without one, transformers still makes an empty tokenizer for many
# models, whose ids mean nothing.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "bpe.model", "bpe.codes"),
    *("source.spm", "target.spm", "tekken.json", "tiktoken.model", "vocab.bpe", "dict.txt", "entity_vocab.json"),
)
NO_TOKENIZER = Path("none")  # value of --tokenizer: the bundle takes token ids
_ADVICE = "Pass another one with --tokenizer FOLDER, or --tokenizer none for a bundle that takes token ids."

ODD_TEXTS = (
    *("", " ", "   ", "\n", "hello world", " leading", "trailing ", "a  b   c", "Hello, World! It's 3.14 -- isn't it?"),
    *("don 't , stop . now ! x ' y", "1234567890 12,345.67 1e-9", "def f(x):\n    return x\t# tab\r\n", "UPPER lower"),
    *("https://example.com/a?b=c&d=%20#e", "café cafe\u0301 Ångström ﬁ ²", "Größe naïve", "東京タワー 中文字符 한국어"),
    *("สวัสดีชาวโลก", "नमस्ते क्षत्रिय", "שלום עולם", "مرحبا\u200f بالعالم", "👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵 👍🏽", "\x00\x07\x1b[0m\u200b"),
    *("\ufeffBOM", "\ufffd \uffff", "word" * 200, "<|im_start|>user <s> </s> [CLS] [MASK] <unk> <pad>"),
    *("<0x41><0xE2> ▁under▁score Ġbyte ##piece", "\u3000ideographic\u00a0space"),
)
_ADDED = 200  # added tokens that are tested; some models have thousands
_CUT = 5  # tokens that truncation keeps
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Größe? \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
)


@overload
def with_tokenizer(source: Source, name: str, read: ReadFile, given: Path | None) -> Source: ...


@overload
def with_tokenizer(
    source: EncoderDecoderSource, name: str, read: ReadFile, given: Path | None
) -> EncoderDecoderSource: ...


def with_tokenizer(
    source: Source | EncoderDecoderSource, name: str, read: ReadFile, given: Path | None
) -> Source | EncoderDecoderSource:
    """`source` with the files of its tokenizer, or of the one in the folder `given`.

    If the model takes no token ids and its tokenizer is unsupported, the source gets a note instead.

    Raises:
        ExportError: the model takes token ids and its tokenizer is unsupported; the message has the reason.
        ParityError: the written tokenizer gives other ids than transformers'.
    """
    if given == NO_TOKENIZER:
        return source
    first = source.encoder if isinstance(source, EncoderDecoderSource) else source
    try:
        files = tokenizer_files(name, read) if given is None else folder_files(given)
    except ExportError as error:
        parts = (source.encoder, source.decoder) if isinstance(source, EncoderDecoderSource) else (source,)
        if given is not None or any(value.name == "input_ids" for part in parts for value in part.inputs):
            raise
        changed = dataclasses.replace(first, notes=(*first.notes, f"The bundle has no tokenizer: {error}"))
    else:
        changed = dataclasses.replace(first, files={**first.files, **files})
    return dataclasses.replace(source, encoder=changed) if isinstance(source, EncoderDecoderSource) else changed


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in `folder`.

    Raises:
        ExportError: there is none, or it is unsupported.
    """
    files = tokenizer_files(str(folder), file_reader(str(folder)))
    if not files:
        raise ExportError(
            f"the tokenizer {folder} is neither a tokenizer.json nor a folder with one; save it with "
            " tokenizer.save_pretrained(folder), or Tokenizer.save(file)."
        )
    return files


def tokenizer_files(name: str, read: ReadFile) -> dict[str, bytes]:
    """{name: content} of a model's tokenizer files, checked; {} if the model has no tokenizer.

    Raises:
        ExportError: transformers cannot load the tokenizer, or it has no tokenizer.json.
        ParityError: the runtime's ids differ from transformers'.
    """
    present = [file for file in VOCABULARIES if read(file) is not None]
    if not present:
        return {}
    with quiet():
        try:
            tokenizer = _load(name, read)
        except Exception as error:
            raise ExportError(
                f"transformers cannot load the tokenizer of {name} ({', '.join(present)}): "
                f"{type(error).__name__}: {first_line(error)[:300]} {_ADVICE}"
            ) from error
        kind = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ExportError(
                f"the tokenizer of {name}, {kind}, is Python code in transformers; expected one with a tokenizer.json, "
                f"which the runtime reads. {_ADVICE}"
            )
        files = _saved(tokenizer, read)
        check_tokenizer(tokenizer, files, f"{kind} of {name}")
    return files


def _load(name: str, read: ReadFile) -> Any:
    import transformers

    settings = json.loads(read("tokenizer_config.json") or b"{}")
    if read("config.json") is None and "tokenizer_class" not in settings:
        return transformers.PreTrainedTokenizerFast.from_pretrained(name)  # a tokenizer.json without a class
    return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _saved(tokenizer: Any, read: ReadFile) -> dict[str, bytes]:
    """The files that `save_pretrained` writes; named chat templates are in tokenizer_config.json, with no subfolder."""
    legacy = read("chat_template.json")  # written by processors only
    if tokenizer.chat_template is None and legacy is not None:
        tokenizer.chat_template = json.loads(legacy)["chat_template"]
    with temporary_folder() as folder:
        tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        present = [folder / file for file in TOKENIZER_FILES if (folder / file).exists()]
        files = {file.name: file.read_bytes() for file in present}
    # The inputs that the tokenizer's class makes, such as token types; its file need not have them.
    settings = json.loads(files["tokenizer_config.json"]) | {"model_input_names": tokenizer.model_input_names}
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files | {"tokenizer.json": compact_tokenizer(files["tokenizer.json"])}


def compact_tokenizer(data: bytes) -> bytes:
    """The same tokenizer.json without whitespace, and with merges as text ("a b") unless a token has a space.

    All readers accept that form, the only one until tokenizers 0.20. SmolLM2's loads in 46 ms instead of 63 ms.
    """
    tokenizer = json.loads(data)
    merges = tokenizer["model"].get("merges", [])
    if all(isinstance(pair, list) and not any(" " in token for token in pair) for pair in merges):
        merges[:] = [" ".join(pair) for pair in merges]
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode()


# -------------------------------------------------------------------------------------------------------------- parity


def check_tokenizer(tokenizer: Any, files: Mapping[str, bytes], what: str, texts: Sequence[str] = ODD_TEXTS) -> None:
    """Compares the runtime's tokenizer, read from `files`, with transformers' `tokenizer`.

    Raises:
        ParityError: they differ; the message has the text and both results.
    """
    with temporary_folder() as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        paths = [folder / name if name in files else None for name in TOKENIZER_FILES]
        assert paths[0] is not None
        runtime = Tokenizer.read(paths[0], *paths[1:])
    for case, theirs, ours in (*_texts(tokenizer, runtime, texts), *_chats(tokenizer, runtime)):
        expected, found = _outcome(theirs), _outcome(ours)
        if expected != found:
            raise ParityError(
                f"the tokenizer {what} is unsupported: for {case} transformers gives {_short(expected)}, and the "
                f"bundle would give {_short(found)}. {_ADVICE}"
            )


_Case = tuple[str, Callable[[], Any], Callable[[], Any]]  # (name, transformers' result, the runtime's)


def _texts(tokenizer: Any, runtime: Tokenizer, texts: Sequence[str]) -> Iterator[_Case]:
    def theirs(*text: str | list[str], name: str = "input_ids", **more: Any) -> Callable[[], Any]:
        return lambda: tokenizer(*text, **more)[name]

    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())][:_ADDED]
    added = [token for token in added if token != runtime.special_tokens.get("fill_token")]  # the runtime rejects it
    length = _CUT + tokenizer.num_special_tokens_to_add(pair=False)
    for text in (*texts, *(f"a{token}b {token} {token}c" for token in added)):
        for special in (True, False):
            case = f"{text!r} ({'with' if special else 'without'} special tokens)"
            yield case, theirs(text, add_special_tokens=special), partial(runtime.encode, text, special)
        ids = runtime.encode(text)
        for skip in (True, False):
            text_of = partial(tokenizer.decode, ids, skip_special_tokens=skip)
            yield f"the text of {ids}", text_of, partial(runtime.decode, ids, skip)
        expected = theirs(text, truncation=True, max_length=length)
        yield f"{text!r} cut to {length} tokens", expected, partial(_field, runtime, text, "ids", length)
    fields = [("input_ids", "ids")]
    if "token_type_ids" in tokenizer.model_input_names:  # otherwise the model gets none
        fields.append(("token_type_ids", "type_ids"))
    for pair in zip(texts[1::2], texts[2::2], strict=False):
        for name, ours in fields:
            # As a batch: for a single pair with an empty second text, transformers drops that text.
            expected = theirs([pair[0]], [pair[1]], name=name, return_token_type_ids=True)
            yield f"the {name} of {pair!r}", partial(_only, expected), partial(_field, runtime, pair, ours)


def _only(batch: Callable[[], list[Any]]) -> Any:
    return batch()[0]


def _field(runtime: Tokenizer, text: str | tuple[str, str], name: str, length: int | None = None) -> Any:
    return getattr(runtime.encode_for_encoder(text, length), name)


def _chats(tokenizer: Any, runtime: Tokenizer) -> Iterator[_Case]:
    templates = tokenizer.chat_template
    names = list(templates) if isinstance(templates, dict) else [None] if templates else []
    for name in names:
        for chat in _CHATS:
            more = {"chat_template": name, "add_generation_prompt": True, "return_dict": False}
            expected = partial(tokenizer.apply_chat_template, chat, **more)
            yield f"the chat {chat} ({name or 'default'})", expected, partial(runtime.encode_chat, chat, template=name)


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """An error. All are equal: a template that rejects a chat must reject it in both, with any message."""

    error: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return self.error


def _outcome(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        return _Refusal(f"{type(error).__name__}: {error}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."
