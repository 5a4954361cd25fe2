"""What happens when the context is full: the answer ends, the call fails, or the context slides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edgeformer.errors import InputError

ContextPolicy = Literal["stop", "error", "slide"]
POLICIES: tuple[ContextPolicy, ...] = ("stop", "error", "slide")
CHUNK = 128  # tokens: a context loses whole chunks of this size


def checked_policy(policy: str | None, protect: int | None, context: int | None) -> tuple[ContextPolicy, int]:
    """The policy, and how many tokens at the beginning a sliding context keeps (default: a quarter, at most CHUNK).

    Raises:
        InputError: the policy is unknown, or `protect` leaves no room.
    """
    if policy is not None and policy not in POLICIES:
        raise InputError(f"context_policy is {policy!r}, expected {', '.join(map(repr, POLICIES))}.")
    most = 0 if context is None else context // 2
    if protect is None:
        return policy or "stop", min(CHUNK, most // 2)
    if isinstance(protect, bool) or not isinstance(protect, int) or not 0 <= protect <= most:
        raise InputError(
            f"context_protect is {protect!r}, expected 0 to {most} tokens, half of the context; the rest must slide."
        )
    return policy or "stop", protect


def shortened(ids: Sequence[int], context: int, protect: int) -> list[int]:
    """`ids` without the oldest tokens behind the first `protect`, at most three quarters of `context` long.

    Whole chunks are dropped, so that a slide is rare: it costs a prefill of what is left, because positions (and with
    them keys) change. The state keeps the protected beginning.
    """
    chunk = min(CHUNK, max(1, context // 8))
    excess = len(ids) - (context - context // 4)
    drop = -(-excess // chunk) * chunk
    start = min(len(ids) - 1, protect + drop)
    return [*ids[:protect], *ids[start:]]
