"""What we believe of a ComfyUI job, against a toy engine that knows the truth, under losses and restarts."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpulane.adapters.comfyui.messages import (
    Evidence,
    Look,
    Phase,
    Place,
    read_history,
    read_message,
    read_queue,
)
from gpulane.adapters.comfyui.result import read_entry
from gpulane.core.model import JobId
from tests.unit.adapters.comfyui.toy_engine import JOB, End, Toy

ends = st.sampled_from(["success", "error", "interrupted"])


class OneJob(RuleBasedStateMachine):
    """One submission, watched to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()
        self.evidence = Evidence(job=JobId(JOB))
        self.is_sent = False
        self.look: dict[str, Any] | None = None
        self.is_under_way = False
        """Sent, without an answer; the engine may still read it."""

    # --- the engine goes on

    @rule()
    def stranger_comes(self) -> None:
        if len(self.toy.pending) < 2:
            self.toy.submit("other")

    @precondition(lambda self: not self.is_sent)
    @rule(is_answered=st.booleans())
    def job_is_sent(self, *, is_answered: bool) -> None:
        self.is_sent = True
        if is_answered:
            self.toy.submit(JOB)
            self.evidence.accept()
        else:
            self.is_under_way = True

    @precondition(lambda self: self.is_under_way)
    @rule()
    def engine_reads_what_was_sent(self) -> None:
        self.is_under_way = False
        self.toy.submit(JOB)

    @rule(end=ends)
    def engine_goes_on(self, end: End) -> None:
        self.toy.step(end)

    @precondition(lambda self: self.is_sent)
    @rule()
    def engine_restarts(self) -> None:
        self.toy.restart()

    @precondition(lambda self: JOB in self.toy.pending)
    @rule()
    def job_is_deleted(self) -> None:
        self.toy.pending.remove(JOB)
        self.toy.forgotten += 1

    # --- the wire

    @rule(is_muted=st.booleans())
    def socket_changes(self, *, is_muted: bool) -> None:
        self.toy.muted = is_muted

    @precondition(lambda self: self.toy.wire)
    @rule(is_lost=st.booleans())
    def message_comes(self, *, is_lost: bool) -> None:
        raw = self.toy.wire.popleft()
        message = read_message(raw)
        assert message is not None
        if not is_lost:
            self.evidence.hear(message)

    # --- a look, in its three requests

    @precondition(lambda self: self.look is None and self.is_sent)
    @rule()
    def look_begins(self) -> None:
        before = read_queue(self.toy.queue()).place_of(JOB)
        self.look = {"began": self.evidence.heard, "before": before}

    @precondition(lambda self: self.look is not None and len(self.look) == 2)
    @rule()
    def look_goes_on(self) -> None:
        assert self.look is not None
        if self.look["before"] is not Place.ABSENT:
            self._take_in(Look(**self.look))
        else:
            self.look["entry"] = read_history(self.toy.entry(), JOB)

    @precondition(lambda self: self.look is not None and len(self.look) == 3)
    @rule(is_settled=st.booleans())
    def look_ends(self, *, is_settled: bool) -> None:
        assert self.look is not None
        after = Place.ABSENT
        if self.look["entry"] is None:
            after = read_queue(self.toy.queue()).place_of(JOB)
        # "Settled" is a promise that nothing is under way any more; it may have arrived only just now.
        self._take_in(Look(**self.look, after=after), is_settled=is_settled and not self.is_under_way)

    def _take_in(self, look: Look, *, is_settled: bool = False) -> None:
        self.look = None
        phase = self.evidence.phase
        self.evidence.look(look, is_settled=is_settled)
        assert self.evidence.phase >= phase, "an old look takes nothing back"
        if look.before is Place.RUNNING:
            assert self.evidence.has_started

    # --- what must hold

    @invariant()
    def nothing_is_over_that_is_not(self) -> None:
        if self.evidence.phase >= Phase.FREE:
            assert not self.toy.has_job, "believed over while the engine has it"

    @invariant()
    def result_is_the_engines(self) -> None:
        if self.evidence.entry is not None:
            assert self.toy.ends, "a result of a run that never was"
            assert read_entry(self.evidence.entry).verdict.value == self.toy.ends[-1]

    @invariant()
    def lost_is_lost(self) -> None:
        if self.evidence.phase is Phase.LOST:
            assert self.toy.forgotten, "believed lost, and the engine had not forgotten it"

    def teardown(self) -> None:
        """However it stood: two whole looks at an engine that has come to rest tell how it ended."""
        if not self.is_sent:
            return
        self.toy.forgotten += self.is_under_way
        while self.toy.running is not None or self.toy.pending:
            self.toy.step("success")
        self.toy.wire.clear()
        self.look = None
        for _ in range(2):
            before = read_queue(self.toy.queue()).place_of(JOB)
            entry = read_history(self.toy.entry(), JOB)
            look = Look(began=self.evidence.heard, before=before, entry=entry)
            self.evidence.look(look, is_settled=True)
        assert self.evidence.is_over
        self.nothing_is_over_that_is_not()
        self.result_is_the_engines()
        self.lost_is_lost()


OneJob.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestOneJob = OneJob.TestCase
