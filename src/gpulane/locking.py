"""Holds a GPU for this program: `with gpulane.lock("gpu0") as gpu: ...`, and what `gpulane lock` is made of.

Blocking, and of the standard library alone: it is imported into other people's programs. The GPU is used only
between the gateway's grant, the flock of the GPU's lock file, and the gateway's word that both still hold.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, cast
from urllib.parse import quote, urlsplit

from gpulane.errors import ConfigError, GpulaneError

DEFAULT_URL: Final = "http://127.0.0.1:8800"
SECONDS_MAX: Final = 3600.0
CALL_SECONDS: Final = 30.0
SILENCE_SECONDS_MAX: Final = 45.0
"""The gateway says something every 15 s."""
LINE_BYTES_MAX: Final = 64 * 1024
FLOCK_SECONDS: Final = 30.0
"""How long the lock file may be held by somebody else once the gateway has granted the GPU."""
FLOCK_POLL_SECONDS: Final = 0.05
UNHEARD_SECONDS: Final = 15.0
"""Grace after the time limit, where the gateway, which should have told us, cannot be heard any more."""
END_SECONDS: Final = 5.0

Line = dict[str, object]


class LockRefused(GpulaneError):
    """The GPU was not given."""

    code = "lock_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Where a lock stands in the queue."""

    job: str
    position: int | None
    reason: str


@dataclass(slots=True, kw_only=True)
class HeldGpu:
    """A GPU that this program holds."""

    name: str
    """NODE/NAME."""
    uuid: str
    """The driver's, where the settings know it; else a name of the gateway's own."""
    lock_file: str
    job: str
    seconds_max: float
    file: int
    """Descriptor of the flocked lock file. Whoever inherits it holds the GPU too."""
    lost: threading.Event = field(default_factory=threading.Event)
    """Set when the GPU must not be used any more: cancelled, or its time is over."""
    why_lost: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Variables for programs that shall use this GPU, and no other."""
        found = {"GPULANE_GPU": self.name, "GPULANE_LOCK_FILE": self.lock_file}
        if self.uuid.startswith(("GPU-", "MIG-")):
            found["CUDA_VISIBLE_DEVICES"] = self.uuid
        return found


def lock(
    gpu: str | None = None,
    *,
    labels: Sequence[str] = (),
    priority: str | int = "normal",
    seconds_max: float = SECONDS_MAX,
    note: str = "",
    url: str | None = None,
    key: str | None = None,
    on_waiting: Callable[[Waiting], None] | None = None,
    on_lost: Callable[[str], None] | None = None,
) -> GpuLock:
    """Hold a GPU of this machine inside a `with` block; without a name, any that is free.

    Waits for its turn in the gateway's queue. `url` and `key` default to GPULANE_URL and GPULANE_KEY.
    `on_lost` is called in a thread of its own, once, when the GPU must not be used any more. Raises
    GpulaneError.
    """
    body: Line = {
        "gpu": gpu,
        "labels": list(labels),
        "priority": priority,
        "seconds_max": seconds_max,
        "note": note,
    }
    gateway = _Gateway(
        url or os.environ.get("GPULANE_URL") or DEFAULT_URL, key or os.environ.get("GPULANE_KEY")
    )
    return GpuLock(gateway, body, on_waiting=on_waiting, on_lost=on_lost)


class GpuLock:
    """One lock, for one `with` block."""

    def __init__(
        self,
        gateway: _Gateway,
        body: Line,
        *,
        on_waiting: Callable[[Waiting], None] | None,
        on_lost: Callable[[str], None] | None,
    ) -> None:
        self._gateway = gateway
        self._body = body
        self._on_waiting = on_waiting
        self._on_lost = on_lost
        self._stream: _Stream | None = None
        self._held: HeldGpu | None = None
        self._listener: threading.Thread | None = None
        self._is_over = threading.Event()

    def __enter__(self) -> HeldGpu:
        """Wait for the GPU, take its lock file, and have the gateway agree."""
        self._stream = self._gateway.stream("/gpulane/v1/locks", self._body)
        try:
            granted = self._granted(self._stream)
            file = _flocked(_text(granted, "lock_file"), _text(granted, "gpu"))
            try:
                held = _held(granted, file)
                self._gateway.call(f"/gpulane/v1/locks/{quote(held.job)}/hold")
                _write_note(file, held.job)
            except BaseException:
                os.close(file)
                raise
        except BaseException:
            # The gateway takes the end of the connection as ours.
            self._stream.close()
            raise
        self._held = held
        self._listener = threading.Thread(target=self._listen, args=(self._stream, held), daemon=True)
        self._listener.start()
        return held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say that it is over, then let go of the file. What was forked off meanwhile may hold on to it."""
        assert self._held is not None
        assert self._stream is not None
        assert self._listener is not None
        self._is_over.set()
        try:
            if not self._held.lost.is_set():
                self._gateway.call(f"/gpulane/v1/locks/{quote(self._held.job)}/release")
        except GpulaneError:
            pass  # the end of the connection, and the file, tell the same
        finally:
            try:
                os.ftruncate(self._held.file, 0)
            except OSError:
                pass  # somebody else's file, which we may lock and not write
            os.close(self._held.file)
            self._listener.join(END_SECONDS)
            self._stream.close()

    def _granted(self, stream: _Stream) -> Line:
        """Read lines until the GPU is ours."""
        while (line := stream.next()) is not None:
            match line.get("event"):
                case "waiting":
                    self._tell_waiting(line)
                case "granted":
                    return line
                case "cancelled":
                    raise LockRefused("cancelled while waiting for a GPU")
                case "failed":
                    error = cast("dict[str, object]", line.get("error") or {})
                    raise LockRefused(str(error.get("message") or "refused"))
                case _:
                    pass  # alive, and what later versions say
        raise LockRefused(f"{self._gateway.url} broke off while we waited for a GPU")

    def _tell_waiting(self, line: Line) -> None:
        if self._on_waiting is None:
            return
        position, reason = line.get("position"), cast("dict[str, object]", line.get("reason") or {})
        place = position if isinstance(position, int) else None
        self._on_waiting(
            Waiting(job=str(line.get("job", "")), position=place, reason=str(reason.get("text", "")))
        )

    def _listen(self, stream: _Stream, held: HeldGpu) -> None:
        """Hear of the end while the block runs. A gateway that is gone ends nothing but at the time limit."""
        ends = time.monotonic() + held.seconds_max + UNHEARD_SECONDS
        words = {"cancelled": "cancelled", "expired": f"its {held.seconds_max:g} s are over"}
        why = ""
        try:
            while not why and (line := stream.next()) is not None:
                event = str(line.get("event"))
                if event in {"released", "failed", "gone"}:
                    break
                why = words.get(event, "")
        except GpulaneError:
            pass
        if not why and not self._is_over.wait(max(0.0, ends - time.monotonic())):
            why = words["expired"]
        if why and not self._is_over.is_set():
            held.why_lost = why
            held.lost.set()
            if self._on_lost is not None:
                self._on_lost(why)


# --- the lock file


def _flocked(path: str, gpu: str) -> int:
    """Open the lock file and flock it."""
    try:
        file = _opened(path)
    except FileNotFoundError:
        raise _elsewhere(gpu, path) from None
    except OSError as error:
        raise LockRefused(f"lock file {path} cannot be opened: {error.strerror}") from error
    ends = time.monotonic() + FLOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends:
                os.close(file)
                raise LockRefused(f"lock file {path} is held by another program") from None
            time.sleep(FLOCK_POLL_SECONDS)
        else:
            return file


def _opened(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR)
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)  # a lock needs no right to write


def _write_note(file: int, job: str) -> None:
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {job}\n".encode(), 0)
    except OSError:
        pass  # somebody else's file, which we may lock and not write


def _elsewhere(gpu: str, path: str) -> LockRefused:
    return LockRefused(
        f"GPU {gpu} is not on this machine: its lock file {path} is not here",
        hint="run this on the GPU's own machine",
    )


def _held(granted: Line, file: int) -> HeldGpu:
    seconds_max = granted.get("seconds_max")
    return HeldGpu(
        name=_text(granted, "gpu"),
        uuid=_text(granted, "uuid"),
        lock_file=_text(granted, "lock_file"),
        job=_text(granted, "job"),
        seconds_max=float(seconds_max) if isinstance(seconds_max, int | float) else SECONDS_MAX,
        file=file,
    )


def _text(line: Line, name: str) -> str:
    found = line.get(name)
    if not isinstance(found, str):
        raise LockRefused(f"the gateway granted a GPU without its {name}: is it one of this version?")
    return found


# --- the gateway


class _Gateway:
    """One gateway, by its URL."""

    def __init__(self, url: str, key: str | None) -> None:
        try:
            parts = urlsplit(url)
            port, is_url = parts.port, parts.scheme in {"http", "https"} and bool(parts.hostname)
        except ValueError:
            parts, port, is_url = urlsplit(""), None, False
        if not is_url:
            raise ConfigError(f"{url!r} is no URL of a gateway: write http://HOST:PORT (GPULANE_URL)")
        self.url = url.rstrip("/")
        self._parts = parts
        self._port = port
        self._headers = {"Content-Type": "application/json", "User-Agent": "gpulane-lock"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def call(self, path: str) -> None:
        """POST without a body. Raises LockRefused, also when nobody answers."""
        _Stream(self._connection(CALL_SECONDS), self.url, self._base + path, b"", self._headers).close()

    def stream(self, path: str, body: Line) -> _Stream:
        """POST, and have the answer line by line."""
        connection = self._connection(SILENCE_SECONDS_MAX)
        return _Stream(connection, self.url, self._base + path, json.dumps(body).encode(), self._headers)

    @property
    def _base(self) -> str:
        return self._parts.path.rstrip("/")

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        host = self._parts.hostname or ""
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, self._port, timeout=seconds)
        return http.client.HTTPConnection(host, self._port, timeout=seconds)


class _Stream:
    """One answer, read line by line."""

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        url: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
    ) -> None:
        """Send the request and read the answer's head. Raises LockRefused."""
        self._connection = connection
        self._url = url
        try:
            connection.request("POST", path, body, headers)
            self._answer = connection.getresponse()
            # An answer without a length takes the socket from its connection.
            self._socket: socket.socket | None = connection.sock
            if self._answer.status != 200:
                raise _refused(self._answer, url)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            hint = "start one with `gpulane serve`, or say where it is with GPULANE_URL"
            raise LockRefused(f"no gateway at {url}: {why}", hint=hint) from error
        except GpulaneError:
            connection.close()
            raise

    def next(self) -> Line | None:
        """Read the next line; None at the end. Raises LockRefused when the gateway falls silent."""
        try:
            text = self._answer.readline(LINE_BYTES_MAX)
            found: object = json.loads(text) if text.strip() else None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise LockRefused(f"{self._url} broke off: {error or type(error).__name__}") from error
        return cast("Line", found) if isinstance(found, dict) else None

    def close(self) -> None:
        """Close the connection, and wake whoever reads from it."""
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already
        self._connection.close()


def _refused(answer: http.client.HTTPResponse, url: str) -> LockRefused:
    """Read a refusal in the gateway's own words."""
    try:
        found = cast("dict[str, dict[str, str | None]]", json.loads(answer.read(LINE_BYTES_MAX)))
        error = found["error"]
        message, hint = str(error["message"]), error.get("hint")
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return LockRefused(f"{url} answered {answer.status}, and not as a gpulane does: is it one?")
    if answer.status == http.client.UNAUTHORIZED:
        hint = "give a key with --key or GPULANE_KEY"
    return LockRefused(message, hint=hint)
