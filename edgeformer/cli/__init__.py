"""The command line: `edgeformer export | train | run | chat | embed | classify | transcribe | inspect | ...`."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from edgeformer.cli.exit_codes import (
    BAD_BUNDLE,
    CHECK_FAILED,
    DONE,
    INTERRUPTED,
    NO_ENGINE,
    REFUSED,
    USAGE,
    exit_code,
)
from edgeformer.errors import EdgeformerError

__all__ = [
    "BAD_BUNDLE",
    "CHECK_FAILED",
    "DONE",
    "INTERRUPTED",
    "NO_ENGINE",
    "REFUSED",
    "USAGE",
    "exit_code",
    "main",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A user's mistake gives one message; a defect gives a traceback."""
    _show_any_text()
    from edgeformer.cli.app import app

    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="edgeformer")
    except SystemExit as end:  # the parser ends so, also after its message about a wrong option (code 2)
        if isinstance(end.code, str):
            return _fail(end.code, USAGE)
        return end.code or DONE
    except EdgeformerError as error:
        return _fail(str(error), exit_code(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), REFUSED)
    return DONE


def _show_any_text() -> None:
    """Characters that stdout or stderr cannot encode become `?`: a console without UTF-8 must not end a command.

    Pipes on Windows have the code page of the system; PYTHONUTF8=1 makes them UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    return code
