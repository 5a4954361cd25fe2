"""An encoder on edgeformer. Options: engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from with_edgeformer import load_library, versions  # type: ignore[import-not-found]

__all__ = ["Loaded", "load_library", "versions"]


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        from edgeformer import load

        self._model = load(file, engine=options["engine"], threads=threads)
        self._names = self._model.info["inputs"]

    def encode(self, feeds: Mapping[str, Any]) -> Any:
        return self._model(**{name: feeds[name] for name in self._names})["last_hidden_state"]
