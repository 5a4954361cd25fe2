"""`python -m edgeformer.export SOURCE -o BUNDLE`: one command from a PyTorch Transformer to a bundle."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from edgeformer.errors import EdgeformerError

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


class Drawn:
    """Stages as lines with their seconds, long ones with a bar."""

    def __init__(self) -> None:
        self._stage, self._start = "", time.monotonic()

    def stage(self, text: str) -> None:
        self.end()
        self._stage = text
        if console.is_terminal:
            console.print(f"[dim]·[/] {text} …", end="\r")

    def end(self) -> None:
        if self._stage:
            console.print(f"[green]✓[/] {self._stage} [dim]{time.monotonic() - self._start:.1f} s[/]   ")
        self._stage, self._start = "", time.monotonic()

    def track(self, items: Iterable[T], name: str) -> Iterable[T]:
        bar: Iterable[T] = tqdm(items, desc=f"  {name}", leave=False, file=sys.stderr)
        return bar


@app.command(epilog=EXAMPLES)
def main(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a Hugging Face folder or hub name, a checkpoint folder of edgeformer.train, "
            "module:factory or file.py:factory, or a recipe (.toml).",
            show_default=False,
        ),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The bundle's folder.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="q4a (4 bits, scale and minimum), q4, q8, keep (GGUF), none. [default: keep for GGUF, else q4a]"
        ),
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 16, 32, 64, 128. [default: 32]")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="The output layer: tied, q4a, q4, q8, none. [default: tied where the model ties it]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="What q4a and q4 weights of a language model are fitted to (GPTQ): samples (the model's own), a text "
            "file, or none (round to nearest). [default: samples]"
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="How many tokens of it. [default: by the model's width, 512 to 16384]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, or float16 for CUDA. [default: float32]")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="For a factory: its checkpoint: .safetensors, .pt, .ckpt, or a folder.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer's folder, to take instead; for a factory, a tokenizer.json too; or none."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Merge the PEFT adapter in this folder (LoRA, DoRA, IA3, ...) into the model.")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="For a factory: name=dtype\\[axis,...]; named axes are dynamic.")
    ] = None,
    output_names: Annotated[
        list[str] | None, typer.Option("--output-name", help="For a factory: names of its outputs.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="For a Hugging Face source: its class. [default: as config.json says]")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A word for what the model does, for the manifest.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Measure accuracy on this text. [default: Python's language reference]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens of it; 0 to skip. [default: 1024]")] = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-missing", help="Tensors that may be missing or unused, as a pattern: 'pooler.*'. May be repeated."
        ),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Refuse an export that needs more memory: 6G. [default: the machine's]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
) -> None:
    """Export SOURCE to a bundle: an ordinary ONNX folder, checked against PyTorch before it gets its name."""
    given = {
        "output": output, "quantize": quantize, "block": block, "head": head, "dtype": dtype, "weights": weights,
        "calibration": calibration, "calibration_tokens": calibration_tokens,
        "adapter": adapter, "tokenizer": tokenizer,
        "input": tuple(inputs or ()), "output_names": tuple(output_names or ()), "architecture": architecture,
        "task": task, "text": text,
        "tokens": tokens, "overwrite": overwrite or None,
        "allow_missing": tuple(allow_missing or ()), "memory_limit": memory_limit,
    }  # fmt: skip
    try:
        _run(source, {name: value for name, value in given.items() if value not in (None, ())})
    except EdgeformerError as error:
        console.print(f"[red]error:[/] {type(error).__name__}: ", end="")
        console.print(str(error), markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written.")
        raise typer.Exit(130) from None


def _run(source: str, given: dict[str, object]) -> None:
    # Threads that spin while they wait crawl on a busy machine; read once, when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from edgeformer.export.options import make_options, read_recipe  # torch is loaded after --help has had its say
    from edgeformer.export.pipeline import export

    if source.endswith(".toml"):
        options = read_recipe(Path(source), **given)
    elif "output" not in given:
        raise typer.BadParameter("say where the bundle goes: -o FOLDER")
    else:
        options = make_options(source=source, **given)
    drawn = Drawn()
    manifest = export(options, drawn)
    drawn.end()
    _summary(options.output, manifest)


def _summary(path: Path, manifest: dict[str, object]) -> None:
    from edgeformer.bundle.bundle import Bundle
    from edgeformer.cli.purpose import command_for

    parity, accuracy = manifest["parity"], manifest["accuracy"]
    quantization, files = manifest["quantization"], manifest["files"]
    assert isinstance(parity, dict) and isinstance(quantization, dict) and isinstance(files, dict)
    table = Table(show_header=False, box=None, pad_edge=False)
    size = sum(entry["size"] for entry in files.values())
    table.add_row("bundle", f"{path} ({size / 1e6:.1f} MB)")
    if adapter := manifest["provenance"].get("adapter"):  # type: ignore[attr-defined]
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
            table.add_row(
                f"parity, {name}", f"{found['worst']:.1e} of the outputs' range (allowed {found['tolerance']:.0e})"
            )
    for name, found in parity["engines"].items():
        if found["passed"]:
            told = f"{found['worst']:.1e} of the outputs' range (allowed {found['tolerance']:.0e})"
            table.add_row(f"engine {name}", told)
    if isinstance(accuracy, dict):
        table.add_row(
            "accuracy",
            f"perplexity {accuracy['perplexity_float']:.3f} -> {accuracy['perplexity']:.3f}, "
            f"KL {accuracy['mean_kl']:.4f}, "
            f"same next token {accuracy['top1_agreement']:.1%} ({accuracy['tokens']} tokens of {accuracy['text']})",
        )
    console.print(table)
    for name, found in parity["engines"].items():
        if found["passed"] is False:
            told = f"the engine {name} will not be used for this bundle: {found['problem']}"
            console.print("[bold red]failed:[/] ", end="")
            console.print(told, markup=False, highlight=False)
    for note in manifest.get("notes", ()):  # type: ignore[attr-defined]
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    run = command_for(Bundle.open(path), str(path)).replace("[", "\\[")
    console.print(f"Next: [bold]edgeformer inspect {path}[/]  or  [bold]edgeformer {run}[/]")


if __name__ == "__main__":
    app(prog_name="python -m edgeformer.export")
