"""A conversation: a state and the token ids that it holds."""

from __future__ import annotations

from collections.abc import Sequence

from edgeformer.engines.base import State


class Session:
    """One conversation: a state and its token ids. The next prompt runs only the tokens that are new."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cuts the state to its common prefix with `prompt`; returns the length of that prefix.

        The last token of the prompt always runs: it gives the logits of the first new token.
        """
        # A run that was interrupted after the engine returned leaves the state one step ahead of this list.
        known = min(self.state.length, len(self.ids))
        common = 0
        limit = min(known, len(prompt) - 1)
        while common < limit and self.ids[common] == prompt[common]:
            common += 1
        if self.state.length > common:
            if common < self.state.shortest:
                common = 0  # a sliding window has dropped keys that the next token would see
            self.state.truncate(common)
        self.ids = self.ids[:common]
        return common

    def reset(self) -> None:
        """Empties the state."""
        self.state.truncate(0)
        self.ids = []
