"""What a store says of its jobs: names and whose they are, records, bodies, pages; what is forgotten when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpulane.core.model import (
    AttemptState,
    Failure,
    FailureKind,
    JobId,
    JobState,
    Service,
)
from gpulane.store.base import Code, JobQuery, NewJob, Retention
from tests.contract.store.ground import (
    ANN,
    BOB,
    BROKEN,
    GPU,
    GPU2,
    LIMITS,
    NODE,
    Ground,
    claim_request,
    new_job,
)

pytestmark = pytest.mark.anyio

GONE = Failure(kind=FailureKind.CLIENT, code="client_gone", message="the client left")

# -- names


async def test_same_names_same_content_is_the_same_job(ground: Ground) -> None:
    new = NewJob(job=new_job(1), body=b"{}", digest="d", client_job_id="mine", idempotency_key="key")
    assert (await ground.store.enqueue(new, LIMITS)).code is Code.OK
    by_client = replace(new, job=new_job(2), idempotency_key=None)
    by_key = replace(new, job=new_job(3), client_job_id=None)
    token = await ground.started(new.job.id)
    for _ in range(2):  # while it runs, and once it has ended
        for again in (new, by_client, by_key):
            reply = await ground.store.enqueue(again, LIMITS)
            assert (reply.code, reply.job) == (Code.EXISTS, new.job.id)
            reply = await ground.store.enqueue(replace(again, digest="other"), LIMITS)
            assert (reply.code, reply.job) == (Code.CONFLICT, new.job.id)
        await ground.finish(new.job.id, token)
    record = await ground.store.job_of_client(ANN, Service.COMFYUI, "mine")
    assert record is not None
    assert (record.job.id, record.client_job_id) == (new.job.id, "mine")
    await ground.store.forget(new.job.id)
    assert (await ground.store.enqueue(by_client, LIMITS)).code is Code.OK


async def test_names_are_scoped(ground: Ground) -> None:
    new = NewJob(job=new_job(1), digest="d", client_job_id="mine", idempotency_key="key")
    await ground.store.enqueue(new, LIMITS)
    stranger = replace(new, job=new_job(2, BOB))
    assert (await ground.store.enqueue(stranger, LIMITS)).code is Code.OK
    other_service = replace(new, job=new_job(3, service=Service.A1111), idempotency_key=None)
    assert (await ground.store.enqueue(other_service, LIMITS)).code is Code.OK
    reply = await ground.store.enqueue(replace(new, job=new_job(1, BOB)), LIMITS)
    assert (reply.code, reply.state) == (Code.CONFLICT, None), "nothing is learned of another's job"


# -- records, bodies, pages


async def test_record_tells_the_whole_story(ground: Ground) -> None:
    new = NewJob(job=new_job(1), meta=b'{"labels":[1]}', body=b"body", digest="d")
    await ground.store.enqueue(new, LIMITS)
    job, t0 = new.job.id, ground.clock.now
    ground.clock.pass_seconds(1)
    await ground.fail(job, await ground.started(job))
    ground.clock.pass_seconds(1)
    token = await ground.started(job, GPU2)
    ground.clock.pass_seconds(1)
    running = await ground.record(job)
    assert (running.token, running.gpu, running.node, running.started) == (token, GPU2, NODE, True)
    await ground.finish(job, token)
    record = await ground.record(job)
    assert (record.job.submitted_at, record.submitted_at, record.meta) == (t0, t0, b'{"labels":[1]}')
    assert (record.started_at, record.finished_at, record.ended_by) == (t0 + 2, t0 + 3, token)
    assert [(a.number, a.gpu, a.state, a.failure) for a in record.attempts] == [
        (1, GPU, AttemptState.FAILED, BROKEN),
        (2, GPU2, AttemptState.FINISHED, None),
    ]
    assert (record.gpu, record.token, record.started, record.attempts_counted) == (GPU2, None, False, 2)
    assert await ground.store.body(job) == b"body"


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 64 * 1024 + 1, 1_000_000])
async def test_bodies_and_results_of_any_size(ground: Ground, size: int) -> None:
    body, result = b"b" * size, b"r" * size
    job = await ground.enqueue(body=body)
    assert await ground.store.body(job) == body
    assert await ground.store.result(job) is None
    await ground.finish(job, await ground.started(job), result=result)
    assert await ground.store.body(job) == body
    assert await ground.store.result(job) == result
    await ground.store.forget(job)
    assert await ground.store.body(job) is None
    assert await ground.store.result(job) is None


async def test_job_without_a_body(ground: Ground) -> None:
    job = await ground.enqueue(body=None, held=True, holder="n1.1")
    assert await ground.store.body(job) is None
    assert (await ground.record(job)).job.holder == "n1.1"


async def test_pages_are_newest_first_and_lose_nothing(ground: Ground) -> None:
    jobs = [await ground.enqueue(BOB if i % 3 == 0 else ANN) for i in range(20)]
    for job in jobs[5:9]:
        await ground.finish(job, await ground.started(job))
    await ground.started(jobs[9])
    await ground.store.cancel(jobs[19])
    seen: list[JobId] = []
    before: int | None = None
    while page := await ground.store.jobs(JobQuery(limit=7, before=before)):
        seen += [r.job.id for r in page]
        before = page[-1].job.arrival
        assert len(page) <= 7
    assert seen == jobs[::-1]

    async def found(query: JobQuery) -> set[int]:
        return {jobs.index(r.job.id) for r in await ground.store.jobs(query)}

    ann = {i for i in range(20) if i % 3}
    assert await found(JobQuery(account=ANN)) == ann
    assert await found(JobQuery(states=frozenset({JobState.SUCCEEDED}))) == {5, 6, 7, 8}
    assert await found(JobQuery(states=frozenset({JobState.RUNNING, JobState.CANCELLED}))) == {9, 19}
    assert await found(JobQuery(account=ANN, states=frozenset({JobState.SUCCEEDED}))) == {5, 7, 8}
    assert await found(JobQuery(states=frozenset({JobState.QUEUED}))) == set(range(19)) - {5, 6, 7, 8, 9}
    assert await found(JobQuery(service=Service.A1111)) == set()
    assert await found(
        JobQuery(service=Service.COMFYUI, states=frozenset({JobState.SUCCEEDED}), limit=2)
    ) == {7, 8}


# -- retention


async def test_prune_by_age(ground: Ground) -> None:
    old, young, waiting = [await ground.enqueue() for _ in range(3)]
    await ground.finish(old, await ground.started(old))
    ground.clock.pass_seconds(100)
    await ground.finish(young, await ground.started(young))
    assert await ground.store.prune(Retention(ended_seconds=100.0)) == (old,)
    assert await ground.store.prune(Retention(ended_seconds=100.0)) == ()
    assert await ground.store.job(old) is None
    ground.clock.pass_seconds(1000)
    assert await ground.store.prune(Retention(ended_seconds=100.0)) == (young,)
    assert (await ground.record(waiting)).state is JobState.QUEUED


async def test_prune_by_count_and_by_bytes(ground: Ground) -> None:
    jobs = [await ground.enqueue(body=b"x" * 1000) for _ in range(6)]
    for job in jobs:
        await ground.finish(job, await ground.started(job), result=b"y" * 1000)
    assert await ground.store.prune(Retention(ended_jobs_max=4)) == tuple(jobs[:2])
    assert await ground.store.prune(Retention(result_bytes_max=5000)) == tuple(jobs[2:4])
    assert await ground.store.prune(Retention(result_bytes_max=5000)) == ()


async def test_prune_forgets_accounts_that_v_has_overtaken(ground: Ground) -> None:
    job = await ground.enqueue(BOB)
    await ground.finish(job, await ground.started(job))
    busy = await ground.enqueue(ANN)
    await ground.store.claim(claim_request(busy, gpu=GPU, claim="c", lowest=500.0))
    await ground.store.prune(Retention())
    assert {a for _, a, _ in (await ground.store.snapshot()).account_f} == {ANN}
    await ground.enqueue(BOB)
    assert await ground.f(BOB) == 500.0
