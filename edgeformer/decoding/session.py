"""A conversation: a state and the token ids that it holds."""

from __future__ import annotations

from collections.abc import Sequence

from edgeformer.engines.base import State


class Session:
    """A state and the tokens it holds, so that the next prompt only runs what is new. For one conversation."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the state to what it has in common with `prompt`, and say how many tokens that is.

        The prompt's last token is never reused: running it gives the logits of the first new one.
        """
        # A run that was interrupted between the engine and this list leaves the state one step ahead.
        held = min(self.state.length, len(self.ids))
        common = 0
        limit = min(held, len(prompt) - 1)
        while common < limit and self.ids[common] == prompt[common]:
            common += 1
        if self.state.length > common:
            self.state.truncate(common)
        self.ids = self.ids[:common]
        return common

    def reset(self) -> None:
        """Forget everything."""
        self.state.truncate(0)
        self.ids = []
