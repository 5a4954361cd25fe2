"""The models of a server by name: loaded at first use, unloaded when idle or when another one needs the memory."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeformer.bundle.bundle import Bundle
from edgeformer.decoding.counters import Counters
from edgeformer.decoding.scheduler import TOKEN_BUDGET
from edgeformer.errors import EdgeformerWarning, InputError
from edgeformer.machine import available_memory
from edgeformer.model import Model, load
from edgeformer.server.errors import SERVER, ApiError
from edgeformer.server.options import ServeOptions
from edgeformer.tasks.scheduler import GenerationScheduler

log = logging.getLogger("edgeformer.server")
# Seconds; see `Loaded.interval`. A screen shows a picture every 16 ms: the shortest is half of that.
SHORTEST_INTERVAL, EACH_STREAM, LONGEST_INTERVAL = 0.008, 0.003, 0.03
STRETCH = 10.0  # of `Model.scheduler`, above its default: here tokens a second and the first token count more than gaps


@dataclass
class Loaded:
    """A model in memory. `scheduler`: of a language model. `cache_bytes`: that its KV caches may take."""

    model: Model
    scheduler: GenerationScheduler | None
    cache_bytes: int
    context: int | None
    queue: int  # requests that may wait
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of an encoder: one request runs at a time
    mean_seconds: float = 1.0  # of recent answers
    waiting: int = 0  # requests for an encoder that wait
    streams: int = 0  # answers that are streamed now

    def retry_after(self) -> int:
        """Seconds after which a place is likely to be free, 1 to 60."""
        waiting = (
            self.waiting if self.scheduler is None else self.scheduler.waiting / self.scheduler.options.max_sequences
        )
        return max(1, min(60, math.ceil(self.mean_seconds * waiting)))

    def interval(self) -> float:
        """Seconds between two events of a stream, at least.

        Each event costs system calls and a turn of the event loop here and in the client, about 0.3 ms in all, on a
        machine whose cores all compute. So each brings what came in the meantime; a token that comes later than this
        after the last event does not wait.
        """
        return min(LONGEST_INTERVAL, max(SHORTEST_INTERVAL, EACH_STREAM * (self.streams - 1)))

    def close(self) -> None:
        """Ends its answers."""
        if self.scheduler is not None:
            self.scheduler.close()


@dataclass
class Entry:
    """One model of the server, loaded or not."""

    name: str
    bundle: Bundle
    created: int  # seconds since 1970, of the bundle's manifest
    loaded: Loaded | None = None
    loading: asyncio.Task[Loaded] | None = None
    users: int = 0
    counters: Counters = field(default_factory=Counters)  # they outlive its schedulers
    last_used: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        """Bytes of its files, about what its weights take in memory."""
        return self.bundle.size

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any byte of the bundle."""
        return f"fp_{self.bundle.fingerprint[:12]}"


class Lease:
    """A loaded model that is not unloaded before `release`."""

    def __init__(self, entry: Entry, loaded: Loaded) -> None:
        self.entry, self.loaded = entry, loaded
        self._is_held = True
        entry.users += 1

    def release(self) -> None:
        """Gives it back; a second call does nothing."""
        if self._is_held:
            self._is_held = False
            self.entry.users -= 1
            self.entry.last_used = time.monotonic()


class Registry:
    """The models by name. All methods run in the event loop; loading itself runs in a thread.

    `where` holds the arguments of `load` that all models share.

    Raises:
        InputError: two bundles have one name.
        BundleError: a folder is no bundle.
    """

    def __init__(self, bundles: Sequence[str], options: ServeOptions, where: Mapping[str, Any] | None = None) -> None:
        self._options, self._where = options, dict(where or {})
        self.entries: dict[str, Entry] = {}
        for text in bundles:
            name, path = _named(text)
            if name in self.entries:
                raise InputError(f"Two bundles have the name {name!r}; give one another name: NAME=PATH.")
            bundle = Bundle.open(path)
            self.entries[name] = Entry(name, bundle, int((bundle.path / "edgeformer.json").stat().st_mtime))
        if not self.entries:
            raise InputError("There is no bundle to serve.")
        self._turn = asyncio.Lock()  # one model is loaded at a time, so that the free memory is known
        self._thread = ThreadPoolExecutor(1, "edgeformer-load")
        self._sweeper: asyncio.Task[None] | None = None

    def find(self, name: str | None) -> Entry:
        """The model of that name; without a name, the only one.

        Raises:
            ApiError: there is none (404), or the name is missing and there are several (400).
        """
        if name is None:
            if len(self.entries) == 1:
                return next(iter(self.entries.values()))
            raise ApiError(400, f"model is required: {', '.join(self.entries)}.", param="model")
        if name not in self.entries:
            known = ", ".join(self.entries)
            raise ApiError(
                404, f"There is no model {name!r} here; there is {known}.", code="model_not_found", param="model"
            )
        return self.entries[name]

    async def lease(self, name: str | None) -> Lease:
        """The model of that name, loaded.

        Raises:
            ApiError: there is none, or its weights do not fit beside the models in use.
            EdgeformerError: it cannot be loaded.
        """
        entry = self.find(name)
        while entry.loaded is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
            await asyncio.shield(entry.loading)
        return Lease(entry, entry.loaded)

    async def start(self) -> None:
        """Loads all models if asked to, and unloads idle ones from now on."""
        if self._options.preload:
            for name in self.entries:
                (await self.lease(name)).release()
        if self._options.idle_timeout:
            self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Unloads all models; answers that run are cancelled."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for entry in self.entries.values():
            if entry.loading is not None:
                await asyncio.wait([entry.loading])
            if entry.loaded is not None:
                await self._unload(entry, "the server ends")
        self._thread.shutdown()

    @property
    def used_bytes(self) -> int:
        """Bytes that the loaded models have reserved: weights and caches."""
        return sum(one.size + one.loaded.cache_bytes for one in self.entries.values() if one.loaded is not None)

    # --------------------------------------------------------------------------------------------------------- loading

    async def _load(self, entry: Entry) -> Loaded:
        try:
            async with self._turn:
                await self._make_room(entry)
                began = time.monotonic()
                loop = asyncio.get_running_loop()
                entry.loaded = await loop.run_in_executor(self._thread, self._open, entry)
                entry.last_used = time.monotonic()
                facts = {"model": entry.name, "bytes": entry.size, "cache_bytes": entry.loaded.cache_bytes}
                seconds = round(time.monotonic() - began, 3)
                log.info("model loaded", extra=facts | {"engine": entry.loaded.model.engine.name, "seconds": seconds})
                return entry.loaded
        finally:
            entry.loading = None

    def _open(self, entry: Entry) -> Loaded:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EdgeformerWarning)
            model = load(entry.bundle, **self._where)
        for warning in caught:
            log.warning(str(warning.message), extra={"model": entry.name})
        if not model.is_language_model:
            return Loaded(model, None, 0, None, self._options.queue)
        context: int | None = model.info["context"]
        options = self._options
        most = model.engine.kv_bytes(context or TOKEN_BUDGET) * options.max_sequences
        room = self._room()
        cache = most if room is None else max(model.engine.kv_bytes(1), min(most, max(0, room - entry.size) // 2))
        if context is not None and cache < model.engine.kv_bytes(context):
            log.warning(
                "memory for less than one answer that fills the context; requests need max_tokens",
                extra={"model": entry.name, "cache_bytes": cache, "context_bytes": model.engine.kv_bytes(context)},
            )
        budget = max(TOKEN_BUDGET, options.max_sequences)
        scheduler = model.scheduler(
            options.max_sequences, budget, cache or None, queue_limit=options.queue, stretch=STRETCH
        )
        scheduler.count_in(entry.counters)
        return Loaded(model, scheduler, cache, context, options.queue)

    def _room(self) -> int | None:
        """Bytes that are free for another model; None if that is unknown."""
        limit, free = self._options.memory_limit, available_memory()
        if limit is None:
            return free
        return limit - self.used_bytes

    async def _make_room(self, entry: Entry) -> None:
        """Unloads the models that were idle for longest, until `entry` fits.

        Raises:
            ApiError: it does not fit.
        """
        while (room := self._room()) is not None and room < entry.size:
            idle = [one for one in self.entries.values() if one.loaded is not None and not one.users]
            if not idle:
                raise ApiError(
                    503,
                    f"{entry.name} needs {entry.size:,} bytes and {max(0, room):,} are free; the other models are in "
                    "use. Try again later.",
                    kind=SERVER,
                    code="out_of_memory",
                    headers={"Retry-After": "10"},
                )
            await self._unload(min(idle, key=lambda one: one.last_used), "another model needs the memory")

    async def _unload(self, entry: Entry, why: str) -> None:
        loaded, entry.loaded = entry.loaded, None
        if loaded is not None:
            await asyncio.get_running_loop().run_in_executor(None, loaded.close)
            del loaded
            gc.collect()  # an engine and its states refer to each other
            log.info("model unloaded", extra={"model": entry.name, "reason": why})

    async def _sweep(self) -> None:
        limit = self._options.idle_timeout
        while True:
            await asyncio.sleep(min(limit, 5.0))
            async with self._turn:
                for entry in self.entries.values():
                    idle = time.monotonic() - entry.last_used
                    if entry.loaded is not None and not entry.users and idle > limit:
                        await self._unload(entry, "idle")


def _named(text: str) -> tuple[str, Path]:
    """(name, path) of `PATH` or `NAME=PATH`; a name of its own is the folder's."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return name, Path(path)
    found = Path(text).expanduser()
    return found.name or found.resolve().name, found
