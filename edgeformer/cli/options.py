"""Frozen dataclasses of options, and the flags that typer makes of their fields.

A field has a flag if its metadata has `help`. It may also have `flags` (by default --field-name), `min`, `max`,
`metavar`, `panel` (the flag's heading in --help), and `default_text`: what --help says of a default
that the field's value does not show.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from edgeformer.engines.options import PANEL, option
from edgeformer.errors import InputError

SAMPLING, SHAPE, SPEED = "Sampling", "What the answer must be", "Speed"
F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class GenerationFlags:
    """Arguments of `Model.generate`. Those that are None are as the bundle's generation_config.json says."""

    max_new_tokens: int | None = option(
        None,
        "The longest answer, in tokens.",
        flags=("--max-new-tokens", "-n"),
        min=1,
        default_text="as the bundle says",
    )
    stop: list[str] | None = option(None, "End before this text; may be repeated.")  # noqa: RUF009 (a field)
    ignore_eos: bool = option(False, "Go on after the model's end token.")
    temperature: float | None = option(
        None, "0 takes the likeliest token.", min=0.0, default_text="as the bundle says, else 0", panel=SAMPLING
    )
    top_k: int | None = option(None, "0 is off.", min=0, panel=SAMPLING)
    top_p: float | None = option(None, "1 is off.", min=0.0, max=1.0, panel=SAMPLING)
    min_p: float | None = option(None, "0 is off.", min=0.0, max=1.0, panel=SAMPLING)
    repetition_penalty: float | None = option(None, "1 is off.", panel=SAMPLING)
    frequency_penalty: float | None = option(
        None, "For each time that a token was generated. 0 is off.", panel=SAMPLING
    )
    presence_penalty: float | None = option(None, "For tokens that were generated. 0 is off.", panel=SAMPLING)
    seed: int | None = option(None, "Same seed, same text.", min=0, panel=SAMPLING)
    num_beams: int | None = option(
        None,
        "Beam search.",
        flags=("--beams",),
        min=1,
        max=256,
        default_text="as the bundle says",
        panel=SAMPLING,
    )

    context_policy: str | None = option(None, "When the context is full: stop (default), error or slide.")
    json_schema: str | None = option(None, "A JSON Schema: a file, or JSON.", metavar="FILE|JSON", panel=SHAPE)
    regex: str | None = option(None, "A regular expression that the whole answer matches.", panel=SHAPE)
    grammar: str | None = option(None, "A grammar (Lark or GBNF): a file.", metavar="FILE", panel=SHAPE)
    choices: list[str] | None = option(None, "One of these; repeat it.", flags=("--choice",), panel=SHAPE)  # noqa: RUF009 (a field)

    def arguments(self) -> dict[str, Any]:
        """The options that are given, as keyword arguments of `Model.generate`.

        Raises:
            InputError: the file of a schema or grammar cannot be read.
        """
        given = {name: value for name, value in vars(self).items() if value is not None and value != []}
        if self.json_schema is not None and not self.json_schema.lstrip().startswith("{"):
            given["json_schema"] = _text_of("--json-schema", self.json_schema)
        if self.grammar is not None:
            given["grammar"] = _text_of("--grammar", self.grammar)
        return given


def _text_of(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} is {path!r}, which cannot be read as a file: {error}.") from error


@dataclass(frozen=True)
class SpeedFlags:
    """Speculation, and the prefix cache."""

    speculation: str = option("auto", "Guess next tokens: auto, off or lookup.", metavar="NAME", panel=SPEED)
    draft: Path | None = option(  # noqa: RUF009 (a field)
        None, "A smaller bundle of the same vocabulary that guesses.", metavar="BUNDLE", panel=SPEED
    )
    prefix_cache: str | None = option(
        None, "Keep beginnings of prompts in this folder, for the next run.", metavar="FOLDER", panel=SPEED
    )


@dataclass(frozen=True)
class BatchFlags:
    """Many prompts from a file."""

    prompts: Path | None = option(  # noqa: RUF009 (a field)
        None, "Many prompts: JSON Lines of texts, messages or objects with their own options.", metavar="FILE"
    )
    output: Path | None = option(  # noqa: RUF009 (a field)
        None, "Where their answers go (.jsonl); goes on there if interrupted.", flags=("--output", "-o")
    )
    max_sequences: int = option(
        16, "How many prompts of --prompts run together.", flags=("--parallel",), min=1, max=1024
    )


@dataclass(frozen=True)
class EmbedFlags:
    """Arguments of `Model.embed`. Those that are None are as the bundle says."""

    prompt_name: str | None = option(None, "Name of the bundle's prompt to put before each text.")
    prompt: str | None = option(None, "Text to put before each text; '' for none.")
    pooling: str | None = option(
        None, "mean, cls, max, last, mean_sqrt_len or weightedmean.", default_text="as the bundle says"
    )
    normalize: bool | None = option(
        None, "To length 1.", flags=("--normalize/--no-normalize",), default_text="as the bundle says"
    )
    dimensions: int | None = option(None, "Only the first of them, as Matryoshka models allow.", min=1)
    batch_size: int | None = option(None, "At most so many items run together. Default: as many as run well.", min=1)

    def arguments(self) -> dict[str, Any]:
        """The fields as keyword arguments of `Model.embed`, with a progress bar for many items on a terminal."""
        return vars(self) | {"show_progress": None}


@dataclass(frozen=True)
class PromptFlags:
    """How the prompt of `run` is given."""

    chat: bool = option(False, "Wrap the prompt in the model's chat format.")
    system: str | None = option(None, "A system message (with --chat).")
    ids: str | None = option(None, "Token ids instead of text: 1,2,3.")


@dataclass(frozen=True)
class ArrayFlags:
    """The files of `run` for a model without tokens."""

    inputs: Path | None = option(None, "Arrays for a model without tokens (.npz).")  # noqa: RUF009 (a field)
    outputs: Path | None = option(None, "Where the arrays go (.npz).")  # noqa: RUF009 (a field)


@dataclass(frozen=True)
class BenchFlags:
    """What `bench` measures: lists of numbers with commas."""

    prompts: str = option("512", "Prompt lengths, with commas; 0 for none.", flags=("-p", "--prompt"))
    generated: str = option("128", "Tokens to generate; 0 for none.", flags=("-n", "--generate"))
    depths: str = option("0", "Tokens in the cache before.", flags=("-d", "--depth"))
    repetitions: int = option(5, "Measured runs of each.", flags=("-r", "--repetitions"), min=1)
    threads: str | None = option(None, "Threads, with commas.", flags=("-t", "--threads"), panel=PANEL)
    energy: bool = option(False, "Also joules a token, from RAPL (Linux, root) or a Jetson's power monitor.")


class Only:
    """`Annotated[Options, Only("a", b=1)]`: a command has the flags `a` and `b`, the latter with the default 1."""

    def __init__(self, *names: str, **defaults: Any) -> None:
        self.names = {*names, *defaults}
        self.defaults = defaults


class Given:
    """`Annotated[dict[str, Any], Given(Options)]`: a command has the flags of Options, and gets those that were given.

    For options that another place, such as a recipe, sets too. A field without a default is not required here.
    """

    def __init__(self, options: type) -> None:
        self.options = options


def with_options(command: F) -> F:
    """A command in which the flags of its fields replace each parameter that is an options dataclass, or `Given`."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[str]]] = {}  # parameter -> its dataclass and the fields that have flags
    only_given: set[str] = set()  # the parameters that take the given flags alone
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        annotation = hints[name]
        kind, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        if given := next((extra for extra in extras if isinstance(extra, Given)), None):
            kind = given.options
            only_given.add(name)
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=annotation))
            continue
        assert isinstance(kind, type)
        made = list(_flags(kind, next((extra for extra in extras if isinstance(extra, Only)), None)))
        groups[name] = kind, [flag.name for flag in made]
        parameters += made
    parameters.append(inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        context: typer.Context = values.pop(_CONTEXT)
        for name, (kind, names) in groups.items():
            chosen = {flag: values.pop(flag) for flag in names}
            values[name] = _on_command_line(context, chosen) if name in only_given else kind(**chosen)
        command(**values)

    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
    return call  # type: ignore[return-value]


_CONTEXT = "typer_context"


def _on_command_line(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` (field -> value) whose flags the user wrote."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: values[name] for name, source in sources.items() if source and source.name != "DEFAULT"}


def _flags(kind: type, only: Only | None) -> Iterator[inspect.Parameter]:
    """The parameters that typer makes flags of: one for each field with a help text, or for those in `only`."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        if "help" not in one.metadata or (only is not None and one.name not in only.names):
            continue
        metadata = dict(one.metadata)
        names = metadata.pop("flags", ("--" + one.name.replace("_", "-"),))
        declared = typer.Option(
            *names,
            help=escape(metadata.pop("help")),
            show_default=metadata.pop("default_text", True),
            rich_help_panel=metadata.pop("panel", None),
            **metadata,
        )
        default = one.default if only is None else only.defaults.get(one.name, one.default)
        annotation: Any = Annotated[_parsed(hints[one.name]), declared]
        if default in (MISSING, ()):
            default = None
        yield inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parsed(kind: Any) -> Any:
    """The type that typer parses a flag as, for the type of its field."""
    if kind == tuple[str, ...]:
        return list[str] | None
    first, *others = get_args(kind) or (kind,)
    return first | None if others else kind  # of a union, the first
