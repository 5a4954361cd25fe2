"""`edgeformer transcribe`: the text of recordings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeformer.cli.console import load_model
from edgeformer.cli.purpose import require
from edgeformer.engines.options import EngineOptions


def print_transcripts(
    bundle: Path, engine: EngineOptions, files: Sequence[Path], options: Mapping[str, Any], *, as_json: bool
) -> None:
    """Print the text of each file on a line, or JSON lines that also have the language.

    Raises:
        InputError: the bundle is no speech model, or a file cannot be read.
    """
    model = load_model(require(bundle, "transcribe"), engine.arguments())
    for file in files:
        found = model.transcribe(file, **options)
        if as_json:
            line = {"file": str(file), "text": found.text, "language": found.language, "ids": found.ids}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(f"{file}: {found.text}" if len(files) > 1 else found.text, flush=True)
