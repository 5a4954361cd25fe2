"""How many items an encoder runs at once, in which order, and who hears how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgeformer.errors import InputError

# Tokens of a batch with its padding. Measured on MiniLM, one thread, 512 texts of 2 to 222 tokens, CPU time against
# batches of 32 texts: 512 tokens 1.17 times as fast on the native engine (q8) and 1.31 times on ONNX Runtime (float),
# 1,024 tokens 1.14 and 1.21, 2,048 tokens 1.06 and 1.03. Larger activations leave the CPU's caches.
BATCH_TOKENS = 512
BATCH_ITEMS = 32  # pictures, whose rows are not counted; and texts on a GPU, which wants more work at once
MANY = 256  # items from which a progress bar is of use

Progress = Callable[[int, int], None]  # (items done, items in all)


@dataclass(frozen=True)
class Batching:
    """At most `size` items in a batch (None: as many as run well), and how progress is shown.

    `progress` is a function of (items done, items in all), True for a bar on stderr, or None for one if stderr is a
    terminal and there are many items.

    Raises:
        InputError: `size` is not a whole number of at least 1, or `progress` is something else.
    """

    size: int | None = None
    progress: bool | Progress | None = False

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise InputError(f"batch_size is {self.size!r}, expected a whole number of at least 1.")
        if not (self.progress is None or isinstance(self.progress, bool) or callable(self.progress)):
            raise InputError(
                f"show_progress is {self.progress!r}, expected True, False, None or a function of (done, total)."
            )

    def by_length(self, lengths: Sequence[int], tokens: int | None, *, may_pad: bool = True) -> Iterator[list[int]]:
        """The places of each batch, the longest items first, so that little of a batch is padding.

        A batch has at most `tokens` tokens with its padding (None: any number), but at least one item. Without
        `may_pad` its items have one length.
        """
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        while order:
            if tokens is None:
                count = self.size or BATCH_ITEMS
            else:
                fitting = max(1, tokens // max(1, lengths[order[0]]))
                count = min(fitting, self.size or fitting)
            if not may_pad:
                count = sum(lengths[place] == lengths[order[0]] for place in order[:count])
            yield order[:count]
            del order[:count]

    @contextmanager
    def reporting(self, total: int) -> Iterator[Callable[[int], None]]:
        """A function that takes the number of items that a batch had."""
        if callable(self.progress):
            hear, done = self.progress, 0

            def report(count: int) -> None:
                nonlocal done
                done += count
                hear(done, total)

            yield report
        elif self.progress or (self.progress is None and total >= MANY and sys.stderr.isatty()):
            from tqdm import tqdm

            with tqdm(total=total, unit=" items", file=sys.stderr) as bar:

                def advance(count: int) -> None:
                    bar.update(count)

                yield advance
        else:
            yield lambda _: None
