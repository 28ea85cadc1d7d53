"""What all adapters share: the words in which they tell the rest of gpulane about a request. Pure data, no
behavior.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from gpulane.core.model import NO_MODEL, ModelKey, Work

HeaderList = tuple[tuple[str, str], ...]
"""Headers in their order, duplicates kept."""


class Route(StrEnum):
    """What a request to a service's front door is, told from method and path alone."""

    JOB = "job"
    """It needs the gpu: its body is read and it becomes a job."""
    OWN = "own"
    """It asks about jobs, progress, options, lists: the front door answers from the gateway's own
    knowledge."""
    RELAY = "relay"
    """Not a job: passed to an engine of the service byte for byte."""
    CLOSED = "closed"
    """Dangerous, or would touch other people's work or the gpu behind the queue's back: refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What is sent to the engine to do a job, built by us and never the client's bytes unread."""

    method: str
    target: str
    """Origin-form, already percent-encoded as it goes on the wire."""
    headers: HeaderList = ()
    body: bytes = b""


class _RequestHead(msgspec.Struct, frozen=True):
    method: str
    target: str
    headers: HeaderList


def encode_request(request: EngineRequest) -> bytes:
    """Write a request as a stored body: its head as one line of JSON, then its own body untouched."""
    head = _RequestHead(request.method, request.target, request.headers)
    return msgspec.json.encode(head) + b"\n" + request.body


def decode_request(stored: bytes) -> EngineRequest:
    """Read what `encode_request` wrote."""
    head_line, _, body = stored.partition(b"\n")
    head = msgspec.json.decode(head_line, type=_RequestHead)
    return EngineRequest(method=head.method, target=head.target, headers=head.headers, body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognized:
    """A request understood as a job: what the scheduler needs, and what will be sent."""

    kind: str
    request: EngineRequest
    model: ModelKey = NO_MODEL
    signature: str = ""
    work: Work = field(default_factory=Work)
    needs: frozenset[str] = frozenset()
    client_job_id: str | None = None
    meta: bytes = b"{}"
    """JSON that the front door and the engine client need again later (client id, endpoint ...)."""
    digest: str = ""
    """Digest of the content, equal for equal requests: idempotency and joining."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """A refusal in the service's own shape."""

    status: int
    body: bytes
    content_type: str = "application/json"
