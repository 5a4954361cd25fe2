"""What `edgeformer serve` is told: one frozen dataclass, whose fields are its flags."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from edgeformer.engines.options import option
from edgeformer.errors import InputError

NETWORK, SAFETY, LOAD, WATCH = "Network", "Safety", "Load", "Observability"


@dataclass(frozen=True)
class ServeOptions:
    """How the server listens, what it allows, and what it may use.

    Raises:
        InputError: only one of the TLS files is given, the key is empty, or the OTLP endpoint is no HTTP address.
    """

    host: str = option("127.0.0.1", "The address to listen on.", panel=NETWORK)
    port: int = option(8080, "0 takes a free one.", min=0, max=65535, panel=NETWORK)
    uds: Path | None = option(None, "A unix socket instead of an address and a port.", panel=NETWORK)  # noqa: RUF009
    tls_cert: Path | None = option(None, "The certificate chain, as PEM: serves HTTPS.", panel=NETWORK)  # noqa: RUF009
    tls_key: Path | None = option(None, "The certificate's private key, as PEM.", panel=NETWORK)  # noqa: RUF009
    api_key: str | None = option(
        None,
        "Requests need `Authorization: Bearer KEY`. Better in a file or in EDGEFORMER_API_KEY: arguments are visible.",
        panel=SAFETY,
    )
    api_key_file: Path | None = option(None, "A file with the key in its first line.", panel=SAFETY)  # noqa: RUF009
    insecure: bool = option(False, "Listen beyond this machine without a key.", panel=SAFETY)
    cors: list[str] | None = option(  # noqa: RUF009
        None, "An origin whose web pages may call; may be repeated.", metavar="ORIGIN", panel=SAFETY
    )
    page: bool = option(True, "The chat page at /.", flags=("--page/--no-page",), panel=NETWORK)
    max_body: int = option(8 << 20, "The most bytes of a request.", min=1, panel=SAFETY)
    max_audio: int = option(25 << 20, "The most bytes of a request with a recording.", min=1, panel=SAFETY)
    max_audio_seconds: float = option(3600.0, "The most seconds of sound of a recording.", min=0.1, panel=SAFETY)
    max_messages: int = option(1024, "The most messages of a chat.", min=1, panel=SAFETY)
    max_sequences: int = option(8, "How many answers run at once.", min=1, panel=LOAD)
    queue: int = option(64, "How many requests may wait; others get 429.", min=0, panel=LOAD)
    queue_timeout: float = option(60.0, "Seconds that a request may wait.", min=0.0, panel=LOAD)
    memory_limit: int | None = option(
        None, "Bytes of weights and caches of all models.", min=1, default_text="what is free", panel=LOAD
    )
    idle_timeout: float = option(0.0, "Unload a model after so many idle seconds; 0 is never.", min=0.0, panel=LOAD)
    preload: bool = option(False, "Load all models before the first request.", panel=LOAD)
    grace: float = option(30.0, "Seconds that answers may take to end after SIGTERM.", min=0.0, panel=LOAD)
    ping: float = option(10.0, "Seconds of silence after which a stream gets a comment.", min=0.01, panel=LOAD)
    log_prompts: bool = option(False, "Write prompts and answers to the log.", panel=SAFETY)
    otlp_endpoint: str | None = option(
        None, "Send OpenTelemetry traces and metrics there: http://HOST:4318.", metavar="URL", panel=WATCH
    )

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("HTTPS needs both --tls-cert and --tls-key.")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise InputError("The API key is empty, or holds characters that are not ASCII.")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise InputError(f"--otlp-endpoint is {self.otlp_endpoint!r}, expected http://HOST:PORT or https://...")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
