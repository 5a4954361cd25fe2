"""The exit codes of all commands.

0 done; 1 a check failed (verify, doctor, parity of an export); 2 wrong arguments or input; 3 the bundle is missing or
damaged; 4 the engine cannot run here; 5 anything else that was refused (disk, export, training); 130 interrupted.
"""

from __future__ import annotations

from edgeformer.errors import BundleError, EdgeformerError, EngineUnavailable, InputError, ParityError, TemplateError

DONE, CHECK_FAILED, USAGE, BAD_BUNDLE, NO_ENGINE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_CODES: tuple[tuple[type[EdgeformerError], int], ...] = (
    (ParityError, CHECK_FAILED),
    (BundleError, BAD_BUNDLE),
    (EngineUnavailable, NO_ENGINE),
    (InputError, USAGE),
    (TemplateError, USAGE),
)


def exit_code(error: EdgeformerError) -> int:
    """The exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), REFUSED)
