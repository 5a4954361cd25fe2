"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), as OpenAI's API streams them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeformer.server.errors import api_error

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment: keeps proxies and clients from closing a silent connection

log = logging.getLogger("edgeformer.server")
_encoder = msgspec.json.Encoder()


def encoded(value: Any) -> bytes:
    """`value` as JSON."""
    return _encoder.encode(value)


def event(value: Any, name: str | None = None) -> bytes:
    """One event with `value` as JSON; `name` is its type, which OpenAI's chat streams do not have."""
    data = b"data: " + _encoder.encode(value) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


class EventStream(Response):
    """Sends the events of a generator. When the client goes away the generator is closed at once.

    An error in the middle of the stream becomes an event with OpenAI's error object; the stream ends after it.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # it is chunked
        self._first, self._rest = first, rest

    @classmethod
    async def of(cls, events: AsyncGenerator[bytes, None]) -> EventStream:
        """The response, once its first event is there: an error before that has a status of its own."""
        try:
            return cls(await anext(events), events)
        except BaseException:
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's)
        """Sends it."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._rest.aclose()
        if (
            not sending.cancelled()
            and (failure := sending.exception()) is not None
            and not isinstance(failure, OSError)
        ):
            raise failure

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for chunk in self._rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if isinstance(error, OSError):
                raise
            await send({"type": "http.response.body", "body": event(api_error(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
