"""Requests of OpenAI's Responses API: https://platform.openai.com/docs/api-reference/responses

Stateless: a request brings the whole conversation. It becomes messages and arguments as chat completions have them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from edgeformer.server.chat_types import FOLDED, ChatRequest
from edgeformer.server.errors import ApiError, unsupported, validation_error
from edgeformer.server.reasoning import effort_variables
from edgeformer.server.registry import Loaded
from edgeformer.server.sampling import Neutral, StreamOptions

T = TypeVar("T")
LOGPROBS = "message.output_text.logprobs"
# Reasoning that comes back must be encrypted where its text is hidden. Here it comes, and goes back, as text.
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")


class _Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Clients send items back with the fields that answers gave them."""

    type: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message, of a result or of reasoning. `logprobs` are those of an earlier answer."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(_Item, kw_only=True):
    """A message."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    phase: Literal["commentary", "final_answer"] | None = None  # of an answer: says nothing that a template knows


class CallItem(_Item, kw_only=True):
    """A call of an earlier answer."""

    call_id: str
    name: str
    arguments: str


class OutputItem(_Item, kw_only=True):
    """What a tool gave."""

    call_id: str
    output: str | list[dict[str, Any]]
    name: str | None = None


class ReasoningItem(_Item, kw_only=True):
    """Reasoning of an earlier answer."""

    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] | None = None
    encrypted_content: None = None


ITEMS: dict[str, type[_Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}
TEXTS = {"input_text": "text", "output_text": "text", "reasoning_text": "text", "refusal": "refusal"}


def messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages for a chat template; reasoning, text and calls that follow each other are one message.

    Raises:
        ApiError: an item has what this server does not take.
    """
    found: list[dict[str, Any]] = []
    for number, given in enumerate(items):
        one = _message(given, f"input[{number}]")
        last = found[-1] if found else {}
        if last.get("role") == one["role"] == "assistant" and not ("content" in last and "content" in one):
            if "reasoning_content" in last and "reasoning_content" in one:
                one["reasoning_content"] = last["reasoning_content"] + "\n" + one["reasoning_content"]
            if "tool_calls" in last and "tool_calls" in one:
                one["tool_calls"] = [*last["tool_calls"], *one["tool_calls"]]
            last |= one
        else:
            found.append(one)
    for message in found:
        if message.keys() <= {"role", "reasoning_content"}:
            message["content"] = ""  # reasoning that was cut short
    return found


def _message(given: dict[str, Any], place: str) -> dict[str, Any]:
    kind = given.get("type", "message")
    if kind not in ITEMS:
        raise unsupported(f"{place}.type", f"{kind!r} is none of {', '.join(ITEMS)}")
    item = _converted(given, ITEMS[kind], place)
    if isinstance(item, MessageItem):
        return {"role": FOLDED.get(item.role, item.role), "content": _text(item.content, f"{place}.content")}
    if isinstance(item, CallItem):
        call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        return {"role": "assistant", "tool_calls": [call]}
    if isinstance(item, OutputItem):
        message = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, f"{place}.output")}
        return message if item.name is None else {**message, "name": item.name}
    assert isinstance(item, ReasoningItem)
    if item.summary:
        raise unsupported(f"{place}.summary", "reasoning is in its content")
    return {"role": "assistant", "reasoning_content": _text(item.content or [], f"{place}.content")}


def _text(content: str | list[dict[str, Any]], place: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for number, given in enumerate(content):
        here = f"{place}[{number}]"
        if given.get("type") not in TEXTS:
            raise unsupported(f"{here}.type", f"{given.get('type')!r} is no text, and this model reads text")
        part = _converted(given, TextPart, here)
        text = getattr(part, TEXTS[part.type])
        if text is None:
            raise ApiError(400, f"{here}.{TEXTS[part.type]} is required.", param=f"{here}.{TEXTS[part.type]}")
        if part.annotations:
            raise unsupported(f"{here}.annotations", "a chat template has no place for them")
        texts.append(text)
    return "\n".join(texts)


def _converted(given: Any, kind: type[T], place: str) -> T:
    """
    Raises:
        ApiError: it has another shape; `place` says where it is.
    """
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        message, at, path = str(error).partition(" - at ")
        inner = path.strip("`").removeprefix("$") if at else ""
        raise validation_error(f"{message} - at `$.{place}{inner}`") from None


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the client runs. The server has no tools of its own."""

    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None

    def plain(self, place: str) -> dict[str, Any]:
        """The tool as chat completions have it.

        Raises:
            ApiError: it asks for what this server does not do.
        """
        for name, neutral in (("allowed_callers", ["direct"]), ("defer_loading", False), ("output_schema", {})):
            if getattr(self, name) not in (None, neutral):
                raise unsupported(f"{place}.{name}", "a chat template has no place for it")
        given = {name: getattr(self, name) for name in ("name", "description", "parameters", "strict")}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Text, JSON, or JSON that obeys a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer's text."""

    format: TextFormat | None = None
    verbosity: Any = None


class ReasoningConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a model reasons: with an effort where its chat template reads one. Reasoning is shown whole."""

    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None
    context: Any = None
    mode: Any = None


# "auto" asks for the best summary that there is.
_REASONING = {"summary": (None, "auto"), "generate_summary": (None, "auto"), "context": (None, "auto"), "mode": (None,)}


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    include: list[str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None  # comes back in the answer
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None  # a hint where cached prompts are: here all are in one place
    reasoning: ReasoningConfig | None = None
    safety_identifier: str | None = None  # says who asks: nothing depends on it
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[FunctionTool] | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: str | None = None  # says who asks: nothing depends on it

    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    store: Any = None
    truncation: Any = None

    NEUTRAL: ClassVar[Neutral] = {
        "access_programs": ((None,), "there are none"),
        "background": ((None, False), "responses are not stored, so nobody could ask for it"),
        "background_options": ((None,), "responses are not stored, so nobody could ask for it"),
        "context_management": ((None, []), "the client keeps the conversation"),
        "conversation": ((None,), "conversations are not stored; send all items in input"),
        "image": ((None,), "only text is taken"),
        "max_tool_calls": ((None,), "the server runs no tools"),
        "moderation": ((None,), "there is no moderation model"),
        "previous_response_id": ((None,), "responses are not stored; send all items in input"),
        "prompt": ((None,), "prompts are not stored"),
        "prompt_cache_options": ((None,), "the cache of prompts is the server's, for all requests"),
        "prompt_cache_retention": ((None, "in_memory"), "the cache of prompts is in memory"),
        "service_tier": ((None, "auto", "default"), "there is one tier"),
        "store": ((None, False), "responses are not stored; send store: false"),
        "truncation": ((None, "disabled"), "items are not dropped from the conversation"),
    }

    @property
    def form(self) -> TextFormat:
        """The format of the answer."""
        return (self.text and self.text.format) or TextFormat()

    @property
    def effort(self) -> str | None:
        """How much the model shall reason."""
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def has_logprobs(self) -> bool:
        """Whether log probabilities are asked for."""
        return LOGPROBS in (self.include or ())

    def messages(self, most: int) -> list[dict[str, Any]]:
        """The messages for a chat template.

        Raises:
            ApiError: there are none or more than `most`, or a field asks for what this server does not do.
        """
        self._refuse()
        found = messages_of(self.input) if isinstance(self.input, list) else [{"role": "user", "content": self.input}]
        if not 1 <= len(found) <= most:
            raise ApiError(400, f"input holds {len(found)} messages, expected 1 to {most}.", param="input")
        if self.instructions is not None:
            if found[0]["role"] == "system":  # templates take one
                found[0]["content"] = f"{self.instructions}\n{found[0]['content']}"
            else:
                found.insert(0, {"role": "system", "content": self.instructions})
        return found

    def arguments(self, loaded: Loaded) -> dict[str, Any]:
        """The arguments of `Model.generate`.

        Raises:
            ApiError: a field is wrong, or asks for what this server does not do.
        """
        if self.top_logprobs is not None and not self.has_logprobs:
            raise ApiError(400, f"top_logprobs needs include: [{LOGPROBS!r}].", param="top_logprobs")
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise ApiError(
                400, f"max_output_tokens is {self.max_output_tokens}, expected 1 or more.", param="max_output_tokens"
            )
        same = ChatRequest(
            messages=[],
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=[tool.plain(f"tools[{number}]") for number, tool in enumerate(self.tools or ())] or None,
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._response_format(),
            logprobs=self.has_logprobs or None,
            top_logprobs=self.top_logprobs,
            chat_template_kwargs=effort_variables(loaded, self.effort, "reasoning.effort") or None,
        )
        return same.arguments(loaded)

    def _choice(self) -> str | dict[str, Any] | None:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") != "function" or choice.keys() != {"type", "name"}:
            raise unsupported("tool_choice", "expected 'auto', 'none', 'required' or {'type': 'function', 'name': ...}")
        return {"type": "function", "function": {"name": choice["name"]}}

    def _response_format(self) -> dict[str, Any] | None:
        form = self.form
        more = {name: getattr(form, name) for name in ("name", "schema", "strict", "description")}
        given = {name: value for name, value in more.items() if value is not None}
        if form.type == "json_schema":
            for name in ("name", "schema"):
                if name not in given:
                    raise ApiError(400, f"text.format.{name} is required.", param=f"text.format.{name}")
            return {"type": "json_schema", "json_schema": given}
        if given:
            name = f"text.format.{next(iter(given))}"
            raise ApiError(400, f"{name} is for the type json_schema.", param=name)
        return None if form.type == "text" else {"type": form.type}

    def _refuse(self) -> None:
        for name, (values, why) in self.NEUTRAL.items():
            if getattr(self, name) not in values:
                raise unsupported(name, why)
        for number, one in enumerate(self.include or ()):
            if one not in INCLUDED:
                raise unsupported(f"include[{number}]", f"{one!r} is none of {', '.join(INCLUDED)}")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise unsupported("text.verbosity", "models have no such switch")
        for name, values in _REASONING.items():
            if getattr(self.reasoning, name, None) not in values:
                raise unsupported(f"reasoning.{name}", "reasoning is shown whole, as the chat template says")
        if self.stream_options is not None:
            if not self.stream:
                raise ApiError(400, "stream_options is for streams; set stream to true.", param="stream_options")
            for name in ("include_usage", "include_obfuscation"):
                if getattr(self.stream_options, name):
                    raise unsupported(f"stream_options.{name}", "usage is in the last event, and nothing is padded")
