"""`edgeformer chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeformer.cli.console import load_model, stderr
from edgeformer.cli.options import GenerationFlags
from edgeformer.cli.purpose import require
from edgeformer.decoding.session import Session
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import InputError, TemplateError
from edgeformer.model import Model

LONGEST = 512  # tokens of an answer, if neither a flag nor the bundle limits it
HELP = "/reset begins again, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def talk(bundle: Path, engine: EngineOptions, system: str | None, generation: GenerationFlags, *, quiet: bool) -> None:
    """Answer each line of stdin, until /exit or the end.

    Raises:
        TemplateError: the bundle has no chat template.
        InputError: it is no language model.
    """
    model = load_model(require(bundle, "run"), engine.arguments())
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise TemplateError(f"{bundle} has no chat template, so it is no chat model; use `edgeformer run` with text.")
    file, arguments = model.bundle.generation_config, generation.arguments()
    if all(limits.get(name) is None for limits in (arguments, file) for name in ("max_new_tokens", "max_length")):
        arguments["max_new_tokens"] = LONGEST
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    session = None if (file.get("num_beams") or 1) > 1 else model.session()  # beams keep none
    interactive = sys.stdin.isatty()
    if interactive:
        stderr.print(f"[bold]{model.bundle.path.name}[/bold] on {model.engine.name}. [dim]{HELP}[/dim]")
        _enable_line_editing()
    while (line := _ask(interactive)) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(opening)
            if session is not None:
                session.reset()
            stderr.print("[dim]a new conversation[/dim]")
        elif line.startswith("/"):
            stderr.print(f"[dim]{HELP}[/dim]" if line == "/help" else f"[dim]unknown command {line}; {HELP}[/dim]")
        elif line:
            messages = _answer(model, session, [*messages, {"role": "user", "content": line}], arguments, quiet)


def _answer(
    model: Model, session: Session | None, messages: list[dict[str, str]], arguments: Mapping[str, Any], quiet: bool
) -> list[dict[str, str]]:
    """Stream one answer and return the conversation with it; without the last message if that was refused."""
    parts: list[str] = []
    stream = None
    try:
        stream = model.stream(messages, session=session, **arguments)
        for piece in stream:
            parts.append(piece.text)
            print(piece.text, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        if stream is not None:
            stream.close()
        print(flush=True)
        stderr.print("[dim]stopped[/dim]")
    except InputError as error:
        stderr.print(f"[red]{error}[/red]\n[dim]Your last message was not taken. {HELP}.[/dim]", soft_wrap=True)
        return messages[:-1]
    else:
        result = stream.result
        if result.finish_reason == "context":
            stderr.print("[yellow]The model's context is full; /reset begins again.[/yellow]")
        if not quiet:
            stderr.print(f"[dim]{result.timings}[/dim]", soft_wrap=True)
    return [*messages, {"role": "assistant", "content": "".join(parts)}]


def _ask(interactive: bool) -> str | None:
    """The next line; None at the end."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _enable_line_editing() -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() history and editing)
