"""Reads files of a model from its folder or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ReadFile = Callable[[str], bytes | None]  # file name -> content; None if the model has no such file


def file_reader(name: str) -> ReadFile:
    """A function that reads files of the model `name`, a folder or a hub name."""

    def read(file: str) -> bytes | None:
        if Path(name).is_dir():
            return (Path(name) / file).read_bytes() if (Path(name) / file).is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        return Path(found).read_bytes() if found else None

    return read
