"""Names of files that every system can have: a bundle is copied from one to another."""

from __future__ import annotations

import re

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def windows_name_problem(name: str) -> str | None:
    """Why Windows has no file of this name; None if it may have one. Microsoft: Naming Files, Paths, and Namespaces."""
    if _RESERVED.fullmatch(name):
        return "it is the name of a device on Windows"
    wrong = sorted({character for character in name if character in '<>:"/\\|?*' or ord(character) < 32})
    if wrong:
        return f"Windows allows no {' '.join(map(repr, wrong))} in a name"
    return "Windows drops a dot or a space at the end of a name" if name[-1:] in (".", " ") else None
