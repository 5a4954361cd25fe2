"""GET /openapi.json: OpenAPI 3.1 of the routes, made from their msgspec types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

import edgeformer
from edgeformer.server.endpoint import Call, Endpoint, reply

_REF = "#/components/schemas/{name}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    types = [kind for one in endpoints for kind in (one.body, one.result, one.chunk) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    made = iter(schemas)
    paths: dict[str, Any] = {}
    for one in endpoints:
        body, result, chunk = (next(made) if kind is not None else None for kind in (one.body, one.result, one.chunk))
        content: dict[str, Any] = {"application/json": {"schema": result}} if result else {"text/plain": {}}
        if one.is_form:
            content["text/plain"] = {}
        if chunk:
            content["text/event-stream"] = {"itemSchema": chunk}
        operation: dict[str, Any] = {
            "operationId": one.handle.__name__,
            "summary": one.summary,
            "responses": {
                "200": {"description": "The answer.", "content": content},
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": one.error or {"$ref": _REF.format(name="Error")}}},
                },
            },
        }
        if body:
            kind = "multipart/form-data" if one.is_form else "application/json"
            operation["requestBody"] = {"required": True, "content": {kind: {"schema": body}}}
        path = re.sub(r"{(\w+):\w+}", r"{\1}", one.path)
        names = re.findall(r"{(\w+)}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        paths.setdefault(path, {})[one.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgeformer", "version": edgeformer.__version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def endpoint(endpoints: Sequence[Endpoint]) -> Endpoint:
    """The route that gives the document of `endpoints` and itself."""

    async def openapi(_: Call) -> Response:
        """The document."""
        return reply(made)

    own = Endpoint("GET", "/openapi.json", openapi, result=dict[str, Any], summary="This document.")
    made = document([*endpoints, own])
    return own
