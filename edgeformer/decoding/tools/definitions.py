"""The tools of a request, and which of them the answer may call, as in OpenAI's chat completions.

https://platform.openai.com/docs/api-reference/chat/create: `tools`, `tool_choice`, `parallel_tool_calls`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeformer.decoding.tools.callables import schema_of
from edgeformer.errors import InputError
from edgeformer.processing.chat import short

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ToolLike = Mapping[str, Any] | Callable[..., Any]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of an object."""

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any] = field(repr=False)  # {"type": "function", "function": {...}}, for chat templates


@dataclass(frozen=True)
class ToolChoice:
    """Which calls an answer may or must have: mode "auto", "none", "required" or "named" (then `name`)."""

    mode: str = "auto"
    name: str | None = None

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> ToolChoice:
        """The choice in OpenAI's shape, or the name of a tool alone. None: "auto" if there are tools, else "none".

        Raises:
            InputError: it is of another shape, or names no tool of `tools`.
        """
        if given is None:
            return cls("auto" if tools else "none")
        name: Any = given
        if isinstance(given, Mapping):
            function = given.get("function", given)
            name = function.get("name") if isinstance(function, Mapping) else None
            if given.get("type", "function") != "function" or not isinstance(name, str):
                raise InputError(
                    f"tool_choice is {short(given)}, expected 'auto', 'none', 'required' or "
                    "{'type': 'function', 'function': {'name': ...}}."
                )
        elif given in ("auto", "none", "required"):
            if given == "required" and not tools:
                raise InputError("tool_choice is 'required', and there are no tools; give tools=[...].")
            return cls(given)
        known = [tool.name for tool in tools]
        if name not in known:
            raise InputError(f"tool_choice is {short(given)}; the tools are: {', '.join(known) or 'none'}.")
        return cls("named", name)


@dataclass(frozen=True)
class ToolRequest:
    """The tools of a request, the choice among them, and whether one answer may have several calls."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice("none")
    parallel: bool = True

    @classmethod
    def of(
        cls,
        tools: Sequence[ToolLike] | None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
    ) -> ToolRequest:
        """The checked arguments of a call.

        Args:
            tools: OpenAI's shape, bare function schemas (`name`, `description`, `parameters`), or Python functions with
                type hints and docstrings.
            tool_choice: see `ToolChoice.of`.
            parallel_tool_calls: several calls in one answer are allowed.

        Raises:
            InputError: a tool or the choice is not of that shape.
        """
        checked = tools_of(tools)
        return cls(checked, ToolChoice.of(tool_choice, checked), parallel_tool_calls)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that this answer may call."""
        if self.choice.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if self.choice.name in (None, tool.name))

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice.mode in ("required", "named")

    @property
    def definitions(self) -> list[Mapping[str, Any]] | None:
        """The tools for a chat template; None if there are none."""
        return [tool.definition for tool in self.tools] or None


def tools_of(given: Sequence[ToolLike] | None) -> tuple[Tool, ...]:
    """The tools, checked.

    Raises:
        InputError: one is malformed, or two have one name.
    """
    if given is None:
        return ()
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise InputError(f"tools is {short(given)}, expected a list of function schemas or Python functions.")
    tools = tuple(_tool(index, one) for index, one in enumerate(given))
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{names.count(name)} tools have the name {name!r}; every tool needs its own.")
    return tools


def _tool(index: int, given: ToolLike) -> Tool:
    if callable(given) and not isinstance(given, Mapping):
        given = schema_of(given)
    if not isinstance(given, Mapping):
        raise InputError(f"Tool {index} is {short(given)}, expected a function schema or a Python function.")
    if given.get("type", "function") != "function":
        raise InputError(f"Tool {index} has the type {given['type']!r}, expected 'function'.")
    function = given.get("function", {key: value for key, value in given.items() if key != "type"})
    if not isinstance(function, Mapping):
        raise InputError(f"Tool {index} has the function {short(function)}, expected a mapping with a 'name'.")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"Tool {index} has the name {short(name)}, expected 1 to 64 letters, digits, underscores or hyphens."
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InputError(f"Tool {name!r} has the description {short(description)}, expected a text.")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InputError(
            f"Tool {name!r} has the parameters {short(parameters)}, expected the JSON schema of an object: "
            "{'type': 'object', 'properties': {...}}."
        )
    if not isinstance(parameters.get("properties", {}), Mapping):
        raise InputError(f"Tool {name!r} has the properties {short(parameters['properties'])}, expected a mapping.")
    # Templates read all three, and some fail without a description.
    written = {**function, "name": name, "description": description or "", "parameters": parameters}
    return Tool(name, parameters, {"type": "function", "function": written})
