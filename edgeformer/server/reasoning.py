"""How much a model reasons: variables of its chat template, where that reads any. There is no list of models."""

from __future__ import annotations

from typing import Any

from edgeformer.server.errors import unsupported
from edgeformer.server.registry import Loaded

EFFORT = "reasoning_effort"
SWITCHES = ("enable_thinking", "thinking")  # the names under which templates read whether to reason at all


def effort_variables(loaded: Loaded, effort: str | None, field: str) -> dict[str, Any]:
    """The variables for an effort; "none" is also what a switch says. Empty without one.

    Raises:
        ApiError: the chat template reads no effort; `field` is what the request calls it.
    """
    if effort is None:
        return {}
    if EFFORT in _read(loaded):
        return {EFFORT: effort}
    if effort == "none" and (switched := switch_variables(loaded, on=False)):
        return switched
    raise unsupported(field, f"the chat template of this model reads no {EFFORT}")


def switch_variables(loaded: Loaded, *, on: bool) -> dict[str, Any]:
    """The variables that switch reasoning on or off; empty where the template has no switch."""
    return {name: on for name in SWITCHES if name in _read(loaded)}


def _read(loaded: Loaded) -> frozenset[str]:
    tokenizer = loaded.model.tokenizer
    return frozenset() if tokenizer is None else tokenizer.chat_variables
