"""Random verbs against the oracle; for the durable store also random crashes, after which nothing may
differ."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpulane.core.model import ClaimId, GpuId, JobId, JobState, Token
from gpulane.store.base import Again, JobRecord, NewJob, QueueLimits, Reply
from tests.contract.store.conftest import make_ground
from tests.contract.store.ground import (
    ANN,
    BOB,
    BROKEN,
    CHARGE,
    GPU,
    GPU2,
    LEASE,
    NODE,
    Ground,
    claim_request,
    new_job,
)
from tests.contract.store.oracle import Oracle
from tests.contract.store.toy import ToyBook

pytestmark = pytest.mark.timeout(360)  # a failure is made small first, which takes its time

JOBS = 2
"""Places; once the job of a place has ended, another takes it."""
MOST = QueueLimits(queued_max=2)
numbers = st.integers(min_value=0, max_value=JOBS - 1)
gpus = st.sampled_from([GPU, GPU2])
claims = st.sampled_from(["a", "b", "c", "d"])
ages = st.sampled_from([1, 1, 1, 2, 3])
"""Which of a job's tokens to send: mostly its newest."""
seldom = st.sampled_from([False, False, False, True])


class StoreMachine(RuleBasedStateMachine):
    """One store beside one oracle."""

    kind = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="gpulane-test-"))
        self.crashes = 0
        self.ground: Ground = make_ground(self.kind, self.folder / "0")
        self.oracle = Oracle()
        self.toy = ToyBook()
        self.tokens: dict[JobId, list[Token]] = {}
        self.places = list(range(JOBS))

    @initialize()
    def open(self) -> None:
        self.runner.run(self.ground.open())
        self.oracle.n = 1  # the registration
        for number in range(JOBS):
            self.enqueue(number, ANN)

    def teardown(self) -> None:
        self.runner.run(self.ground.store.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    @property
    def now(self) -> float:
        return self.ground.clock.now

    def at(self, place: int) -> JobId:
        return new_job(self.places[place]).id

    def token(self, job: JobId, age: int) -> Token:
        had = self.tokens.get(job, [])
        return had[-age] if age <= len(had) else had[-1] if had else Token("0.none")

    def check(self, reply: Reply, expected: str) -> None:
        assert (reply.code, reply.n) == (expected, self.oracle.n)
        if reply.job is not None and reply.token is not None:
            had = self.tokens.setdefault(reply.job, [])
            if reply.token not in had:
                had.append(reply.token)

    # -- verbs

    @rule(number=numbers, account=st.sampled_from([ANN, ANN, BOB]))
    def enqueue(self, number: int, account: str) -> None:
        job = new_job(self.places[number], ANN if account == ANN else BOB)
        reply = self.runner.run(self.ground.store.enqueue(NewJob(job=job, body=b"{}"), MOST))
        self.check(reply, self.oracle.enqueue(job.id, account, MOST.queued_max))
        if job.id in self.oracle.jobs and self.oracle.jobs[job.id].is_over:
            self.places[number] += JOBS

    @rule(gpu=gpus, claim=claims, first=numbers, second=numbers, lowest=st.sampled_from([0.0, 7.0, 40.0]))
    def claim(self, gpu: GpuId, claim: str, first: int, second: int, lowest: float) -> None:
        jobs = [self.at(first), self.at(second)]
        request = claim_request(*jobs, gpu=gpu, claim=claim, lowest=lowest)
        expected = self.oracle.claim(
            gpu, claim, [*map(str, jobs)], CHARGE, lowest, self.now + LEASE, self.now
        )
        self.check(self.runner.run(self.ground.store.claim(request)), expected)

    @rule(number=numbers, gpu=gpus, claim=claims)
    def begin(self, number: int, gpu: GpuId, claim: str) -> None:
        """Bring a job to run, as a rule: most of what is worth trying happens there."""
        self.enqueue(number, ANN)
        self.claim(gpu, claim, number, number, 0.0)
        self.start(number, 1)

    @rule(number=numbers)
    def lose(self, number: int) -> None:
        """Let a lease run out and mark it."""
        self.wait(LEASE)
        self.expire(number, 1)

    @rule(number=numbers, age=ages)
    def start(self, number: int, age: int) -> None:
        job = self.at(number)
        token = self.token(job, age)
        self.check(
            self.runner.run(self.ground.store.start(job, token)), self.oracle.start(job, token, self.now)
        )

    @rule(number=numbers, age=ages)
    def release(self, number: int, age: int) -> None:
        job = self.at(number)
        token = self.token(job, age)
        self.check(
            self.runner.run(self.ground.store.release(job, token, "test")), self.oracle.release(job, token)
        )

    @rule(number=numbers, age=ages, well=st.booleans(), used=st.sampled_from([0.0, 4.0, 30.0]))
    def finish(self, number: int, age: int, well: bool, used: float) -> None:
        job = self.at(number)
        token = self.token(job, age)
        state = JobState.SUCCEEDED if well else JobState.FAILED
        reply = self.runner.run(self.ground.finish(job, token, state, used=used))
        self.check(reply, self.oracle.finish(job, token, state, used))

    @rule(number=numbers, age=ages, refund=st.booleans(), rest=st.sampled_from([0.0, 20.0]))
    def fail(self, number: int, age: int, refund: bool, rest: float) -> None:
        job = self.at(number)
        token = self.token(job, age)
        again = Again(rest_seconds=rest, avoid=frozenset({GPU}), refund=refund)
        reply = self.runner.run(self.ground.store.fail(job, token, BROKEN, again, used_seconds=3.0))
        self.check(reply, self.oracle.fail(job, token, 3.0, refund, rest, self.now))

    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        job = self.at(number)
        self.check(self.runner.run(self.ground.store.cancel(job)), self.oracle.cancel(job))

    @rule(number=numbers, age=ages, gpu=gpus, claim=claims)
    def resume(self, number: int, age: int, gpu: GpuId, claim: str) -> None:
        job = self.at(number)
        token = self.token(job, age)
        reply = self.runner.run(self.ground.store.resume(NODE, 1, gpu, job, token, ClaimId(claim), LEASE))
        self.check(reply, self.oracle.resume(job, token, gpu, claim, self.now + LEASE))

    @rule(number=numbers, age=ages)
    def beat(self, number: int, age: int) -> None:
        job = self.at(number)
        token = self.token(job, age)
        reply = self.runner.run(self.ground.store.beat(NODE, 1, 60.0, LEASE, ((job, token),)))
        assert reply.leases == ((job, self.oracle.beat(job, token, self.now + LEASE, self.now)),)

    @rule(number=numbers, age=ages)
    def expire(self, number: int, age: int) -> None:
        job = self.at(number)
        token = self.token(job, age)
        self.check(
            self.runner.run(self.ground.store.expire(job, token)), self.oracle.expire(job, token, self.now)
        )

    @rule(number=numbers, age=ages, grace=st.sampled_from([0.0, 20.0]))
    def rescue(self, number: int, age: int, grace: float) -> None:
        job = self.at(number)
        token = self.token(job, age)
        reply = self.runner.run(self.ground.store.rescue(job, token, grace))
        self.check(reply, self.oracle.rescue(job, token, grace, self.now))

    @rule(gpu=gpus, draining=seldom)
    def drain(self, gpu: GpuId, draining: bool) -> None:
        self.oracle.n += (gpu in self.oracle.drained) != draining
        (self.oracle.drained.add if draining else self.oracle.drained.discard)(gpu)
        self.check(self.runner.run(self.ground.store.drain(gpu, draining)), "ok")

    @rule(paused=seldom)
    def pause(self, paused: bool) -> None:
        self.oracle.n += self.oracle.paused != paused
        self.oracle.paused = paused
        self.check(self.runner.run(self.ground.store.pause(paused)), "ok")

    @rule(seconds=st.sampled_from([1.0, 20.0, LEASE]))
    def wait(self, seconds: float) -> None:
        self.ground.clock.pass_seconds(seconds)

    @precondition(lambda self: self.kind == "sqlite")
    @rule()
    def crash(self) -> None:
        """Leave the store as it is and open what lies on the disk."""
        before = self.runner.run(self.everything())
        self.crashes += 1
        folder = self.folder / str(self.crashes)
        assert self.ground.folder is not None
        shutil.copytree(self.ground.folder, folder)
        left = self.ground
        self.ground = make_ground(self.kind, folder)
        self.ground.clock.now = left.clock.now
        self.ground.events = left.events
        self.runner.run(left.store.close())
        self.runner.run(self.ground.store.open())
        self.ground.store.listen(self.ground.events.extend)
        assert self.runner.run(self.everything()) == before

    async def everything(self) -> tuple[object, list[JobRecord | None], list[bytes | None]]:
        store, jobs = self.ground.store, [JobId(name) for name in self.oracle.jobs]
        records = [await store.job(job) for job in jobs]
        return await store.snapshot(), records, [await store.result(job) for job in jobs]

    # -- what must hold

    @invariant()
    def the_records_are_as_told(self) -> None:
        for name, told in self.oracle.jobs.items():
            record = self.runner.run(self.ground.store.job(JobId(name)))
            assert record is not None
            assert record.state == told.state
            assert (record.token, record.ended_by) == (told.holder, told.over_by)
            assert (record.attempts_counted, record.cancel_wanted) == (told.counted, told.wanted_gone)
            assert record.started == (told.holder is not None and told.has_started)

    @invariant()
    def the_events_say_what_the_snapshot_says(self) -> None:
        for event in self.ground.events[self.toy.n :]:
            self.toy.apply(event)
        snapshot = self.runner.run(self.ground.store.snapshot())
        self.toy.agrees_with(snapshot)
        assert {a: pytest.approx(f) for _, a, f in snapshot.account_f} == self.oracle.spent
        assert sum(v for _, v in snapshot.band_v) == self.oracle.floor


class SqliteMachine(StoreMachine):
    kind = "sqlite"


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
TestMemoryMachine = StoreMachine.TestCase
TestMemoryMachine.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=SLOW
)
TestSqliteMachine = SqliteMachine.TestCase
TestSqliteMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=SLOW
)
