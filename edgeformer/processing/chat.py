"""Conversations as text: the chat templates of a bundle, and their variables.

It follows transformers' `apply_chat_template`: how a template is chosen, how messages are prepared, how the last
message is continued, and how control tokens of a message are distinguished from the template's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgeformer.errors import InputError, TemplateError

Message = Mapping[str, Any]
DEFAULT, WITH_TOOLS = "default", "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which templates read it
SET = ("messages", "tools", "documents", "add_generation_prompt")  # variables that a conversation sets
_OPEN = "CONTINUE_FINAL_MESSAGE_TAG "
# Private-use characters that enclose a control token in the text of a user.
MARKS = ("\U000f0000", "\U000f0001")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """The variables of a template, without the messages and the tokenizer's special tokens."""

    add_generation_prompt: bool | None = None  # None: True unless the last message is continued
    continue_final_message: bool | str = False  # or the field of the message to continue
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas
    documents: Sequence[Mapping[str, Any]] | None = None
    template: str | None = None  # the name of a template in the bundle, or a template's text
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise InputError("add_generation_prompt and continue_final_message exclude each other; give one of them.")
        for name, values in (("tools", self.tools), ("documents", self.documents)):
            if values is not None and not _all_mappings(values):
                kind = "JSON schemas (mappings)" if name == "tools" else "mappings"
                raise InputError(f"{name} is {short(values)}, expected a list of {kind}.")


class ChatFormat:
    """The chat templates of one tokenizer, by name. Immutable; threads may share it."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = templates
        self._special_tokens = special_tokens
        self._compiled: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Names of the templates."""
        return sorted(self._templates)

    @property
    def texts(self) -> list[str]:
        """The templates themselves."""
        return list(self._templates.values())

    @property
    def variables(self) -> frozenset[str]:
        """The names that the templates read and that `render` does not set itself.

        Raises:
            TemplateError: a template's syntax is wrong.
        """
        from edgeformer.processing.chat_template import variables

        return frozenset().union(*map(variables, self.texts)) - {*SET, *self._special_tokens}

    def source(self, request: ChatRequest) -> str:
        """The text of the template for `request`.

        Raises:
            TemplateError: there is none, or none of several is the default.
        """
        if request.template is not None:
            named = self._templates.get(request.template)
            if named is None and not re.search(r"\{[{%]", request.template):
                known = ", ".join(self.names) or "none"
                raise TemplateError(f"There is no chat template {request.template!r}; the bundle has: {known}.")
            return named or request.template
        wanted = (WITH_TOOLS, DEFAULT) if request.tools is not None else (DEFAULT,)
        found = next((self._templates[name] for name in wanted if name in self._templates), None)
        if found is None and self._templates:
            raise TemplateError(f"The bundle has no default chat template; name one of: {', '.join(self.names)}.")
        if found is None:
            raise TemplateError("This bundle has no chat template; pass the prompt as text.")
        return found

    def render(self, messages: Sequence[Message], request: ChatRequest, control: Collection[str] = ()) -> str:
        """The messages as text; `control` tokens that are in messages are put between `MARKS`.

        Raises:
            TemplateError: there is no such template, or it refuses the messages.
            InputError: a message is not a mapping with a `role` and a `content`.
        """
        check_messages(messages)
        source = self.source(request)
        if source not in self._compiled:
            from edgeformer.processing.chat_template import ChatTemplate

            self._compiled[source] = ChatTemplate(source)
        # Mark first: the tag of a continued message must not be taken for the user's text.
        given = {"tools": request.tools, "documents": request.documents, **request.variables}
        conversation = [{k: v for k, v in _plain(message).items() if v is not None} for message in messages]
        if control:
            pattern = any_of(control)
            conversation, given = _marked(conversation, pattern), _marked(_plain(given), pattern)
        conversation = [_with_reasoning(message) for message in conversation]
        final = _leave_open(conversation, request.continue_final_message, source)
        prompt = request.add_generation_prompt
        variables = {
            **self._special_tokens,
            **_plain(given),
            "messages": conversation,
            "add_generation_prompt": not request.continue_final_message if prompt is None else prompt,
        }
        text: str = self._compiled[source].render(variables)
        return text if final is None else _cut_open(text, final)


def check_messages(messages: Any) -> None:
    """Raises InputError: `messages` is not a list of messages."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            "The messages are no list, or an empty one; expected [{'role': 'user', 'content': '...'}, ...]."
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"Message {index} is {short(message)}, expected a mapping with a 'role' and a 'content'.")
        has_content = isinstance(message.get("content"), (str, list, tuple, Mapping))
        if not has_content and not any(message.get(name) is not None for name in ("tool_calls", *REASONING)):
            raise InputError(f"Message {index} ({message['role']}) has no 'content' text.")


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


def short(value: object) -> str:
    """`repr(value)`, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _all_mappings(values: Any) -> bool:
    listed = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    return listed and all(isinstance(value, Mapping) for value in values)


def _plain(value: Any) -> Any:
    """`value` converted to plain JSON types. A template is untrusted code and must not reach methods of objects.

    Other values (an image, for example) become the name of their type; templates only test whether they exist.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass may have other methods
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "ndim", 0):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic, as in OpenAI's client
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names of REASONING that templates read."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """`value` with control tokens between MARKS, after removing existing marks. Keys are unchanged."""
    if isinstance(value, str):
        for mark in MARKS:
            value = value.replace(mark, "")
        return pattern.sub(f"{MARKS[0]}\\g<0>{MARKS[1]}", value)
    if isinstance(value, dict):
        return {key: _marked(item, pattern) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(item, pattern) for item in value]
    return value


def _leave_open(conversation: list[dict[str, Any]], wanted: bool | str, source: str) -> str | None:
    """Appends a tag to the last message if it is to be continued, and returns its text; otherwise None."""
    if not wanted:
        return None
    field = wanted if isinstance(wanted, str) else "content"
    message = conversation[-1]
    value = message.get(field)
    if value is None:
        raise InputError(f"The last message has no {field!r} to continue.")
    fields = [name for name in REASONING if message.get(name) == value] if field in REASONING else [field]
    if not any(name in source for name in fields):
        raise TemplateError(f"The chat template does not read {field!r}, so it cannot be continued.")
    if isinstance(value, (list, tuple)):
        part = next((part for part in reversed(value) if isinstance(part, dict) and "text" in part), None)
        if part is None:
            raise InputError("The last message has no text to continue.")
        value = part["text"]
        part["text"] = value + _OPEN
    else:
        message |= {name: str(value) + _OPEN for name in fields}
    return str(value)


def _cut_open(text: str, final: str) -> str:
    """The text before the tag of `_leave_open`."""
    place = text.rfind(_OPEN.strip())
    if place < 0 or final.strip() not in text:
        raise TemplateError("The chat template changes or leaves out the last message, so it cannot be continued.")
    kept = text[place:].startswith(_OPEN)  # otherwise the template strips spaces, of the message too
    return text[:place] if kept else text[:place].rstrip()
