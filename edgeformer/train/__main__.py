"""`python -m edgeformer.train`: the command line of the training loop."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeformer.cli.exit_codes import DONE, INTERRUPTED, REFUSED, USAGE, exit_code
from edgeformer.cli.options import with_options
from edgeformer.engines.options import option
from edgeformer.errors import EdgeformerError, TrainingError
from edgeformer.train.options import RunOptions
from edgeformer.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from edgeformer.train.loop import TrainingReport

EPILOG = """
Examples:

  python -m edgeformer.train demo-text                      # about a minute on two cores

  python -m edgeformer.train demo-text --data book.txt -o runs/book

  python -m edgeformer.train demo-forecast --data power.csv --column kw

  python -m edgeformer.train my.toml --set model.hidden_size=256 --steps 5000

  python -m edgeformer.train my.toml -o runs/my --resume

  torchrun --nproc-per-node 2 -m edgeformer.train my.toml
"""


@dataclass(frozen=True)
class RecipeFlags:
    """Keys of the recipe that have a flag."""

    data: list[str] | None = option(None, "Text files, pydoc, a CSV file, or seasonal.")  # noqa: RUF009 (a field)
    column: str | None = option(None, "Column of the CSV file.")
    steps: int | None = option(None, "Optimizer steps.")
    batch_size: int | None = option(None, "Sequences a step, over all processes.")
    learning_rate: float | None = option(None, "Highest learning rate.")
    seed: int | None = option(None, "Decides weights, order of data, dropout.")
    settings: list[str] | None = option(None, "Any key: SECTION.KEY=VALUE.", flags=("--set",))  # noqa: RUF009 (a field)

    def overrides(self) -> dict[str, Any]:
        """The given keys of the recipe, such as "train.steps". Those of --set win.

        Raises:
            TrainingError: a --set is not SECTION.KEY=VALUE.
        """
        flags = {"data.column": self.column}
        flags |= {f"train.{name}": getattr(self, name) for name in ("steps", "batch_size", "learning_rate", "seed")}
        given: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
        if self.data:
            given["data.source"] = self.data[0] if len(self.data) == 1 else self.data
        return given | dict(map(parse_setting, self.settings or []))


@with_options
def command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or a preset: demo-text, demo-forecast.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Checkpoint folder.  [default: runs/RECIPE]")] = None,
    *,
    changes: RecipeFlags,
    options: RunOptions,
) -> None:
    """Train a small Transformer: a language model on text, or a sequence encoder that forecasts a series.

    Ctrl-C finishes the step, writes a checkpoint and ends with code 130; --resume goes on from there, bit for bit.
    """
    try:
        loaded = load_recipe(recipe, changes.overrides())
    except TrainingError as error:  # a flag or the recipe is wrong; nothing was loaded yet
        raise _failed(error, USAGE) from None
    folder = out or Path("runs") / Path(recipe).stem
    try:
        code = run(loaded, folder, options)
    except EdgeformerError as error:
        raise _failed(error, exit_code(error)) from None
    except OSError as error:
        raise _failed(error, REFUSED) from None
    except KeyboardInterrupt:  # before the first step, or the second Ctrl-C
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(code)


def _failed(error: Exception, code: int) -> typer.Exit:
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(code)


def parse_setting(text: str) -> tuple[str, Any]:
    """("train.steps", 10) for "train.steps=10". A value that is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise TrainingError(f"--set {text}: expected SECTION.KEY=VALUE, such as train.steps=100")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def run(recipe: Recipe, folder: Path, options: RunOptions) -> int:
    """Train and print the result; returns the exit code: 0, or 130 after Ctrl-C."""
    # OpenMP threads that spin while they wait (the default) double a run's time on a busy machine. Read by torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported here: torch takes seconds to load, which --help and a wrong recipe need not wait for.
    from accelerate import PartialState

    from edgeformer.train.loop import train

    interrupts: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt  # the second Ctrl-C ends the run at once
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        report = train(recipe, folder, replace(options, progress_bar=True, should_stop=lambda: bool(interrupts)))
    finally:
        signal.signal(signal.SIGINT, before)
    if PartialState().is_main_process:
        print_report(report)
    return INTERRUPTED if interrupts else DONE


def print_report(report: TrainingReport) -> None:
    """Print the losses, the checkpoint's folder and the command to export it."""
    name, value = report.baseline
    if report.step < report.steps:
        typer.echo(f"stopped at step {report.step} of {report.steps}; --resume goes on from there")
    typer.echo(f"parameters       {report.parameters:,}")
    typer.echo(f"validation loss  {report.validation_loss:.3f}   ({name}: {value:.3f})")
    typer.echo(f"time             {report.seconds:.0f} s")
    for key, shown in report.shown.items():
        typer.echo(f"\n{shown}\n" if isinstance(shown, str) else f"{key}: {shown:.3f}")
    pictures = ", ".join(sorted(path.name for path in report.folder.glob("*.png")))
    typer.echo(f"checkpoint       {report.folder}   ({pictures})")
    typer.echo(f"next             python -m edgeformer.export {report.folder} -o {report.folder}-bundle")


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(epilog=EPILOG)(command)

if __name__ == "__main__":
    app(prog_name="python -m edgeformer.train")
