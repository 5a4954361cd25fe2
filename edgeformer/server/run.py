"""Runs the app on uvicorn, and ends it as a service should."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from edgeformer.server import logs
from edgeformer.server.app import create_app
from edgeformer.server.connection import TimedProtocol
from edgeformer.server.options import ServeOptions
from edgeformer.server.registry import Registry

log = logging.getLogger("edgeformer.server")


class SignalledServer(uvicorn.Server):
    """The first SIGTERM or SIGINT takes no more requests and lets answers end; the second ends the process at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens, once it does."""
        await super().startup(sockets)
        if self.started:
            options: ServeOptions = self.config.app.state.server.options  # type: ignore[union-attr]
            log.info("running on %s", address(options, self.servers[0].sockets[0].getsockname()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's name)
        """The handler of both signals."""
        if self.should_exit:
            os._exit(128 + sig)
        self.config.app.state.server.is_stopping = True  # type: ignore[union-attr]
        self.should_exit = True
        log.info("stopping", extra={"signal": signal.Signals(sig).name})


def uvicorn_config(app: Starlette, options: ServeOptions) -> uvicorn.Config:
    """How uvicorn runs the app.

    h11 parses: it is strict, written for the RFC, and fast enough here, where a step of the model takes milliseconds.
    """
    return uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        uds=None if options.uds is None else str(options.uds),
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        http=TimedProtocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(options.grace),
        timeout_keep_alive=75,
    )


def address(options: ServeOptions, bound: Any) -> str:
    """What a person types to reach it; `bound`: the socket's own name, which has the port that was free."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'https' if options.tls_cert else 'http'}://{host}:{bound[1]}"


def serve(bundles: Sequence[str], options: ServeOptions, where: Mapping[str, Any] | None = None) -> None:
    """Serves the bundles (`PATH` or `NAME=PATH`) until SIGTERM or SIGINT. `where` holds arguments of `load`.

    Raises:
        InputError: an option is wrong.
        BundleError: a bundle is damaged, or none.
    """
    registry = Registry(bundles, options, where)
    app = create_app(registry, options)
    logs.set_up()
    server = SignalledServer(uvicorn_config(app, options))
    log.info("starting", extra={"models": list(registry.entries), "pid": os.getpid()})
    server.run()
    if not server.started:
        sys.exit(1)  # uvicorn has said why
