"""Stop strings: text passes up to the first one, and what may become one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on up to the first stop string; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._pending = ""
        self._found = False

    def found(self) -> bool:
        """Whether a stop string appeared; no text passes after it."""
        return self._found

    def push(self, text: str) -> str:
        """The text that can be shown after `text` was added."""
        if self.found():
            return ""
        self._pending += text
        # The stop string that ends first counts, so the answer does not depend on where tokens end.
        places = [(place + len(stop), place) for stop in self._stops if (place := self._pending.find(stop)) >= 0]
        if places:
            _, place = min(places)
            self._found = True
            out, self._pending = self._pending[:place], ""
            return out
        keep = max((overlap(self._pending, stop) for stop in self._stops), default=0)
        cut = len(self._pending) - keep
        out, self._pending = self._pending[:cut], self._pending[cut:]
        return out

    def flush(self) -> str:
        """The text that was held back, at the end of the answer."""
        out, self._pending = self._pending, ""
        return out


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`, but is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
