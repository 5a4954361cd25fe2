"""A connection with time limits: uvicorn's own waits for ever for a head, and for a client that does not read.

Without them a few hundred idle sockets take all file descriptors, before any key is asked for.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # in which the head of a request must have come: after the connection, and after its first byte
STALL_SECONDS = 60.0  # in which a client must have read something of an answer that waits for it


class TimedProtocol(H11Protocol):
    """Closes a connection on which no whole head comes, or whose client reads nothing.

    What is not read waits in a buffer of at most 64 KiB and in the answer's own tokens, so such a client holds little
    memory; the others' answers do not wait for it.
    """

    _head: asyncio.TimerHandle | None = None  # rings when a head should have come
    _stall: asyncio.TimerHandle | None = None  # rings when something should have been read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Waits for the rest of a head, if that is what has come."""
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the timers."""
        super().connection_lost(exc)
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        self._head = self._stall = None

    def _await_head(self) -> None:
        """The timer runs from the first moment without a request to its whole head: single bytes do not prolong it."""
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        elif not waits and self._head is not None:
            self._head.cancel()
            self._head = None

    # ------------------------------------------------------------------------------------------------ slow readers

    def pause_writing(self) -> None:
        """The client does not read as fast as the answer comes."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def timeout_keep_alive_handler(self) -> None:
        """Closes after what was sent has been read, if it is read."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self._watch()

    def _watch(self, unread: Any = None) -> None:
        left = self.transport.get_write_buffer_size()
        if left == unread:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(STALL_SECONDS, self._watch, left)
