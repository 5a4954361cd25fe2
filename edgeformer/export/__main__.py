"""`python -m edgeformer.export SOURCE -o BUNDLE`: one command from a PyTorch Transformer to a bundle."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from edgeformer.cli import INTERRUPTED, REFUSED, USAGE, exit_code
from edgeformer.cli.options import Given, with_options
from edgeformer.errors import EdgeformerError, ExportError
from edgeformer.export.options import ExportOptions, make_options, read_recipe

T = TypeVar("T")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False, soft_wrap=True)

SOURCE = (
    "A .gguf file, a Hugging Face folder or hub name, a checkpoint folder of edgeformer.train, module:factory or "
    "file.py:factory, or a recipe (.toml)."
)
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


@app.command(epilog=EXAMPLES)
@with_options
def main(
    source: Annotated[str, typer.Argument(help=SOURCE, show_default=False)],
    *,
    given: Annotated[dict[str, Any], Given(ExportOptions)],
) -> None:
    """Export SOURCE to a bundle: an ordinary ONNX folder, written only if its numbers are those of PyTorch."""
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
    from edgeformer.bundle.cache_cost import CacheCost
    from edgeformer.cli.inspect import difference
    from edgeformer.cli.purpose import command_for
    from edgeformer.export.cache_choice import warning

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
            table.add_row(f"parity, {name}", difference(found))
    for name, found in parity["engines"].items():
        if found["passed"]:
            table.add_row(f"engine {name}", difference(found))
    if accuracy:
        table.add_row(
            "accuracy",
            f"perplexity {accuracy['perplexity_float']:.3f} -> {accuracy['perplexity']:.3f}, "
            f"KL {accuracy['mean_kl']:.4f}, "
            f"same next token {accuracy['top1_agreement']:.1%} ({accuracy['tokens']} tokens of {accuracy['text']})",
        )
    cost = CacheCost.of(manifest)
    if "kv_cache" in manifest:
        table.add_row("int8 KV cache", cost.described("int8"))
    console.print(table)
    if told := warning(manifest):
        console.print("[bold yellow]warning:[/] ", end="")
        console.print(told, markup=False, highlight=False)
    for name, found in parity["engines"].items():
        if found["passed"] is False:
            console.print("[bold red]failed:[/] ", end="")
            problem = f"the engine {name} will not be used for this bundle: {found['problem']}"
            console.print(problem, markup=False, highlight=False)
    for note in manifest.get("notes", ()):
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    run = command_for(Bundle.open(path), str(path))
    console.print(f"Next: [bold]edgeformer inspect {path}[/]  or  [bold]edgeformer {escape(run)}[/]")


if __name__ == "__main__":
    app(prog_name="python -m edgeformer.export")
