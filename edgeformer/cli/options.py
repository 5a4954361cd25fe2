"""Frozen dataclasses of options, and the flags that typer makes of their fields.

A field's metadata may have: `help`, `flags` (by default --field-name), `min`, `max`, `metavar`, and `panel` (the
heading in --help that the flag stands under).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from edgeformer.engines.options import PANEL
from edgeformer.engines.options import option as option  # also for edgeformer.train

SAMPLING = "Sampling"
F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class GenerationFlags:
    """Arguments of `Model.generate`. Those that are None are as the bundle's generation_config.json says."""

    max_new_tokens: int | None = option(
        None, "The longest answer, in tokens. Default: as the bundle says.", flags=("--max-new-tokens", "-n"), min=1
    )
    stop: list[str] | None = option(None, "End before this text; may be repeated.")  # noqa: RUF009 (a field)
    ignore_eos: bool = option(False, "Go on after the model's end token.", flags=("--ignore-eos",))
    temperature: float | None = option(
        None, "0 takes the likeliest token. Default: as the bundle says, else 0.", min=0.0, panel=SAMPLING
    )
    top_k: int | None = option(None, "0 is off.", min=0, panel=SAMPLING)
    top_p: float | None = option(None, "1 is off.", min=0.0, max=1.0, panel=SAMPLING)
    min_p: float | None = option(None, "0 is off.", min=0.0, max=1.0, panel=SAMPLING)
    repetition_penalty: float | None = option(None, "1 is off.", panel=SAMPLING)
    seed: int | None = option(None, "Same seed, same text.", min=0, panel=SAMPLING)
    num_beams: int | None = option(
        None, "Beam search. Default: as the bundle says.", flags=("--beams",), min=1, max=256, panel=SAMPLING
    )

    def arguments(self) -> dict[str, Any]:
        """The options that are given, as keyword arguments of `Model.generate`."""
        return {name: value for name, value in vars(self).items() if value is not None and value != []}


@dataclass(frozen=True)
class EmbedFlags:
    """Arguments of `Model.embed`. Those that are None are as the bundle says."""

    prompt_name: str | None = option(None, "The bundle's prompt that stands before each text.")
    prompt: str | None = option(None, "What stands before each text; '' leaves the bundle's own out.")
    pooling: str | None = option(
        None, "mean, cls, max, last, mean_sqrt_len or weightedmean. Default: as the bundle says."
    )
    normalize: bool | None = option(
        None, "To length 1. Default: as the bundle says.", flags=("--normalize/--no-normalize",)
    )
    dimensions: int | None = option(None, "Only the first of them, as Matryoshka models allow.", min=1)
    batch_size: int = option(32, "Items that run together.", min=1)

    def arguments(self) -> dict[str, Any]:
        """The fields as keyword arguments of `Model.embed`."""
        return dict(vars(self))


@dataclass(frozen=True)
class PromptFlags:
    """How the prompt of `run` is given."""

    chat: bool = option(False, "Wrap the prompt in the model's chat format.", flags=("--chat",))
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


class Only:
    """`Annotated[Options, Only("a", b=1)]`: a command has the flags `a` and `b`, the latter with the default 1."""

    def __init__(self, *names: str, **defaults: Any) -> None:
        self.names = {*names, *defaults}
        self.defaults = defaults


def with_options(command: F) -> F:
    """A command in which each parameter that is an options dataclass stands for the flags of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[str]]] = {}  # parameter -> its dataclass and the fields that have flags
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        annotation = hints[name]
        kind, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=annotation))
            continue
        assert isinstance(kind, type)
        made = list(_flags(kind, next((extra for extra in extras if isinstance(extra, Only)), None)))
        groups[name] = kind, [flag.name for flag in made]
        parameters += made

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, (kind, names) in groups.items():
            values[name] = kind(**{flag: values.pop(flag) for flag in names})
        command(**values)

    named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
    return call  # type: ignore[return-value]


def _flags(kind: type, only: Only | None) -> Iterator[inspect.Parameter]:
    """The parameters that typer makes flags of: one for each field, or for those in `only`."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        if only is not None and one.name not in only.names:
            continue
        metadata = dict(one.metadata)
        names = metadata.pop("flags", ("--" + one.name.replace("_", "-"),))
        declared = typer.Option(*names, rich_help_panel=metadata.pop("panel", None), **metadata)
        default = one.default if only is None else only.defaults.get(one.name, one.default)
        annotation: Any = Annotated[hints[one.name], declared]
        yield inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
