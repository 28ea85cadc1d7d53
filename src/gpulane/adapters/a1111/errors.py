"""Refusals in A1111's two shapes.

FastAPI's own validation answers 422 `{"detail": [{loc, msg, type}]}`; everything else the webui raises
becomes `{"error": class, "detail": ..., "body": "", "errors": ...}` with the status of the exception, or 500.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from gpulane.adapters.base import ErrorAnswer
from gpulane.errors import BadRequest, ClientError


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One field that is wrong, as FastAPI tells it."""

    loc: tuple[str | int, ...]
    msg: str
    type: str


class Invalid(BadRequest):
    """The body does not fit the endpoint."""

    code = "invalid_body"
    status = 422

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{'.'.join(map(str, p.loc))}: {p.msg}" for p in problems))


class UnknownName(ClientError):
    """No engine knows this name; A1111 would silently take another one."""

    status = 422


class EngineRefusal(ClientError):
    """What the engine itself would answer, said without asking it."""

    code = "refused"

    def __init__(
        self, message: str, *, status: int, code: str = "refused", error: str = "HTTPException"
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.error = error


def error_answer(error: ClientError) -> ErrorAnswer:
    """Say a refusal as A1111 would."""
    if isinstance(error, Invalid):
        body: dict[str, object] = {"detail": error.problems}
        return ErrorAnswer(status=error.status, body=msgspec.json.encode(body))
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    name = error.error if isinstance(error, EngineRefusal) else "HTTPException"
    # Clients show `detail` of an HTTPException and `errors` of anything else.
    is_http = name == "HTTPException"
    body = {
        "error": name,
        "detail": message if is_http else "",
        "body": "",
        "errors": "" if is_http else message,
        "code": error.code,
    }
    return ErrorAnswer(status=error.status, body=msgspec.json.encode(body))


def not_found_answer() -> ErrorAnswer:
    """Answer for a path that is not there."""
    return ErrorAnswer(status=404, body=b'{"detail":"Not Found"}')
