"""`edgeformer transcribe`: the text of recordings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from edgeformer.cli.console import load_model, stderr
from edgeformer.cli.exit_codes import DONE, exit_code
from edgeformer.cli.purpose import require
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import EdgeformerError


def print_transcripts(
    bundle: Path, engine: EngineOptions, files: Sequence[Path], options: Mapping[str, Any], *, as_json: bool
) -> int:
    """Print the text of each file on a line, or JSON lines that also have the language; returns the exit code.

    Several files run at once, with a progress bar if stderr is a terminal. One that fails does not stop the others:
    its error is printed, and the exit code is that of the first error.

    Raises:
        InputError: the bundle is no speech model.
    """
    model = load_model(require(bundle, "transcribe"), engine.arguments())
    code = DONE
    for file, found in zip(files, model.transcribe_each(files, show_progress=None, **options), strict=True):
        if isinstance(found, EdgeformerError):
            code = code or exit_code(found)
            where = "" if str(file) in str(found) else f"{file}: "
            line = None
            stderr.print(f"[bold red]error: [/bold red]{escape(where + str(found))}")
        elif as_json:
            entry = {"file": str(file), "text": found.text, "language": found.language, "ids": found.ids}
            line = json.dumps(entry, ensure_ascii=False)
        else:
            line = f"{file}: {found.text}" if len(files) > 1 else found.text
        if line is not None:
            print(line, flush=True)
    return code
