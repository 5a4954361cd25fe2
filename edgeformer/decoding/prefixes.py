"""The `prefix_cache` argument: whether, how much and where beginnings of prompts are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgeformer.decoding.limits import Limits
from edgeformer.decoding.prefix_cache import PrefixCache
from edgeformer.decoding.prefix_folder import PrefixFolder
from edgeformer.engines.base import Engine
from edgeformer.errors import InputError

if TYPE_CHECKING:
    from edgeformer.engines.native.engine import NativeEngine

DEFAULT_TOKENS = 4096  # of beginnings that are kept, if nothing else is asked for

# None: DEFAULT_TOKENS in memory where that changes no token; False: none; bytes of memory; "folder" or a path: on disk
PrefixCacheOption = bool | int | str | os.PathLike[str] | None


def make_prefix_cache(engine: Engine, limits: Limits, asked: PrefixCacheOption) -> PrefixCache | None:
    """The prefix cache of a model; None without one.

    Raises:
        InputError: `asked` is of another kind, the graph has no KV cache, or a folder is asked for and the engine is
            not native.
    """
    if asked is False or asked == 0 or (asked is None and not (limits.cached and engine.rows_are_exact)):
        return None
    if not limits.cached:
        raise InputError("prefix_cache needs a graph with a KV cache; this one has none. Leave it out.")
    usual = engine.kv_bytes(min(limits.context or DEFAULT_TOKENS, DEFAULT_TOKENS))
    if asked is None or asked is True:
        return PrefixCache(usual)
    if isinstance(asked, int):
        if asked < 0:
            raise InputError(f"prefix_cache is {asked}, expected a number of bytes.")
        return PrefixCache(asked)
    if not isinstance(asked, (str, os.PathLike)):
        raise InputError(
            f"prefix_cache is {asked!r}, expected True, False, a number of bytes, 'folder', or the path of a folder."
        )
    path = None if asked == "folder" else Path(asked)
    return PrefixCache(usual, PrefixFolder(cast("NativeEngine", engine), path))
