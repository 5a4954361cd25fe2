"""The files of a model: in its folder, or in its place on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ReadFile = Callable[[str], bytes | None]  # a file of one model by its name; None where there is none


def file_reader(name: str) -> ReadFile:
    """What reads the files of the model `name`: a folder, or a name on the hub."""

    def read(file: str) -> bytes | None:
        if Path(name).is_dir():
            return (Path(name) / file).read_bytes() if (Path(name) / file).is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        return Path(found).read_bytes() if found else None

    return read
