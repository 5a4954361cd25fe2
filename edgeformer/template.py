"""Chat templates: jinja2's immutable sandbox, with bounds on time and size.

A template comes with a bundle, so it is foreign code. jinja2's sandbox keeps it from Python's internals; the bounds
here keep it from running or growing without end. Helpers and whitespace rules are those of transformers
(`utils/chat_template_utils.py`), so that a template renders as it does there.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, TypeVar

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeformer.errors import TemplateError

T = TypeVar("T")

SECONDS = 5.0  # a real template renders in about a millisecond
CHARACTERS = 4_000_000  # of any text, list or number of digits that a template makes
ROUNDS = 100_000  # the largest number that a template may hand to a function


class ChatTemplate:
    """A compiled template. `render` may be called from several threads.

    Raises:
        TemplateError: the template's syntax is wrong.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _with_deadline(lambda: _environment().from_string(source))
        except (JinjaError, RecursionError) as error:
            raise TemplateError(f"The chat template is not valid: {error}.") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises:
            TemplateError: the template raises, reads what is not there, or passes the bounds of time or size.
        """
        try:
            return _with_deadline(lambda: self._template.render(**variables))
        except TemplateError:
            raise
        except (JinjaError, RecursionError, MemoryError) as error:
            raise TemplateError(
                f"The chat template refuses these messages: {error or type(error).__name__}."
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise TemplateError(f"The chat template fails on these messages: {error}.") from error


def _with_deadline(work: Callable[[], T]) -> T:
    """`work()`, stopped by a trace function, the one way to interrupt a loop of Python code in any thread."""
    end = time.monotonic() + SECONDS

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise TemplateError(f"The chat template runs for more than {SECONDS:g} seconds; it was stopped.")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        return work()
    finally:
        sys.settrace(before)


def bounded(value: Any) -> Any:
    """`value`, if it is not too large.

    Raises:
        TemplateError: it is.
    """
    if isinstance(value, (str, bytes, list, tuple, dict)) and len(value) > CHARACTERS:
        raise _too_large()
    if isinstance(value, int) and value.bit_length() > 1024:
        raise _too_large()
    return value


def _too_large() -> TemplateError:
    return TemplateError(f"The chat template makes a value of more than {CHARACTERS:,} characters; it was stopped.")


def _check_call(function: Any, arguments: Sequence[Any]) -> None:
    """Refuse calls whose result may be far larger than what goes in, before they are made."""
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > ROUNDS:
            raise _too_large()
    owner = getattr(function, "__self__", None)
    texts = [value for value in (owner, *arguments) if isinstance(value, str)]
    name = getattr(function, "__name__", "")
    if name in ("format", "format_map", "do_format"):
        import re

        if any(re.search(r"\d{6}", text) for text in texts):  # "{:999999999}" or "%999999999d"
            raise _too_large()
    if name in ("replace", "do_replace", "join", "do_join", "sync_do_join", "translate", "wordwrap", "do_indent"):
        product = 1
        for value in (owner, *arguments):
            if isinstance(value, (str, list, tuple)):
                product *= len(value) + 1
        # The longest text times the number of places; real templates join and replace a few characters.
        if product > CHARACTERS * 100:
            raise _too_large()


class _BoundedCode(CodeGenerator):
    """Compiles `a ~ b` to a bounded join; jinja2's own has no hook."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.bounded_join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _BoundedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return _Sandbox.bounded_join(parts)

    @staticmethod
    def bounded_join(parts: Iterable[Any]) -> str:
        texts, length = [], 0
        for part in parts:
            text = str(part)
            length += len(text)
            if length > CHARACTERS:
                raise _too_large()
            texts.append(text)
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, bytes, list, tuple))]
        if operator == "*" and sizes:
            times = next((side for side in (left, right) if isinstance(side, int)), 1)
            if sizes[0] * max(times, 0) > CHARACTERS:
                raise _too_large()
        if operator == "**" and isinstance(right, int) and (abs(right) > 1024 or bounded(left) is None):
            raise _too_large()
        if operator == "+" and sum(sizes) > CHARACTERS:
            raise _too_large()
        if operator == "%" and isinstance(left, str):
            _check_call(str.format, (left,))
        return bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_call(function, (*args, *kwargs.values()))
        return bounded(super().call(context, function, *args, **kwargs))


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks words for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own way)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])

    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment.filters["tojson"] = tojson
    environment.filters = {name: _bounded_filter(function) for name, function in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    return environment


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja2's marks (pass_context, ...) too
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_call(function, (*args, *kwargs.values()))
        return bounded(function(*args, **kwargs))

    return run
