"""Answers in A1111's shapes, and the refusals that are this front's own."""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from gpulane.errors import ClientError, EngineError, GpulaneError, NotPermitted, StoreError
from gpulane.relay import AnswerGone
from gpulane.web.ports import Identity, Role

NOT_FOUND: Final = b'{"detail":"Not Found"}'
METHOD_NOT_ALLOWED: Final = b'{"detail":"Method Not Allowed"}'
ORDER_BYTES_MAX: Final = 1024 * 1024
"""Largest body of what is no job; a whole dictionary of options is about 12 KiB."""

_JOB_STATUSES: Final = {
    "cancelled": 409,
    "client_gone": 409,
    "out_of_memory": 500,
    "poisoned": 500,
    "refused": 500,
}
"""What a call is told when its job ended without an answer of the engine; 502 for everything else.

409 for a cancelled one, since clients that repeat a call by its status do so for 429 and 5xx only, and
somebody wanted this one to end.
"""


class CallFailed(ClientError):
    """The job of a held call ended without an answer."""

    code = "job_failed"
    status = 502


class OperatorsOnly(NotPermitted):
    """It concerns the engine and everybody who uses it."""


def call_failed(error: GpulaneError) -> GpulaneError:
    """Put the end of a held job that brought no answer into a status and words for its client."""
    if isinstance(error, ClientError | EngineError | StoreError | AnswerGone):
        return error  # no word about the job: put into words for all services alike
    failed = CallFailed(error.message, code=error.code)
    failed.status = _JOB_STATUSES.get(error.code, CallFailed.status)
    return failed


def json_answer(value: object, status: int = 200) -> web.Response:
    """Answer JSON."""
    return json_bytes(msgspec.json.encode(value), status)


def json_bytes(body: bytes, status: int = 200) -> web.Response:
    """Answer JSON that is written already."""
    return web.Response(body=body, status=status, content_type="application/json")


def require_user(identity: Identity) -> None:
    """Refuse those who may only look."""
    if identity.role is Role.VIEWER:
        raise NotPermitted("This key may look but not change anything.")


def require_operator(identity: Identity) -> None:
    """Refuse what would touch other people's work."""
    if identity.role not in {Role.OPERATOR, Role.ADMIN}:
        raise OperatorsOnly("This concerns the engine and all its users.", hint="Ask an operator.")
