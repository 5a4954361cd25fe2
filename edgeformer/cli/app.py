"""The commands and their options. Each command's work is in a module of its own, imported when it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from edgeformer.cli import INTERRUPTED, REFUSED


class _Commands(typer.core.TyperGroup):
    """Ends well where the user or the reader of the output ends it; the parser's own code for these is 1."""

    def invoke(self, context: Any) -> Any:
        try:
            result = super().invoke(context)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output has gone (`| head`); Python would complain again when it flushes at exit.
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

MODEL, MACHINE, SAMPLING = "Model", "Engine", "Sampling"

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder.", show_default=False)]
EngineOpt = Annotated[
    str, typer.Option("--engine", "-e", metavar="NAME", help="auto, cuda, native or cpu.", rich_help_panel=MACHINE)
]
ThreadsOpt = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, max=1024, help="Default: physical cores.", rich_help_panel=MACHINE),
]
IsaOpt = Annotated[str | None, typer.Option("--isa", help="Native kernels to use: avx2, ...", rich_help_panel=MACHINE)]
KvOpt = Annotated[
    str, typer.Option("--kv", help="Native cache: auto (as the weights), int8 or float32.", rich_help_panel=MACHINE)
]
ContextOpt = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Native: tokens that the cache may hold.", rich_help_panel=MACHINE),
]
# Each of these overrides the bundle's generation_config.json, which says what is left out.
CountOpt = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", min=1, help="The longest answer, in tokens. Default: as the bundle says."),
]
TemperatureOpt = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        help="0 takes the likeliest token. Default: as the bundle says, else 0.",
        rich_help_panel=SAMPLING,
    ),
]
TopKOpt = Annotated[int | None, typer.Option("--top-k", min=0, help="0 is off.", rich_help_panel=SAMPLING)]
TopPOpt = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="1 is off.", rich_help_panel=SAMPLING)]
MinPOpt = Annotated[float | None, typer.Option("--min-p", min=0.0, max=1.0, help="0 is off.", rich_help_panel=SAMPLING)]
PenaltyOpt = Annotated[float | None, typer.Option("--repetition-penalty", help="1 is off.", rich_help_panel=SAMPLING)]
BeamsOpt = Annotated[
    int | None,
    typer.Option("--beams", min=1, max=256, help="Beam search. Default: as the bundle says.", rich_help_panel=SAMPLING),
]
SeedOpt = Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same text.", rich_help_panel=SAMPLING)]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]

FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
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
    '  edgeformer run translator "Where is the station?" --beams 4\n\n'
    "  edgeformer run forecast --inputs week.npz --outputs next.npz",
)
def run(
    bundle: BundleArg,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text; - reads it from stdin.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat format.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message (with --chat).")] = None,
    ids: Annotated[str | None, typer.Option("--ids", help="Token ids instead of text: 1,2,3.")] = None,
    inputs: Annotated[Path | None, typer.Option("--inputs", help="Arrays for a model without tokens (.npz).")] = None,
    outputs: Annotated[Path | None, typer.Option("--outputs", help="Where the arrays go (.npz).")] = None,
    max_new_tokens: CountOpt = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No timings on stderr.")] = False,
    json: JsonOpt = False,
    temperature: TemperatureOpt = None,
    top_k: TopKOpt = None,
    top_p: TopPOpt = None,
    min_p: MinPOpt = None,
    repetition_penalty: PenaltyOpt = None,
    seed: SeedOpt = None,
    beams: BeamsOpt = None,
    engine: EngineOpt = "auto",
    threads: ThreadsOpt = None,
    isa: IsaOpt = None,
    kv: KvOpt = "auto",
    context: ContextOpt = None,
) -> None:
    """Run a bundle once: text streams to stdout, timings go to stderr."""
    from edgeformer.cli import run as work

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": stop or None,
        "ignore_eos": ignore_eos,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    where = {"engine": engine, "threads": threads, "isa": isa, "kv": kv, "context": context}
    if inputs is not None:
        work.arrays(bundle, where, inputs, outputs, as_json=json)
    else:
        asked = work.Asked(prompt, ids, chat, system)
        work.text(bundle, where, asked, settings, beams, quiet=quiet, as_json=json)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    "  edgeformer chat smollm2\n\n"
    '  edgeformer chat smollm2 --system "Answer in one sentence." --temperature 0.7 --top-p 0.9\n\n'
    "Type /reset to begin again, /exit or Ctrl-D to end; Ctrl-C stops an answer.",
)
def chat(
    bundle: BundleArg,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: CountOpt = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No timings on stderr.")] = False,
    temperature: TemperatureOpt = None,
    top_k: TopKOpt = None,
    top_p: TopPOpt = None,
    min_p: MinPOpt = None,
    repetition_penalty: PenaltyOpt = None,
    seed: SeedOpt = None,
    engine: EngineOpt = "auto",
    threads: ThreadsOpt = None,
    isa: IsaOpt = None,
    kv: KvOpt = "auto",
    context: ContextOpt = None,
) -> None:
    """Talk with a model; the conversation is kept, and only what is new of it is run."""
    from edgeformer.cli.chat import talk

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": stop or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    where = {"engine": engine, "threads": threads, "isa": isa, "kv": kv, "context": context}
    talk(bundle, where, system, settings, quiet=quiet)


ItemsArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ITEM]...", help="Texts or picture files; - reads one a line.", show_default=False),
]


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    '  edgeformer embed minilm "A man is eating." "Someone has a meal."\n\n'
    "  edgeformer embed minilm - -o vectors.npy < sentences.txt",
)
def embed(
    bundle: BundleArg,
    items: ItemsArg = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="An array instead of JSON lines (.npy).")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option("--prompt-name", help="The bundle's prompt that stands before each text.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What stands before each text; '' leaves the bundle's own out.")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="mean, cls, max, last, mean_sqrt_len or weightedmean. Default: as the bundle says."),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="To length 1. Default: as the bundle says.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", min=1, help="Only the first of them, as Matryoshka models allow.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Items that run together.")] = 32,
    engine: EngineOpt = "auto",
    threads: ThreadsOpt = None,
    isa: IsaOpt = None,
) -> None:
    """Turn texts or pictures into vectors: JSON lines on stdout, or one .npy file."""
    from edgeformer.cli import tasks

    settings = {"pooling": pooling, "normalize": normalize, "dimensions": dimensions, "batch_size": batch_size}
    settings |= {"prompt_name": prompt_name, "prompt": prompt}
    tasks.embed(bundle, {"engine": engine, "threads": threads, "isa": isa}, items or [], output, settings)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    '  edgeformer classify reviews "I would buy it again." --top 2\n\n'
    "  edgeformer classify flowers garden/*.jpg --json",
)
def classify(
    bundle: BundleArg,
    items: ItemsArg = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Labels to show for each item.")] = 5,
    json: JsonOpt = False,
    engine: EngineOpt = "auto",
    threads: ThreadsOpt = None,
    isa: IsaOpt = None,
) -> None:
    """Say which labels texts or pictures have, and how sure that is; of words, where the model labels words."""
    from edgeformer.cli import tasks

    tasks.classify(bundle, {"engine": engine, "threads": threads, "isa": isa}, items or [], top, as_json=json)


@app.command(
    rich_help_panel="Use a bundle",
    epilog="Examples:\n\n"
    "  edgeformer transcribe whisper talk.wav\n\n"
    "  edgeformer transcribe whisper talk.wav --language de --translate",
)
def transcribe(
    bundle: BundleArg,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Recordings: WAV, FLAC, MP3, OGG.", show_default=False)
    ],
    language: Annotated[
        str | None, typer.Option(help="A code such as de. Default: the bundle's, else the model listens.")
    ] = None,
    translate: Annotated[bool, typer.Option("--translate", help="Into English.")] = False,
    beams: BeamsOpt = None,
    json: JsonOpt = False,
    engine: EngineOpt = "auto",
    threads: ThreadsOpt = None,
    isa: IsaOpt = None,
    kv: KvOpt = "auto",
) -> None:
    """Write down what is said in recordings."""
    from edgeformer.cli import tasks

    settings = {"language": language, "task": "translate" if translate else None, "num_beams": beams}
    where = {"engine": engine, "threads": threads, "isa": isa, "kv": kv}
    tasks.transcribe(bundle, where, files, settings, as_json=json)


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
    from edgeformer.cli.inspect import show, show_program

    if program:
        show_program(bundle)
    else:
        show(bundle, hashes=hashes, as_json=json)


@app.command(
    rich_help_panel="Look at a bundle",
    epilog="Examples:\n\n"
    "  edgeformer verify smollm2\n\n"
    "  edgeformer verify smollm2 --engine cpu --engine native && ./deploy smollm2",
)
def verify(
    bundle: BundleArg,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", "-e", metavar="NAME", help="auto, cuda, native or cpu; may be repeated."),
    ] = None,
    threads: ThreadsOpt = None,
    isa: IsaOpt = None,
    kv: KvOpt = "float32",
    json: JsonOpt = False,
) -> None:
    """Repeat the export's parity check here, without PyTorch. Exit code 1 if the numbers are not the model's."""
    from edgeformer.cli.verify import check

    check(bundle, engine or ["auto"], {"threads": threads, "isa": isa, "kv": kv}, as_json=json)


@app.command(
    rich_help_panel="Look at this machine",
    epilog="Examples:\n\n"
    "  edgeformer bench smollm2\n\n"
    "  edgeformer bench smollm2 -p 128,512 -n 64 -d 0,1024 -t 1,2 -r 5 --json > result.json\n\n"
    "  edgeformer bench smollm2 --engine native --profile -p 512 -n 64 -t 1",
)
def bench(
    bundle: BundleArg,
    prompts: Annotated[str, typer.Option("-p", "--prompt", help="Prompt lengths, with commas; 0 for none.")] = "512",
    generated: Annotated[str, typer.Option("-n", "--generate", help="Tokens to generate; 0 for none.")] = "128",
    depths: Annotated[str, typer.Option("-d", "--depth", help="Tokens in the cache before.")] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Measured runs of each.")] = 5,
    threads: Annotated[
        str | None, typer.Option("-t", "--threads", help="Threads, with commas.", rich_help_panel=MACHINE)
    ] = None,
    engine: EngineOpt = "auto",
    isa: IsaOpt = None,
    kv: KvOpt = "auto",
    context: ContextOpt = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time by operation instead (native).")] = False,
    json: JsonOpt = False,
) -> None:
    """Measure tokens/s: pp512 is a prompt of 512 tokens, tg128 are 128 generated ones, @ d is the depth before."""
    from edgeformer.cli import bench as work

    where = {"engine": engine, "isa": isa, "kv": kv, "context": context}
    lists: dict[str, Any] = {
        "prompts": work.numbers(prompts, "-p"),
        "generated": work.numbers(generated, "-n"),
        "depths": work.numbers(depths, "-d", zero=True),
        "threads": work.numbers(threads, "-t") or [None],
    }
    if profile:
        work.profile(bundle, where, lists)
        return
    work.measure(bundle, where, lists, repetitions, as_json=json)


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
    """Say what this machine can run, and why not the rest. Exit code 1 if no engine can run."""
    from edgeformer.cli.doctor import report

    report(bundle, as_json=json)
