"""One request to the native API, as its answers see it, and how answers are written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from gpulane.core.model import JobId
from gpulane.errors import BadRequest, NotFound, NotPermitted
from gpulane.store.base import JobRecord
from gpulane.web.ports import Identity, JobsPort, Role

_RANKS = {role: rank for rank, role in enumerate(Role)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request with its identity and the values of its path."""

    request: web.Request
    identity: Identity
    values: dict[str, str]

    @property
    def is_operator(self) -> bool:
        return is_at_least(self.identity, Role.OPERATOR)

    def number(self, name: str, default: int, *, low: int, high: int) -> int:
        """Read a number of the query. Raises BadRequest."""
        text = self.request.query.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
            raise BadRequest(f"{name}={text[:50]} is no number from {low} to {high}.", code="bad_query")
        return int(text)


Answer = Callable[[Asked], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One row of the API's table, and of its description."""

    method: str
    path: str
    answer: Answer
    summary: str
    role: Role = Role.VIEWER
    takes: type[msgspec.Struct] | None = None
    gives: type[msgspec.Struct] | None = None
    """None: not JSON of ours (a stream, a file, an engine's answer)."""
    content_type: str = "application/json"
    status: int = 200
    query: tuple[str, ...] = ()


def is_at_least(identity: Identity, role: Role) -> bool:
    """Tell whether the identity may do what this role may."""
    return _RANKS[identity.role] >= _RANKS[role]


def require(identity: Identity, role: Role) -> None:
    """Raise NotPermitted unless the identity has at least this role."""
    if not is_at_least(identity, role):
        raise NotPermitted(f"This takes the role {role.value}; this key is a {identity.role.value}'s.")


async def own_record(asked: Asked, jobs: JobsPort) -> JobRecord:
    """Find the job of the path. Somebody else's is as unknown as none at all, except to operators."""
    record = await jobs.record(JobId(asked.values["id"]))
    if record is None or not (asked.is_operator or record.job.account == asked.identity.account):
        raise NotFound("No such job.", code="no_such_job")
    return record


def json_response(
    document: msgspec.Struct, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """Write an answer."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )
