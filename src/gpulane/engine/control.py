"""Small calls to an engine beside its jobs: health, progress, lists, interrupt.

They have connections of their own, so that neither jobs nor relayed pages can keep a probe from its answer;
every call has a limit in time and size, and raises EngineError with a code that says what it proves.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from gpulane.engine.base import REFUSED, UNREACHABLE
from gpulane.errors import EngineError
from gpulane.wire import (
    ConnectFailed,
    ConnectRefused,
    ConnectTimeout,
    EngineClient,
    EngineTimeout,
    Timeouts,
    WireError,
)

CONNECTIONS_MAX: Final = 8
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""Lists of LoRAs carry their training metadata: tens of megabytes."""

Answer = TypeVar("Answer")


class StatusError(EngineError):
    """The engine answered, but with an error."""

    code = "engine_refused"

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ControlCalls:
    """Calls to one engine."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self.url = url
        self.headers = authorization(url)
        self._timeout_seconds = timeout_seconds
        self._wire = EngineClient(url, connections_max=CONNECTIONS_MAX)

    async def close(self) -> None:
        await self._wire.close()

    def _timeouts(self, limit: float) -> Timeouts:
        connect = min(limit, self._timeout_seconds)
        return Timeouts(connect_seconds=connect, first_byte_seconds=limit, idle_seconds=limit)

    async def fetch(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        *,
        fresh: bool = False,
        seconds: float | None = None,
    ) -> tuple[int, bytes]:
        """Make one call; returns status and body. Raises EngineError when there is no whole answer in
        time: `seconds`, for what takes another time than a question.
        """
        limit = seconds or self._timeout_seconds
        headers: list[tuple[str, str]] = [("Accept", "application/json"), ("Accept-Encoding", "identity")]
        headers.extend(self.headers)
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        try:
            async with asyncio.timeout(limit):
                response = await self._wire.request(
                    method, target, headers, body, timeouts=self._timeouts(limit), fresh=fresh
                )
                async with response:
                    return response.status, await response.read(ANSWER_BYTES_MAX)
        except TimeoutError:
            message = f"{self.url} did not answer {target} within {limit:g} s"
            raise named(EngineError(message), "timeout") from None
        except WireError as error:
            raise named(error, code_of(error)) from error

    async def ask(
        self, kind: type[Answer], target: str, body: bytes | None = None, *, fresh: bool = False
    ) -> Answer:
        """GET (POST with a body) and decode. Raises StatusError for an answer that is no 2xx."""
        status, data = await self.fetch("GET" if body is None else "POST", target, body, fresh=fresh)
        if not 200 <= status < 300:
            raise StatusError(f"{self.url} answered {status} to {target}", status=status)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            message = f"{self.url} answered {target} with something else than expected: {error}"
            raise named(EngineError(message), "bad_answer") from error


def code_of(error: WireError) -> str:
    """Name what a broken call proves: `connect_refused` alone says that no process listens there."""
    match error:
        case ConnectRefused():
            return REFUSED
        case ConnectFailed():
            return UNREACHABLE
        case ConnectTimeout() | EngineTimeout():
            return "timeout"
        case _:
            return error.code


def named(error: EngineError, code: str) -> EngineError:
    """Give an error its code."""
    found = EngineError(error.message, sent=error.sent)
    found.code = code
    return found


def authorization(url: str) -> Sequence[tuple[str, str]]:
    """Turn `http://user:password@host` into the header that it stands for."""
    parts = urlsplit(url)
    if parts.username is None:
        return ()
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return (("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}"),)
