"""The chat page at `/`: static files, read once, and the routes that send them.

The files hold no secrets and no names of models, so they need no key: a browser cannot send one with an address that a
person types. The page asks for the key, and sends it with each call of the API, which is guarded as for all clients.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from starlette.responses import Response

from edgeformer.server.endpoint import Call, Endpoint

STATIC = Path(__file__).parent / "static"
INDEX = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What a browser lets the page do: load this server's own files, call this server, and nothing else. No inline script
# or style runs, no other page may frame it, and no string becomes HTML (Trusted Types), whatever an answer says.
# https://www.w3.org/TR/CSP3/, https://www.w3.org/TR/trusted-types/
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered by 304: no old page after an update
}


def endpoints() -> list[Endpoint]:
    """The routes of the page: `/` and `/page/NAME` for each file. Only these names exist; no path is looked up."""
    files = sorted(path for path in STATIC.iterdir() if path.suffix in KINDS)
    return [_endpoint("/" if path.name == INDEX else f"/page/{path.name}", path) for path in files]


def _endpoint(route: str, path: Path) -> Endpoint:
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
    return Endpoint("GET", route, partial(_send, body, tag, KINDS[path.suffix]), summary="A file of the chat page.")


async def _send(body: bytes, tag: str, kind: str, call: Call) -> Response:
    headers = {**HEADERS, "ETag": tag}
    if call.request.headers.get("if-none-match") == tag:
        return Response(None, 304, headers)
    return Response(body, 200, {**headers, "Content-Type": kind})
