"""Several engines on one card, as the book sees them: what stays, what a hand-off costs, leaks, locks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpulane.core.events import (
    CardMeasured,
    EngineLeaking,
    EngineLost,
    EngineReady,
    EngineUnloaded,
    GpuPaused,
    HandoffMeasured,
    JobReleased,
    ModelSeen,
    Snapshot,
    VramMeasured,
)
from gpulane.core.learned import Learned, LearnedValues
from gpulane.core.model import (
    NO_MODEL,
    EngineState,
    EngineUrl,
    GpuId,
    GpuState,
    HandoffMode,
    JobId,
    ModelKey,
    Service,
)
from gpulane.core.policy import Policy
from tests.unit.core.building import Desk, gpu

GIB = 1 << 30
G0 = GpuId("node/g0")
A1111, COMFY, LOCK = (
    EngineUrl(f"http://g0:{service.value}") for service in (Service.A1111, Service.COMFYUI, Service.LOCK)
)
MODEL_A, MODEL_B = ModelKey("A"), ModelKey("B")


def shared(
    total_gib: int = 24,
    *,
    peaks_gib: int = 7,
    policy: Policy | None = None,
    mode: HandoffMode = HandoffMode.AUTO,
) -> Desk:
    """One card with both services; A1111 holds A, and what both need is known."""
    desk = Desk(policy or Policy())
    plain = gpu("g0", Service.A1111, Service.COMFYUI, Service.LOCK)
    engines = tuple(replace(e, handoff=mode) for e in plain.engines)
    desk.add(replace(plain, engines=engines, vram_bytes=total_gib * GIB))
    desk.tell(EngineUnloaded(gpu=G0, engine=COMFY))
    desk.tell(ModelSeen(gpu=G0, engine=A1111, model=MODEL_A))
    for service, model in ((Service.A1111, MODEL_A), (Service.COMFYUI, MODEL_B)):
        desk.tell(VramMeasured(gpu=G0, service=service, model=model, bytes_peak=peaks_gib * GIB))
    return desk


def held(desk: Desk) -> dict[EngineUrl, str]:
    return {url: str(e.resident) for url, e in desk.book.gpus[G0].engines.items()}


def cost(desk: Desk) -> float:
    return desk.starts()[0].candidates[0].charge.load_seconds


def test_what_fits_stays_and_costs_no_handoff() -> None:
    desk = shared()
    desk.submit("j1", model="B", service=Service.COMFYUI)
    assert cost(desk) == 10.0
    desk.claim(desk.starts()[0])
    assert held(desk) == {A1111: "A", COMFY: "B", LOCK: ""}
    desk.end("j1")
    desk.submit("j2", model="A")
    start = desk.starts()[0].candidates[0]
    assert (start.rule, start.charge.load_seconds) == ("1", 0.0)


def test_what_does_not_fit_goes_and_costs_a_handoff() -> None:
    desk = shared(12)
    desk.submit("j1", model="B", service=Service.COMFYUI)
    assert cost(desk) == 10.0 + 6.0
    desk.tell(HandoffMeasured(gpu=G0, seconds=2.5, unloaded=(A1111,)))
    assert cost(desk) == 10.0 + 2.5
    desk.tell(HandoffMeasured(gpu=G0, seconds=0.0, unloaded=()))
    assert cost(desk) == 12.5, "one without an unload says nothing of the time that it takes"
    desk.claim(desk.starts()[0])
    assert held(desk) == {A1111: "", COMFY: "B", LOCK: ""}


def test_a_handoff_that_needed_no_unload_gives_back_what_was_assumed() -> None:
    desk = shared(12)
    desk.submit("j1", model="B", service=Service.COMFYUI)
    desk.claim(desk.starts()[0])
    desk.tell(HandoffMeasured(gpu=G0, seconds=0.1, unloaded=()))
    assert held(desk)[A1111] == "A"


def test_the_plan_of_the_dispatcher_knows_what_was_before_the_claim() -> None:
    desk = shared(12)
    desk.submit("j1", model="B", service=Service.COMFYUI)
    desk.claim(desk.starts()[0], begin=False)
    found = desk.book.handoff_plan(G0, COMFY, MODEL_B, bytes_free=5 * GIB)
    assert (found.unload, found.need_bytes) == ((A1111,), 7 * GIB)
    assert desk.book.handoff_plan(G0, COMFY, MODEL_B, bytes_free=8 * GIB).unload == ()
    assert found.make_loadable, "ComfyUI was unloaded; it does nothing there"
    desk.tell(EngineUnloaded(gpu=G0, engine=A1111))
    assert desk.book.handoff_plan(G0, COMFY, MODEL_B).unload == ()
    assert desk.book.handoff_plan(G0, A1111, MODEL_A).make_loadable


def test_an_unloaded_engine_stays_so_until_it_was_seen_to_hold_something() -> None:
    desk = shared(12)
    desk.tell(EngineUnloaded(gpu=G0, engine=A1111))
    assert held(desk)[A1111] == ""
    desk.submit("j1", model="A")
    desk.claim(desk.starts()[0])
    assert desk.book.handoff_plan(G0, A1111, MODEL_A).make_loadable, (
        "the first try may not have come that far"
    )
    desk.end("j1")
    assert not desk.book.handoff_plan(G0, A1111, MODEL_A).make_loadable


def test_a_claim_that_was_given_back_leaves_what_nobody_unloaded() -> None:
    for total, expected in ((24, "A"), (12, "")):
        desk = shared(total)
        desk.submit("j1", model="B", service=Service.COMFYUI)
        desk.claim(desk.starts()[0], begin=False)
        token = desk.book.active[JobId("j1")].token
        desk.tell(JobReleased(n=desk.next_n, job=JobId("j1"), token=token, account_f=0.0, why="test"))
        assert held(desk) == {A1111: expected, COMFY: "", LOCK: ""}


def test_never_and_always_are_known_to_the_scheduler() -> None:
    for mode, total, seconds in ((HandoffMode.NEVER, 12, 10.0), (HandoffMode.ALWAYS, 24, 16.0)):
        desk = shared(total, mode=mode)
        desk.submit("j1", model="B", service=Service.COMFYUI)
        assert cost(desk) == seconds


def test_the_cards_total_may_be_measured() -> None:
    desk = shared(12)
    desk.tell(CardMeasured(gpu=G0, bytes_total=24 * GIB))
    desk.submit("j1", model="B", service=Service.COMFYUI)
    assert cost(desk) == 10.0
    view = desk.book.gpu_view(G0)
    assert view is not None
    assert view.bytes_total == 24 * GIB


def test_what_was_started_may_hold_something_though_its_end_was_never_told() -> None:
    desk = shared(12)
    desk.submit("j1", model="B", service=Service.COMFYUI)
    desk.claim(desk.starts()[0])
    desk.tell(EngineUnloaded(gpu=G0, engine=A1111))
    assert desk.book.handoff_plan(G0, A1111, MODEL_A).unload == (COMFY,)
    nothing = Snapshot(
        n=desk.book.n + 5, waiting=(), active=(), account_f=(), band_v=(), draining=frozenset(), paused=False
    )
    desk.book.restore(nothing, desk.now)
    assert desk.book.handoff_plan(G0, A1111, MODEL_A).unload == (COMFY,)
    assert desk.book.handoff_plan(G0, COMFY, MODEL_B).unload == (A1111,), "jobs nobody told of may have run"


# --- leaks


def test_a_leaking_engine_works_on_and_is_shown() -> None:
    desk = shared()
    desk.tell(EngineLeaking(engine=A1111, leaking=True, why="kept 7 GiB"))
    desk.submit("j1", model="A")
    assert len(desk.starts()) == 1
    desk.tell(EngineReady(engine=A1111, offers=None))
    view = desk.book.gpu_view(G0)
    assert view is not None
    assert (view.engines[0].state, view.engines[0].why) == (EngineState.LEAKING, "kept 7 GiB")
    desk.tell(EngineLeaking(engine=A1111, leaking=False))
    assert desk.book.gpus[G0].engines[A1111].state is EngineState.READY


def test_a_gpu_that_leaks_is_left_alone_where_the_policy_says_so() -> None:
    desk = shared(policy=Policy(skip_leaking=True))
    desk.submit("j1", model="B", service=Service.COMFYUI)
    desk.tell(EngineLeaking(engine=A1111, leaking=True))
    assert not desk.starts()
    why = desk.book.reason(JobId("j1"))
    assert why is not None
    assert why.code == "no_gpu_ready"
    assert "does not give its memory back" in why.text
    desk.tell(EngineLost(engine=A1111, why="restarted"))
    assert len(desk.starts()) == 1


def test_an_engine_that_is_lost_cannot_leak() -> None:
    desk = shared()
    desk.tell(EngineLost(engine=A1111, why="died"))
    desk.tell(EngineLeaking(engine=A1111, leaking=True))
    assert desk.book.gpus[G0].engines[A1111].state is EngineState.LOST


# --- locks


def test_a_lock_is_a_job_that_needs_nothing_and_holds_no_model() -> None:
    desk = shared()
    desk.submit("l1", model=NO_MODEL, service=Service.LOCK)
    assert cost(desk) == 6.0, "nobody knows what it needs: the others make room"
    desk.claim(desk.starts()[0])
    desk.end("l1")
    desk.tell(HandoffMeasured(gpu=G0, seconds=1.0, unloaded=()))
    assert held(desk) == {A1111: "A", COMFY: "", LOCK: ""}, "they were not unloaded"
    desk.submit("j1", model="A")
    assert cost(desk) == 0.0, "a lock that is over holds nothing"


def test_a_gpu_can_be_locked_while_its_engines_are_down_and_shows_as_lost() -> None:
    desk = shared()
    for engine in (A1111, COMFY):
        desk.tell(EngineLost(engine=engine, why="died"))
    view = desk.book.gpu_view(G0)
    assert view is not None
    assert view.state is GpuState.LOST
    desk.submit("l1", model=NO_MODEL, service=Service.LOCK)
    assert len(desk.starts()) == 1


# --- pauses


def test_a_paused_gpu_rests_says_why_and_comes_back() -> None:
    desk = shared()
    desk.submit("j1", model="A")
    desk.tell(GpuPaused(gpu=G0, seconds=30.0, failures=5))
    assert not desk.starts()
    assert desk.timers() == [5.0]
    why = desk.book.reason(JobId("j1"))
    assert why is not None
    assert why.code == "gpus_paused"
    assert "paused for 30 s after 5 failed attempts in a row" in why.text
    view = desk.book.gpu_view(G0)
    assert view is not None
    assert (view.paused_until, view.failures) == (30.0, 5)
    desk.now = 30.0
    assert len(desk.starts()) == 1
    desk.now = 1.0
    desk.tell(GpuPaused(gpu=G0, seconds=0.0))
    assert len(desk.starts()) == 1


# --- learned


def test_peaks_are_the_largest_of_the_recent_and_fall_back_on_other_gpus() -> None:
    learned = Learned(Policy())
    for gib in (9, 7, 8):
        learned.vram_measured(G0, Service.A1111, MODEL_A, gib * GIB)
    assert learned.vram_peak(G0, Service.A1111, MODEL_A) == 9 * GIB
    assert learned.vram_peak(GpuId("node/g1"), Service.A1111, MODEL_A) == 9 * GIB
    assert learned.vram_peak(G0, Service.COMFYUI, MODEL_A) is None
    for _ in range(9):
        learned.vram_measured(G0, Service.A1111, MODEL_A, 6 * GIB)
    assert learned.vram_peak(G0, Service.A1111, MODEL_A) == 6 * GIB


def test_what_has_no_name_is_known_on_its_own_gpu_only_and_locks_never() -> None:
    learned = Learned(Policy())
    learned.vram_measured(G0, Service.HTTP, NO_MODEL, GIB)
    assert learned.vram_peak(G0, Service.HTTP, NO_MODEL) == GIB
    assert learned.vram_peak(GpuId("node/g1"), Service.HTTP, NO_MODEL) is None
    learned.vram_measured(G0, Service.LOCK, NO_MODEL, GIB)
    assert learned.vram_peak(G0, Service.LOCK, NO_MODEL) is None


@pytest.mark.parametrize("broken", [0, -1, 1 << 60])
def test_broken_measurements_are_no_measurements(broken: int) -> None:
    learned = Learned(Policy())
    learned.vram_measured(G0, Service.A1111, MODEL_A, broken)
    learned.handoff_measured(G0, -1.0)
    assert learned.vram_peak(G0, Service.A1111, MODEL_A) is None
    assert learned.handoff_seconds(G0) == Policy().handoff_seconds


def test_peaks_and_handoffs_are_recalled() -> None:
    first, second = Learned(Policy()), Learned(Policy())
    first.vram_measured(G0, Service.A1111, MODEL_A, 7 * GIB)
    first.handoff_measured(G0, 2.0)
    second.recall(first.values())
    assert second.vram_peak(G0, Service.A1111, MODEL_A) == 7 * GIB
    assert second.handoff_seconds(G0) == 2.0
    second.recall(LearnedValues())
    assert second.values() == first.values()
