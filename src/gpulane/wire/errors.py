"""What can go wrong between us and an engine, as a caller must tell it apart.

`sent` (from EngineError) decides whether a request may be repeated, so it errs on the side of True.
`status` is what a client of the relay is told.
"""

from __future__ import annotations

import errno
from typing import Literal, TypeAlias

from gpulane.errors import EngineError

TimeoutPhase: TypeAlias = Literal["first_byte", "idle"]
"""`first_byte`: from the request's last byte to the answer's head. `idle`: no byte moved while we waited."""


class WireError(EngineError):
    """The exchange with the engine failed."""

    code = "engine_failed"
    status = 502


class RefusedRequest(WireError):
    """The request cannot be written safely, so not a byte of it was."""

    code = "request_refused"

    def __init__(self, message: str) -> None:
        super().__init__(message, sent=False)


class ConnectFailed(WireError):
    """The engine does not accept connections."""

    code = "engine_unreachable"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, sent=False)


class ConnectRefused(ConnectFailed):
    """Nobody listens at the engine's address: each of its addresses said so."""


def is_refusal(error: OSError) -> bool:
    """Tell whether no process listens there. A host or network that cannot be reached, or no room for another
    connection here, proves nothing.
    """
    if isinstance(error, ConnectionRefusedError):
        return True
    # asyncio joins the errors of several addresses (localhost: ::1 and 127.0.0.1) into one text.
    text = str(error)
    refused = text.count(f"[Errno {errno.ECONNREFUSED}]")
    return error.errno is None and refused > 0 and refused == text.count("[Errno ")


class ConnectTimeout(WireError):
    """No connection to the engine in time."""

    code = "engine_unreachable"
    status = 504

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, sent=False)


class EngineDisconnected(WireError):
    """The engine closed the connection before its answer was complete."""

    code = "engine_disconnected"

    def __init__(
        self, message: str | None = None, *, sent: bool = True, response_started: bool = False
    ) -> None:
        super().__init__(message, sent=sent)
        self.response_started = response_started
        """Whether a byte of the answer had come."""


class EngineTimeout(WireError):
    """The engine was silent for too long."""

    code = "engine_timeout"
    status = 504

    def __init__(self, phase: TimeoutPhase, seconds: float) -> None:
        super().__init__(f"the engine was silent for {seconds:g} s ({phase})")
        self.phase: TimeoutPhase = phase


class MalformedResponse(WireError):
    """The engine's answer is not sound HTTP/1.1."""

    code = "engine_malformed"


class ResponseTooLarge(WireError):
    """The engine's answer is over its limit."""

    code = "engine_answer_too_large"
