"""`python -m edgeformer.train`: the command line of the training loop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeformer.cli.exit_codes import DONE, INTERRUPTED, REFUSED, USAGE, exit_code
from edgeformer.errors import EdgeformerError, TrainingError
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


def command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or a preset: demo-text, demo-forecast.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Checkpoint folder.  [default: runs/RECIPE]")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text files, pydoc, a CSV file, or seasonal.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the CSV file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides weights, order of data, dropout.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any key: SECTION.KEY=VALUE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder that holds a run.")] = False,
    stop_at: Annotated[int | None, typer.Option(help="Stop at this step, with a checkpoint to resume from.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave the GPU alone.")] = False,
) -> None:
    """Train a small Transformer: a language model on text, or a sequence encoder that forecasts a series.

    Ctrl-C finishes the step, writes a checkpoint and ends with code 130; --resume goes on from there, bit for bit.
    """
    flags = {
        "data.column": column,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
        "train.seed": seed,
    }
    overrides: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if data:
        overrides["data.source"] = data[0] if len(data) == 1 else data
    try:
        loaded = load_recipe(recipe, overrides | dict(map(parse_setting, settings or [])))
    except TrainingError as error:  # a flag or the recipe is wrong; nothing was loaded yet
        raise _failed(error, USAGE) from None
    folder = out or Path("runs") / Path(recipe).stem
    try:
        code = run(loaded, folder, resume=resume, overwrite=overwrite, stop_at=stop_at, cpu=cpu)
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


def run(recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool, stop_at: int | None, cpu: bool) -> int:
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
        report = train(
            recipe,
            folder,
            resume=resume,
            overwrite=overwrite,
            stop_at=stop_at,
            cpu=cpu,
            progress_bar=True,
            should_stop=lambda: bool(interrupts),
        )
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
