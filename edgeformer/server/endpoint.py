"""A route and what its handler gets. A group of routes is a module with a list `ENDPOINTS`; app.py lists the modules.

A handler takes a `Call` and gives a Response: `reply(...)` for JSON, or an `EventStream`. It is cancelled when the
client goes away, so what it holds must be released in `finally`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edgeformer.server.metrics import Metrics
from edgeformer.server.options import ServeOptions
from edgeformer.server.registry import Registry
from edgeformer.server.tracing import RequestTrace, Tracing


@dataclass
class Server:
    """What all requests share."""

    options: ServeOptions
    registry: Registry
    metrics: Metrics
    tracing: Tracing | None = None
    is_stopping: bool = False  # no new work: it ends when the running answers have ended


@dataclass
class Call:
    """One request. `body` is an instance of the endpoint's `body` type, of JSON or of a form (None without one)."""

    server: Server
    request: Request
    body: Any
    id: str
    log: dict[str, Any]  # what the line of the log will say beside path, status and time
    trace: RequestTrace | None = None


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A route: what it takes and gives, for the router and for /openapi.json.

    body, result: msgspec structs. streams: with `stream` it answers by server-sent events of `chunk`. error: the JSON
    schema of its errors, if it is not OpenAI's. is_form: the body is multipart/form-data; `file` is its file.
    """

    method: str
    path: str
    handle: Handler
    body: type[msgspec.Struct] | None = None
    result: Any = None
    chunk: Any = None
    summary: str = ""
    error: Mapping[str, Any] | None = None
    is_form: bool = False


_encoder = msgspec.json.Encoder()


def reply(value: Any, status: int = 200) -> Response:
    """`value` as a JSON response."""
    return Response(_encoder.encode(value), status, media_type="application/json")
