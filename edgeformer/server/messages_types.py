"""Requests of Anthropic's Messages API: https://docs.anthropic.com/en/api/messages

They become messages, tools and arguments as chat completions have them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from edgeformer.decoding.answer_shape import answer_format
from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.server.chat_types import ChatRequest
from edgeformer.server.errors import ApiError, unsupported
from edgeformer.server.reasoning import effort_variables, switch_variables
from edgeformer.server.registry import Loaded
from edgeformer.server.sampling import Neutral

# Coding agents ask to keep all earlier thoughts, which is what happens.
KEEP_ALL = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}


class CacheControl(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Asks to cache a beginning, which this server does for all beginnings."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    cache_control: CacheControl | None = None


class TextParam(_Block, kw_only=True, tag="text"):
    """Text of a message."""

    text: str
    citations: Any = None


class ThinkingParam(_Block, kw_only=True, tag="thinking"):
    """Reasoning of an earlier answer. `signature` is what that answer had; there is none here."""

    thinking: str
    signature: str = ""


class ToolUseParam(_Block, kw_only=True, tag="tool_use"):
    """A call of an earlier answer."""

    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    toolset_name: Any = None


class ToolResultParam(_Block, kw_only=True, tag="tool_result"):
    """What a tool gave."""

    tool_use_id: str
    content: str | list[TextParam] | None = None
    is_error: bool | None = None


Block = TextParam | ThinkingParam | ToolUseParam | ToolResultParam
ALLOWED = {"user": (TextParam, ToolResultParam), "assistant": (TextParam, ThinkingParam, ToolUseParam)}


class MessageParam(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def plain(self, place: str) -> list[dict[str, Any]]:
        """The messages for a chat template: each result of a tool is one of its own.

        Raises:
            ApiError: a block does not belong to the role; `place` says where.
        """
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        for number, block in enumerate(self.content):
            _check(block, self.role, f"{place}.content[{number}]")
        if self.role == "assistant":
            return [self._assistant(self.content)]
        found: list[dict[str, Any]] = []
        texts: list[str] = []
        for block in self.content:
            if isinstance(block, TextParam):
                texts.append(block.text)
            elif isinstance(block, ToolResultParam):
                if texts:
                    found.append({"role": self.role, "content": "\n".join(texts)})
                    texts = []
                found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        if texts or not found:
            found.append({"role": self.role, "content": "\n".join(texts)})
        return found

    def _assistant(self, blocks: list[Block]) -> dict[str, Any]:
        texts = [block.text for block in blocks if isinstance(block, TextParam)]
        thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingParam)]
        calls = [_call(block) for block in blocks if isinstance(block, ToolUseParam)]
        found: dict[str, Any] = {"role": "assistant"}
        if texts or not calls:
            found["content"] = "\n".join(texts)
        if thoughts:
            found["reasoning_content"] = "\n".join(thoughts)
        if calls:
            found["tool_calls"] = calls
        return found


def _check(block: Block, role: str, place: str) -> None:
    if not isinstance(block, ALLOWED.get(role, (TextParam,))):
        kind = type(block).__struct_config__.tag
        raise ApiError(400, f"{place} is a block {kind!r}, which a message of role {role!r} has not.", param=place)
    for name in ("citations", "caller", "toolset_name"):
        value = getattr(block, name, None)
        if value and value != {"type": "direct"}:
            raise unsupported(f"{place}.{name}", "a chat template has no place for it")


def _call(block: ToolUseParam) -> dict[str, Any]:
    arguments = msgspec.json.encode(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultParam) -> str:
    """The text of a result; templates have no mark for a failure, so a word stands before it."""
    content = block.content
    text = content or "" if not isinstance(content, list) else "\n".join(part.text for part in content)
    return f"Error: {text}" if block.is_error else text


class ToolParam(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs. The server has none of its own."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None  # a call is sent once it is whole and valid
    strict: bool | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    input_examples: Any = None

    def plain(self, place: str) -> dict[str, Any]:
        """The tool as chat completions have it.

        Raises:
            ApiError: it asks for what this server does not do.
        """
        for name, neutral in (("allowed_callers", ["direct"]), ("defer_loading", False), ("input_examples", [])):
            if getattr(self, name) not in (None, neutral):
                raise unsupported(f"{place}.{name}", "a chat template has no place for it")
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ToolChoiceParam(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether and which tools the answer calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def plain(self) -> str | dict[str, Any]:
        """The choice as chat completions have it.

        Raises:
            ApiError: the name is missing, or there is one where none belongs.
        """
        if (self.type == "tool") != (self.name is not None):
            raise ApiError(400, "tool_choice.name is for the type 'tool', which needs it.", param="tool_choice.name")
        if self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class ThinkingConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a model reasons: as its chat template says, which may have a switch."""

    type: Literal["adaptive", "enabled", "disabled", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class Metadata(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Says who asks: nothing depends on it."""

    user_id: str | None = None


class JsonFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The JSON schema that the answer must obey."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The format of the answer, and how much to reason for it."""

    format: JsonFormat | None = None
    effort: str | None = None


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/messages/count_tokens: what makes the prompt."""

    messages: list[MessageParam]
    model: str | None = None
    system: str | list[TextParam] | None = None
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingConfig | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    NEUTRAL: ClassVar[Neutral] = {
        "speed": ((None, "standard"), "there is one speed"),
        "user_profile_id": ((None,), "there are no profiles"),
        "workspace_id": ((None,), "there are no workspaces"),
    }

    def conversation(self, most: int) -> list[dict[str, Any]]:
        """The messages for a chat template; neighbours of one role are joined, as Anthropic's API does.

        Raises:
            ApiError: there are none or more than `most`, the last one is the assistant's, or a field asks for what
                this server does not do.
        """
        self._refuse()
        if not 1 <= len(self.messages) <= most:
            raise ApiError(
                400, f"messages holds {len(self.messages)} messages, expected 1 to {most}.", param="messages"
            )
        if self.messages[-1].role == "assistant":
            raise ApiError(
                400,
                "messages ends with one of the assistant, and beginnings of an answer (prefill) are not supported; end "
                "with one of the user.",
                param="messages",
            )
        found: list[dict[str, Any]] = []
        if self.system:
            text = self.system if isinstance(self.system, str) else "\n".join(one.text for one in self.system)
            found.append({"role": "system", "content": text})
        for number, message in enumerate(self.messages):
            for one in message.plain(f"messages[{number}]"):
                last = found[-1] if found else None
                if last is not None and last["role"] == one["role"] != "tool" and number > 0:
                    _join(last, one)
                else:
                    found.append(one)
        return found

    def definitions(self) -> list[dict[str, Any]] | None:
        """The tools as chat completions have them.

        Raises:
            ApiError: a tool asks for what this server does not do.
        """
        return [tool.plain(f"tools[{number}]") for number, tool in enumerate(self.tools or ())] or None

    def variables(self, loaded: Loaded) -> dict[str, Any]:
        """The variables of the chat template that say how to reason.

        Raises:
            ApiError: the template has none for what is asked.
        """
        config, thinking = self.output_config, self.thinking
        effort = None if config is None else config.effort
        found = effort_variables(loaded, effort, "output_config.effort")
        if thinking is None or thinking.type not in ("enabled", "disabled"):
            return found
        switched = switch_variables(loaded, on=thinking.type == "enabled")
        if thinking.type == "disabled" and not switched and _may_reason(loaded):
            raise unsupported("thinking.type", "the chat template has no switch for it; 'adaptive' is taken")
        return found | switched

    def _refuse(self) -> None:
        for name, (values, why) in self.NEUTRAL.items():
            if getattr(self, name) not in values:
                raise unsupported(name, why)
        thinking = self.thinking
        if thinking is None:
            return
        if thinking.type == "between_tools":
            raise unsupported("thinking.type", "a chat template says where a model reasons; 'adaptive' is taken")
        if thinking.display == "omitted":
            raise unsupported("thinking.display", "reasoning is always shown")
        limit = getattr(self, "max_tokens", None)
        if thinking.budget_tokens is not None and limit is not None and thinking.budget_tokens < limit - 1:
            raise unsupported(
                "thinking.budget_tokens", f"max_tokens limits reasoning and answer together; give {limit - 1} or more"
            )


class MessagesRequest(CountRequest, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: int
    metadata: Metadata | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    container: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    mcp_servers: Any = None
    service_tier: Any = None

    NEUTRAL: ClassVar[Neutral] = {
        **CountRequest.NEUTRAL,
        "container": ((None,), "the server runs no code"),
        "context_management": ((None, {}, {"edits": []}, KEEP_ALL), "the client keeps the conversation"),
        "diagnostics": ((None,), "requests are not stored"),
        "inference_geo": ((None,), "the server is one machine"),
        "mcp_servers": ((None, []), "the server asks nobody else"),
        "service_tier": ((None, "auto", "standard_only"), "there is one tier"),
    }

    def arguments(self, loaded: Loaded) -> dict[str, Any]:
        """The arguments of `Model.generate`.

        Raises:
            ApiError: a field is wrong, or asks for what this server does not do.
        """
        if self.max_tokens < 1:
            raise ApiError(400, f"max_tokens is {self.max_tokens}, expected 1 or more.", param="max_tokens")
        if not all(self.stop_sequences or ()):
            raise ApiError(400, "stop_sequences holds an empty text.", param="stop_sequences")
        choice = self.tool_choice
        form = None if self.output_config is None else self.output_config.format
        schema = None if form is None else {"name": "answer", "schema": form.schema, "strict": True}
        same = ChatRequest(
            messages=[],
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            tools=self.definitions(),
            tool_choice=None if choice is None else choice.plain(),
            parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
            response_format=None if schema is None else {"type": "json_schema", "json_schema": schema},
            chat_template_kwargs=self.variables(loaded) or None,
        )
        return same.arguments(loaded)


def _may_reason(loaded: Loaded) -> bool:
    """Whether the chat template has a place for reasoning."""
    model = loaded.model
    if model.tokenizer is None or loaded.scheduler is None or not model.tokenizer.has_chat_template:
        return False
    eos = GenerationConfig.of(file_settings(model.bundle), {}, model.bundle.vocab_size).eos_token_id
    return answer_format(model.tokenizer, eos).reasoning is not None


def _join(last: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds a message to the one before it, which has its role."""
    for name in ("content", "reasoning_content"):
        texts = [one[name] for one in (last, more) if one.get(name)]
        if texts:
            last[name] = "\n".join(texts)
    if calls := [*last.get("tool_calls", ()), *more.get("tool_calls", ())]:
        last["tool_calls"] = calls
