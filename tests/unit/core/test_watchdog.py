"""How long a job may be silent, and what follows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpulane.core.learned import Learned
from gpulane.core.model import NO_MODEL, GpuId, ModelKey, Service
from gpulane.core.policy import Policy
from gpulane.core.watchdog import Patience, WatchStep, limit_seconds, look_again_at, step
from tests.unit.core.building import job

G0 = GpuId("node/g0")
PATIENCE = Patience(hung_factor=6.0, hung_seconds_min=300.0, hung_interrupt_seconds=60.0)


def test_short_jobs_have_the_least_limit() -> None:
    learned = Learned(Policy())
    learned.service_measured(job("j1"), 1.0, 8.0)
    assert limit_seconds(learned, job("j2"), G0, PATIENCE) == 300.0


def test_long_jobs_have_more_by_their_size_their_gpu_and_their_load() -> None:
    learned = Learned(Policy())
    for seconds in (60.0, 60.0, 60.0, 100.0):
        learned.service_measured(job("j1"), 1.0, seconds)
    learned.load_measured(G0, ModelKey("A"), Service.A1111, 20.0)
    assert limit_seconds(learned, job("j2"), G0, PATIENCE) == 6 * 100.0 + 20.0
    assert limit_seconds(learned, job("j2"), G0, PATIENCE, speed=0.5) == 6 * 200.0 + 20.0


def test_a_lock_has_no_limit_of_ours() -> None:
    lock = job("l1", service=Service.LOCK, model=NO_MODEL)
    assert limit_seconds(Learned(Policy()), lock, G0, PATIENCE) is None


def watch(now: float, progress: float, interrupted: float | None, limit: float | None = 100.0) -> WatchStep:
    return step(now=now, progress_at=progress, interrupted_at=interrupted, limit=limit, patience=PATIENCE)


def test_it_is_interrupted_then_given_up() -> None:
    assert watch(99.0, 0.0, None) is WatchStep.WAIT
    assert watch(100.0, 0.0, None) is WatchStep.INTERRUPT
    assert watch(150.0, 0.0, 100.0) is WatchStep.WAIT
    assert watch(160.0, 0.0, 100.0) is WatchStep.GIVE_UP
    assert watch(1e9, 0.0, None, limit=None) is WatchStep.WAIT


@given(
    progress=st.floats(0, 1e6),
    interrupted=st.none() | st.floats(0, 1e6),
    limit=st.none() | st.floats(1, 1e5),
)
def test_looking_again_is_neither_early_nor_late(
    progress: float, interrupted: float | None, limit: float | None
) -> None:
    at = look_again_at(progress_at=progress, interrupted_at=interrupted, limit=limit, patience=PATIENCE)
    if at is None:
        assert watch(1e12, progress, interrupted, limit) is WatchStep.WAIT
    else:
        assert watch(at + 0.01, progress, interrupted, limit) is not WatchStep.WAIT
        assert watch(at - 0.01, progress, interrupted, limit) is WatchStep.WAIT
