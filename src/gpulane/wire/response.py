"""What a caller holds of an answer: its head at once, its body as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from gpulane.wire.errors import ResponseTooLarge
from gpulane.wire.exchange import Exchange, Head


class EngineResponse:
    """An engine's answer. Read it to its end or close it; `async with` does the latter."""

    __slots__ = ("_exchange", "content_length", "headers", "reason", "status")

    def __init__(self, exchange: Exchange, head: Head) -> None:
        self._exchange = exchange
        self.status = head.status
        self.reason = head.reason
        self.headers: tuple[tuple[str, str], ...] = head.headers
        """In the engine's order, duplicates kept."""
        self.content_length: int | None = head.length
        """As the engine stated it; for HEAD and 304 no body of that length follows."""

    @property
    def request_was_sent(self) -> bool:
        """Whether the whole request has been written; False while a body is still going out."""
        return self._exchange.is_sent_whole

    @property
    def is_complete(self) -> bool:
        """Whether the engine has said its last byte; from then on the engine is free of this request."""
        return self._exchange.ended and self._exchange.error is None

    def header(self, name: str) -> str | None:
        """Return the first header of that name, given in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), None)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; the engine is made to wait while the caller does."""
        while chunk := await self._exchange.next_chunk():
            yield chunk

    def take_all(self) -> bytes | None:
        """Return the rest of the body when it is here already, else None and nothing is taken."""
        return self._exchange.take_all()

    async def next_chunk(self) -> bytes:
        """Return what has come of the body, at least one byte; b"" is the end."""
        return await self._exchange.next_chunk()

    async def read(self, bytes_max: int) -> bytes:
        """Return the whole body; one over the limit is abandoned and raises ResponseTooLarge."""
        parts: list[bytes] = []
        size = 0
        while chunk := await self._exchange.next_chunk():
            size += len(chunk)
            if size > bytes_max:
                self._exchange.close()
                raise ResponseTooLarge(f"the engine's answer is over {bytes_max} bytes")
            parts.append(chunk)
        return b"".join(parts)

    async def close(self) -> None:
        """Abandon the answer: its connection is closed unless the last byte had come."""
        self._exchange.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exchange.close()
