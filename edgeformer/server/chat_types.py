"""Chat completions on the wire: https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from edgeformer.server.errors import ApiError, unsupported
from edgeformer.server.reasoning import effort_variables
from edgeformer.server.registry import Loaded
from edgeformer.server.sampling import Neutral, SamplingFields
from edgeformer.server.usage import Logprob, Timings, Usage

FOLDED = {"developer": "system"}  # OpenAI's newer name of the role, which few templates know


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message. Only text is taken; no address is ever fetched."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """The name and the arguments, as JSON text, of a call."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None  # clients send answers back with all their fields
    audio: Any = None
    function_call: Any = None

    def plain(self, place: str) -> dict[str, Any]:
        """The message for a chat template.

        Raises:
            ApiError: it has what this server does not take; `place` says where.
        """
        for name in ("audio", "function_call"):
            if getattr(self, name) is not None:
                raise unsupported(f"{place}.{name}", "only text and tool_calls are taken")
        if self.annotations:
            raise unsupported(f"{place}.annotations", "a chat template has no place for them")
        found: dict[str, Any] = {"role": FOLDED.get(self.role, self.role)}
        content = self.content
        if isinstance(content, list):
            content = "\n".join(_text(part, f"{place}.content[{number}]") for number, part in enumerate(content))
        if content is None and self.refusal is not None:
            content = self.refusal
        if content is not None:
            found["content"] = content
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.tool_calls:
            found["tool_calls"] = [msgspec.to_builtins(call) for call in self.tool_calls]
        return found


def _text(part: ContentPart, place: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text if part.type == "text" else None
    if part.type not in ("text", "refusal"):
        raise unsupported(f"{place}.type", f"{part.type!r} is no text, and this model reads text")
    if text is None:
        raise ApiError(400, f"{place} has no {part.type}.", param=place)
    return text


class ChatRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # llama-server's and vLLM's: variables of the chat template
    prompt_cache_key: str | None = None  # a hint where cached prompts are: here all are in one place
    safety_identifier: str | None = None  # says who asks: nothing depends on it

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    NEUTRAL: ClassVar[Neutral] = {
        **SamplingFields.NEUTRAL,
        "audio": ((None,), "answers are text"),
        "function_call": ((None,), "it is the old form of tool_choice; use that"),
        "functions": ((None,), "it is the old form of tools; use that"),
        "metadata": ((None, {}), "completions are not stored"),
        "modalities": ((None, ["text"]), "answers are text"),
        "moderation": ((None,), "there is no moderation model"),
        "prediction": ((None,), "drafts come from the prompt and from recent answers"),
        "prompt_cache_options": ((None,), "the cache of prompts is the server's, for all requests"),
        "prompt_cache_retention": ((None, "in_memory"), "the cache of prompts is in memory"),
        "service_tier": ((None, "auto", "default"), "there is one tier"),
        "store": ((None, False), "completions are not stored"),
        "verbosity": ((None, "medium"), "models have no such switch"),
        "web_search_options": ((None,), "the server asks nobody else"),
    }

    def conversation(self, most: int) -> list[dict[str, Any]]:
        """The messages for a chat template.

        Raises:
            ApiError: there are none or more than `most`, or one has what this server does not take.
        """
        self.refuse()
        if not 1 <= len(self.messages) <= most:
            raise ApiError(
                400, f"messages holds {len(self.messages)} messages, expected 1 to {most}.", param="messages"
            )
        return [message.plain(f"messages[{number}]") for number, message in enumerate(self.messages)]

    def arguments(self, loaded: Loaded) -> dict[str, Any]:
        """See `SamplingFields.arguments`.

        Raises:
            ApiError: fields contradict each other.
        """
        found = super().arguments(loaded)
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens is not None and self.max_tokens != most:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens")
        found |= self.longest(loaded, most)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if self.logprobs:
            found["logprobs"] = self.top_logprobs or 0
        for name in ("response_format", "tools", "tool_choice", "parallel_tool_calls"):
            value = getattr(self, name)
            if value is not None and not (name == "tools" and not value):
                found[name] = value
        variables = effort_variables(loaded, self.reasoning_effort, "reasoning_effort")
        if variables := {**variables, **(self.chat_template_kwargs or {})}:
            found["chat_template_kwargs"] = variables
        if "tools" not in found:
            if self.tool_choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice needs tools.", param="tool_choice")
            found.pop("tool_choice", None)
        return found


class AnswerMessage(msgspec.Struct, kw_only=True):
    """The assistant's message. `content` is None where there are only calls."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChoiceLogprobs(msgspec.Struct):
    """Log probabilities of the answer's tokens."""

    content: list[Logprob]
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: str = "default"
    timings: Timings


class FunctionDelta(msgspec.Struct):
    """A whole call: its name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallDelta(msgspec.Struct):
    """A call of a stream; `index` counts the calls of one answer."""

    index: int
    id: str
    type: str
    function: FunctionDelta


class Delta(msgspec.Struct, kw_only=True):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """A part of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    service_tier: str = "default"
    timings: Timings | UnsetType = UNSET
