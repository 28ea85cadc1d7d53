"""The verbs of nodes, leases and steering. Like those of `transitions`: checked first, then changed, one
event each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from gpulane.core.events import AttemptFailed, GpuDrained, LeaseExpired, NodeChanged, QueuePaused
from gpulane.core.model import (
    ENDED,
    AttemptState,
    Failure,
    FailureKind,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Token,
)
from gpulane.store.base import BeatReply, Code, RegisterReply, Reply
from gpulane.store.records import Attempt, Node, Row
from gpulane.store.tables import Tables
from gpulane.store.transitions import close_attempt, held_by, is_current, refusal, release

SWEEP_SECONDS: Final = 5.0
"""At most one beat in so many seconds is told what is due."""
DUE_MAX: Final = 50
"""How much of each kind one beat is told."""
REGISTERED_SECONDS: Final = 30.0
"""How long a node counts as seen from its registration, before its first beat."""


def register(
    t: Tables, node_id: NodeId, boot: int, gpus: tuple[tuple[GpuId, str], ...], name: str, now: float
) -> RegisterReply:
    known = t.nodes.get(node_id)
    if known is not None and boot < known.boot:
        return RegisterReply(code=Code.STALE, n=t.n)
    if any(is_taken(node, gpus) for node in t.nodes.values() if node.id != node_id and lives(node, now)):
        return RegisterReply(code=Code.TAKEN, n=t.n)
    node = Node(id=node_id, boot=boot, name=name, gpus=dict(gpus))
    node.seen_until = max(now + REGISTERED_SECONDS, known.seen_until if known else 0.0)
    if node != known:
        take_gpus_over(t, node)
        n = t.change()
        t.changes.nodes.add(node_id)
        t.tell(NodeChanged(n=n, node=node_id, present=True))
    t.nodes[node_id] = node
    return leftovers(t, node)


def lives(node: Node, now: float) -> bool:
    return node.present and node.seen_until > now


def is_taken(node: Node, gpus: tuple[tuple[GpuId, str], ...]) -> bool:
    uuids = set(node.gpus.values())
    return any(gpu in node.gpus or uuid in uuids for gpu, uuid in gpus)


def take_gpus_over(t: Tables, new: Node) -> None:
    """Take from nodes not seen any more the gpus that this one brings."""
    uuids = set(new.gpus.values())
    for old in t.nodes.values():
        kept = {gpu: uuid for gpu, uuid in old.gpus.items() if gpu not in new.gpus and uuid not in uuids}
        if old.id != new.id and kept != old.gpus:
            old.gpus = kept
            t.changes.nodes.add(old.id)


def leftovers(t: Tables, node: Node) -> RegisterReply:
    """Return what earlier boots of a node left behind."""
    held: list[JobId] = []
    claims: list[tuple[JobId, Token]] = []
    started: list[tuple[JobId, Token, GpuId]] = []
    for row in t.live.values():
        grant = row.grant
        is_started = grant is not None and grant.state is AttemptState.STARTED
        is_old = grant is not None and grant.node == node.id and grant.boot != node.boot
        if row.job.held and not is_started and was_held_by(row, node):
            held.append(row.job.id)
        elif grant is not None and is_old and is_started:
            started.append((row.job.id, grant.token, grant.gpu))
        elif grant is not None and is_old:
            claims.append((row.job.id, grant.token))
    return RegisterReply(
        code=Code.OK, n=t.n, held_waiting=tuple(held), claims=tuple(claims), started=tuple(started)
    )


def was_held_by(row: Row, node: Node) -> bool:
    holder, _, boot = row.job.holder.rpartition(".")
    return holder == node.id and boot != str(node.boot)


def leave(t: Tables, node_id: NodeId, boot: int) -> Reply:
    node = t.nodes.get(node_id)
    if node is None or (node.boot == boot and not node.present):
        return Reply(code=Code.OK, n=t.n)
    if node.boot != boot:
        return Reply(code=Code.STALE, n=t.n)
    if slots_of(t, node_id):
        return Reply(code=Code.BUSY, n=t.n)
    node.present = False
    n = t.change()
    t.changes.nodes.add(node_id)
    t.tell(NodeChanged(n=n, node=node_id, present=False))
    return Reply(code=Code.OK, n=n)


def slots_of(t: Tables, node: NodeId) -> tuple[tuple[GpuId, JobId, Token], ...]:
    held = ((gpu, row.job.id, row.grant) for gpu, row in sorted(t.slots.items()))
    return tuple((gpu, job, grant.token) for gpu, job, grant in held if grant and grant.node == node)


def beat(
    t: Tables,
    node_id: NodeId,
    boot: int,
    seen_seconds: Seconds,
    lease_seconds: Seconds,
    leases: tuple[tuple[JobId, Token], ...],
    now: float,
) -> BeatReply:
    node = t.nodes.get(node_id)
    if node is None or not is_current(node, boot):
        return BeatReply(code=Code.STALE, n=t.n, store_seconds=now)
    node.seen_until = now + seen_seconds
    renewed = tuple((job, renew(t, job, token, now, lease_seconds)) for job, token in leases)
    reply = BeatReply(code=Code.OK, n=t.n, store_seconds=now, leases=renewed, slots=slots_of(t, node_id))
    if t.swept_at is not None and 0 <= now - t.swept_at < SWEEP_SECONDS:
        return reply
    t.swept_at = now
    return replace(
        reply,
        expired=due(t, lambda grant: grant.suspect_at is None and grant.lease_until <= now),
        suspects=due(t, lambda grant: grant.suspect_at is not None),
        nodes_gone=tuple(n.id for n in t.nodes.values() if n.present and not lives(n, now))[:DUE_MAX],
    )


def renew(t: Tables, job: JobId, token: Token, now: float, lease_seconds: Seconds) -> Code:
    row, grant = held_by(t, job, token)
    if row is None:
        return Code.UNKNOWN
    if grant is None:
        return Code.GONE
    if grant.lease_until <= now or grant.suspect_at is not None:
        return Code.EXPIRED
    if grant.lease_until != now + lease_seconds:
        grant.lease_until = now + lease_seconds
        t.changes.rows[job] = row
    return Code.CANCEL if row.cancel_wanted else Code.OK


def due(t: Tables, is_due: Callable[[Attempt], bool]) -> tuple[tuple[JobId, Token], ...]:
    grants = ((row.job.id, row.grant) for row in t.active.values())
    found = [(grant.lease_until, job, grant.token) for job, grant in grants if grant and is_due(grant)]
    return tuple((job, token) for _, job, token in sorted(found)[:DUE_MAX])


def expire(t: Tables, job: JobId, token: Token, now: float) -> Reply:
    row, grant = held_by(t, job, token)
    if row is not None and row.given_back == token:
        return Reply(code=Code.OK, n=t.n, job=job, state=row.state)
    if row is None or grant is None:
        return refusal(t, job, row)
    if grant.suspect_at is not None:
        return Reply(code=Code.OK, n=t.n, job=job, token=token, state=row.state)
    if grant.lease_until > now:
        return Reply(code=Code.NOT_DUE, n=t.n, job=job, token=token, state=row.state)
    if grant.state is AttemptState.CLAIMED:
        return release(t, job, token, "lease_expired")
    grant.suspect_at = now
    n = t.change(row)
    t.tell(LeaseExpired(n=n, job=job))
    return Reply(code=Code.OK, n=n, job=job, token=token, state=row.state)


def rescue(t: Tables, job: JobId, token: Token, grace_seconds: Seconds, now: float) -> Reply:
    """1. came again  2. no suspect, or within its grace  3. cancel wanted  4. another attempt  5. the end."""
    row, grant = held_by(t, job, token)
    if row is not None and grant is None and was_rescued(row, token):
        return Reply(code=Code.OK, n=t.n, job=job, state=row.state)
    if row is None or grant is None:
        return refusal(t, job, row)
    if grant.suspect_at is None or now - grant.suspect_at < grace_seconds:
        return Reply(code=Code.NOT_DUE, n=t.n, job=job, token=token, state=row.state)
    failure = lost_failure(row, grant)
    t.take(row)
    close_attempt(grant, AttemptState.LOST, failure, now)
    f = t.pay(row, grant, 0.0)  # our fault, so the account does not pay
    if row.cancel_wanted:
        t.end(row, JobState.CANCELLED, row.failure, token, now)
    elif row.attempts_counted < row.job.max_attempts and row.job.rerun_lost:
        t.rest(row)
        row.state, row.avoid, row.failure = JobState.WAITING_RETRY, row.avoid | {grant.gpu}, failure
        n = t.change(row)
        t.tell(
            AttemptFailed(
                n=n,
                job=job,
                token=token,
                failure=failure,
                avoid=row.avoid,
                not_before_seconds=0.0,
                account_f=f,
            )
        )
    else:
        t.end(row, JobState.FAILED, failure, token, now)
    return Reply(code=Code.OK, n=t.n, job=job, state=row.state)


def was_rescued(row: Row, token: Token) -> bool:
    attempt = row.attempt(token)
    is_lost = attempt is not None and attempt.state is AttemptState.LOST
    return is_lost and (row.state not in ENDED or row.ended_by == token)


def lost_failure(row: Row, grant: Attempt) -> Failure:
    kills = any(a.failure is not None and a.failure.killed_engine for a in row.attempts)
    return Failure(
        kind=FailureKind.LOST,
        code="poisoned" if kills else "lost",
        message=f"{grant.gpu} did not answer any more while it ran this job",
    )


def drain(t: Tables, gpu: GpuId, is_draining: bool) -> Reply:
    if (gpu in t.draining) != is_draining:
        t.draining.symmetric_difference_update({gpu})
        n = t.change()
        t.changes.gpus.add(gpu)
        t.tell(GpuDrained(n=n, gpu=gpu, draining=is_draining))
    return Reply(code=Code.OK, n=t.n)


def pause(t: Tables, is_paused: bool) -> Reply:
    if t.paused != is_paused:
        t.paused = is_paused
        n = t.change()
        t.changes.paused = True
        t.tell(QueuePaused(n=n, paused=is_paused))
    return Reply(code=Code.OK, n=t.n)
