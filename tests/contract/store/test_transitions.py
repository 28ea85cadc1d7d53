"""Every verb from every state and every verb twice: codes, states, one event per change, else none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import pytest

from gpulane.core.model import Band, ClaimId, JobId, JobState, Token
from gpulane.store.base import Code, NewJob, Reply
from tests.contract.store.ground import (
    AGAIN,
    BROKEN,
    GPU,
    GPU2,
    LEASE,
    LIMITS,
    NO_TOKEN,
    NODE,
    Ground,
    claim_request,
    new_job,
)

pytestmark = pytest.mark.anyio

STATES = (
    "absent",
    "queued",
    "claimed",
    "running",
    "cancelling",
    "suspect",
    "failed_once",
    "rescued",
    "succeeded",
    "failed",
    "cancelled",
    "cancelled_running",
)

# Per verb, what it answers in each state: `code` leaves all as it was, `code>state` moves the job there.
TABLE: Final[dict[str, str]] = {
    "enqueue": "ok>queued exists exists exists exists exists exists exists exists exists exists exists",
    "claim": "lost ok>queued lost lost lost lost ok>waiting_retry ok>waiting_retry lost lost lost lost",
    "start": "unknown stale ok>running ok ok ok stale stale stale stale stale stale",
    "release": "unknown stale ok>queued stale stale stale stale stale stale stale stale stale",
    "finish_well": (
        "unknown stale stale ok>succeeded ok>cancelled ok>succeeded ok>succeeded ok>succeeded ok ok stale ok"
    ),
    "finish_badly": "unknown stale stale ok>failed ok>cancelled ok>failed stale stale ok ok stale ok",
    "fail": (
        "unknown stale stale ok>waiting_retry ok>cancelled ok>waiting_retry ok stale stale stale stale ok"
    ),
    "resume": ("unknown gone gone ok>running ok>running ok>running gone ok>running gone gone gone gone"),
    "expire": "unknown stale not_due not_due not_due ok stale stale stale stale stale stale",
    "expire_late": "unknown stale ok>queued ok>running ok>running ok stale stale stale stale stale stale",
    "rescue": "unknown stale not_due not_due not_due ok>waiting_retry stale ok stale stale stale stale",
    "cancel": (
        "unknown cancelled>cancelled cancelled>cancelled cancelling>running cancelling cancelling>running "
        "cancelled>cancelled cancelled>cancelled ended ended cancelled ended"
    ),
    "prioritise": (
        "unknown ok>queued not_waiting not_waiting not_waiting not_waiting ok>waiting_retry "
        "ok>waiting_retry not_waiting not_waiting not_waiting not_waiting"
    ),
    "forget": "unknown busy busy busy busy busy busy busy ok>gone ok>gone ok>gone ok>gone",
}
TWICE = {"enqueue": Code.EXISTS, "forget": Code.UNKNOWN}
"""What the second of two equal verbs answers where that is not the same."""

CASES = [
    (verb, state, outcome)
    for verb, row in TABLE.items()
    for state, outcome in zip(STATES, row.split(), strict=True)
]


async def bring(ground: Ground, state: str) -> tuple[JobId, Token]:
    """Return a job in that state with the last token it had."""
    if state == "absent":
        return new_job(99).id, NO_TOKEN
    job = await ground.enqueue()
    match state:
        case "queued":
            return job, NO_TOKEN
        case "claimed":
            return job, await ground.claimed(job)
        case "suspect":
            return job, await ground.suspected(job)
        case "rescued":
            return job, await ground.rescued(job)
        case "cancelled":
            await ground.store.cancel(job)
            return job, NO_TOKEN
        case _:
            token = await ground.started(job)
    if state.startswith("cancel"):
        await ground.store.cancel(job)
    if state == "failed_once":
        await ground.fail(job, token)
    if state in {"succeeded", "failed", "cancelled_running"}:
        await ground.finish(job, token, JobState.FAILED if state == "failed" else JobState.SUCCEEDED)
    return job, token


def verb_of(ground: Ground, verb: str, job: JobId, token: Token) -> Callable[[], Awaitable[Reply]]:
    store = ground.store
    request = claim_request(job, gpu=GPU2, claim="again")
    again = NewJob(job=new_job(int(job[-12:])), digest="d1")
    verbs: dict[str, Callable[[], Awaitable[Reply]]] = {
        "enqueue": lambda: store.enqueue(again, LIMITS),
        "claim": lambda: store.claim(request),
        "start": lambda: store.start(job, token),
        "release": lambda: store.release(job, token, "test"),
        "finish_well": lambda: ground.finish(job, token),
        "finish_badly": lambda: ground.finish(job, token, JobState.FAILED),
        "fail": lambda: store.fail(job, token, BROKEN, AGAIN, used_seconds=1.0),
        "resume": lambda: store.resume(NODE, 1, GPU, job, token, ClaimId("r1"), LEASE),
        "expire": lambda: store.expire(job, token),
        "expire_late": lambda: store.expire(job, token),
        "rescue": lambda: store.rescue(job, token, 0.0),
        "cancel": lambda: store.cancel(job),
        "prioritise": lambda: store.prioritise(job, Band.BATCH, 3),
        "forget": lambda: store.forget(job),
    }
    return verbs[verb]


@pytest.mark.parametrize(("verb", "state", "outcome"), CASES, ids=[f"{v}-{s}" for v, s, _ in CASES])
async def test_verb_from_state(ground: Ground, verb: str, state: str, outcome: str) -> None:
    job, token = await bring(ground, state)
    if verb == "expire_late":
        ground.clock.pass_seconds(LEASE)
    code, _, state_after = outcome.partition(">")
    call = verb_of(ground, verb, job, token)
    before, n = await ground.store.job(job), len(ground.events)

    reply = await call()
    after = await ground.store.job(job)
    assert reply.code == code
    if not state_after:
        assert after == before
        assert len(ground.events) == n
    elif state_after == "gone":
        assert after is None
    else:
        assert after is not None
        assert after.state == state_after
        assert [e.n for e in ground.events[n:]] == [reply.n]
        assert after.v == reply.n

    n = len(ground.events)
    second = await call()
    assert second.code == TWICE.get(verb, reply.code) if state_after else reply.code
    assert (second.job, second.token) == (reply.job, reply.token)
    assert await ground.store.job(job) == after
    assert len(ground.events) == n


@pytest.mark.parametrize("verb", ["start", "release", "finish_well", "fail", "expire", "rescue", "resume"])
@pytest.mark.parametrize("state", ["claimed", "running", "suspect"])
async def test_another_token_changes_nothing(ground: Ground, verb: str, state: str) -> None:
    job, token = await bring(ground, state)
    before = await ground.store.job(job)
    forged = Token(token.partition(".")[0] + ".forged")  # the right number, another claim
    reply = await verb_of(ground, verb, job, forged)()
    assert reply.code == (Code.GONE if verb == "resume" else Code.STALE)
    assert await ground.store.job(job) == before
