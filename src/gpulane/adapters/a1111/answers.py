"""What an engine's answer proves: which checkpoint really ran, and whose fault an error is.

The answer may be hundreds of megabytes of pictures, with the proof at its end, so only its tail is kept and
looked at.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import msgspec

from gpulane.adapters.a1111.catalogue import file_of, stem_of
from gpulane.core.model import Failure, FailureKind

TAIL_BYTES: Final = 256 * 1024
"""`info` repeats the prompt for every picture; one that is longer than this proves nothing, which fails
nothing."""
_INFO: Final = (b'"info":"', b'"info": "')


@dataclass(slots=True, kw_only=True)
class Tail:
    """The last bytes of a stream, at most twice `TAIL_BYTES` of memory."""

    _chunks: deque[bytes] = field(default_factory=deque[bytes])
    _size: int = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk of the answer."""
        chunk = chunk[-TAIL_BYTES:]
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(self._chunks[0]) >= TAIL_BYTES:
            self._size -= len(self._chunks.popleft())

    def bytes(self) -> bytes:
        """Return the last bytes; all, while there are fewer than TAIL_BYTES."""
        return b"".join(self._chunks)


class Info(msgspec.Struct, frozen=True):
    """What `info` says of a finished generation."""

    sd_model_name: str | None = None
    sd_model_hash: str | None = None
    sd_vae_name: str | None = None
    job_timestamp: str | None = None
    version: str | None = None


def read_info(tail: bytes) -> Info | None:
    """Read the `info` string at the end of an answer. None: there is none to be seen."""
    # Inside strings quotes are escaped, so the last bare `"info":"` is the field itself.
    start = max((found + len(sign) for sign in _INFO if (found := tail.rfind(sign)) >= 0), default=0)
    end = tail.rfind(b'"')
    if not start or end < start:
        return None
    try:
        text = msgspec.json.decode(tail[start - 1 : end + 1], type=str)
        return msgspec.json.decode(text, type=Info)
    except (msgspec.DecodeError, RecursionError):
        return None


def ran_other_model(asked: str, info: Info | None) -> bool:
    """Tell whether the answer names another checkpoint than was asked for. No proof is no mismatch."""
    if not asked or info is None or not info.sd_model_name:
        return False
    return stem_of(asked).casefold() != file_of(info.sd_model_name).casefold()


def wrong_model(asked: str, info: Info | None) -> Failure:
    """Put that into a failure."""
    ran = info.sd_model_name if info is not None else None
    return Failure(
        kind=FailureKind.ENGINE,
        code="wrong_model",
        message=f"asked for checkpoint {asked!r}, but the engine rendered with {ran!r}",
    )


class _Error(msgspec.Struct):
    error: str = ""
    detail: object = ""
    errors: object = ""


_ENGINE_ERRORS: Final = frozenset(
    {
        "OutOfMemoryError",
        "NansException",
        "MemoryError",
        "OSError",
        "IOError",
        "ConnectionError",
        "TimeoutError",
    }
)
"""Classes that say something of the engine or its machine. Everything else a 500 names is taken for the
request's fault: bad base64, unknown options, unknown upscalers and bad sizes all answer 500."""
_BROKEN_GPU: Final = (
    "cuda error",
    "cublas",
    "cudnn",
    "hip error",
    "illegal memory access",
    "device-side assert",
)


def failure_of(status: int, body: bytes) -> Failure | None:
    """Judge an answer that is whole. None: it is a success."""
    if 200 <= status < 300:
        return None
    try:
        error = msgspec.json.decode(body, type=_Error)
    except (msgspec.DecodeError, RecursionError):
        error = _Error(error="", detail=body[:500].decode("utf-8", "replace"))
    message = _message(status, error)
    text = f"{error.error} {error.detail} {error.errors}".lower()
    if status in {401, 403}:
        hint = "the engine wants a login (--api-auth): write it into its URL"
        return Failure(kind=FailureKind.NOT_STARTED, code="engine_auth", message=f"{message}; {hint}")
    if status in {502, 503, 504}:
        return Failure(kind=FailureKind.ENGINE, code="engine_unavailable", message=message)
    if "outofmemory" in text or "out of memory" in text:
        return Failure(kind=FailureKind.ENGINE, code="out_of_memory", message=message)
    if any(sign in text for sign in _BROKEN_GPU):
        # After such an error every later call of the process fails too.
        return Failure(kind=FailureKind.ENGINE, code="gpu_broken", message=message, killed_engine=True)
    if error.error in _ENGINE_ERRORS:
        return Failure(kind=FailureKind.ENGINE, code="engine_failed", message=message)
    return Failure(kind=FailureKind.CLIENT, code="refused", message=message)


def _message(status: int, error: _Error) -> str:
    parts = [str(part) for part in (error.error, error.detail, error.errors) if part]
    return f"{status}: {': '.join(parts)}"[:1000] if parts else f"the engine answered {status}"
