"""Chat templates: jinja2's immutable sandbox, with limits on time and size.

A template comes with a bundle, so it is untrusted code. jinja2's sandbox blocks access to Python's internals; the
limits here bound time and memory. Helpers and whitespace rules are those of transformers
(`utils/chat_template_utils.py`), so that a template renders as it does there.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, TypeVar

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgeformer.errors import TemplateError

T = TypeVar("T")

SECONDS = 5.0  # a real template renders in about a millisecond
CHARACTERS = 4_000_000  # length of any text or list, bits of any number
TOTAL = 50 * CHARACTERS  # of all of them together: appending to a text in a loop makes many copies


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
            TemplateError: the template raises, reads an undefined name, or exceeds a limit of time or size.
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


@functools.lru_cache(16)
def literals(source: str) -> str:
    """The constant texts of a template: its text and the strings in its code, separated by NUL.

    Raises:
        TemplateError: the template's syntax is wrong.
    """
    try:
        tree = _with_deadline(lambda: _environment().parse(source))
    except (JinjaError, RecursionError) as error:
        raise TemplateError(f"The chat template is not valid: {error}.") from error
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


@functools.lru_cache(16)
def variables(source: str) -> frozenset[str]:
    """The names that a template takes from its caller.

    Raises:
        TemplateError: the template's syntax is wrong.
    """
    try:
        tree = _with_deadline(lambda: _environment().parse(source))
    except (JinjaError, RecursionError) as error:
        raise TemplateError(f"The chat template is not valid: {error}.") from error
    return frozenset(find_undeclared_variables(tree) - _environment().globals.keys())


def _with_deadline(work: Callable[[], T]) -> T:
    """The result of `work()`. A trace function stops it after SECONDS: this works in any thread."""
    end = time.monotonic() + SECONDS

    def watch(_frame: FrameType, _event: str, _argument: object) -> Any:
        if time.monotonic() > end:
            raise TemplateError(f"The chat template runs for more than {SECONDS:g} seconds; it was stopped.")
        return watch

    before = sys.gettrace()
    _spent.characters = 0
    sys.settrace(watch)
    try:
        return work()
    finally:
        sys.settrace(before)


class _Spent(threading.local):
    """Characters that the render of this thread has produced so far."""

    characters = 0


_spent = _Spent()


def bounded(value: Any) -> Any:
    """`value`, counted against the limits of this render.

    Raises:
        TemplateError: a limit is exceeded.
    """
    size = len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0
    if isinstance(value, int):
        size = value.bit_length()
    _spent.characters += size
    if size > CHARACTERS or _spent.characters > TOTAL:
        raise _too_large()
    return value


def _too_large() -> TemplateError:
    return TemplateError(f"The chat template makes a value of more than {CHARACTERS:,} characters; it was stopped.")


# Methods of str and filters of jinja2 whose result may be much longer than their arguments. The product of their
# numbers and the lengths of their texts is an upper bound of the result.
_GROWING = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "do_center", "do_indent", "do_wordwrap", "do_slice",
    "do_batch",
}  # fmt: skip


def _check_call(function: Any, arguments: Sequence[Any]) -> None:
    """Refuse a call whose result may be too large, before the call."""
    name = getattr(function, "__name__", "")
    if name not in _GROWING:
        return
    product = 1
    for value in (getattr(function, "__self__", None), *arguments):
        if isinstance(value, int):
            product *= max(1, abs(value)) if name != "to_bytes" or value in arguments else 1
        elif isinstance(value, str):
            product *= 1 if name in ("center", "ljust", "rjust", "zfill", "do_center") else max(1, len(value))
    if product > 10 * CHARACTERS:
        raise _too_large()


def _check_format(text: str, arguments: Iterable[Any]) -> None:
    """Refuse a field width that is large, or that an argument determines."""
    nested = re.search(r"%[^a-zA-Z%]*\*", text) or re.search(r"\{[^}]*\{", text)
    if re.search(r"\d{6}", text) or (nested and any(isinstance(a, int) and abs(a) > 10_000 for a in arguments)):
        raise _too_large()


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """str.replace, refused before the call if the result is too large."""
    text, old, new = str(text), str(old), str(new)
    places = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    if len(text) + places * (len(new) - len(old)) > CHARACTERS:
        raise _too_large()
    return str(text.replace(old, new, -1 if count is None else count))


def _join(parts: Iterable[Any], separator: Any = "") -> str:
    """str.join, stopped when the result becomes too large."""
    texts: list[str] = []
    length = 0
    for part in parts:
        if texts and separator:
            texts.append(str(separator))
        texts.append(str(part))
        length += len(texts[-1]) + (len(str(separator)) if len(texts) > 1 else 0)
        if length > CHARACTERS:
            raise _too_large()
    return str(bounded("".join(texts)))


class _BoundedCode(CodeGenerator):
    """Compiles `a ~ b` to a bounded join; jinja2's compiler has no hook for it."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (jinja2's name)
        self.write("environment.bounded_join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _BoundedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    concat = staticmethod(_join)
    bounded_join = staticmethod(_join)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, bytes, list, tuple))]
        if operator == "*" and sizes:
            times = next((side for side in (left, right) if isinstance(side, int)), 1)
            if sizes[0] * max(times, 0) > CHARACTERS:
                raise _too_large()
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and right * max(1, left.bit_length()) > 4096:
            raise _too_large()
        if operator == "+" and sum(sizes) > CHARACTERS:
            raise _too_large()
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and len(args) == 1:
                return _join(args[0], owner)
            if name == "replace" and len(args) in (2, 3):
                return bounded(_replace(owner, *args))
            if name == "translate":
                raise TemplateError("The chat template calls str.translate, which is not allowed here.")
        _check_call(function, (*args, *kwargs.values()))
        return bounded(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            return str(wrapped(*args, **kwargs))

        return run


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training. It renders its content, in a new scope as in
    transformers.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Names(Namespace):
    """jinja2's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's: `self` may be one of the names
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace may not hold the name {name!r}: it begins with an underscore")


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` only."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


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
        if indent is not None and not 0 <= indent <= 16:
            raise JinjaError(f"tojson(indent={indent}) is out of range, expected 0 to 16")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def join(value: Any, d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(environment, attribute), value)
        return _join(value, d)

    def format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
        _check_format(str(value), (*args, *kwargs.values()))
        return str(value) % (kwargs or args)

    environment.filters |= {"tojson": tojson, "join": join, "replace": _replace, "format": format_filter}
    environment.filters = {name: _bounded_filter(function) for name, function in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals |= {"dict": _Dict(), "namespace": _Names}
    environment.globals.pop("lipsum", None)  # generates text of any length
    return environment


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja2's marks (pass_context, ...) too
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_call(function, (*args, *kwargs.values()))
        return bounded(function(*args, **kwargs))

    return run
