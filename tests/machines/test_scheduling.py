"""Book and decide against an independent picture of the world, in any order of events.

See oracle.py for why it is independent.
"""

from __future__ import annotations

import pickle
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant

from gpulane.core.decisions import AskAgain, StartAttempt
from gpulane.core.model import (
    Band,
    Charge,
    FailureKind,
    GpuId,
    Job,
)
from gpulane.core.scheduler import decide
from tests.machines.oracle import Naive
from tests.machines.played import A1111, COMFY, Played, Wish, accounts, corrections, outcomes


class Scheduling(Played):
    """What must hold after every step."""

    def slack(self, gpu: str, job: Job) -> float:
        model = job.model
        c = self.book.load_seconds(GpuId(gpu), model, job.service) if model else self.policy.handoff_seconds
        up = sum(
            any(e.alive for e in g.engines.values()) and not g.draining for g in self.world.gpus.values()
        )
        return min(20 * c, 60 * max(up, 1))

    @invariant()
    def book_agrees_with_itself(self) -> None:
        self.book.check()

    @invariant()
    def book_agrees_with_the_world(self) -> None:
        world = {w.job.id: (w.gpu, w.state) for w in self.world.jobs.values() if w.state != "waiting"}
        book = {job: (str(a.gpu), str(a.state.value)) for job, a in self.book.active.items()}
        assert book == world
        waiting = {w.job.id for w in self.world.jobs.values() if w.state == "waiting"}
        assert set(self.book.waiting.entries) == waiting
        assert len({gpu for gpu, _ in world.values()}) == len(world), "two jobs on one gpu"

    @invariant()
    def deciding_changes_nothing_and_is_repeatable(self) -> None:
        before = pickle.dumps(self.book)
        decisions = decide(self.book, self.policy, self.now)
        assert pickle.dumps(self.book) == before
        assert decide(pickle.loads(before), self.policy, self.now) == decisions
        assert all(d.at > self.now for d in decisions if isinstance(d, AskAgain))

    @invariant()
    def only_fit_pairs_are_proposed(self) -> None:
        starts = self.proposed()
        assert not (starts and self.world.paused)
        assert len({s.gpu for s in starts}) == len(starts)
        assert len({s.candidates[0].job for s in starts}) == len(starts)
        for start in starts:
            gpu = self.world.gpus[start.gpu]
            assert gpu.usable(self.now)
            assert len({c.job for c in start.candidates}) == len(start.candidates) <= 8
            for candidate in start.candidates:
                entry = self.world.jobs[candidate.job]
                assert entry.state == "waiting" and entry.not_before <= self.now and entry.claiming is None
                assert not entry.away
                assert candidate.despite_avoid == (start.gpu in entry.avoid)
                assert candidate.engine in self.world.eligible(entry)[start.gpu]

    @invariant()
    def choices_are_those_of_the_prose(self) -> None:
        """Exact order: rules 1 and 2, band by band, as the oracle reads them; and the lead bound with
        them."""
        if self.world.paused:
            return
        free = [
            gpu.id
            for gpu in self.world.gpus.values()
            if gpu.usable(self.now) and self.book.gpus[GpuId(gpu.id)].rest_until <= self.now
        ]
        naive = Naive(self.world, self.now, self.slack)
        starts = self.proposed()
        for band in Band:
            while (choice := naive.choose(band, free)) is not None:
                entry, gpus, number = choice
                assert starts, f"{entry.job.id} could start on {gpus}: work conservation"
                start = starts.pop(0)
                first = start.candidates[0]
                assert (first.job, first.rule) == (entry.job.id, number)
                assert start.gpu in gpus
                self.lead_is_bounded(naive, start)
                naive.take(entry, first.charge.total)
                free.remove(start.gpu)
        assert starts == []

    def lead_is_bounded(self, naive: Naive, start: StartAttempt) -> None:
        chosen = self.world.jobs[start.candidates[0].job]
        for other in self.world.offered(self.now):
            if other.job.id in naive.taken or other.job.band != chosen.job.band:
                continue
            if start.gpu in self.world.eligible(other):
                lead = naive.rank(chosen.job) - naive.rank(other.job)
                assert lead <= self.slack(start.gpu, chosen.job) + 1e-9

    @invariant()
    def every_waiting_job_says_why(self) -> None:
        for entry in self.world.jobs.values():
            assert self.book.reason(entry.job.id, self.now) is not None
            waits = entry.state == "waiting"
            assert (self.book.job_place(entry.job.id) is not None) == waits
            if waits:
                span = self.book.estimated_start_seconds(entry.job.id, self.now)
                assert span is None or 0 <= span[0] <= span[1]

    @invariant()
    def charges_name_service_and_load_apart(self) -> None:
        for start in self.proposed():
            for candidate in start.candidates:
                assert isinstance(candidate.charge, Charge) and candidate.charge.service_seconds > 0


plain_wishes = st.tuples(
    accounts,
    st.sampled_from([A1111, A1111, A1111, COMFY]),
    st.sampled_from(["A", "B", "B", "C"]),
    st.sampled_from([Band.NORMAL] * 9 + [Band.INTERACTIVE]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(["", "", "", "", "", "big"]),
)


@given(
    ready=st.lists(st.sampled_from([True, True, True, False]), min_size=5, max_size=5),
    queue=st.lists(plain_wishes, min_size=10, max_size=40),
    rounds=st.lists(st.tuples(corrections, outcomes), min_size=5, max_size=12),
    late=st.lists(plain_wishes, max_size=5),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_full_queue_is_worked_off_in_order(
    ready: list[bool], queue: list[Wish], rounds: list[tuple[float, list[str]]], late: list[Wish]
) -> None:
    """What single random steps hardly reach: many jobs, warm models, accounts far apart in F."""
    machine = Scheduling()
    machine.settings_and_probes(ready, queue)
    for number, (correction, results) in enumerate(rounds):
        if number == 3:
            machine.several_submit(late)
        machine.carry_out(["claim"] * 3)
        check_everything(machine)
        machine.start_all()
        for at, outcome in enumerate(results):
            if outcome == "ok":
                machine.finish(at, correction, "ok")
            else:
                machine.fail_again(at, 3.0, FailureKind.NOT_STARTED)
            check_everything(machine)
        machine.time_passes(1.0)
        check_everything(machine)


def check_everything(machine: Scheduling) -> None:
    machine.book_agrees_with_itself()
    machine.book_agrees_with_the_world()
    machine.deciding_changes_nothing_and_is_repeatable()
    machine.only_fit_pairs_are_proposed()
    machine.choices_are_those_of_the_prose()


TestScheduling = cast("Any", Scheduling).TestCase
TestScheduling.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
