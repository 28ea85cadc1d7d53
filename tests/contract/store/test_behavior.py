"""What the contract promises beyond single transitions: orders of verbs, leases, limits, shares, events."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpulane.core.events import JobEnded, JobSubmitted, NodeChanged
from gpulane.core.model import (
    AttemptState,
    Band,
    ClaimId,
    Failure,
    FailureKind,
    GpuId,
    JobId,
    JobState,
    NodeId,
)
from gpulane.store.base import Again, ClaimCandidate, Code, NewJob, QueueLimits
from tests.contract.store.ground import (
    AGAIN,
    ANN,
    BOB,
    BROKEN,
    CHARGE,
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
from tests.contract.store.toy import ToyBook

pytestmark = pytest.mark.anyio

GONE = Failure(kind=FailureKind.CLIENT, code="client_gone", message="the client left")

# -- cancel against everything, in both orders


async def test_cancel_before_claim(ground: Ground) -> None:
    job = await ground.enqueue()
    assert (await ground.store.cancel(job)).code is Code.CANCELLED
    assert (await ground.claim(job)).code is Code.LOST


async def test_cancel_between_claim_and_start(ground: Ground) -> None:
    job, other = await ground.enqueue(), await ground.enqueue()
    token = await ground.claimed(job)
    assert (await ground.store.cancel(job)).code is Code.CANCELLED
    assert (await ground.store.start(job, token)).code is Code.STALE
    assert (await ground.claim(other)).code is Code.OK, "the slot is free"


async def test_cancel_after_start_rules_over_success(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.started(job)
    assert (await ground.store.cancel(job, GONE)).code is Code.CANCELLING
    reply = await ground.finish(job, token, JobState.SUCCEEDED)
    assert (reply.code, reply.state) == (Code.OK, JobState.CANCELLED)
    record = await ground.record(job)
    assert (record.state, record.failure, record.ended_by) == (JobState.CANCELLED, GONE, token)
    assert await ground.store.result(job) is None


async def test_cancel_after_finish(ground: Ground) -> None:
    job = await ground.enqueue()
    await ground.finish(job, await ground.started(job))
    reply = await ground.store.cancel(job)
    assert (reply.code, reply.state) == (Code.ENDED, JobState.SUCCEEDED)


async def test_wanted_cancel_rules_over_rescue(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.started(job)
    await ground.store.cancel(job)
    ground.clock.pass_seconds(LEASE)
    await ground.store.expire(job, token)
    reply = await ground.store.rescue(job, token, 0.0)
    assert (reply.code, reply.state) == (Code.OK, JobState.CANCELLED)


async def test_nobody_is_cancelled_whom_nobody_cancelled(ground: Ground) -> None:
    job = await ground.enqueue()
    interrupted = Failure(kind=FailureKind.INTERRUPTED, code="interrupted", message="by a stranger")
    reply = await ground.store.finish(
        job,
        await ground.started(job),
        state=JobState.CANCELLED,
        failure=interrupted,
        used_seconds=1.0,
        result=None,
    )
    assert reply.state is JobState.FAILED
    assert (await ground.record(job)).failure == interrupted


# -- leases


async def test_expired_lease_is_not_renewed_but_resumed(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.started(job)
    ground.clock.pass_seconds(LEASE)
    beat = await ground.store.beat(NODE, 1, 30.0, LEASE, ((job, token),))
    assert beat.leases == ((job, Code.EXPIRED),)
    assert beat.expired == ((job, token),)
    assert (await ground.store.expire(job, token)).code is Code.OK
    resumed = await ground.store.resume(NODE, 1, GPU, job, token, ClaimId("r1"), LEASE)
    assert resumed.code is Code.OK
    assert resumed.token is not None
    assert resumed.token != token
    beat = await ground.store.beat(NODE, 1, 30.0, LEASE, ((job, token), (job, resumed.token)))
    assert beat.leases == ((job, Code.GONE), (job, Code.OK))
    assert (await ground.finish(job, token)).code is Code.STALE
    assert (await ground.finish(job, resumed.token)).code is Code.OK
    assert (await ground.record(job)).attempts_counted == 1


async def test_claim_is_not_started_on_an_expired_lease(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.claimed(job)
    ground.clock.pass_seconds(LEASE)
    assert (await ground.store.start(job, token)).code is Code.EXPIRED
    assert (await ground.store.expire(job, token)).code is Code.OK
    assert (await ground.record(job)).attempts == ()
    assert await ground.f() == 0.0


async def test_beat_renews_and_tells_what_the_store_thinks(ground: Ground) -> None:
    job, other = await ground.enqueue(), await ground.enqueue()
    token = await ground.started(job)
    ground.clock.pass_seconds(LEASE - 1)
    n = len(ground.events)
    beat = await ground.store.beat(
        NODE, 1, 30.0, LEASE, ((job, token), (other, NO_TOKEN), (JobId("x"), token))
    )
    assert (beat.code, beat.store_seconds) == (Code.OK, ground.clock.now)
    assert beat.leases == ((job, Code.OK), (other, Code.GONE), (JobId("x"), Code.UNKNOWN))
    assert beat.slots == ((GPU, job, token),)
    assert len(ground.events) == n, "a beat appends no event"
    ground.clock.pass_seconds(LEASE - 1)
    await ground.store.cancel(job)
    assert (await ground.store.beat(NODE, 1, 30.0, LEASE, ((job, token),))).leases == ((job, Code.CANCEL),)
    assert (await ground.store.beat(NODE, 2, 30.0, LEASE, ())).code is Code.STALE


async def test_due_lists_go_to_one_beat_per_interval(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.started(job)
    ground.clock.pass_seconds(LEASE)
    assert (await ground.store.beat(NODE, 1, 30.0, LEASE, ())).expired == ((job, token),)
    assert (await ground.store.beat(NODE, 1, 30.0, LEASE, ())).expired == ()
    await ground.store.expire(job, token)
    ground.clock.pass_seconds(5)
    beat = await ground.store.beat(NODE, 1, 30.0, LEASE, ())
    assert (beat.expired, beat.suspects) == ((), ((job, token),))


async def test_grace_runs_from_the_mark(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.started(job)
    ground.clock.pass_seconds(LEASE + 1000)  # the store was away
    await ground.store.expire(job, token)
    assert (await ground.store.rescue(job, token, 60.0)).code is Code.NOT_DUE
    ground.clock.pass_seconds(60)
    assert (await ground.store.rescue(job, token, 60.0)).state is JobState.WAITING_RETRY
    record = await ground.record(job)
    assert record.avoid == {GPU}
    assert [a.state for a in record.attempts] == [AttemptState.LOST]


async def test_rescue_ends_what_may_not_run_again(ground: Ground) -> None:
    once = await ground.enqueue(max_attempts=1)
    await ground.rescued(once)
    paid = await ground.enqueue(rerun_lost=False)
    await ground.rescued(paid)
    for job in (once, paid):
        record = await ground.record(job)
        assert record.failure is not None
        assert (record.state, record.failure.code) == (JobState.FAILED, "lost")


async def test_job_whose_attempts_killed_engines_ends_poisoned(ground: Ground) -> None:
    job = await ground.enqueue(max_attempts=2)
    killer = replace(BROKEN, killed_engine=True)
    await ground.store.fail(job, await ground.started(job), killer, AGAIN, used_seconds=0.0)
    await ground.rescued(job)
    failure = (await ground.record(job)).failure
    assert failure is not None
    assert failure.code == "poisoned"


async def test_late_success_of_a_rescued_attempt_ends_the_job(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.rescued(job)
    assert (await ground.finish(job, token, JobState.FAILED)).code is Code.STALE
    reply = await ground.finish(job, token, used=25.0)
    assert (reply.code, reply.state) == (Code.OK, JobState.SUCCEEDED)
    assert await ground.f() == 25.0
    assert await ground.store.result(job) == b"done"


async def test_late_success_wins_over_a_mere_claim_only(ground: Ground) -> None:
    first, second = await ground.enqueue(), await ground.enqueue()
    old1, old2 = await ground.rescued(first), await ground.rescued(second)
    new1 = await ground.claimed(first, GPU)
    await ground.started(second, GPU2)
    assert (await ground.finish(first, old1)).code is Code.OK
    assert (await ground.store.start(first, new1)).code is Code.STALE
    assert (await ground.finish(second, old2)).code is Code.STALE, "the second attempt has started"
    assert (await ground.claim(await ground.enqueue(), gpu=GPU)).code is Code.OK, "the slot is free"


async def test_rescued_attempt_is_resumed_unless_its_gpu_is_taken(ground: Ground) -> None:
    job, other = await ground.enqueue(), await ground.enqueue()
    token = await ground.rescued(job)
    blocker = await ground.claimed(other, GPU)
    resume = ground.store.resume
    assert (await resume(NODE, 1, GPU, job, token, ClaimId("r1"), LEASE)).code is Code.BUSY
    await ground.store.release(other, blocker, "test")
    assert (await resume(NODE, 1, GPU, job, token, ClaimId("r1"), LEASE)).code is Code.OK
    record = await ground.record(job)
    assert (record.state, record.attempts_counted, record.started) == (JobState.RUNNING, 1, True)
    assert (await resume(NODE, 2, GPU, job, token, ClaimId("r1"), LEASE)).code is Code.STALE


# -- claims


async def test_claim_takes_the_first_that_can_be_had(ground: Ground) -> None:
    gone, resting, avoiding, good = [await ground.enqueue() for _ in range(4)]
    await ground.store.cancel(gone)
    await ground.fail(
        resting, await ground.started(resting), Again(rest_seconds=60.0, avoid=frozenset(), refund=False)
    )
    await ground.fail(avoiding, await ground.started(avoiding))
    request = claim_request(gone, resting, avoiding, good, gpu=GPU, claim="c")
    strict = tuple(replace(c, despite_avoid=False) for c in request.candidates)
    reply = await ground.store.claim(replace(request, candidates=strict))
    assert reply.job == good
    snapshot = await ground.store.snapshot()
    assert {w.job.id: w.not_before_seconds for w in snapshot.waiting} == {resting: 60.0, avoiding: 0.0}
    ground.clock.pass_seconds(60)
    assert (await ground.claim(resting, gpu=GPU2)).job == resting


async def test_candidate_may_be_taken_despite_its_avoidance(ground: Ground) -> None:
    job = await ground.enqueue()
    await ground.fail(job, await ground.started(job))
    request = claim_request(job, gpu=GPU, claim="c")
    strict = replace(
        request, candidates=(ClaimCandidate(job=job, engine=request.candidates[0].engine, charge_seconds=1),)
    )
    assert (await ground.store.claim(strict)).code is Code.LOST
    assert (await ground.store.claim(request)).code is Code.OK


async def test_repeated_claim_gets_the_same_answer_even_paused(ground: Ground) -> None:
    job, other = await ground.enqueue(), await ground.enqueue()
    first = await ground.claim(job, claim="same")
    await ground.store.pause(True)
    assert replace(await ground.claim(other, claim="same"), n=first.n) == first


async def test_busy_names_what_holds_the_slot(ground: Ground) -> None:
    job, other = await ground.enqueue(), await ground.enqueue()
    token = await ground.claimed(job)
    reply = await ground.claim(other)
    assert (reply.code, reply.job, reply.token) == (Code.BUSY, job, token)


async def test_drain_between_decide_and_claim(ground: Ground) -> None:
    job = await ground.enqueue()
    await ground.store.drain(GPU, draining=True)
    assert (await ground.claim(job)).code is Code.DRAINING
    assert (await ground.claim(job, gpu=GPU2)).code is Code.OK
    await ground.store.drain(GPU, draining=False)
    assert (await ground.claim(await ground.enqueue())).code is Code.OK


async def test_drain_and_pause_leave_what_runs_alone_and_tell_once(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.started(job)
    n = len(ground.events)
    for _ in range(2):
        assert (await ground.store.drain(GPU, draining=True)).code is Code.OK
        assert (await ground.store.pause(True)).code is Code.OK
    assert len(ground.events) == n + 2
    assert (await ground.claim(await ground.enqueue(), gpu=GPU2)).code is Code.HOLD
    assert (await ground.finish(job, token)).code is Code.OK


async def test_claims_of_an_old_boot_or_a_foreign_gpu_are_stale(ground: Ground) -> None:
    job = await ground.enqueue()
    request = claim_request(job, gpu=GPU, claim="c")
    assert (await ground.store.claim(replace(request, boot=0))).code is Code.STALE
    assert (await ground.store.claim(replace(request, node=NodeId("other")))).code is Code.STALE
    assert (await ground.store.claim(replace(request, gpu=GpuId("box/none")))).code is Code.STALE


async def test_two_gpus_one_job(ground: Ground) -> None:
    job = await ground.enqueue()
    codes = [r.code for r in await asyncio.gather(ground.claim(job), ground.claim(job, gpu=GPU2))]
    assert sorted(codes) == [Code.LOST, Code.OK]


# -- limits


async def test_queue_and_account_limits_hold_and_never_drift(ground: Ground) -> None:
    limits = QueueLimits(queued_max=3, queued_per_account_max=2)

    async def offer(number: int, account: str) -> Code:
        job = new_job(number, ANN if account == "ann" else BOB)
        return (await ground.store.enqueue(NewJob(job=job), limits)).code

    first = [await offer(n, "ann") for n in (101, 102, 103)]
    assert first == [Code.OK, Code.OK, Code.ACCOUNT_FULL]
    assert [await offer(n, "bob") for n in (104, 105)] == [Code.OK, Code.FULL]
    job = new_job(101).id
    for _ in range(3):  # out of what waits, and back
        await ground.store.release(job, await ground.claimed(job), "test")
        assert await offer(106, "ann") is Code.FULL
    token = await ground.started(job)
    assert await offer(106, "ann") is Code.OK
    await ground.fail(job, token)
    await ground.store.cancel(job)
    await ground.store.cancel(new_job(104).id)
    assert await offer(107, "bob") is Code.OK
    assert await offer(108, "bob") is Code.FULL
    assert len((await ground.store.snapshot()).waiting) == 3


# -- fair share


async def test_newcomer_is_lifted_to_v(ground: Ground) -> None:
    job = await ground.enqueue()
    await ground.store.claim(claim_request(job, gpu=GPU, claim="c", lowest=100.0))
    assert (await ground.store.snapshot()).band_v == ((Band.NORMAL, 100.0),)
    await ground.enqueue(BOB)
    assert await ground.f(BOB) == 100.0
    second = await ground.enqueue(BOB)
    await ground.store.claim(claim_request(second, gpu=GPU2, claim="d", lowest=400.0))
    assert await ground.f(BOB) == 100.0 + CHARGE, "no lift while another of theirs waits"
    lower = claim_request(await ground.enqueue(), gpu=GPU2, claim="e", lowest=5.0)
    await ground.store.claim(lower)
    assert (await ground.store.snapshot()).band_v == ((Band.NORMAL, 400.0),), "V never falls"


async def test_charge_is_divided_by_weight_refunded_and_corrected(ground: Ground) -> None:
    job = await ground.enqueue(weight=2.0)
    token = await ground.claimed(job)
    assert await ground.f() == CHARGE / 2
    await ground.store.release(job, token, "test")
    assert await ground.f() == 0.0
    token = await ground.started(job)
    await ground.fail(job, token, Again(rest_seconds=0, avoid=frozenset(), refund=True), used=99.0)
    assert await ground.f() == 0.0
    token = await ground.started(job)
    await ground.fail(job, token, AGAIN, used=6.0)
    assert await ground.f() == 3.0
    await ground.finish(job, await ground.started(job), used=30.0)
    assert await ground.f() == 18.0
    ended = ground.events[-1]
    assert isinstance(ended, JobEnded)
    assert ended.account_f == 18.0


async def test_bands_have_accounts_of_their_own(ground: Ground) -> None:
    job = await ground.enqueue()
    await ground.store.claim(claim_request(job, gpu=GPU, claim="c", lowest=50.0))
    other = await ground.enqueue(band=Band.BATCH)
    assert await ground.f(band=Band.BATCH) == 0.0
    await ground.store.prioritise(other, Band.NORMAL, 1)
    assert await ground.f() == CHARGE + 0.0 if CHARGE > 50 else 50.0
    record = await ground.record(other)
    assert (record.job.band, record.job.priority) == (Band.NORMAL, 1)


# -- nodes


async def test_restart_tells_what_the_earlier_boot_left(ground: Ground) -> None:
    started, claimed = await ground.enqueue(), await ground.enqueue()
    token, claim = await ground.started(started), await ground.claimed(claimed, GPU2)
    held = await ground.enqueue(held=True, holder=f"{NODE}.1")
    mine = await ground.enqueue(held=True, holder=f"{NODE}.2")
    gpus = ((GPU, "uuid-0"), (GPU2, "uuid-1"))
    first = await ground.store.register(NODE, 2, gpus, "box")
    for reply in (first, await ground.store.register(NODE, 2, gpus, "box")):
        assert reply.code is Code.OK
        assert (reply.held_waiting, reply.claims) == ((held,), ((claimed, claim),))
        assert reply.started == ((started, token, GPU),)
    assert mine not in first.held_waiting
    assert isinstance(ground.events[-1], NodeChanged)
    assert (await ground.store.register(NODE, 1, gpus, "box")).code is Code.STALE
    resumed = await ground.store.resume(NODE, 2, GPU, started, token, ClaimId("r"), LEASE)
    assert resumed.code is Code.OK


async def test_gpu_belongs_to_one_living_node(ground: Ground) -> None:
    other = NodeId("n2")
    same_uuid = ((GpuId("two/gpu0"), "uuid-0"),)
    assert (await ground.store.register(other, 1, same_uuid, "two")).code is Code.TAKEN
    ground.clock.pass_seconds(1000)  # the first is not seen any more
    assert (await ground.store.register(other, 1, same_uuid, "two")).code is Code.OK
    assert (await ground.claim(await ground.enqueue())).code is Code.STALE
    assert (await ground.store.beat(other, 1, 30.0, LEASE, ())).nodes_gone == (NODE,)


async def test_node_leaves_once_its_gpus_hold_nothing(ground: Ground) -> None:
    job = await ground.enqueue()
    token = await ground.claimed(job)
    assert (await ground.store.leave(NODE, 1)).code is Code.BUSY
    await ground.store.release(job, token, "test")
    assert (await ground.store.leave(NODE, 0)).code is Code.STALE
    for _ in range(2):
        assert (await ground.store.leave(NODE, 1)).code is Code.OK
    assert (await ground.claim(job)).code is Code.STALE


# -- events


async def test_events_come_before_the_reply_in_order_and_dense(ground: Ground) -> None:
    start = ground.events[-1].n

    async def life(i: int) -> None:
        job = new_job(1000 + i)
        reply = await ground.store.enqueue(NewJob(job=job, digest="d"), LIMITS)
        assert any(isinstance(e, JobSubmitted) and e.n == reply.n for e in ground.events)
        if i % 2:
            reply = await ground.store.cancel(job.id)
            assert any(isinstance(e, JobEnded) and e.job == job.id for e in ground.events)

    async with asyncio.TaskGroup() as group:
        for i in range(50):
            group.create_task(life(i))
    assert [e.n for e in ground.events if e.n > start] == list(range(start + 1, start + 76))


async def test_snapshot_is_what_the_events_say(ground: Ground) -> None:
    toy = ToyBook()
    a, b, c, d, e = [await ground.enqueue(BOB if i % 2 else ANN, weight=2.0) for i in range(5)]
    await ground.finish(a, await ground.started(a))
    await ground.fail(b, await ground.started(b))
    lost = await ground.rescued(c)
    await ground.store.resume(NODE, 1, GPU, c, lost, ClaimId("r1"), LEASE)
    await ground.store.cancel(c)
    await ground.store.cancel(d)
    await ground.store.prioritise(e, Band.INTERACTIVE, 7)
    await ground.claimed(e, GPU2)
    await ground.store.drain(GPU2, draining=True)
    await ground.store.pause(True)
    for event in ground.events:
        toy.apply(event)
    toy.agrees_with(await ground.store.snapshot())
