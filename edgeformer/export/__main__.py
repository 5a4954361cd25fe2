"""`python -m edgeformer.export SOURCE -o BUNDLE`: one command from a PyTorch Transformer to a bundle."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from edgeformer.cli import INTERRUPTED, REFUSED, USAGE, exit_code
from edgeformer.errors import EdgeformerError, ExportError
from edgeformer.export.options import ExportOptions, Flag, make_options, read_recipe

T = TypeVar("T")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False, soft_wrap=True)

EXAMPLES = """
Examples:

  python -m edgeformer.export SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2          (the file's own 4-bit weights, kept)

  python -m edgeformer.export ./my-hf-model -o my-model --quantize q8

  python -m edgeformer.export model.py:make_model -o forecaster --quantize none --input x=float32\\[batch,sequence,3]

  python -m edgeformer.export export/smollm2.toml                                   (a recipe: all options in one file)
"""


class ConsoleProgress:
    """A line for each stage with its seconds, and a bar for long ones."""

    def __init__(self) -> None:
        self._stage, self._start = "", time.monotonic()

    def stage(self, text: str) -> None:
        """Ends the stage before, and shows that this one runs."""
        self.end()
        self._stage = text
        if console.is_terminal:
            console.print(f"[dim]·[/] {text} …", end="\r")

    def end(self) -> None:
        """Shows the seconds of the last stage."""
        if self._stage:
            console.print(f"[green]✓[/] {self._stage} [dim]{time.monotonic() - self._start:.1f} s[/]   ")
        self._stage, self._start = "", time.monotonic()

    def track(self, items: Iterable[T], name: str) -> Iterable[T]:
        """Returns `items`, with a bar that shows how many of them have been consumed."""
        bar: Iterable[T] = tqdm(items, desc=f"  {name}", leave=False, file=sys.stderr)
        return bar


def main(source: str, **flags: Any) -> None:
    """Export SOURCE to a bundle: an ordinary ONNX folder, written only if its numbers are those of PyTorch."""
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != []}
    try:
        options = _options(source, given)
    except ExportError as error:  # a value or a recipe is wrong; nothing was loaded yet
        raise _failed(str(error), USAGE) from error
    try:
        _run(options)
    except EdgeformerError as error:
        raise _failed(f"{type(error).__name__}: {error}", exit_code(error)) from error
    except OSError as error:
        raise _failed(str(error), REFUSED) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written.")
        raise typer.Exit(INTERRUPTED) from None


def _parameters() -> Iterator[inspect.Parameter]:
    """The parameters of `main` for typer: one for each option of an export, None where it is not given."""
    hints = get_type_hints(ExportOptions, include_extras=True)
    for field in dataclasses.fields(ExportOptions):
        kind, flag = get_args(hints[field.name])
        assert isinstance(flag, Flag)
        default = flag.default or (field.default if type(field.default) in (int, str) else None)
        text = escape(flag.help + (f" [default: {default}]" if default else ""))
        if field.name == "source":
            annotation: Any = Annotated[str, typer.Argument(help=text, show_default=False)]
            yield inspect.Parameter(field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            continue
        names = flag.names or (f"--{field.name.replace('_', '-')}",)
        annotation = Annotated[_parsed(kind), typer.Option(*names, help=text)]
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parsed(kind: Any) -> Any:
    """The type that typer parses a flag as, for the type of its option."""
    if kind is bool:
        return bool
    if kind == tuple[str, ...]:
        return list[str] | None
    return (kind if isinstance(kind, type) else get_args(kind)[0]) | None


main.__signature__ = inspect.Signature(list(_parameters()))  # type: ignore[attr-defined]
main.__annotations__ = {}
app.command(epilog=EXAMPLES)(main)


def _failed(message: str, code: int) -> typer.Exit:
    console.print("[red]error:[/] ", end="")
    console.print(message, markup=False)
    return typer.Exit(code)


def _options(source: str, given: dict[str, Any]) -> ExportOptions:
    if source.endswith(".toml"):
        return read_recipe(Path(source), **given)
    if "output" not in given:
        raise typer.BadParameter("say where the bundle goes: -o FOLDER")
    return make_options(source=source, **given)


def _run(options: ExportOptions) -> None:
    # OpenMP threads that spin while they wait are slow on a busy machine. torch reads the variable when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from edgeformer.export.pipeline import export  # loads torch, which --help does without

    progress = ConsoleProgress()
    manifest = export(options, progress)
    progress.end()
    _summary(options.output, manifest)


def _summary(path: Path, manifest: dict[str, Any]) -> None:
    from edgeformer.bundle.bundle import Bundle
    from edgeformer.cli.purpose import command_for

    parity, accuracy = manifest["parity"], manifest["accuracy"]
    quantization, files = manifest["quantization"], manifest["files"]
    table = Table(show_header=False, box=None, pad_edge=False)
    size = sum(entry["size"] for entry in files.values())
    table.add_row("bundle", f"{path} ({size / 1e6:.1f} MB)")
    if adapter := manifest["provenance"].get("adapter"):
        table.add_row("adapter", f"{adapter['name']} ({adapter['method']}, {adapter['layers']} layers), merged")
    table.add_row(
        "weights", f"{quantization['scheme']}, {quantization['bits_per_weight']} bits each, head {quantization['head']}"
    )
    if fitted := quantization["calibration"]:
        table.add_row(
            "calibrated",
            f"{fitted['method']}, {fitted['tensors']} weights on {fitted['tokens']} tokens of {fitted['source']}",
        )
    for name, found in parity.items():
        if found and name != "engines":
            table.add_row(f"parity, {name}", _difference(found))
    for name, found in parity["engines"].items():
        if found["passed"]:
            table.add_row(f"engine {name}", _difference(found))
    if accuracy:
        table.add_row(
            "accuracy",
            f"perplexity {accuracy['perplexity_float']:.3f} -> {accuracy['perplexity']:.3f}, "
            f"KL {accuracy['mean_kl']:.4f}, "
            f"same next token {accuracy['top1_agreement']:.1%} ({accuracy['tokens']} tokens of {accuracy['text']})",
        )
    console.print(table)
    for name, found in parity["engines"].items():
        if found["passed"] is False:
            console.print("[bold red]failed:[/] ", end="")
            problem = f"the engine {name} will not be used for this bundle: {found['problem']}"
            console.print(problem, markup=False, highlight=False)
    for note in manifest.get("notes", ()):
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    run = command_for(Bundle.open(path), str(path)).replace("[", "\\[")
    console.print(f"Next: [bold]edgeformer inspect {path}[/]  or  [bold]edgeformer {run}[/]")


def _difference(found: dict[str, Any]) -> str:
    return f"{found['worst']:.1e} of the outputs' range (allowed {found['tolerance']:.0e})"


if __name__ == "__main__":
    app(prog_name="python -m edgeformer.export")
