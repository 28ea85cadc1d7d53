"""An answer that an engine writes at its own speed and clients read at theirs, again and again.

`write` never waits for a reader: the GPU is free at the engine's last byte. Up to `memory_bytes_max` stays in
memory, then all of it moves to a file without a name, which cannot outlive the process.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO

from gpulane.errors import GpulaneError, StoreError
from gpulane.wire import ResponseTooLarge

MEMORY_BYTES_MAX = 8 * 1024 * 1024
READ_BYTES = 256 * 1024
"""How much a reader takes from the file at a time."""


class AnswerGone(GpulaneError):
    """The answer is no longer kept."""

    code = "answer_gone"


class HeldAnswer:
    """One answer: written once, read from its beginning by any number of readers until `close`."""

    def __init__(self, folder: Path, *, bytes_max: int, memory_bytes_max: int = MEMORY_BYTES_MAX) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._memory_bytes_max = memory_bytes_max
        self._chunks: list[bytes] = []
        self._starts: list[int] = []
        self._file: IO[bytes] | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self.status = 0
        """0 until the head is known."""
        self.reason = ""
        self.headers: tuple[tuple[str, str], ...] = ()
        self.bytes_written = 0
        self.is_finished = False
        """The answer is whole."""
        self.error: Exception | None = None

    @property
    def is_spooled(self) -> bool:
        """Whether it has moved to the file."""
        return self._file is not None

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.is_finished or self.error is not None

    # --- the engine's side; nothing here waits

    def begin(self, status: int, headers: Sequence[tuple[str, str]], *, reason: str = "") -> None:
        """Set the head."""
        if self.is_ended:
            return
        self.status = status
        self.reason = reason
        self.headers = tuple(headers)
        self._wake()

    def write(self, chunk: bytes) -> None:
        """Keep a piece of the body; over the limit, or with a full disk, the answer fails and it raises."""
        if self.error is not None:
            raise self.error
        if not chunk:
            return
        size = self.bytes_written + len(chunk)
        if size > self._bytes_max:
            error = ResponseTooLarge(f"the engine's answer is over {self._bytes_max} bytes")
            self.fail(error)
            raise error
        if size > self._memory_bytes_max:
            self._write_to_file(chunk)
        else:
            self._starts.append(self.bytes_written)
            self._chunks.append(chunk)
        self.bytes_written = size
        self._wake()

    def finish(self) -> None:
        """The engine has said its last byte."""
        if not self.is_ended:
            self.is_finished = True
            self._wake()

    def fail(self, error: Exception) -> None:
        """No more will come; readers get what there is and then `error`."""
        if not self.is_ended:
            self.error = error
            self._wake()

    def close(self) -> None:
        """Forget it and free its memory or file; readers in the middle get AnswerGone."""
        self.is_finished = False
        self.error = AnswerGone()
        self._chunks.clear()
        self._starts.clear()
        self.bytes_written = 0
        if self._file is not None:
            self._file.close()
            self._file = None
        self._wake()

    # --- the readers' side

    async def wait_head(self) -> tuple[int, tuple[tuple[str, str], ...]]:
        """Wait for status and headers; raises the error of an answer that failed before them."""
        while not self.status or isinstance(self.error, AnswerGone):
            if self.error is not None:
                raise self.error
            await self._wait()
        return self.status, self.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body from its beginning, as it comes."""
        offset = 0
        while True:
            if offset < self.bytes_written:
                data = self._read(offset)
                offset += len(data)
                yield data
            elif self.error is not None:
                raise self.error
            elif self.is_finished:
                return
            else:
                await self._wait()

    def _read(self, offset: int) -> bytes:
        if self._file is not None:
            return os.pread(self._file.fileno(), READ_BYTES, offset)
        index = bisect_right(self._starts, offset) - 1
        chunk, within = self._chunks[index], offset - self._starts[index]
        return chunk[within:] if within else chunk

    def _write_to_file(self, chunk: bytes) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - close() closes it
                self._file.writelines(self._chunks)
                self._chunks.clear()
                self._starts.clear()
            self._file.write(chunk)
            # Readers use pread, past this object's own buffer.
            self._file.flush()
        except OSError as error:
            failure = StoreError(f"cannot keep the answer in {self._folder}: {error.strerror or error}")
            self.fail(failure)
            raise failure from error

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
