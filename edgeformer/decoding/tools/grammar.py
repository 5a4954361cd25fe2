"""The grammar of an answer with tool calls, as a text in llguidance's Lark dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeformer.decoding.tools.answer import PLAIN
from edgeformer.decoding.tools.definitions import Tool, ToolRequest
from edgeformer.decoding.tools.literals import LiteralRules
from edgeformer.decoding.tools.rules import (
    ANY,
    Frame,
    GrammarTokens,
    Rules,
    either,
    json_rule,
    members,
    pattern,
    sequence,
)
from edgeformer.errors import InputError
from edgeformer.processing.tool_format import (
    ARGUMENTS,
    CALL_ID,
    JSON,
    NAME,
    NUMBER,
    RAW,
    TEXT,
    AnswerFormat,
    NamedCall,
    ObjectCall,
    PairCall,
    ToolFormat,
)
from edgeformer.processing.tool_reading import types_of
from edgeformer.processing.tool_values import to_json

SPACE = "/[ \\n]{0,3}/"  # models write line breaks more or less than their template
OTHERS = {CALL_ID: '/"[A-Za-z0-9]{9}"/', NUMBER: "/0|[1-9][0-9]{0,8}/", TEXT: '/"[^"\\\\\\x00-\\x1f]{0,64}"/'}


def tool_grammar(
    form: AnswerFormat, request: ToolRequest, tokens: GrammarTokens, in_reasoning: bool = False
) -> str | None:
    """The grammar of an answer to `request`; None if any text may be one.

    "required" and "named": the answer is calls, after reasoning if the template shows it; where the template shows no
    calls, one object `{"name": ..., "arguments": {...}}` (`answer.PLAIN`). "auto": text, and calls are well formed once
    their beginning appears; None where nothing announces a call (they are parsed only). "none": None.

    Args:
        form: what the chat template shows.
        request: the tools and the choice.
        tokens: the special tokens of the tokenizer, and those that end an answer.
        in_reasoning: the prompt ends within reasoning.

    Raises:
        InputError: "auto", and the template shows no calls; or a schema cannot be obeyed.
    """
    tools = request.callable_tools
    if not tools:
        return None
    if form.tools is not None and form.tools.sorts:
        tools = tuple(replace(tool, parameters=_sorted(tool.parameters)) for tool in tools)
    if form.tools is None and not request.forced:
        raise InputError(
            f"tool_choice='auto' needs a chat template that shows tool calls: {form.why_no_tools}. "
            "Use tool_choice='required', or name a tool: both work with any model."
        )
    format_ = form.tools or PLAIN
    if not request.forced and not format_.trigger:
        return None
    rules = Rules(tokens)
    calls = _calls(rules, format_, tools, request.parallel)
    thought = _thought(rules, form, in_reasoning)
    if request.forced:
        before = format_.before
        space = SPACE if before[:1].isspace() or thought else ""
        rules.add("start", sequence(thought, space, rules.text(before.lstrip()), calls))
    else:
        rules.add("start", sequence(thought, _announced(rules, format_, calls, request.parallel)))
    return rules.source()


def _thought(rules: Rules, form: AnswerFormat, in_reasoning: bool) -> str:
    """Reasoning before the answer: open already, or not needed."""
    if form.reasoning is None:
        return ""
    inside = rules.until("thought", form.reasoning.close)
    return inside if in_reasoning else f"({sequence(SPACE, rules.text(form.reasoning.open), inside)})?"


def _announced(rules: Rules, form: ToolFormat, calls: str, parallel: bool) -> str:
    """Any text; once the beginning of a call appears, the call."""
    before = form.before.lstrip()
    parts = rules.segments(form.trigger)
    in_before = rules.segments(before)
    rules.add("text", ANY)
    if parts[0] in rules.tokens.special:
        head = rules.text(before)
    else:
        rules.add("head", f"/(?s:.*){pattern(parts[0])}/", lazy=True)
        rest = in_before[0][len(parts[0]) :] + "".join(in_before[1:])
        head = sequence("head", rules.text(rest))
    # Text matches no special tokens, so the others (of citations, say) are named.
    ends = rules.tokens.ends | ({rules.tokens.special[parts[0]]} if parts[0] in rules.tokens.special else set())
    others = sorted(set(rules.tokens.special.values()) - ends)
    free = ["text other"] if others else []
    if others:
        rules.add("other", f"<[{','.join(map(str, others))}]>")
    lead = "text " if head.startswith("<[") else ""
    rules.add("announced", lead + sequence(head, calls))
    if parallel:
        return f"({either('announced', *free)})* text"
    prefix = "(text other)* " if others else ""
    return f"{prefix}(text | announced)"


def _calls(rules: Rules, form: ToolFormat, tools: Sequence[Tool], parallel: bool) -> str:
    """One call, or several, without the text before the first."""
    last = either(*(_Call(rules, form, tool, f"t{index}").rule(more=False) for index, tool in enumerate(tools)))
    if not parallel or form.between is None:
        return last
    more = either(*(_Call(rules, form, tool, f"m{index}").rule(more=True) for index, tool in enumerate(tools)))
    return f"{rules.add('more', more)}* {rules.add('last', last)}"


@dataclass(frozen=True)
class _Call:
    """The rules of one tool's call, whose names begin with `prefix`."""

    rules: Rules
    form: ToolFormat
    tool: Tool
    prefix: str

    def rule(self, more: bool) -> str:
        """The call with what follows it: another one's beginning, or the end."""
        call = self.form.call
        ending = (self.form.between if more else self.form.after) or ""
        if isinstance(call, PairCall):
            return self._pairs(call, ending, call.none_between if more else call.none)
        end = self.rules.text(ending)
        if isinstance(call, NamedCall):
            written = sequence(self.rules.text(self.tool.name + call.middle), self._arguments(call.style))
        else:
            written = self._object(call)
        return self.rules.add(self.prefix, sequence(written, end))

    def _object(self, call: ObjectCall) -> str:
        quote = to_json if call.style == JSON else repr
        parts: list[str] = []
        constant = ""
        for part in call.parts:
            if part == NAME:
                constant += quote(self.tool.name)
            elif part == ARGUMENTS or part in OTHERS:
                parts += [self.rules.text(constant), OTHERS.get(part) or self._arguments(call.style)]
                constant = ""
            else:
                constant += part
        return sequence(*parts, self.rules.text(constant))

    def _arguments(self, style: str) -> str:
        schema = _closed(self.tool.parameters)
        if style == JSON:
            return json_rule(schema)
        return LiteralRules(self.rules, self.prefix, schema, None).value(schema)

    def _pairs(self, call: PairCall, ending: str, none: str | None) -> str:
        schema = self.tool.parameters
        # A string without quotes takes the text that ends it: then only the rest of that text follows.
        strip = len(call.close) if not call.quotes[0] else 0
        properties = schema.get("properties", {})
        required = schema.get("required", ())
        literals = LiteralRules(self.rules, f"{self.prefix}_l", schema, self._quotes(call))
        pairs = [
            (
                sequence(
                    self.rules.text(key + call.assign),
                    self._value(call, literals, schema, index),
                ),
                key in required,
            )
            for index, key in enumerate(properties)
        ]
        empty = None if none is None else self.rules.text(self.tool.name + none)
        frame = Frame(
            self.rules.text(self.tool.name + call.middle),
            self.rules.text(call.join[strip:]),
            self.rules.text(ending[strip:]),
            empty,
        )
        return members(self.rules, self.prefix, pairs, frame)

    def _quotes(self, call: PairCall) -> tuple[str, str] | None:
        return call.quotes if call.string_style == RAW and call.quotes[0] else None

    def _value(self, call: PairCall, literals: LiteralRules, schema: Mapping[str, Any], index: int) -> str:
        own = list(schema["properties"].values())[index]
        styles = {call.scalar_style, call.nested_style}
        if call.quotes[0]:
            plain = styles | {call.string_style} == {JSON}
            return json_rule(own, schema) if plain else literals.value(own)
        types = types_of(own, schema)
        if types is None or "string" in types:
            return self._raw(call, own, types, f"{self.prefix}_s{index}")
        value = json_rule(own, schema) if styles == {JSON} else literals.value(own)
        return sequence(value, self.rules.text(call.close))

    def _raw(self, call: PairCall, schema: Mapping[str, Any], types: set[str] | None, name: str) -> str:
        """A string without quotes, and what ends it."""
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            texts = [self.rules.text((one if isinstance(one, str) else to_json(one)) + call.close) for one in values]
            return either(*texts)
        refused = sorted({"pattern", "format", "not", "allOf"} & set(schema))
        if refused:
            raise InputError(
                f"The schema keyword {refused[0]!r} of a text argument of {self.tool.name!r} cannot be obeyed: this "
                "model's chat template writes texts without quotes. Leave the keyword out, or use tool_choice='auto'."
            )
        if types == {"string"} and {"minLength", "maxLength"} & set(schema):
            count = f".{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
            return self.rules.until(name, call.close, count)
        return self.rules.until(name, call.close)


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object that has no members but the named ones, if it says nothing else."""
    made = {"type": "object", **schema}
    if "properties" in made and "patternProperties" not in made:
        made.setdefault("additionalProperties", False)
    return made


def _sorted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its properties in the order of their names: a grammar has a fixed order."""
    properties = schema.get("properties", {})
    return {**schema, "properties": {key: properties[key] for key in sorted(properties, key=str.lower)}}
