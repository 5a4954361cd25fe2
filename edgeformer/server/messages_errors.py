"""Errors of the Messages API in its own shape: https://docs.anthropic.com/en/api/errors"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeformer.server.errors import ApiError

PREFIX = "/v1/messages"
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}

SCHEMA = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}


def messages_error(status: int, body: dict[str, Any], request_id: str | None) -> dict[str, Any]:
    """The error object for one of OpenAI's (`ApiError.body`). It has no `param`, so the message names the field."""
    error = body["error"]
    message, param = error["message"], error["param"]
    if param and param not in message:
        message = f"{param}: {message}"
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def error_event(error: ApiError, request_id: str) -> dict[str, Any]:
    """The data of the event `error`, with which a stream that failed ends."""
    return messages_error(error.status, error.body, request_id)


class MessagesErrors:
    """An ASGI middleware that rewrites the errors under /v1/messages, also those of the guard and of unknown paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == PREFIX or path.startswith(PREFIX + "/")):
            send = _Rewriting(send)
        await self._app(scope, receive, send)


class _Rewriting:
    """Holds an error back until its body is whole; what is no error passes with the header `request-id`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None  # of an error
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            message = {**message, "headers": headers.raw}
            if (given := headers.get("x-request-id")) is not None:
                headers["request-id"] = given
            if message["status"] >= 400 and headers.get("content-type") == "application/json":
                self._start = message
                return
        if self._start is None:
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        headers = MutableHeaders(raw=self._start["headers"])
        made = messages_error(self._start["status"], msgspec.json.decode(self._body), headers.get("request-id"))
        body = msgspec.json.encode(made)
        headers["content-length"] = str(len(body))
        await self._send({**self._start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})
