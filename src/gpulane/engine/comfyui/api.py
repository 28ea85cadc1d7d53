"""ComfyUI's control calls over HTTP: each one request with a limit on time and size, failures as EngineError.

No Origin or Sec-Fetch header is ever sent (a ComfyUI on loopback refuses foreign ones). Nothing here is
repeated by itself, save reads by the HTTP library on a connection that had died meanwhile.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import msgspec

from gpulane.adapters.comfyui.messages import QueueView, read_history, read_queue
from gpulane.core.model import EngineUrl
from gpulane.engine.base import REFUSED, UNREACHABLE
from gpulane.engine.comfyui.timings import Timings
from gpulane.errors import EngineError
from gpulane.wire.errors import is_refusal

ANSWER_BYTES_MAX = 256 * 1024 * 1024
"""/queue and /history repeat whole prompts, pictures inside them included."""
CONNECTIONS_MAX = 16
PLAIN_BODY_BYTES_MAX = 512 * 1024
"""Larger bodies are handed to the HTTP library as a file, so that it writes them in pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An engine's answer, whole."""

    status: int
    body: bytes


class EngineApi:
    """The HTTP side of one engine. Its connections stay warm."""

    def __init__(self, url: EngineUrl, timings: Timings) -> None:
        self.url = url
        self.name = _without_password(url)
        """The URL as it may be shown."""
        self._timings = timings
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The pooled session, made on first use since it belongs to the running loop."""
        if self._session is None:
            self._session = _session(aiohttp.TCPConnector(limit=CONNECTIONS_MAX))
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- what is asked

    async def queue(self, *, fresh: bool = False) -> QueueView:
        body = await self.get("/queue", fresh=fresh)
        return _decoded(lambda: read_queue(body), "/queue")

    async def entry(self, job: str, *, fresh: bool = False) -> msgspec.Raw | None:
        """Return the job's entry in the history; None when there is none."""
        body = await self.get(f"/history/{job}", fresh=fresh)
        return _decoded(lambda: read_history(body, job), "/history")

    async def get(self, target: str, *, fresh: bool = False) -> bytes:
        """Return a document. Anything but 200 is an error."""
        answer = await self.ask("GET", target, fresh=fresh)
        if answer.status != 200:
            raise EngineError(f"{self.name} answered {answer.status} to GET {_path(target)}")
        return answer.body

    async def order(self, target: str, value: object) -> Answer:
        """POST a small JSON order."""
        return await self.ask("POST", target, body=msgspec.json.encode(value))

    async def submit(self, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """POST a job: once, whatever happens."""
        return await self.ask(
            "POST", target, body=body, headers=headers, seconds=self._timings.submit_seconds
        )

    # --- how

    async def ask(
        self,
        method: str,
        target: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        seconds: float | None = None,
        fresh: bool = False,
    ) -> Answer:
        """Make one request. Raises EngineError; its `sent` is False only if no connection came about."""
        if not fresh:
            return await self._ask(self.session, method, target, body, headers, seconds)
        async with _session(aiohttp.TCPConnector(force_close=True)) as session:
            return await self._ask(session, method, target, body, headers, seconds)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        method: str,
        target: str,
        body: bytes | None,
        headers: dict[str, str] | None,
        seconds: float | None,
    ) -> Answer:
        limit = seconds or self._timings.request_seconds
        where = f"{method} {_path(target)}"
        data = io.BytesIO(body) if body is not None and len(body) > PLAIN_BODY_BYTES_MAX else body
        try:
            async with (
                asyncio.timeout(limit),
                session.request(
                    method, self.url + target, data=data, headers=headers, allow_redirects=False
                ) as response,
            ):
                return Answer(status=response.status, body=await _whole(response))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _unconnected(self.name, error) from error
        except TimeoutError as error:
            raise EngineError(f"{self.name} did not answer {where} within {limit:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{self.name} broke off {where}: {type(error).__name__}") from error


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),  # each request has its own
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "gpulane", "Content-Type": "application/json"},
    )


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError("the answer is too large")
        chunks.append(chunk)
    return b"".join(chunks)


def _unconnected(name: str, error: aiohttp.ClientError | OSError) -> EngineError:
    """No byte was sent. Only a refusal proves that nobody listens; an unreachable host may be at work."""
    is_refused = isinstance(error, aiohttp.ClientConnectorError) and is_refusal(error.os_error)
    said = "refuses connections" if is_refused else f"cannot be reached: {type(error).__name__}"
    unconnected = EngineError(f"{name} {said}", sent=False)
    unconnected.code = REFUSED if is_refused else UNREACHABLE
    return unconnected


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _path(target: str) -> str:
    return target.partition("?")[0]


T = TypeVar("T")


def _decoded(read: Callable[[], T], target: str) -> T:
    try:
        return read()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"the answer to GET {target} is not ComfyUI's: {error}") from error
