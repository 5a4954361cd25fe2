"""GET /health, /ready, /props, /slots and /metrics."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

import edgeformer
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import SERVER, ApiError
from edgeformer.server.metrics import CONTENT_TYPE


class Status(msgspec.Struct):
    """That it works."""

    status: str


class Slot(msgspec.Struct):
    """A place for an answer; `id` counts those of all loaded models."""

    id: int
    model: str
    n_ctx: int | None
    is_processing: bool


class Props(msgspec.Struct):
    """What the server is; llama-server's names."""

    build_info: str
    model_alias: str
    model_path: str
    chat_template: str
    total_slots: int
    default_generation_settings: dict[str, Any]
    models: list[str]


async def health(_: Call) -> Response:
    """Says that the process answers. It needs no key."""
    return reply(Status("ok"))


async def ready(call: Call) -> Response:
    """Says whether requests are taken: not while models are loaded at the start, nor after SIGTERM."""
    if call.server.is_stopping:
        raise ApiError(503, "The server is stopping.", kind=SERVER, code="server_stopping")
    return reply(Status("ready"))


async def slots(call: Call) -> Response:
    """Lists the places for answers of the loaded models."""
    found: list[Slot] = []
    for entry in call.server.registry.entries.values():
        loaded = entry.loaded
        if loaded is not None and loaded.scheduler is not None:
            running = loaded.scheduler.running
            found += [
                Slot(len(found) + number, entry.name, loaded.context, number < running)
                for number in range(loaded.scheduler.options.max_sequences)
            ]
    return reply(found)


async def props(call: Call) -> Response:
    """Describes the server and a model (`?model=`, by default the first)."""
    registry = call.server.registry
    entry = registry.find(call.request.query_params.get("model") or next(iter(registry.entries)))
    loaded = entry.loaded
    tokenizer = None if loaded is None else loaded.model.tokenizer
    return reply(
        Props(
            build_info=f"edgeformer {edgeformer.__version__}",
            model_alias=entry.name,
            model_path=entry.bundle.path.name,
            chat_template=next(iter(tokenizer.chat.texts), "") if tokenizer is not None else "",
            total_slots=call.server.options.max_sequences,
            default_generation_settings={
                "n_ctx": entry.bundle.context if loaded is None else loaded.context,
                "params": entry.bundle.generation_config,
            },
            models=list(registry.entries),
        )
    )


async def metrics(call: Call) -> Response:
    """Prometheus metrics."""
    return Response(call.server.metrics.text(), headers={"content-type": CONTENT_TYPE})


ENDPOINTS = [
    Endpoint("GET", "/health", health, result=Status, summary="Says that the process answers."),
    Endpoint("GET", "/ready", ready, result=Status, summary="Says whether requests are taken."),
    Endpoint("GET", "/props", props, result=Props, summary="Describes the server and a model."),
    Endpoint("GET", "/slots", slots, result=list[Slot], summary="Lists the places for answers."),
    Endpoint("GET", "/metrics", metrics, summary="Prometheus metrics."),
]
