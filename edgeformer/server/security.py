"""Who may ask, and how much: the API key, the names of this machine, and the size of a request.

A web page of another origin can make a browser send requests to a server on loopback. It can read no answer (no CORS
headers unless an origin is named), it can send no JSON (the content type must say JSON, which a browser asks for first)
and no form (its `Origin` is checked), and a name of its own that resolves to 127.0.0.1 is refused (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import AsyncGenerator, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeformer.errors import InputError
from edgeformer.server.errors import ApiError
from edgeformer.server.logs import refused
from edgeformer.server.options import ServeOptions

OPEN = ("/health",)  # routes that need no key, beside the page's files
BODY_SECONDS = 60.0  # in which a body must have come
_HOST = re.compile(r"^(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d+)?$")


def read_key(options: ServeOptions) -> str | None:
    """The API key: of the flag, the file or EDGEFORMER_API_KEY; None without one.

    Raises:
        InputError: the file is empty or cannot be read, or other machines can connect, and there is neither a key nor
            `insecure`.
    """
    key = _given_key(options)
    if key is None and not options.is_local and not options.insecure:
        raise InputError(
            f"--host {options.host} can be reached from other machines, so anyone there could use the models. Set "
            "--api-key-file (or EDGEFORMER_API_KEY), or say --insecure."
        )
    return key


def _given_key(options: ServeOptions) -> str | None:
    if options.api_key is not None:
        return options.api_key
    if options.api_key_file is not None:
        try:
            lines = options.api_key_file.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {options.api_key_file} cannot be read: {error}.") from error
        if not lines or not lines[0].strip():
            raise InputError(f"--api-key-file {options.api_key_file} has an empty first line.")
        return lines[0].strip()
    return os.environ.get("EDGEFORMER_API_KEY") or None


class Guard:
    """An ASGI middleware that refuses what is not allowed before anything else sees it.

    `files`: paths of the chat page's files, which may be read without the key (`edgeformer.server.page` says why).
    """

    def __init__(
        self, app: ASGIApp, options: ServeOptions, key: str | None, files: frozenset[str] = frozenset()
    ) -> None:
        self._app = app
        self._files = files
        self._key = None if key is None else _digest(key)
        # With a key, a page behind a foreign name cannot ask; a unix socket has no names.
        self._checks_host = key is None and options.is_local and options.uds is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it with an error."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope["path"], scope["method"])
            except ApiError as error:
                await refused(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str, method: str) -> None:
        if "transfer-encoding" in headers and "content-length" in headers:
            # RFC 9112, 6.1: it may be an attempt to smuggle a request past a proxy.
            raise ApiError(
                400,
                "The request has both Content-Length and Transfer-Encoding.",
                code="bad_framing",
                headers={"Connection": "close"},
            )
        if path in OPEN:
            return
        if self._checks_host and not _is_loopback(headers.get("host", "")):
            raise ApiError(
                403,
                f"The Host header is {headers.get('host', '')[:80]!r}, and this server answers to names of this "
                "machine alone; use localhost, or start it with an API key.",
                code="wrong_host",
            )
        if self._key is not None and not (path in self._files and method in ("GET", "HEAD")):
            given = headers.get("authorization", "")
            scheme, _, token = given.partition(" ")
            token = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(_digest(token), self._key):
                what = "Incorrect API key." if token else "An API key is required: Authorization: Bearer KEY."
                raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body of a request whose content type is JSON.

    Raises:
        ApiError: it is of another type or compressed (415), larger than `limit` bytes (413), comes too slowly (408), or
            the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"The content type is {kind or 'missing'}, expected application/json.", code="unsupported_media_type"
        )
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"The body is compressed ({coding[:20]}); send it as it is.", code="unsupported_media_type")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return b"".join([part async for part in body_chunks(request, limit)])
    except TimeoutError:
        raise too_slow() from None


async def body_chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes.

    Raises:
        ApiError: it is larger than `limit` bytes (413).
    """
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limit:  # the HTTP parser has checked that it is a number
        raise _too_large(limit)
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        yield part


def check_origin(headers: Headers, cors: Collection[str]) -> None:
    """For bodies that a web page may send to another origin without asking first: forms.

    Raises:
        ApiError: the request is of a page of another origin than this server's and those of `cors` (403).
    """
    origin = headers.get("origin")
    if origin is None or origin in cors or urlsplit(origin).netloc == headers.get("host", ""):
        return
    raise ApiError(
        403,
        f"Pages of {origin[:80]} may not send forms; start the server with --cors {origin[:80]}.",
        code="wrong_origin",
    )


def too_slow() -> ApiError:
    """The error for a body that does not come."""
    return ApiError(408, f"The body did not come within {BODY_SECONDS:g} s.", code="timeout")


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {limit:,} bytes; the server's --max-body (of recordings --max-audio) says so.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _digest(text: str) -> bytes:
    """So that comparing takes the same time for keys of all lengths."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _is_loopback(host: str) -> bool:
    found = _HOST.match(host.strip())
    if found is None:
        return False
    name = found[1].strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
