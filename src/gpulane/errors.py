"""Everything that can go wrong, by who is at fault, each with a stable code.

GpulaneError
├── ClientError            their request: tells what to change; `status` is the HTTP status it maps to
│   ├── BadRequest          400   a body or parameter that cannot be understood
│   ├── NotPermitted        403   the role does not allow it
│   ├── NotAuthenticated    401   no key, or a wrong one
│   ├── NotFound            404   no such job, gpu, engine or file (or not theirs)
│   ├── Conflict            409   the same id or idempotency key with other content
│   ├── TooLarge            413   a body, header or frame over its limit
│   ├── Impossible          422   no gpu can ever run this job; says why per gpu
│   ├── Throttled           429   the queue or the account's share of it is full; has retry_after_seconds
│   └── Unavailable         503   cannot be served now; has retry_after_seconds
├── EngineError            the engine failed: `sent` says whether a byte of the request may have reached it
├── StoreError             the store failed or refused
└── ConfigError            the settings are wrong; one line saying what and where

A failed attempt of a job is data (`core.model.Failure`), never one of these.
This module imports nothing and must stay so.
"""

from __future__ import annotations


class GpulaneError(Exception):
    """Something went wrong."""

    code = "error"

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or (self.__doc__ or "").strip()
        self.hint = hint
        super().__init__(self.message)


class ClientError(GpulaneError):
    """The request cannot be served as it is."""

    code = "bad_request"
    status = 400

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        if code is not None:
            self.code = code
        self.retry_after_seconds = retry_after_seconds


class BadRequest(ClientError):
    """The request cannot be understood."""


class NotAuthenticated(ClientError):
    """A key is needed."""

    code = "not_authenticated"
    status = 401


class NotPermitted(ClientError):
    """This role may not do that."""

    code = "not_permitted"
    status = 403


class NotFound(ClientError):
    """There is no such thing here."""

    code = "not_found"
    status = 404


class Conflict(ClientError):
    """The same id was used before with other content."""

    code = "conflict"
    status = 409


class TooLarge(ClientError):
    """The body is over the limit."""

    code = "too_large"
    status = 413


class Impossible(ClientError):
    """No GPU can ever run this job."""

    code = "impossible"
    status = 422


class Throttled(ClientError):
    """The queue is full."""

    code = "queue_full"
    status = 429


class Unavailable(ClientError):
    """This cannot be served now."""

    code = "unavailable"
    status = 503


class EngineError(GpulaneError):
    """An engine failed to answer as it should."""

    code = "engine_error"

    def __init__(self, message: str | None = None, *, sent: bool = True, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sent = sent
        """Whether a byte of the request may have reached the engine: if so, the job may have started."""


class StoreError(GpulaneError):
    """The store failed."""

    code = "store_error"


class ConfigError(GpulaneError):
    """The settings are wrong."""

    code = "config_error"
