"""GET /v1/models and /v1/models/{model}: https://platform.openai.com/docs/api-reference/models"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.registry import Entry


class ModelInfo(msgspec.Struct, kw_only=True):
    """One model; `meta` has llama-server's names."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "edgeformer"
    task: str
    status: str  # loaded or unloaded
    meta: dict[str, Any]


class ModelList(msgspec.Struct, kw_only=True):
    """All models of the server."""

    object: str = "list"
    data: list[ModelInfo]


def _info(entry: Entry) -> ModelInfo:
    loaded = entry.loaded
    meta = {
        "n_vocab": entry.bundle.vocab_size,
        "n_ctx_train": entry.bundle.context,
        "n_ctx": loaded.context if loaded is not None else None,
        "size": entry.size,
        "quantization": entry.bundle.manifest["quantization"]["scheme"],
    }
    status = "unloaded" if loaded is None else "loaded"
    return ModelInfo(id=entry.name, created=entry.created, task=entry.bundle.task, status=status, meta=meta)


async def list_models(call: Call) -> Response:
    """Lists the models."""
    return reply(ModelList(data=[_info(entry) for entry in call.server.registry.entries.values()]))


async def one_model(call: Call) -> Response:
    """Shows one model."""
    return reply(_info(call.server.registry.find(call.request.path_params["model"])))


ENDPOINTS = [
    Endpoint("GET", "/v1/models", list_models, result=ModelList, summary="Lists the models."),
    Endpoint("GET", "/v1/models/{model:path}", one_model, result=ModelInfo, summary="Shows one model."),
]
