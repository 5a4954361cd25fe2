"""Sizes of memory and files as text: 6G, 3.2 GiB."""

from __future__ import annotations

import re

from edgeformer.errors import ExportError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int | None) -> int | None:
    """Bytes of "6G", "500M", "2.5GiB" or a plain number.

    Raises:
        ExportError: it is none of these, or less than one byte.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(i?B)?", str(text).strip(), re.IGNORECASE)
    size = float(match["number"]) * UNITS[match["unit"].upper()] if match else 0.0
    if not 1 <= size < 2**63:
        raise ExportError(f"the memory_limit is {text!r:.200}; write 6G, 500M, or a number of bytes.")
    return int(size)


def shown(size: float) -> str:
    """Bytes as readable text: 3.2 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
