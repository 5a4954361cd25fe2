"""Stop strings: text passes up to the first one, and what may become one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, holding back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._found = False

    def found(self) -> bool:
        """Whether a stop string appeared; from then on nothing comes through."""
        return self._found

    def push(self, text: str) -> str:
        if self.found():
            return ""
        self._held += text
        # The one that is complete first, so that the answer does not depend on where tokens end.
        places = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            _, place = min(places)
            self._found = True
            out, self._held = self._held[:place], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`, but is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
