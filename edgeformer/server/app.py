"""The ASGI app: routes, errors, request ids, the log, and an end for requests whose client went away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edgeformer.server import (
    audio,
    chat,
    completions,
    embeddings,
    health,
    messages,
    models,
    openapi,
    page,
    rerank,
    responses,
    tokenize,
)
from edgeformer.server.audio_form import read_form
from edgeformer.server.endpoint import Call, Endpoint, Server
from edgeformer.server.errors import ApiError, api_error
from edgeformer.server.logs import REQUEST, refused, request_id
from edgeformer.server.messages_errors import MessagesErrors
from edgeformer.server.metrics import Metrics
from edgeformer.server.options import ServeOptions
from edgeformer.server.registry import Registry
from edgeformer.server.security import Guard, read_body, read_key
from edgeformer.server.tracing import RequestTrace, open_tracing

GROUPS = (
    chat,
    completions,
    messages,
    responses,
    embeddings,
    rerank,
    audio,
    models,
    tokenize,
    health,
)  # modules with ENDPOINTS
CLIENT_GONE = 499  # nginx's number, for the log
QUIET = ("/health", "/ready", "/metrics")  # asked for by machines, often: not logged while they work

log = logging.getLogger("edgeformer.server")


def create_app(registry: Registry, options: ServeOptions) -> Starlette:
    """The app; `app.state.server` is its Server.

    Raises:
        InputError: the options allow other machines in without a key, or OpenTelemetry is asked for and not installed.
    """
    server = Server(options, registry, Metrics(registry), open_tracing(options))
    endpoints = [endpoint for group in GROUPS for endpoint in group.ENDPOINTS]
    endpoints.append(openapi.endpoint(endpoints))
    pages = page.endpoints() if options.page else []  # files for people: not in the document of the API

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await registry.start()
        try:
            yield
        finally:
            await registry.close()
            if server.tracing is not None:
                await asyncio.to_thread(server.tracing.close)

    files = frozenset(one.path for one in pages)
    middleware = [Middleware(MessagesErrors), Middleware(Guard, options=options, key=read_key(options), files=files)]
    if options.cors:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=options.cors,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            ),
        )
    app = Starlette(
        routes=[Route(one.path, _served(server, one), methods=[one.method]) for one in (*endpoints, *pages)],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # its redirects lead to what the Host header says, without a line in the log
    app.state.server = server
    return app


def _served(server: Server, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The handler of a route with all that is the same for each."""
    decoder = None if endpoint.body is None or endpoint.is_form else msgspec.json.Decoder(endpoint.body)
    fields = frozenset() if endpoint.body is None else frozenset(endpoint.body.__struct_fields__)

    async def serve(request: Request) -> Response:
        call = Call(server, request, None, request_id(request.headers), {})
        REQUEST.set({"id": call.id})
        if server.tracing is not None and endpoint.path not in QUIET:
            call.trace = RequestTrace(server.tracing, request, endpoint.path, call.id)
            REQUEST.set({"id": call.id, "trace_id": call.trace.trace_id})
        began = time.perf_counter()
        try:
            if decoder is not None:
                call.body = decoder.decode(await read_body(request, server.options.max_body))
            elif endpoint.body is not None:
                call.body = await read_form(request, endpoint.body, server.options)
            response = await unless_gone(request, endpoint.handle(call))
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except Exception as error:
            found = api_error(error, fields)
            call.log["error"] = found.code or found.kind
            response = found.response()
        response.headers["X-Request-Id"] = call.id
        return _Logged(response, call, endpoint.path, began)

    return serve


class _Logged(Response):
    """Sends a response, then writes the line of the log: a stream has its numbers at its end."""

    def __init__(self, response: Response, call: Call, path: str, began: float) -> None:
        self._response, self._call, self._path, self._began = response, call, path, began
        self.status_code, self.background = response.status_code, None
        self.raw_headers = response.raw_headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it."""
        try:
            await self._response(scope, receive, send)
        finally:
            call, status = self._call, self.status_code
            call.server.metrics.request(self._path, status)
            if call.trace is not None:
                call.trace.end(status, call.body, call.log)
            if not (self._path in QUIET or self._path.startswith("/page/")) or status >= 400:
                milliseconds = round(1000 * (time.perf_counter() - self._began), 1)
                line = {"id": call.id, "method": scope["method"], "path": self._path, "status": status}
                log.info("request", extra=line | {"ms": milliseconds} | call.log)


async def unless_gone(request: Request, handling: Awaitable[Response]) -> Response:
    """What `handling` gives; it is cancelled when the client goes away.

    Raises:
        ClientDisconnect: the client went away.
    """
    work = asyncio.ensure_future(handling)
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        for task in (work, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, as the API's errors.

    A client's base URL often lacks the /v1, and some paths end with a slash: the message names the right one.
    """
    found, path = api_error(error), request.url.path
    if found.status == 404:
        known, own = {route.path for route in request.app.routes}, path.rstrip("/")
        meant = next((f"; there is {one}" for one in (own, f"/v1{own}") if own and one in known), "")
        found = ApiError(404, f"There is no {request.method} {path} here{meant}.", code="not_found")
    return refused(request.scope, found)
