"""Silences warnings and progress bars of libraries."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings of all loggers and progress bars of transformers while the block runs."""
    from transformers.utils import logging as transformers_logging

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        logging.disable(level)
