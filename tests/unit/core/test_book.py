"""What the book records, refuses and forgets; the machine in tests/machines tries the combinations."""

from __future__ import annotations

import pytest

from gpulane.core.book import Book, GapInEvents
from gpulane.core.events import (
    AttemptFailed,
    AttemptResumed,
    ClaimLost,
    ClaimProposed,
    EngineLost,
    EngineReady,
    GpuAdded,
    GpuFreed,
    GpuOccupied,
    GpuRemoved,
    JobClaimed,
    JobEnded,
    JobReleased,
    JobStarted,
    JobSubmitted,
    ModelSeen,
    NodeChanged,
    QueuePaused,
)
from gpulane.core.model import (
    NO_MODEL,
    Account,
    AttemptState,
    Band,
    ClaimId,
    EngineUrl,
    Failure,
    FailureKind,
    GpuId,
    GpuState,
    JobId,
    JobState,
    ModelKey,
    NodeId,
    Service,
    Token,
)
from gpulane.core.transitions import MOVES, ended_attempt
from tests.unit.core.building import NODE, Desk, gpu, job

G0, G1 = GpuId("node/g0"), GpuId("node/g1")
E0 = EngineUrl("http://g0:a1111")
LOST = Failure(kind=FailureKind.LOST, code="engine_lost", message="gone")


def one_gpu() -> Desk:
    desk = Desk()
    desk.add(gpu("g0"))
    return desk


def test_events_seen_before_are_ignored_and_gaps_are_told() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.tell(JobEnded(n=1, job=JobId("j1"), state=JobState.FAILED, account_f=9.0))
    assert desk.book.job_state(JobId("j1")) is JobState.QUEUED
    with pytest.raises(GapInEvents):
        desk.tell(QueuePaused(n=3, paused=True))
    assert not desk.book.paused


def test_illegal_move_names_the_event() -> None:
    desk = one_gpu()
    desk.submit("j1")
    with pytest.raises(AssertionError, match="JobStarted"):
        desk.tell(JobStarted(n=2, job=JobId("j1"), token=Token("t"), attempts=1))
    with pytest.raises(AssertionError, match="not known"):
        desk.tell(JobEnded(n=2, job=JobId("j9"), state=JobState.FAILED, account_f=0.0))
    with pytest.raises(AssertionError, match="does not end"):
        desk.tell(JobEnded(n=2, job=JobId("j1"), state=JobState.RUNNING, account_f=0.0))


def test_a_gpu_takes_one_claim() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.submit("j2")
    desk.claim(desk.starts()[0])
    with pytest.raises(AssertionError, match="j1 is there"):
        desk.tell(claimed("j2", G0, desk.next_n))


def claimed(id_: str, gpu_id: GpuId, n: int, node: NodeId = NODE) -> JobClaimed:
    return JobClaimed(
        n=n,
        job=JobId(id_),
        gpu=gpu_id,
        node=node,
        token=Token(f"{n}.c"),
        claim=ClaimId("c"),
        account_f=10.0,
        band_v=3.0,
    )


def test_claims_on_gpus_of_other_nodes_are_recorded() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.tell(claimed("j1", GpuId("other/g7"), 2, NodeId("other")))
    assert desk.book.active[JobId("j1")].gpu == "other/g7"
    assert desk.book.waiting.bands[Band.NORMAL].v == 3.0
    desk.tell(JobStarted(n=3, job=JobId("j1"), token=Token("2.c"), attempts=1))
    desk.tell(JobEnded(n=4, job=JobId("j1"), state=JobState.SUCCEEDED, account_f=9.0))
    assert desk.book.job_state(JobId("j1")) is None


def test_a_gpu_added_later_knows_what_runs_on_it() -> None:
    desk = Desk()
    desk.submit("j1")
    desk.tell(claimed("j1", G0, 2))
    desk.add(gpu("g0"))
    view = desk.book.gpu_view(G0)
    assert view is not None
    assert (view.job, view.state) == ("j1", GpuState.HANDOFF)


def test_old_tokens_are_fenced_off_after_a_resume() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.claim(desk.starts()[0])
    desk.tell(AttemptResumed(n=desk.next_n, job=JobId("j1"), gpu=G0, node=NODE, token=Token("new")))
    failed = AttemptFailed(
        n=desk.next_n,
        job=JobId("j1"),
        token=Token("2.c"),
        failure=LOST,
        avoid=frozenset(),
        not_before_seconds=0.0,
        account_f=0.0,
    )
    with pytest.raises(AssertionError, match="token"):
        desk.tell(failed)
    assert desk.book.active[JobId("j1")].token == "new"


def test_a_rescued_job_can_be_resumed_by_its_node() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.tell(AttemptResumed(n=2, job=JobId("j1"), gpu=G0, node=NODE, token=Token("new")))
    assert desk.book.job_state(JobId("j1")) is JobState.RUNNING
    assert desk.starts() == []


def test_accounts_without_jobs_are_forgotten() -> None:
    desk = one_gpu()
    desk.submit("j1")
    assert Account("ann") in desk.book.waiting.bands[Band.NORMAL].tabs
    desk.claim(desk.starts()[0])
    desk.end("j1")
    assert desk.book.waiting.bands[Band.NORMAL].tabs == {}
    assert desk.book.waiting.bands[Band.NORMAL].classes == {}


def test_first_choice_of_a_claim_under_way_is_not_offered_again() -> None:
    desk = one_gpu()
    desk.add(gpu("g1"))
    desk.submit("j1")
    desk.submit("j2")
    first = desk.starts()[0]
    desk.tell(ClaimProposed(gpu=first.gpu, jobs=tuple(c.job for c in first.candidates)))
    assert [s.candidates[0].job for s in desk.starts()] == ["j2"]
    desk.tell(ClaimLost(gpu=first.gpu))
    assert [s.candidates[0].job for s in desk.starts()] == ["j1", "j2"]


def test_claims_under_way_count_in_fair_order() -> None:
    """Else a burst would start n jobs at the old F before the first claim is answered."""
    desk = one_gpu()
    desk.add(gpu("g1"))
    desk.submit("j1", "ann")
    desk.submit("j2", "ann")
    desk.submit("j3", "bob")
    first = desk.starts()[0]
    desk.tell(ClaimProposed(gpu=first.gpu, jobs=(JobId("j1"),)))
    assert desk.starts()[0].candidates[0].job == "j3"


def test_a_gpu_rests_after_lost_claims_longer_each_time() -> None:
    desk = one_gpu()
    desk.submit("j1")
    rests: list[float] = []
    for _ in range(5):
        start = desk.starts()[0]
        desk.tell(ClaimProposed(gpu=start.gpu, jobs=(start.candidates[0].job,)))
        desk.tell(ClaimLost(gpu=start.gpu))
        rests.append(desk.book.gpus[G0].rest_until - desk.now)
        desk.now = max(desk.now, desk.book.gpus[G0].rest_until)
    assert rests[0] == 0.0
    assert rests[1:] == sorted(rests[1:])
    assert 0 < rests[1] < rests[4] <= desk.policy.claim_lost_rest_seconds_max


def test_a_model_counts_as_loaded_from_the_claim_on_and_vanishes_with_a_failed_load() -> None:
    desk = one_gpu()
    desk.submit("j1", model="A")
    desk.claim(desk.starts()[0])
    assert desk.book.gpus[G0].engines[E0].resident == "A"
    token = desk.book.active[JobId("j1")].token
    failure = Failure(kind=FailureKind.ENGINE, code="out_of_memory", message="no")
    desk.tell(
        AttemptFailed(
            n=desk.next_n,
            job=JobId("j1"),
            token=token,
            failure=failure,
            avoid=frozenset(),
            not_before_seconds=5.0,
            account_f=0.0,
        )
    )
    assert desk.book.gpus[G0].engines[E0].resident == NO_MODEL
    assert desk.starts() == []
    assert desk.timers() == [5.0]
    desk.now = 5.0
    assert desk.starts()[0].candidates[0].job == "j1"


def test_a_released_claim_leaves_the_models_as_they_were() -> None:
    desk = one_gpu()
    desk.tell(ModelSeen(gpu=G0, engine=E0, model=ModelKey("B")))
    desk.submit("j1", model="A")
    desk.claim(desk.starts()[0], begin=False)
    token = desk.book.active[JobId("j1")].token
    desk.tell(JobReleased(n=desk.next_n, job=JobId("j1"), token=token, account_f=0.0, why="test"))
    assert desk.book.gpus[G0].engines[E0].resident == "B"
    assert desk.book.job_state(JobId("j1")) is JobState.QUEUED


def test_what_is_shown_of_a_gpu() -> None:
    desk = one_gpu()

    def state() -> GpuState:
        view = desk.book.gpu_view(G0)
        assert view is not None
        return view.state

    assert state() is GpuState.IDLE
    desk.tell(GpuOccupied(gpu=G0, why="handoff"))
    assert state() is GpuState.HANDOFF
    desk.tell(GpuOccupied(gpu=G0, why="stranger"))
    assert state() is GpuState.BUSY
    desk.tell(GpuFreed(gpu=G0))
    desk.tell(EngineLost(engine=E0, why="no answer"))
    assert state() is GpuState.LOST
    desk.tell(EngineReady(engine=E0, offers=None))
    assert state() is GpuState.IDLE
    assert desk.book.gpu_view(GpuId("node/none")) is None
    assert len(desk.book.gpu_views()) == 1


def test_gpus_of_a_node_that_left_take_nothing() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.tell(NodeChanged(n=2, node=NODE, present=False))
    assert desk.starts() == []
    desk.tell(NodeChanged(n=3, node=NODE, present=True))
    assert len(desk.starts()) == 1


def test_facts_about_unknown_gpus_and_engines_are_old_news() -> None:
    desk = one_gpu()
    desk.submit("j1")
    desk.tell(GpuRemoved(gpu=G0))
    desk.tell(GpuRemoved(gpu=G0))
    desk.tell(EngineReady(engine=E0, offers=None))
    desk.tell(GpuOccupied(gpu=G0, why="stranger"))
    desk.tell(ClaimLost(gpu=G0))
    assert desk.starts() == []
    desk.tell(GpuAdded(gpu=gpu("g0")))
    desk.tell(EngineReady(engine=E0, offers=None))
    assert len(desk.starts()) == 1


def test_a_book_knows_no_job_twice() -> None:
    book = Book()
    book.apply(JobSubmitted(n=1, job=job("j1"), account_f=0.0), 0.0)
    with pytest.raises(AssertionError, match="known"):
        book.apply(JobSubmitted(n=2, job=job("j1"), account_f=0.0), 0.0)


def test_every_move_says_who_makes_it_and_leads_to_a_state_that_goes_on() -> None:
    states = {(state, attempt) for state, attempt, _ in MOVES}
    for (state, attempt, _event), found in MOVES.items():
        assert found.by
        assert found.job is None or (found.job, found.attempt) in states, (state, attempt)
        assert (found.attempt is AttemptState.STARTED) == (found.job is JobState.RUNNING)


def test_last_states_of_attempts() -> None:
    def ended(state: JobState, failure: Failure | None = None) -> AttemptState:
        return ended_attempt(JobEnded(n=1, job=JobId("j"), state=state, account_f=0.0, failure=failure))

    assert ended(JobState.SUCCEEDED) is AttemptState.FINISHED
    assert ended(JobState.CANCELLED) is AttemptState.FAILED
    assert ended(JobState.FAILED, LOST) is AttemptState.LOST
    assert Service.A1111 in {e.service for e in gpu("g0").engines}
