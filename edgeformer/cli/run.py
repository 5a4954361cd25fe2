"""`edgeformer run`: one prompt, or one set of arrays."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.cli.console import load_model, stderr
from edgeformer.cli.purpose import require
from edgeformer.errors import InputError
from edgeformer.model import Prompt


@dataclass(frozen=True)
class Asked:
    """The prompt as the command line gives it."""

    prompt: str | None
    ids: str | None
    chat: bool
    system: str | None

    def read(self) -> Prompt:
        """Text, token ids or messages; `-`, or nothing with a pipe, reads stdin."""
        if self.ids is not None:
            if self.prompt is not None or self.chat:
                raise InputError("--ids is a prompt of its own; leave out the text and --chat.")
            try:
                return [int(part) for part in self.ids.replace(",", " ").split()]
            except ValueError:
                raise InputError(f"--ids is {self.ids!r}, expected whole numbers with commas: 1,2,3.") from None
        if self.system is not None and not self.chat:
            raise InputError("--system needs --chat: only a chat has a system message.")
        text = self.prompt
        if text == "-" or (text is None and not sys.stdin.isatty()):
            text = sys.stdin.read()
        if text is None:
            raise InputError("There is no prompt; give it as an argument, or - to read it from stdin.")
        if not self.chat:
            return text
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]


def text(
    bundle: Path,
    where: Mapping[str, Any],
    asked: Asked,
    settings: Mapping[str, Any],
    beams: int | None,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Stream the answer to stdout (ids where the bundle has no tokenizer), then the timings to stderr.

    Of an encoder-decoder the prompt is the source. A beam search (`beams`, or as the generation_config says) has its
    text at the end alone.
    """
    prompt = asked.read()
    model = load_model(require(bundle, "run"), where)
    pieces = model.stream(prompt, num_beams=beams, **settings)
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
        stderr.print(
            f"[dim]{result.timings} ({model.engine.name}), ended by {result.finish_reason}[/dim]", soft_wrap=True
        )
        if not result.text and not asked.chat and model.tokenizer is not None and model.tokenizer.has_chat_template:
            stderr.print("The model had nothing to add to this text. It was made for conversations: try --chat.")


def arrays(bundle: Path, where: Mapping[str, Any], inputs: Path, outputs: Path | None, *, as_json: bool) -> None:
    """Run a model that takes arrays; save the outputs, or show them."""
    try:
        with np.load(inputs, allow_pickle=False) as file:
            given = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{inputs} cannot be read as an .npz file: {error}.") from error
    model = load_model(bundle, where)
    found = model(**given)
    if outputs is not None:
        if outputs.suffix != ".npz":
            raise InputError(f"--outputs is {outputs}, expected a name ending in .npz.")
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
