"""`edgeformer run`: one prompt, or one set of arrays."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.cli.console import load_model, stderr
from edgeformer.cli.options import ArrayFlags, GenerationFlags, PromptFlags, SpeedFlags
from edgeformer.cli.purpose import require
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import InputError
from edgeformer.model import Model, Prompt


def read_prompt(text: str | None, flags: PromptFlags) -> Prompt:
    """The prompt: text, token ids or messages. `-`, or no text while stdin is a pipe, reads stdin.

    Raises:
        InputError: there is no prompt, or flags exclude each other.
    """
    if flags.ids is not None:
        if text is not None or flags.chat:
            raise InputError("--ids is a prompt of its own; leave out the text and --chat.")
        try:
            return [int(part) for part in flags.ids.replace(",", " ").split()]
        except ValueError:
            raise InputError(f"--ids is {flags.ids!r}, expected whole numbers with commas: 1,2,3.") from None
    if flags.system is not None and not flags.chat:
        raise InputError("--system needs --chat: only a chat has a system message.")
    if text == "-" or (text is None and not sys.stdin.isatty()):
        text = sys.stdin.read()
    if text is None:
        raise InputError("There is no prompt; give it as an argument, or - to read it from stdin.")
    if not flags.chat:
        return text
    system = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    return [*system, {"role": "user", "content": text}]


def refuse_beside_prompts(text: str | None, prompt: PromptFlags, arrays: ArrayFlags, *, as_json: bool) -> None:
    """
    Raises:
        InputError: a flag is given that --prompts does not obey.
    """
    beside = {
        "a text": text is not None,
        "--ids": prompt.ids is not None,
        "--system": prompt.system is not None,
        "--chat": prompt.chat,
        "--inputs": arrays.inputs is not None,
        "--outputs": arrays.outputs is not None,
        "--json": as_json,
    }
    for name, given in beside.items():
        if given:
            raise InputError(
                f"{name} has no meaning with --prompts, whose lines are the prompts and whose answers are JSON; leave "
                'it out. A line in the chat format is a list of messages: [{"role": "user", "content": "Hi"}].'
            )


@dataclass(frozen=True)
class Runner:
    """A bundle and how it is to run."""

    bundle: Path
    engine: EngineOptions
    speed: SpeedFlags

    @cached_property
    def opened(self) -> Bundle:
        """The bundle, of a task that generates."""
        return require(self.bundle, "run")

    def load(self) -> tuple[Model, dict[str, Any]]:
        """(the model, arguments of `generate` that make it faster).

        Raises:
            InputError: --draft and --speculation exclude each other.
        """
        speed = self.speed
        if speed.draft is not None and speed.speculation != "auto":
            raise InputError("--draft names who guesses, --speculation another way; leave out one of them.")
        more = {} if speed.prefix_cache is None else {"prefix_cache": speed.prefix_cache}
        model = load_model(self.opened, {**self.engine.arguments(), **more})
        how: Any = speed.speculation
        if speed.draft is not None:
            how = load_model(require(speed.draft, "run"), self.engine.arguments())
        return model, {} if how == "auto" else {"speculation": how}


def run_prompt(
    runner: Runner,
    prompt: Prompt,
    generation: GenerationFlags,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Stream the answer to stdout (ids where the bundle has no tokenizer), then print the timings to stderr.

    For an encoder-decoder the prompt is the source. A beam search gives its text at the end only.
    """
    arguments = generation.arguments()
    model, faster = runner.load()
    pieces = model.stream(prompt, **arguments, **faster)
    if as_json:
        for _ in pieces:
            pass
        result = pieces.result
        rates = {
            "prompt_tokens_per_second": result.timings.prompt_tokens_per_second,
            "decode_tokens_per_second": result.timings.decode_tokens_per_second,
        }
        facts = asdict(result) | {"engine": model.engine.name, "timings": asdict(result.timings) | rates}
        print(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    for piece in pieces:
        if model.tokenizer is None and piece.id is not None:
            print(piece.id, end=" ", flush=True)
        elif piece.text:
            print(piece.text, end="", flush=True)
    print(flush=True)
    if not quiet:
        result = pieces.result
        drafts = result.drafts
        guessed = f", {drafts.accepted} of {drafts.proposed} guessed tokens right" if drafts.proposed else ""
        stderr.print(
            f"[dim]{result.timings}{guessed} ({model.engine.name}), ended by {result.finish_reason}[/dim]",
            soft_wrap=True,
        )
        chat_model = model.tokenizer is not None and model.tokenizer.has_chat_template
        if not result.text and chat_model and not _is_chat(prompt):
            stderr.print("The answer is empty. This model was trained on conversations: try --chat.")


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and any(isinstance(part, dict) for part in prompt)


def run_arrays(bundle: Path, engine: EngineOptions, inputs: Path, outputs: Path | None, *, as_json: bool) -> None:
    """Run a model on the arrays in `inputs`; print the outputs, or write them to `outputs` (both .npz).

    Raises:
        InputError: `inputs` is not an .npz file, or `outputs` has another suffix.
    """
    try:
        with np.load(inputs, allow_pickle=False) as file:
            given = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{inputs} cannot be read as an .npz file: {error}.") from error
    if outputs is not None and outputs.suffix != ".npz":
        raise InputError(f"--outputs is {outputs}, expected a name ending in .npz.")
    model = load_model(bundle, engine.arguments())
    found = model(**given)
    if outputs is not None:
        np.savez(outputs, **found)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({name: array.tolist() for name, array in found.items()}))
        return
    for name, array in found.items():
        print(f"{name} {array.dtype}{list(array.shape)}")
        if outputs is None:
            print(np.array2string(array, precision=4, threshold=100))
    if outputs is not None:
        stderr.print(f"[dim]written to {outputs}[/dim]")
