"""The command line: `edgeformer export | train | run | chat | embed | classify | transcribe | inspect | ...`.

Exit codes: 0 done; 1 a check failed (verify, doctor); 2 wrong arguments or input; 3 the bundle is missing or damaged;
4 the engine cannot run here; 5 anything else that was refused (disk, export, training); 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edgeformer.errors import BundleError, EdgeformerError, EngineUnavailable, InputError, ParityError, TemplateError

CHECK_FAILED, USAGE, BAD_BUNDLE, NO_ENGINE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 5, 130

_CODES: tuple[tuple[type[EdgeformerError], int], ...] = (
    (ParityError, CHECK_FAILED),
    (BundleError, BAD_BUNDLE),
    (EngineUnavailable, NO_ENGINE),
    (InputError, USAGE),
    (TemplateError, USAGE),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A user's mistake gives one message; a defect gives a traceback."""
    from edgeformer.cli.app import app

    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="edgeformer")
    except SystemExit as end:  # how the parser ends, also after it explained a wrong option (code 2)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else _complain(end.code, USAGE)
    except EdgeformerError as error:
        return _complain(str(error), exit_code(error))
    except OSError as error:
        return _complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), REFUSED)
    return 0


def exit_code(error: EdgeformerError) -> int:
    """The exit code that stands for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), REFUSED)


def _complain(message: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    return code
