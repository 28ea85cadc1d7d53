"""A small blocking client of the native API, for the commands alone.

One connection per call, limits on every wait, and errors that say which gateway was asked and what to do.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from gpulane.cli.documents import Refusal
from gpulane.errors import ConfigError, GpulaneError

CALL_SECONDS: Final = 60.0
STREAM_SILENCE_SECONDS: Final = 45.0
"""The gateway says something every 15 s on a stream."""
CHUNK_BYTES: Final = 256 * 1024
LINE_BYTES_MAX: Final = 8 * 1024 * 1024
"""One line of a stream; a preview is a picture in base64."""
Answer = TypeVar("Answer")


class ApiRefused(GpulaneError):
    """The gateway answered with an error."""

    code = "refused"

    def __init__(self, message: str, *, status: int, hint: str | None = None, code: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code


class NoGateway(GpulaneError):
    """No gateway answers there."""

    code = "no_gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMessage:
    """One server-sent event."""

    kind: str
    data: bytes
    id: str | None
    """Of the last message that had one."""


class ApiClient:
    """One gateway, by its URL."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raise ConfigError for a URL or key that cannot be used."""
        parts = _split(url)
        self.url = url.rstrip("/")
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port
        self._base = parts.path.rstrip("/")
        self._headers = {"Accept": "application/json", "User-Agent": "gpulane-cli"}
        if key:
            if not key.isascii() or not key.isprintable():
                raise ConfigError("the key has characters that no key has; see --key and GPULANE_KEY")
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, kind: type[Answer], path: str, query: Mapping[str, str] | None = None) -> Answer:
        """GET and decode."""
        return self._decoded(kind, self.call("GET", path + _query(query)))

    def send(self, kind: type[Answer], method: str, path: str, document: object = None) -> Answer:
        """Call with a JSON body, if any, and decode the answer."""
        body = None if document is None else msgspec.json.encode(document)
        return self._decoded(kind, self.call(method, path, body))

    def call(
        self, method: str, path: str, body: bytes | None = None, *, seconds: float = CALL_SECONDS
    ) -> bytes:
        """Make one call and return the answer's body. Raises ApiRefused, NoGateway."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with self._answer(method, path, body, headers, seconds=seconds) as answer:
            return answer.read()

    def download(self, path: str, target: Path) -> int:
        """Write an answer's body to a file, which appears when it is whole; return its size."""
        part = target.with_name(target.name + ".part")
        with self._answer("GET", path, None, {}, seconds=CALL_SECONDS) as answer:
            try:
                with part.open("wb") as file:
                    size = _copy(answer, file)
                part.replace(target)
            except OSError as error:
                if isinstance(error, TimeoutError | ConnectionError):
                    raise
                raise GpulaneError(f"{target} cannot be written: {error.strerror or error}") from error
        if answer.length:
            raise NoGateway(f"{self.url} broke off in the middle of {target.name}")
        return size

    def stream(self, path: str, last_id: str | None = None) -> Iterator[StreamMessage]:
        """Follow server-sent events until the gateway ends them. Raises NoGateway when they break off."""
        headers = {"Accept": "text/event-stream"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        with self._answer("GET", path, None, headers, seconds=STREAM_SILENCE_SECONDS) as answer:
            if answer.status == 200:
                yield from _messages(answer, last_id)

    @contextmanager
    def _answer(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], *, seconds: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(seconds)
        try:
            connection.request(method, self._base + path, body, {**self._headers, **headers})
            answer = connection.getresponse()
            if not 200 <= answer.status < 300:
                raise self._refused(answer)
            yield answer
        except ssl.SSLError as error:
            raise NoGateway(f"no TLS with {self.url}: {error.reason}", hint=_hint()) from error
        except TimeoutError as error:
            raise NoGateway(f"{self.url} did not answer within {seconds:g} s", hint=_hint()) from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise NoGateway(f"no gateway at {self.url}: {why}", hint=_hint()) from error
        finally:
            connection.close()

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        if self._is_tls:
            return http.client.HTTPSConnection(self._host, self._port, timeout=seconds)
        return http.client.HTTPConnection(self._host, self._port, timeout=seconds)

    def _refused(self, answer: http.client.HTTPResponse) -> GpulaneError:
        body = answer.read(LINE_BYTES_MAX)
        try:
            error = msgspec.json.decode(body, type=Refusal).error
        except msgspec.MsgspecError:
            return NoGateway(
                f"{self.url} answered {answer.status}, and not as a gpulane does: is it one?", hint=_hint()
            )
        hint = error.hint
        if answer.status == 401:
            hint = "give a key with --key or GPULANE_KEY"
        return ApiRefused(error.message, status=answer.status, hint=hint, code=error.code)

    def _decoded(self, kind: type[Answer], body: bytes) -> Answer:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise NoGateway(
                f"{self.url} answered, but not as a gpulane does: is it one?", hint=_hint()
            ) from error


def _split(url: str):  # noqa: ANN202 - urllib's own result
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid, parts = False, urlsplit("")
    if not valid or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is no URL of a gateway: write http://HOST:PORT (--url or GPULANE_URL)")
    return parts


def _query(query: Mapping[str, str] | None) -> str:
    return f"?{urlencode(query)}" if query else ""


def _hint() -> str:
    return "start one with `gpulane serve`, or say where it is with --url or GPULANE_URL"


def _copy(answer: http.client.HTTPResponse, file: IO[bytes]) -> int:
    size = 0
    while chunk := answer.read(CHUNK_BYTES):
        file.write(chunk)
        size += len(chunk)
    return size


def _messages(answer: http.client.HTTPResponse, last_id: str | None) -> Iterator[StreamMessage]:
    """Read `event:`, `id:` and `data:` lines; an empty line ends a message."""
    kind, data = "message", b""
    while line := answer.readline(LINE_BYTES_MAX):
        name, _, value = line.rstrip(b"\r\n").partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"event":
                kind = value.decode()
            case b"id":
                last_id = value.decode()
            case b"data":
                data = value
            case b"" if data:
                yield StreamMessage(kind=kind, data=data, id=last_id)
                kind, data = "message", b""
            case _:
                pass  # comments, `retry:`
