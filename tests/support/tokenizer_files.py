"""The files of a tokenizer, read from a folder and by the runtime."""

from __future__ import annotations

from pathlib import Path

from edgeformer.export.sources import tokenizer_export
from edgeformer.processing.tokenizer import Tokenizer


def folder_read(folder: Path):
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def runtime_of(files, folder: Path) -> Tokenizer:
    """The runtime's tokenizer of the files of a bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    paths = [folder / name if name in files else None for name in tokenizer_export.TOKENIZER_FILES]
    return Tokenizer.read(*paths)
