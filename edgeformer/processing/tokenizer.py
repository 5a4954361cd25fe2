"""Text to token ids and back: `tokenizer.json`, `tokenizer_config.json` and the chat templates of a bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import read_json
from edgeformer.errors import BundleError, InputError, OutOfMemory, check_memory
from edgeformer.processing.chat import DEFAULT, MARKS, ChatFormat, ChatRequest, Message, any_of, short
from edgeformer.processing.detokenizer import Detokenizer, clean_up
from edgeformer.processing.token_texts import TokenTexts

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Encoded:
    """One text for an encoder, each list with an entry for each token."""

    ids: list[int]
    type_ids: list[int]  # 1 for the second text of a pair
    offsets: list[tuple[int, int]]  # characters of the text
    special: list[int]  # 1 for special tokens
    words: list[int | None]  # index of the word


class Tokenizer:
    """A bundle's tokenizer. Immutable; threads may share it.

    `settings` is `tokenizer_config.json`. Used are `split_special_tokens`, `truncation_side`, `pad_token`,
    `clean_up_tokenization_spaces`, `chat_control_tokens` and the special tokens; the other settings are already in
    `tokenizer.json`, where transformers' `save_pretrained` writes them. `template` overrides that of the settings.
    """

    def __init__(self, backend: Any, settings: Mapping[str, Any], template: str | None = None) -> None:
        # tokenizer.json may switch on both; here they are arguments of each call.
        backend.no_padding()
        backend.no_truncation()
        self._splits = bool(settings.get("split_special_tokens", False))
        backend.encode_special_tokens = self._splits
        self._backend = backend
        self._more_special = _more_special(settings)
        # Without token types in its class, the model's default is 0, also for a second text.
        self.gives_types = "token_type_ids" in settings.get("model_input_names", ("token_type_ids",))
        self._variants: dict[tuple[int | None, bool], Any] = {(None, self._splits): backend}
        self._side = settings.get("truncation_side", "right")
        self._cleans = bool(settings.get("clean_up_tokenization_spaces")) and (
            type(backend.model).__name__ != "BPE"  # as transformers: in BPE, spaces are part of the text
            or bool(settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
        )
        decoder = _decoder(backend)
        self._falls_back, self._is_bytes = '"ByteFallback"' in decoder, decoder.startswith('{"type":"ByteLevel"')
        self._texts: dict[int, str] = {}  # of single tokens that a stream has decoded
        self.special_tokens = _special_tokens(settings)
        pad = self.special_tokens.get("pad_token")
        self.pad_id: int | None = None if pad is None else backend.token_to_id(pad)
        self._fill = self.special_tokens.get("fill_token")  # Code Llama: marks an infilling prompt
        self._control = settings.get("chat_control_tokens")
        self.chat = ChatFormat(_templates(settings, template), self.special_tokens)

    @classmethod
    def of(cls, bundle: Bundle) -> Tokenizer | None:
        """The bundle's tokenizer; None if it has none (prompts are token ids).

        Raises:
            BundleError: `tokenizer.json` is damaged.
        """
        path = bundle.file("tokenizer.json")
        return None if path is None else cls.read(path, bundle.file(SETTINGS), bundle.file(TEMPLATE))

    @classmethod
    def read(cls, path: Path, settings: Path | None, template: Path | None) -> Tokenizer:
        """The tokenizer in `path`, with `tokenizer_config.json` and `chat_template.jinja` if they exist.

        Raises:
            BundleError: a file is damaged.
            OutOfMemory: it cannot be parsed in the memory that is left.
        """
        from tokenizers import Tokenizer as Backend

        try:
            # a parsed tokenizer takes 15 to 18 bytes for each of the file (9 kB to 1.4 MB, tokenizers 0.23)
            check_memory(20 * path.stat().st_size + (256 << 10), f"reading {path}")
            backend = Backend.from_file(str(path))
        except OutOfMemory:
            raise
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} is not a tokenizer: {error}. Export or copy the bundle again.") from error
        return cls(backend, read_json(settings) if settings else {}, _text(template) if template else None)

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool | None = None) -> list[int]:
        """Token ids; with `add_special_tokens` also the tokenizer's begin and end tokens.

        As in transformers, the text of a special token becomes that token; with `split_special_tokens` it is encoded as
        text. The default is the tokenizer's setting, which is nearly always False.
        """
        if not isinstance(text, str):
            raise InputError(f"The text is {type(text).__name__}, expected str.")
        if self._fill is not None and self._fill in text:
            raise InputError(f"{self._fill} marks infilling, which is unsupported; write the model's own prompt.")
        backend = self._variant(None, self._splits if split_special_tokens is None else split_special_tokens)
        ids: list[int] = _encoded(lambda: backend.encode(text, add_special_tokens=add_special_tokens)).ids
        return ids

    def encode_for_encoder(self, text: str | tuple[str, str], max_length: int | None = None) -> Encoded:
        """A text or a pair of texts for an encoder: with special tokens, truncated to `max_length` tokens.

        Raises:
            InputError: `text` is neither.
        """
        pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not pair:
            raise InputError(f"The text is {short(text)}, expected a str, or a pair of them.")
        backend = self._variant(max_length, self._splits)
        found = _encoded(lambda: backend.encode(*([text] if isinstance(text, str) else text)))
        types = found.type_ids if self.gives_types else [0] * len(found.ids)
        return Encoded(found.ids, types, found.offsets, found.special_tokens_mask, found.word_ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        text = self._decode(ids, skip_special_tokens)
        return clean_up(text) if self._cleans else text

    def token(self, id: int) -> str | None:  # noqa: A002
        """The vocabulary's entry; None if there is none."""
        text: str | None = self._backend.id_to_token(id)
        return text

    @cached_property
    def token_texts(self) -> TokenTexts:
        """The bytes that each token stands for within a text."""
        return TokenTexts(self._backend)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens in tokenizer_config.json."""
        more = [*self._more_special, *self.special_tokens.values()]
        found = map(self._backend.token_to_id, more)
        return frozenset(number for number in found if number is not None)

    @cached_property
    def special_texts(self) -> Mapping[str, int]:
        """Text -> id of the tokens that `decode` leaves out; `tokenizer.json` marks them as special."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @property
    def size(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """The entries of the vocabulary and their ids, added tokens included; ids may have gaps."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    @property
    def skipped_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out: those that tokenizer.json marks as special."""
        return frozenset(self.special_texts.values())

    @property
    def decoder(self) -> str:
        """The decoder of tokenizer.json, as JSON; empty if it has none."""
        return _decoder(self._backend)

    @property
    def cleans_up(self) -> bool:
        """Whether `decode` removes spaces before punctuation and contractions."""
        return self._cleans

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each row, on several threads."""
        texts: list[str] = self._backend.decode_batch(rows, skip_special_tokens=True)
        return [clean_up(text) for text in texts] if self._cleans else texts

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a default template, which takes messages only."""
        return DEFAULT in self.chat.names

    @property
    def chat_variables(self) -> frozenset[str]:
        """The names that the chat templates read beside messages, tools and special tokens (`enable_thinking`, ...).

        Raises:
            TemplateError: a template's syntax is wrong.
        """
        return self.chat.variables

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The messages in the model's own chat format, as transformers' `apply_chat_template` renders them.

        Args:
            messages: Mappings with `role` and `content`.
            add_generation_prompt: Append the beginning of an answer. None: yes, unless the last message is continued.
            continue_final_message: The model continues the last message, or the field of it with this name
                (`reasoning_content`).
            tools: JSON schemas of functions. The template `tool_use` is used for them, if the bundle has it.
            documents: Mappings, usually with `title` and `text`.
            template: The name of a template of the bundle, or the text of a template.
            variables: Other variables of the template (`enable_thinking`, ...).

        Raises:
            TemplateError: the bundle has no such template, or it refuses the messages.
            InputError: a message is not a mapping with a `role` and a `content`.
        """
        request = ChatRequest(add_generation_prompt, continue_final_message, tools, documents, template, variables)
        return self.chat.render(messages, request)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        sanitize_control_tokens: bool = False,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of the messages in the model's chat format; see `render_chat` for the arguments.

        The template writes the begin token; none is added. As in transformers, the rendered text is encoded as a whole:
        the text of a special token in a message becomes that token. With `sanitize_control_tokens` it stays text, and
        only the template writes such tokens: use it for untrusted messages.

        Raises:
            TemplateError: as `render_chat`.
            InputError: as `render_chat`; or the text of a control token cannot be written without the token.
        """
        request = ChatRequest(add_generation_prompt, continue_final_message, tools, documents, template, variables)
        if not sanitize_control_tokens:
            return self.encode(self.chat.render(messages, request), add_special_tokens=False)
        control = self._control_tokens(self.chat.source(request))
        return self._encode_marked(self.chat.render(messages, request, control))

    def detokenizer(self) -> Detokenizer:
        """A decoder for one stream of ids."""
        return Detokenizer(self._decode_window, self._is_byte, self._cleans, self._is_bytes)

    def _decode_window(self, ids: list[int]) -> str:
        """As `_decode`. A stream asks for the text of each token alone; these are kept."""
        if len(ids) != 1:
            return self._decode(ids)
        if ids[0] not in self._texts:
            self._texts[ids[0]] = self._decode(ids)
        return self._texts[ids[0]]

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise InputError(f"The token ids run from {min(ids)} to {max(ids)}, expected 0 to {2**32 - 1}.")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def _is_byte(self, number: int) -> bool:
        token = self.token(number) if self._falls_back else None
        return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _variant(self, max_length: int | None, splits: bool) -> Any:
        """A backend that truncates to `max_length` and splits special tokens or not: both are settings of a backend."""
        key = (max_length, splits)
        if key not in self._variants:
            copy = type(self._backend).from_str(self._backend.to_str())
            copy.encode_special_tokens = splits
            if max_length is not None:
                copy.enable_truncation(max_length, direction=self._side)
            self._variants[key] = copy
        return self._variants[key]

    def _control_tokens(self, source: str) -> list[str]:
        """The added tokens that a message may not contain: special ones, and those that the template writes."""
        added = self._backend.get_added_tokens_decoder().values()
        if self._control is not None:
            return [token.content for token in added if token.special or token.content in self._control]
        from edgeformer.processing.chat_template import literals

        written = literals(source)
        return [
            token.content
            for token in added
            if token.special or (token.content in written and not token.content.isspace())
        ]

    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a rendered text in which MARKS enclose control tokens that are text."""
        begin, end = MARKS
        added = any_of([token.content for token in self._backend.get_added_tokens_decoder().values()])
        # Text, a marked token, text, a marked token, ..., text; None for a mark without its other half.
        parts = re.split(f"{begin}({added.pattern}){end}|[{begin}{end}]", text)
        ids = self.encode(parts[0], add_special_tokens=False)
        for index, part in enumerate(parts[1:], 1):
            if part:
                ids += self._inner_ids(part, self._plain_ids if index % 2 else self._text_ids)
        return ids

    def _inner_ids(self, part: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a part inside the text: encoded after a newline, without the newline's ids.

        SentencePiece tokenizers would add a space at the beginning of a text.
        """
        newline = self._text_ids("\n")
        ids = encode("\n" + part)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(part)

    def _text_ids(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of the text without matching added tokens, special or not."""
        backend = self._backend
        token = text.removeprefix("\n")
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
        if backend.token_to_id(token) in ids:
            raise InputError(f"The message contains {token!r}, and this tokenizer makes that token even of plain text.")
        return ids


def _encoded(encode: Callable[[], Any]) -> Any:
    try:
        return encode()
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError("The text holds a lone surrogate, which is no character.") from error
    except BaseException as error:
        # A panic of the library is no Exception: regular expressions of tokenizer.json that backtrack without end.
        if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
            raise
        raise InputError(f"The tokenizer fails on this text: {error}. Its tokenizer.json may be damaged.") from error


def _decoder(backend: Any) -> str:
    """The backend's decoder as JSON; empty if it has none."""
    if backend.decoder is None:
        return ""
    state: bytes = backend.decoder.__getstate__()
    return state.decode()


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the special tokens that a template may read, those of this model alone too."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    for group in ("model_specific_special_tokens", "extra_special_tokens"):
        named |= settings[group] if isinstance(settings.get(group), dict) else {}
    found = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _more_special(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens without a name, or with a model-specific one."""
    found = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    listed = found.values() if isinstance(found, Mapping) else found
    texts = (token.get("content") if isinstance(token, Mapping) else token for token in listed)
    return [text for text in texts if isinstance(text, str)]


def _templates(settings: Mapping[str, Any], file: str | None) -> dict[str, str]:
    """Name -> template. A file overrides the settings, which have one, or a list of several with names."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        value = {part.get("name"): part.get("template") for part in value if isinstance(part, Mapping)}
    if not isinstance(value, Mapping):
        value = {DEFAULT: value}
    found = {str(name): text for name, text in value.items() if isinstance(text, str)}
    return found if file is None else {**found, DEFAULT: file}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error
