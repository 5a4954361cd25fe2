"""A folder that an export must refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeformer.errors import ExportError


def assert_refused(
    read: Callable[[Path], Any], folder: Path, edit: Callable[[Path], Any], message: str, place: Path
) -> None:
    """`read` of a copy of `folder` in `place`, which `edit` has changed, is an ExportError that says `message`."""
    copy = Path(shutil.copytree(folder, place / "folder"))
    edit(copy)
    with pytest.raises(ExportError, match=message):
        read(copy)
