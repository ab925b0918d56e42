"""Connections: their number, their time limits, and how they are closed."""

from __future__ import annotations

import asyncio
from collections import Counter
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512  # at once
HEADERS = 10.0  # seconds for the headers of a request to arrive
STALLED = 30.0  # seconds in which a client reads nothing of an answer
LINGER = 5.0  # seconds for which bytes after an answer are discarded
DISCARDED = 1 << 29  # of them, at most


class Lingering:
    """A transport that lets the client read everything before it closes.

    Closing a connection while bytes arrive resets it, and the answer is lost.
    """

    def __init__(self, transport: Any) -> None:
        self._transport, self._closing = transport, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is read or written."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Stop writing, discard what arrives, and close when the client does."""
        if self.is_closing():
            return
        self._closing = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER, self._transport.close)


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with time limits: by itself it waits for clients for ever."""

    address = ""
    since = 0.0
    discarded = 0
    headers: Any  # of uvicorn

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Accept a connection; if there are too many, close one."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(Lingering(transport))  # type: ignore[arg-type]
        self.address, self.since = (self.client or ("",))[0], self.loop.time()
        self._watch_headers()
        if len(self.connections) > CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        """Close a connection of the address with the most: the oldest idle one, if any."""
        all_of_them: Any = self.connections
        counts = Counter(each.address for each in all_of_them)
        most = max(all_of_them, key=lambda each: (counts[each.address], each.idle, -each.since))
        if most is self:
            self._refuse(503, "too many connections")
        else:
            most.transport.abort()
        self.connections.discard(most)

    def data_received(self, data: bytes) -> None:
        """Read, or discard what arrives after the last answer."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_headers()
            return
        self.discarded += len(data)
        if self.discarded > DISCARDED:
            self.transport.abort()

    def _watch_headers(self) -> None:
        """Limit the time for the headers of a request, from the connection or last answer on."""
        if not self.idle:
            self._stop("headers")
        elif "headers" not in self._timers and not self.transport.is_closing():
            self._timers["headers"] = self.loop.call_later(HEADERS, self._time_out)

    def _time_out(self) -> None:
        self._stop("headers")
        if self.idle and self.conn.trailing_data[0]:
            self._refuse(408, "the headers of a request take too long")
        elif self.idle:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP, also in the middle of a request."""
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(400, msg)
            return
        if not self.cycle.response_started:
            self._refuse(400, msg)
        self.transport.close()
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _refuse(self, status: int, text: str) -> None:
        """Answer without h11, whose state forbids it, and close."""
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nconnection: close\r\n"
        head += f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(text)}\r\n\r\n"
        self.transport.write((head + text).encode())
        self.transport.close()

    def pause_writing(self) -> None:
        """Limit the time in which a client reads nothing."""
        super().pause_writing()
        self._timers["answer"] = self.loop.call_later(STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop("answer")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop("headers")
        self._stop("answer")
        super().connection_lost(exc)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()
