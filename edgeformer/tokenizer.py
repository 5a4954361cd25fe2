"""Text to token ids and back: the bundle's `tokenizer.json`, its chat template, and a decoder for streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeformer.bundle import Bundle
from edgeformer.errors import BundleError, InputError, TemplateError
from edgeformer.manifest import read_json

Message = Mapping[str, Any]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Encoded:
    """One text for an encoder, each list with an entry for each token."""

    ids: list[int]
    type_ids: list[int]  # 1 for the second text of a pair
    offsets: list[tuple[int, int]]  # the characters that it stands for
    special: list[int]  # 1 for tokens that stand for no characters
    words: list[int | None]  # the number of the word that it is a part of


class Tokenizer:
    """A bundle's tokenizer. Immutable; threads may share it."""

    def __init__(self, backend: Any, settings: Mapping[str, Any], template: str | None) -> None:
        self._backend = backend
        self._template_source = template
        self._template: Any = None
        self._cutting: dict[int, Any] = {}  # copies of the backend that cut to a length
        self._more_special = _more_special(settings)
        # A tokenizer whose class gives no types leaves them to the model: all 0, those of a second text too.
        self.gives_types = "token_type_ids" in settings.get("model_input_names", ("token_type_ids",))
        self._cut_side = str(settings.get("truncation_side") or "right")
        self.special_tokens = _special_tokens(settings)

    @classmethod
    def of(cls, bundle: Bundle) -> Tokenizer | None:
        """The bundle's tokenizer; None where the bundle has none (its prompts are token ids).

        Raises:
            BundleError: `tokenizer.json` is damaged.
        """
        path = bundle.file("tokenizer.json")
        if path is None:
            return None
        settings_path = bundle.file("tokenizer_config.json")
        settings = read_json(settings_path) if settings_path else {}
        template_path = bundle.file("chat_template.jinja")
        template = _text(template_path) if template_path else _template_in(settings)
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} is not a tokenizer: {error}. Export or copy the bundle again.") from error
        # The file may ask for both; whoever cuts or pads a text here says so.
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, settings, template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with `add_special_tokens` also the begin and end tokens that the tokenizer itself adds."""
        if not isinstance(text, str):
            raise InputError(f"The text is {type(text).__name__}, expected str.")
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError("The text holds a lone surrogate, which is no character.") from error
        return ids

    def encode_for_encoder(self, text: str | tuple[str, str], max_length: int | None = None) -> Encoded:
        """A text, or two, as an encoder takes it: with special tokens, cut to `max_length` tokens.

        Raises:
            InputError: it is neither text nor a pair of texts.
        """
        pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not pair:
            raise InputError(f"The text is {_short(text)}, expected a str, or a pair of them.")
        backend = self._backend
        if max_length is not None:
            if max_length not in self._cutting:
                copy = type(backend).from_str(backend.to_str())
                copy.enable_truncation(max_length, direction=self._cut_side)
                self._cutting[max_length] = copy
            backend = self._cutting[max_length]
        found = backend.encode(*([text] if isinstance(text, str) else text))
        types = found.type_ids if self.gives_types else [0] * len(found.ids)
        return Encoded(found.ids, types, found.offsets, found.special_tokens_mask, found.word_ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise InputError(f"The token ids run from {min(ids)} to {max(ids)}, expected 0 to {2**32 - 1}.")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str | None:
        """The entry of the vocabulary as it is stored; None where there is none."""
        text: str | None = self._backend.id_to_token(id)
        return text

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that tokenizer_config.json calls special."""
        more = [*self._more_special, *self.special_tokens.values()]
        return frozenset(id for token in more if (id := self._backend.token_to_id(token)) is not None)

    @property
    def size(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The messages in the model's own chat format. `variables` reach the template (tools, documents, ...).

        Raises:
            TemplateError: the bundle has no template, or it refuses the messages.
            InputError: a message is no mapping with a `role` and a `content`.
        """
        _check_messages(messages)
        if self._template_source is None:
            raise TemplateError("This bundle has no chat template; pass the prompt as text.")
        if self._template is None:
            from edgeformer.template import ChatTemplate

            self._template = ChatTemplate(self._template_source)
        known = {"messages": list(messages), "tools": None, "documents": None, **self.special_tokens}
        text: str = self._template.render({**known, "add_generation_prompt": add_generation_prompt, **variables})
        return text

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of the messages in the model's chat format.

        As in transformers, the rendered text is encoded as a whole: the text of a special token inside a message
        becomes that token. Filter what strangers write if that matters to you.
        """
        text = self.render_chat(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        """A decoder for one stream of ids."""
        return Detokenizer(self.decode)


class Detokenizer:
    """Decodes ids one by one; the pieces joined are the text, and no piece ends within a character.

    Characters are often cut over several tokens (byte-level BPE, byte fallback), and the first token of a text may
    decode otherwise than the same token later (leading spaces). So a short window of the latest ids is decoded as a
    whole, and what is new in it is given out once it ends with whole characters.
    """

    PATIENCE = 16  # tokens; a character has at most 4 bytes, so what is still broken after these was never text

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._settled: list[int] = []  # the latest ids whose text was given out: context for the next
        self._pending: list[int] = []
        self._sent = 0  # characters of the window's text that were given out

    def push(self, id: int) -> str:
        """The text that `id` completes; often empty in the middle of a character."""
        self._pending.append(id)
        text = self._decode(self._settled + self._pending)
        whole = text.rstrip(REPLACEMENT)
        if len(whole) < len(text):
            if len(self._pending) < self.PATIENCE:
                return ""
            # Give out the ruins, but for what may still be the beginning of a character: at most 3 bytes.
            end = max(len(whole), len(text) - 3)
            new, self._sent = text[self._sent : end], max(self._sent, end)
            return new
        new = text[self._sent :]
        self._settle()
        return new

    def flush(self) -> str:
        """What is left at the end of the stream; half a character comes out as U+FFFD."""
        if not self._pending:
            return ""
        new = self._decode(self._settled + self._pending)[self._sent :]
        self._settle()
        return new

    def _settle(self) -> None:
        self._settled, self._pending = self._pending, []
        self._sent = len(self._decode(self._settled))


def _check_messages(messages: Any) -> None:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            "The messages are no list, or an empty one; expected [{'role': 'user', 'content': '...'}, ...]."
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"Message {index} is {_short(message)}, expected a mapping with a 'role' and a 'content'.")
        if not isinstance(message.get("content"), (str, list)) and "tool_calls" not in message:
            raise InputError(f"Message {index} ({message['role']}) has no 'content' text.")


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in settings.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _more_special(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens that have no name, or a name of the model's own."""
    found = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    listed = found.values() if isinstance(found, Mapping) else found
    texts = (token.get("content") if isinstance(token, Mapping) else token for token in listed)
    return [text for text in texts if isinstance(text, str)]


def _template_in(settings: Mapping[str, Any]) -> str | None:
    value = settings.get("chat_template")
    if isinstance(value, list):  # several by name; transformers takes "default"
        value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
