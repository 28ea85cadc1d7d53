"""One request and its answer: what has come, what is still awaited, and how it ended.

The connection feeds it, the caller reads from it; it never touches a socket. Bytes wait here up to
`BUFFER_BYTES_HIGH`, above which the connection stops reading from the engine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gpulane.wire.errors import EngineTimeout, TimeoutPhase

BUFFER_BYTES_HIGH = 256 * 1024
"""Reading from the engine pauses above this; one read of the event loop (256 KiB) may lie on top of it."""
BUFFER_BYTES_LOW = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long each phase may take. There is no total: a job may run for an hour."""

    connect_seconds: float = 3.0
    """Waiting for a free connection of the pool and connecting, each."""
    first_byte_seconds: float | None = None
    """From the request's last byte to the answer's head."""
    idle_seconds: float | None = None
    """Longest silence in the middle of a body, in either direction. A slow reader of ours does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The first line and headers of an answer, in their order, duplicates kept."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    length: int | None
    """Bytes of body still to come, when the engine said so; for HEAD and 304 what it would have been."""


class Exchange:
    """State of one request and its answer. `ended` turns True exactly once, with or without `error`."""

    __slots__ = (
        "_chunks",
        "_first_byte_timer",
        "_loop",
        "_reader",
        "abandon",
        "buffered_bytes",
        "ended",
        "error",
        "head",
        "head_ready",
        "is_sent",
        "is_sent_whole",
        "method",
        "on_drained",
        "timeouts",
        "upload",
        "wants_upgrade",
    )

    def __init__(self, method: str, timeouts: Timeouts, *, wants_upgrade: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._first_byte_timer: asyncio.TimerHandle | None = None
        self.method = method
        self.timeouts = timeouts
        self.wants_upgrade = wants_upgrade
        self.head: Head | None = None
        self.head_ready: asyncio.Future[None] = self._loop.create_future()
        self.buffered_bytes = 0
        self.ended = False
        self.error: BaseException | None = None
        self.is_sent = False
        """A byte of the request may have left."""
        self.is_sent_whole = False
        self.upload: asyncio.Task[None] | None = None
        """Sends a streamed body; it lives no longer than the exchange."""
        self.on_drained: Callable[[], None] | None = None
        """Set while the connection has paused reading."""
        self.abandon: Callable[[], None] | None = None
        """Ends the exchange early by closing its connection; None once it has ended."""

    # --- fed by the connection

    def sent_whole(self) -> None:
        """The request's last byte was written: the engine's time to answer begins."""
        self.is_sent_whole = True
        seconds = self.timeouts.first_byte_seconds
        if seconds is not None and not self.head_ready.done():
            self._first_byte_timer = self._loop.call_later(seconds, self._time_out, "first_byte", seconds)

    def receive_head(self, head: Head) -> None:
        """The head is complete (not for 1xx other than 101)."""
        self.head = head
        if self._first_byte_timer is not None:
            self._first_byte_timer.cancel()
        if not self.head_ready.done():
            self.head_ready.set_result(None)

    def receive_body(self, data: bytes) -> None:
        """Some of the body came."""
        self._chunks.append(data)
        self.buffered_bytes += len(data)
        self._wake()

    def finish(self, error: BaseException | None = None) -> None:
        """The answer is complete, or never will be. Only the first call counts."""
        if self.ended:
            return
        self.ended = True
        self.error = error
        self.abandon = None
        self.on_drained = None
        if self._first_byte_timer is not None:
            self._first_byte_timer.cancel()
        if self.upload is not None:
            self.upload.cancel()
        if error is not None and not self.head_ready.done():
            self.head_ready.set_exception(error)
        self._wake()

    # --- read by the caller

    async def next_chunk(self) -> bytes:
        """Return what has come, waiting for at least one byte; b"" is the end. Raises how it failed."""
        while True:
            if self._chunks:
                return self._take()
            if self.error is not None:
                raise self.error
            if self.ended:
                return b""
            await self._wait()

    def take_all(self) -> bytes | None:
        """Return the rest of the body if the end is already here, else None and nothing is taken."""
        if not self.ended or self.error is not None:
            return None
        return self._take() if self._chunks else b""

    def close(self) -> None:
        """Abandon what has not ended: the connection is closed with it."""
        if self.abandon is not None:
            self.abandon()
        self._chunks.clear()

    def _take(self) -> bytes:
        chunks = self._chunks
        data = chunks.popleft() if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self.buffered_bytes = 0
        if self.on_drained is not None:
            self.on_drained()
        return data

    async def _wait(self) -> None:
        if self._reader is not None:
            raise RuntimeError("two readers of one answer")
        self._reader = self._loop.create_future()
        seconds = self.timeouts.idle_seconds
        timer = None if seconds is None else self._loop.call_later(seconds, self._time_out, "idle", seconds)
        try:
            await self._reader
        finally:
            self._reader = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _time_out(self, phase: TimeoutPhase, seconds: float) -> None:
        abandon = self.abandon
        self.finish(EngineTimeout(phase, seconds))
        if abandon is not None:
            abandon()
