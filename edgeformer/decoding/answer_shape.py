"""What an answer must be, and how it is read: constraints, tools and reasoning of one call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeformer.decoding.constraints import ConstraintSpec, Grammar, compile_constraint
from edgeformer.decoding.tools.answer import AnswerParser, messages_for
from edgeformer.decoding.tools.definitions import ToolRequest
from edgeformer.decoding.tools.grammar import tool_grammar
from edgeformer.decoding.tools.rules import GrammarTokens
from edgeformer.errors import InputError
from edgeformer.processing.chat import REASONING
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.processing.tool_format import AnswerFormat
from edgeformer.processing.tool_learning import learn_answer_format

_formats: weakref.WeakKeyDictionary[Tokenizer, dict[frozenset[int], AnswerFormat]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class AnswerShape:
    """
    grammar: the tokens of the answer follow it.
    format: how the chat template writes calls and reasoning; None where the answer is text alone.
    tools: that the answer may call. in_reasoning: the prompt ends within reasoning.
    plain: a forced call is one JSON object, because the template shows no calls.
    seed: makes the ids of calls differ between the turns of a conversation.
    """

    grammar: Grammar | None = None
    format: AnswerFormat | None = None
    tools: ToolRequest = ToolRequest()  # noqa: RUF009  (frozen)
    in_reasoning: bool = False
    plain: bool = False
    seed: str = ""

    def parser(self) -> AnswerParser | None:
        """What divides the answer into content, reasoning and calls; None where it is text alone."""
        if self.format is None:
            return None
        return AnswerParser(self.format, self.tools.callable_tools, self.in_reasoning, self.seed, self.plain)


TEXT = AnswerShape()


@dataclass(frozen=True)
class ShapeOptions:
    """The arguments of a call that say what its answer must be; see `Model.generate`."""

    json_schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None
    response_format: Mapping[str, Any] | None = None
    tools: Sequence[Any] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Mapping[str, Any] | None = None

    def variables(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The variables for the chat template, checked.

        Raises:
            InputError: the template does not read one of them.
        """
        given = self.chat_template_kwargs or {}
        if not isinstance(given, Mapping):
            raise InputError(f"chat_template_kwargs is {type(given).__name__}, expected names with values.")
        if given and (unread := sorted(given.keys() - tokenizer.chat_variables)):
            known = ", ".join(sorted(tokenizer.chat_variables)) or "none"
            raise InputError(f"chat_template_kwargs: the chat template reads no {', '.join(unread)}; it reads {known}.")
        return dict(given)

    def spec(self) -> ConstraintSpec | None:
        """The constraint, checked.

        Raises:
            InputError: it is malformed, or there are several.
        """
        if all(one is None for one in (self.json_schema, self.regex, self.grammar, self.choices, self.response_format)):
            return None
        return ConstraintSpec.of(
            json_schema=self.json_schema,
            regex=self.regex,
            grammar=self.grammar,
            choices=self.choices,
            response_format=self.response_format,
        )

    def request(self) -> ToolRequest:
        """The tools, checked.

        Raises:
            InputError: a tool or the choice is malformed.
        """
        if self.tools is None and self.tool_choice is None:
            return ToolRequest()
        return ToolRequest.of(self.tools, self.tool_choice, self.parallel_tool_calls)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model: its tokenizer, the ids that end an answer, and the length of its logits."""

    tokenizer: Tokenizer | None
    eos: Collection[int]
    size: int | None

    def compile(self, spec: ConstraintSpec) -> Grammar:
        """The grammar of `spec` over these tokens.

        Raises:
            InputError: it is malformed, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("A constraint is on the text of an answer, and this bundle has no tokenizer.")
        return compile_constraint(self.tokenizer, self.eos, self.size or self.tokenizer.size, spec)


def answer_format(tokenizer: Tokenizer, eos: Collection[int]) -> AnswerFormat:
    """What the chat template shows of calls and reasoning; learned once for each tokenizer and set of end tokens."""
    key = frozenset(eos)
    with _lock:
        known = _formats.setdefault(tokenizer, {}).get(key)
    if known is None:
        known = learn_answer_format(tokenizer, [text for text in map(tokenizer.token, eos) if text is not None])
        with _lock:
            _formats[tokenizer][key] = known
    return known


def text_shape(options: ShapeOptions, vocabulary: Vocabulary) -> AnswerShape:
    """The shape of an answer to a text or to token ids.

    Raises:
        InputError: a constraint is wrong, or there are tools: they belong to a chat.
    """
    if options.tools is not None or options.tool_choice is not None:
        raise InputError("Tools are for a chat; give the prompt as a list of messages.")
    if options.chat_template_kwargs:
        raise InputError("chat_template_kwargs is for a chat; give the prompt as a list of messages.")
    spec = options.spec()
    return TEXT if spec is None else AnswerShape(vocabulary.compile(spec))


def chat_shape(
    messages: Sequence[Mapping[str, Any]], options: ShapeOptions, vocabulary: Vocabulary
) -> tuple[list[int], AnswerShape]:
    """(token ids of the messages in the model's chat format, the shape of its answer).

    Raises:
        InputError: a tool or a constraint is wrong, both must be obeyed at once, or the template shows no calls and
            the choice is "auto".
        TemplateError: the chat template refuses the messages.
    """
    tokenizer, request, spec = vocabulary.tokenizer, options.request(), options.spec()
    assert tokenizer is not None
    variables = options.variables(tokenizer)
    has_calls = any("tool_calls" in message for message in messages)
    if not request.tools and not has_calls and not _may_reason(tokenizer):
        return tokenizer.encode_chat(messages, **variables), AnswerShape(vocabulary.compile(spec)) if spec else TEXT
    form = answer_format(tokenizer, vocabulary.eos)
    messages = messages_for(messages, form)
    text = tokenizer.render_chat(messages, tools=request.definitions, **variables)
    ids = tokenizer.encode(text, add_special_tokens=False)  # as `encode_chat`, which would render again
    in_reasoning = form.reasoning is not None and form.reasoning.is_open(text)
    tokens = GrammarTokens(tokenizer.special_texts, frozenset(vocabulary.eos))
    lark = tool_grammar(form, request, tokens, in_reasoning) if request.tools else None
    if lark is not None and spec is not None:
        if request.forced:
            raise InputError(
                f"tool_choice={request.choice.name or request.choice.mode!r} asks for a call, and another constraint "
                "for a text; leave out one of them."
            )
        lark = None  # "auto": the answer follows the constraint, and so makes no call
    if lark is not None:
        spec = ConstraintSpec.of(grammar=lark)
    plain = request.forced and form.tools is None
    grammar = vocabulary.compile(spec) if spec is not None else None
    return ids, AnswerShape(grammar, form, request, in_reasoning, plain, str(len(ids)))


def _may_reason(tokenizer: Tokenizer) -> bool:
    """Whether the chat template may read or write reasoning: most do not, and need not be learned."""
    return any(word in text for text in tokenizer.chat.texts for word in (*REASONING, "think"))
