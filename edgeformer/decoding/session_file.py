"""A conversation in a file: the token ids of a session and its state. Layout:

MAGIC | SHA-256 of what follows (32 bytes) | number of ids (8 bytes, little-endian) | ids, int64 | the state
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeformer.errors import InputError, StateError
from edgeformer.files import replace_file

MAGIC = b"edgeformer-session 1\n"
_DIGEST = 32


def write_session(path: str | os.PathLike[str], ids: Sequence[int], state: bytes) -> None:
    """Write the file whole or not at all: also after a kill or a power failure an old file stays.

    Raises:
        InputError: `path` is no path.
        StateError: it cannot be written.
    """
    body = len(ids).to_bytes(8, "little") + np.asarray(ids, "<i8").tobytes() + state
    file = _path(path)
    try:
        replace_file(file, MAGIC + hashlib.sha256(body).digest() + body)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise StateError(f"{file} cannot be written: {_why(error)}; a file that was there is unchanged.") from error


def read_session(path: str | os.PathLike[str]) -> tuple[list[int], bytes]:
    """(ids, state) as given to `write_session`.

    Raises:
        InputError: `path` is no path.
        StateError: the file cannot be read, or is damaged.
    """
    file = _path(path)
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for its writer
            raise StateError(f"{file} is no file; give the path that was given to session.save().")
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise StateError(f"{file} cannot be read: {_why(error)}.") from error
    if not data.startswith(MAGIC):
        raise StateError(f"{path} is not a saved session of edgeformer, format 1.")
    body = memoryview(data)[len(MAGIC) + _DIGEST :]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : len(MAGIC) + _DIGEST]:
        raise StateError(f"{path} is damaged: its {len(body):,} bytes have another SHA-256; it may be cut short.")
    count = int.from_bytes(body[:8], "little")
    if count > (len(body) - 8) // 8:
        raise StateError(f"{path} is damaged: it says {count:,} token ids and has {len(body):,} bytes.")
    return np.frombuffer(body[8 : 8 + 8 * count], "<i8").tolist(), bytes(body[8 + 8 * count :])


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError as error:
        raise InputError(f"The path is {path!r:.200}, expected the path of a file.") from error


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
