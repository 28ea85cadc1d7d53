"""What follows a failed attempt, case by case and in any order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpulane.core.model import Failure, FailureKind, GpuId, Job
from gpulane.core.policy import Policy
from gpulane.core.retry import POISONED, Again, End, after_failure
from tests.unit.core.building import job

G = [GpuId(f"node/g{number}") for number in range(3)]
ALL = frozenset(G)
POLICY = Policy()


def failure(kind: FailureKind, code: str = "test", *, killed: bool = False) -> Failure:
    return Failure(kind=kind, code=code, message="it broke", killed_engine=killed)


def after(
    what: Failure,
    *,
    attempts: int = 1,
    avoid: frozenset[GpuId] = frozenset(),
    eligible: frozenset[GpuId] = ALL,
    jitter: float = 0.5,
    kills: int = 0,
    of: Job | None = None,
    memory_on: tuple[GpuId, ...] | None = None,
    policy: Policy = POLICY,
) -> Again | End:
    return after_failure(
        of or job("j1"),
        what,
        attempts_counted=attempts,
        avoid=avoid,
        gpu=G[0],
        eligible=eligible,
        policy=policy,
        jitter=jitter,
        engine_kills_before=kills,
        out_of_memory_on=memory_on,
    )


def test_what_did_not_start_is_tried_again_elsewhere_at_our_cost() -> None:
    answer = after(failure(FailureKind.NOT_STARTED))
    assert isinstance(answer, Again)
    assert (answer.avoid, answer.refund) == (frozenset({G[0]}), True)


def test_the_clients_fault_ends_it() -> None:
    assert isinstance(after(failure(FailureKind.CLIENT)), End)


def test_an_engines_error_ends_it_except_memory_once() -> None:
    assert isinstance(after(failure(FailureKind.ENGINE)), End)
    memory = failure(FailureKind.ENGINE, "out_of_memory")
    again = after(memory)
    assert isinstance(again, Again)
    assert not again.refund
    assert isinstance(after(memory, attempts=2), End)


def test_lost_attempts_are_repeated_only_where_that_is_allowed() -> None:
    lost = failure(FailureKind.LOST)
    assert isinstance(after(lost), Again)
    assert isinstance(after(lost, of=job("j1", rerun_lost=False)), End)


def test_an_interrupt_nobody_asked_for_is_a_failed_attempt() -> None:
    assert isinstance(after(failure(FailureKind.INTERRUPTED)), Again)
    assert isinstance(after(failure(FailureKind.INTERRUPTED), attempts=3), End)


def test_a_job_that_kills_engines_is_quarantined() -> None:
    killed = failure(FailureKind.LOST, killed=True)
    assert isinstance(after(killed), Again)
    answer = after(killed, attempts=2, kills=1)
    assert isinstance(answer, End)
    assert answer.failure.code == POISONED
    assert "it broke" in answer.failure.message


def test_avoids_all_gpus_it_failed_on_then_only_the_last_then_none() -> None:
    what = failure(FailureKind.NOT_STARTED)

    def avoided(avoid: set[GpuId], eligible: set[GpuId]) -> frozenset[GpuId]:
        answer = after(what, avoid=frozenset(avoid), eligible=frozenset(eligible))
        assert isinstance(answer, Again)
        return answer.avoid

    assert avoided({G[1]}, {*G}) == {G[0], G[1]}
    assert avoided({G[1]}, {G[0], G[1]}) == {G[0]}
    assert avoided(set(), {G[0]}) == frozenset()


@given(
    kind=st.sampled_from(list(FailureKind)),
    killed=st.booleans(),
    attempts=st.integers(1, 50),
    attempts_max=st.integers(1, 50),
    avoid=st.frozensets(st.sampled_from(G)),
    eligible=st.frozensets(st.sampled_from(G)),
    jitter=st.floats(0.0, 1.0),
)
def test_whatever_happens(
    kind: FailureKind,
    killed: bool,
    attempts: int,
    attempts_max: int,
    avoid: frozenset[GpuId],
    eligible: frozenset[GpuId],
    jitter: float,
) -> None:
    answer = after(
        failure(kind, killed=killed),
        attempts=attempts,
        avoid=avoid,
        eligible=eligible,
        jitter=jitter,
        of=job("j1", max_attempts=attempts_max),
    )
    if isinstance(answer, End):
        return
    assert attempts < attempts_max
    assert kind is not FailureKind.CLIENT
    assert 0 < answer.rest_seconds <= POLICY.retry_seconds_max
    assert not eligible or eligible - answer.avoid, "avoids everything there is"
    if eligible - {G[0]}:
        assert G[0] in answer.avoid, "never twice on the gpu that just failed while another is eligible"


MEMORY = failure(FailureKind.ENGINE, "out_of_memory")


def test_out_of_memory_goes_elsewhere_as_it_is_and_stays_alone_on_the_card() -> None:
    elsewhere = after(MEMORY)
    assert isinstance(elsewhere, Again)
    assert (elsewhere.avoid, elsewhere.unload_all) == (frozenset({G[0]}), False)
    here = after(MEMORY, eligible=frozenset({G[0]}))
    assert isinstance(here, Again)
    assert (here.avoid, here.unload_all) == (frozenset(), True)


def test_out_of_memory_never_twice_on_the_same_card() -> None:
    assert isinstance(after(MEMORY, attempts=2, memory_on=(G[0],), eligible=frozenset({G[0]})), End)
    many = Policy(out_of_memory_retries=9)
    assert isinstance(after(MEMORY, attempts=2, memory_on=(G[0],), policy=many), End)
    assert isinstance(after(MEMORY, attempts=2, memory_on=(G[1],), policy=many), Again)


def test_only_attempts_that_ran_out_of_memory_count_where_that_is_known() -> None:
    assert isinstance(after(MEMORY, attempts=2, memory_on=()), Again)
    assert isinstance(after(MEMORY, attempts=2, memory_on=(G[1],)), End)


def test_no_other_failure_asks_for_an_empty_card() -> None:
    for kind in FailureKind:
        answer = after(failure(kind), eligible=frozenset({G[0]}))
        assert isinstance(answer, End) or not answer.unload_all
