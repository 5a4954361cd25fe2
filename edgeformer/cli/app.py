"""The commands and their flags. Each command's work is in a module of its own, imported when the command is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from edgeformer.cli.exit_codes import INTERRUPTED, REFUSED
from edgeformer.cli.options import (
    ArrayFlags,
    BatchFlags,
    BenchFlags,
    EmbedFlags,
    GenerationFlags,
    Only,
    PromptFlags,
    SpeedFlags,
    with_options,
)
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import InputError
from edgeformer.server.options import ServeOptions


class _Commands(typer.core.TyperGroup):
    """The commands, with exit codes for Ctrl-C and for a closed pipe; the parser's own code for both is 1."""

    def invoke(self, context: Any) -> Any:
        try:
            result = super().invoke(context)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # stdout's reader has closed the pipe (`| head`). Python would report it again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(REFUSED) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Turn a Transformer into a folder that any ONNX runtime can open, and run it here.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong arguments, 3 bad bundle, 4 engine cannot run, 5 refused.",
)

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder.", show_default=False)]
ItemsArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ITEM]...", help="Texts or picture files; - reads one per line from stdin.", show_default=False
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No timings on stderr.")]

# Engine flags of the commands for models without a KV cache.
CachelessEngine = Annotated[EngineOptions, Only("engine", "threads", "isa", "tensorrt")]

FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Without a command: the version, or the help."""
    if version:
        import edgeformer

        typer.echo(edgeformer.__version__)
        raise typer.Exit


@app.command(context_settings=FORWARD, rich_help_panel="Make a bundle", add_help_option=False)
def export(context: typer.Context) -> None:
    """Make a bundle from a PyTorch module, a Hugging Face model or a GGUF file.

    The same as `python -m edgeformer.export`.
    """
    from edgeformer.cli.forward import forward

    forward("export", context.args)


@app.command(context_settings=FORWARD, rich_help_panel="Make a bundle", add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a small Transformer. The same as `python -m edgeformer.train`."""
    from edgeformer.cli.forward import forward

    forward("train", context.args)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    '  edgeformer run smollm2 "The capital of France is" -n 32\n\n'
    '  edgeformer run smollm2 --chat "Explain tides." --temperature 0.7 --seed 1\n\n'
    "  cat letter.txt | edgeformer run smollm2 - --stop END\n\n"
    '  edgeformer run smollm2 --chat "A person, please." --json-schema person.schema.json\n\n'
    "  edgeformer run smollm2 --prompts questions.jsonl -o answers.jsonl\n\n"
    '  edgeformer run translator "Where is the station?" --beams 4\n\n'
    "  edgeformer run forecast --inputs week.npz --outputs next.npz",
)
@with_options
def run(
    bundle: BundleArg,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text; - reads it from stdin.", show_default=False)
    ] = None,
    *,
    prompt: PromptFlags,
    arrays: ArrayFlags,
    batch: BatchFlags,
    generation: GenerationFlags,
    speed: SpeedFlags,
    quiet: QuietOpt = False,
    json: JsonOpt = False,
    engine: EngineOptions,
) -> None:
    """Run a bundle: text streams to stdout, timings go to stderr. With --prompts: many prompts, into a file."""
    from edgeformer.cli import run as work

    if batch.prompts is not None:
        from edgeformer.cli.batch import run_prompts

        work.refuse_beside_prompts(text, prompt, arrays, as_json=json)
        raise typer.Exit(run_prompts(work.Runner(bundle, engine, speed), batch, generation))
    if batch.output is not None:
        raise InputError("--output is the file of --prompts; for one prompt, redirect stdout: > FILE.")
    if arrays.inputs is not None:
        work.run_arrays(bundle, engine, arrays.inputs, arrays.outputs, as_json=json)
    else:
        runner = work.Runner(bundle, engine, speed)
        work.run_prompt(runner, work.read_prompt(text, prompt), generation, quiet=quiet, as_json=json)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    "  edgeformer chat smollm2\n\n"
    '  edgeformer chat smollm2 --system "Answer in one sentence." --temperature 0.7 --top-p 0.9\n\n'
    "Type /reset to begin again, /exit or Ctrl-D to end; Ctrl-C stops an answer.",
)
@with_options
def chat(
    bundle: BundleArg,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    *,
    generation: Annotated[
        GenerationFlags,
        Only("max_new_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    ],
    quiet: QuietOpt = False,
    engine: EngineOptions,
) -> None:
    """Chat with a model. Its KV cache keeps the conversation, so that only new tokens run."""
    from edgeformer.cli.chat import talk

    talk(bundle, engine, system, generation, quiet=quiet)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    '  edgeformer embed minilm "A man is eating." "Someone has a meal."\n\n'
    "  edgeformer embed minilm - -o vectors.npy < sentences.txt",
)
@with_options
def embed(
    bundle: BundleArg,
    items: ItemsArg = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="An array instead of JSON lines (.npy).")
    ] = None,
    *,
    options: EmbedFlags,
    engine: CachelessEngine,
) -> None:
    """Turn texts or pictures into vectors: JSON lines on stdout, or one .npy file."""
    from edgeformer.cli.embed import print_vectors

    print_vectors(bundle, engine, items or [], output, options)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    '  edgeformer classify reviews "I would buy it again." --top 2\n\n'
    "  edgeformer classify flowers garden/*.jpg --json",
)
@with_options
def classify(
    bundle: BundleArg,
    items: ItemsArg = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Labels to show for each item.")] = 5,
    json: JsonOpt = False,
    *,
    engine: CachelessEngine,
) -> None:
    """Label texts or pictures, with probabilities; a token classifier labels the words of a text."""
    from edgeformer.cli.classify import print_labels

    print_labels(bundle, engine, items or [], top, as_json=json)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    "  edgeformer transcribe whisper talk.wav\n\n"
    "  edgeformer transcribe whisper talk.wav --language de --translate\n\n"
    "  edgeformer transcribe whisper *.wav --json > texts.jsonl",
)
@with_options
def transcribe(
    bundle: BundleArg,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Recordings: WAV, FLAC, MP3, OGG.", show_default=False)
    ],
    language: Annotated[
        str | None, typer.Option(help="A code such as de.", show_default="the bundle's, else detected")
    ] = None,
    translate: Annotated[bool, typer.Option("--translate", help="Into English.")] = False,
    *,
    generation: Annotated[GenerationFlags, Only("num_beams")],
    json: JsonOpt = False,
    engine: Annotated[EngineOptions, Only("engine", "threads", "isa", "kv")],
) -> None:
    """Transcribe recordings to text."""
    from edgeformer.cli.transcribe import print_transcripts

    task = "translate" if translate else None
    options = {"language": language, "task": task, "num_beams": generation.num_beams}
    raise typer.Exit(print_transcripts(bundle, engine, files, options, as_json=json))


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    "  edgeformer serve smollm2\n\n"
    "  edgeformer serve smollm2 embedder=minilm --preload --max-sequences 16\n\n"
    "  edgeformer serve smollm2 --host 0.0.0.0 --api-key-file key.txt --tls-cert cert.pem --tls-key key.pem",
)
@with_options
def serve(
    bundles: Annotated[
        list[str], typer.Argument(metavar="[NAME=]BUNDLE...", help="Bundle folders.", show_default=False)
    ],
    *,
    options: ServeOptions,
    engine: EngineOptions,
) -> None:
    """Serve bundles over HTTP, with OpenAI's API: http://127.0.0.1:8080/v1."""
    from edgeformer.cli import serve as work

    work.serve(bundles, options, engine)


@app.command(
    rich_help_panel="Look at a bundle",
    epilog="Examples:\n\n"
    "  edgeformer inspect smollm2\n\n"
    "  edgeformer inspect smollm2 --hashes\n\n"
    "  edgeformer inspect smollm2 --json | jq .accuracy\n\n"
    "  edgeformer inspect smollm2 --program",
)
def inspect(
    bundle: BundleArg,
    hashes: Annotated[bool, typer.Option("--hashes", help="Read and check every byte.")] = False,
    program: Annotated[bool, typer.Option("--program", help="Print the native engine's program.")] = False,
    json: JsonOpt = False,
) -> None:
    """Show what a bundle holds: inputs, quantization, sizes, parity and accuracy reports."""
    from edgeformer.cli.inspect import print_bundle, print_program

    if program:
        print_program(bundle)
    else:
        print_bundle(bundle, hashes=hashes, as_json=json)


@app.command(
    rich_help_panel="Look at a bundle",
    epilog="Examples:\n\n"
    "  edgeformer verify smollm2\n\n"
    "  edgeformer verify smollm2 --engine cpu --engine native && ./deploy smollm2",
)
@with_options
def verify(
    bundle: BundleArg,
    engines: Annotated[
        list[str] | None,
        typer.Option("--engine", "-e", metavar="NAME", help="auto, cuda, native or cpu; may be repeated."),
    ] = None,
    *,
    options: Annotated[EngineOptions, Only("threads", "isa", kv="float32")],
    json: JsonOpt = False,
) -> None:
    """Repeat the export's parity check here, without PyTorch. Exit code 1 if the numbers are not the model's."""
    from edgeformer.cli.verify import check

    check(bundle, engines or ["auto"], options, as_json=json)


@app.command(
    rich_help_panel="Look at this machine",
    epilog="Examples:\n\n"
    "  edgeformer bench smollm2\n\n"
    "  edgeformer bench smollm2 -p 128,512 -n 64 -d 0,1024 -t 1,2 -r 5 --json > result.json\n\n"
    "  edgeformer bench smollm2 --engine native --profile -p 512 -n 64 -t 1",
)
@with_options
def bench(
    bundle: BundleArg,
    *,
    tests: BenchFlags,
    engine: Annotated[EngineOptions, Only("engine", "isa", "kv", "context")],
    profile: Annotated[bool, typer.Option("--profile", help="Time by operation instead (native).")] = False,
    json: JsonOpt = False,
) -> None:
    """Measure tokens/s: pp512 is a prompt of 512 tokens, tg128 are 128 generated ones, @ d is the depth before."""
    from edgeformer.cli import bench as work

    if profile:
        work.print_profile(bundle, engine, tests)
    else:
        work.print_rates(bundle, engine, tests, as_json=json)


@app.command(
    rich_help_panel="Look at this machine",
    epilog="Examples:\n\n  edgeformer doctor\n\n  edgeformer doctor smollm2",
)
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Also try this bundle.", show_default=False)
    ] = None,
    json: JsonOpt = False,
) -> None:
    """Show which engines run on this machine, and why the others do not. Exit code 1 if none runs."""
    from edgeformer.cli.doctor import report

    report(bundle, as_json=json)
