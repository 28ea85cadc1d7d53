"""Positions, reasons and estimates of waiting jobs; what is learned, and kept over a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpulane.core.events import (
    ClaimProposed,
    EngineLost,
    GpuDrained,
    GpuOccupied,
    HolderAway,
    LoadMeasured,
    QueuePaused,
    ServiceMeasured,
)
from gpulane.core.learned import Learned
from gpulane.core.model import Band, EngineUrl, GpuId, JobId, ModelKey, Service, Work
from gpulane.core.policy import Policy
from gpulane.core.reasons import TEXTS, reason
from tests.unit.core.building import Desk, gpu, job

G0, G1 = GpuId("node/g0"), GpuId("node/g1")
J1, J2 = JobId("j1"), JobId("j2")


def code(desk: Desk, job_id: JobId) -> str | None:
    found = desk.book.reason(job_id, desk.now)
    return found.code if found else None


def test_positions_interleave_accounts_and_put_higher_bands_first() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    for number in range(3):
        desk.submit(f"a{number}", "ann")
    desk.submit("b0", "bob")
    desk.submit("high", "cyd", band=Band.INTERACTIVE)
    places = {id_: desk.book.job_place(JobId(id_)) for id_ in ("high", "a0", "b0", "a1", "a2")}
    assert places == {"high": 1, "a0": 2, "b0": 3, "a1": 4, "a2": 5}
    assert desk.book.job_place(JobId("none")) is None


def test_positions_are_a_ranking() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    for number in range(30):
        desk.submit(f"j{number}", f"account{number % 7}", "ABC"[number % 3])
    places = sorted(desk.book.job_place(JobId(f"j{number}")) or 0 for number in range(30))
    assert places == list(range(1, 31))


def test_reasons_in_the_order_of_what_would_have_to_change() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    desk.submit("j1")
    desk.submit("j2")
    assert code(desk, J1) == "waiting_for_model"
    assert code(desk, J2) == "waiting_turn"
    start = desk.starts()[0]
    desk.tell(ClaimProposed(gpu=start.gpu, jobs=(J1,)))
    assert code(desk, J1) == "claiming"
    desk.claim(start, begin=False)
    assert code(desk, J1) == "starting"
    desk.tell(HolderAway(job=J2, away=True))
    assert code(desk, J2) == "client_away"
    assert desk.book.estimated_start_seconds(J2) is None
    desk.tell(QueuePaused(n=desk.next_n, paused=True))
    assert code(desk, J2) == "queue_paused"
    assert code(desk, JobId("none")) is None


def test_reasons_about_gpus() -> None:
    desk = Desk()
    desk.submit("j1")
    assert code(desk, J1) == "no_gpu_of_service"
    desk.add(gpu("g0"))
    desk.tell(GpuOccupied(gpu=G0, why="stranger"))
    assert code(desk, J1) == "gpus_occupied"
    desk.tell(GpuDrained(n=desk.next_n, gpu=G0, draining=True))
    assert code(desk, J1) == "all_draining"
    desk.tell(GpuDrained(n=desk.next_n, gpu=G0, draining=False))
    desk.tell(EngineLost(engine=EngineUrl("http://g0:a1111"), why="no answer"))
    found = desk.book.reason(J1)
    assert found is not None
    assert found.code == "no_gpu_ready"
    assert "http://g0:a1111 is lost" in found.text
    desk.submit("j2", labels=frozenset({"big"}))
    assert code(desk, J2) == "impossible_now"


def test_reasons_are_of_the_list() -> None:
    assert all(text.endswith(("}", ".", "}.")) for text in TEXTS.values())
    with pytest.raises(KeyError):
        reason("no_such_code")
    with pytest.raises(KeyError):
        reason("waiting_turn")


def test_estimates_grow_with_the_queue_and_are_honest_ranges() -> None:
    desk = Desk(Policy(service_seconds_unknown=10.0, load_seconds_unknown=5.0))
    desk.add(gpu("g0"))
    for number in range(20):
        desk.submit(f"j{number}")
    low, high = desk.book.estimated_start_seconds(JobId("j0")) or (0, 0)
    assert low <= 5.0 <= high
    spans = [desk.book.estimated_start_seconds(JobId(f"j{number}")) or (0, 0) for number in range(20)]
    assert [span[0] for span in spans] == sorted(span[0] for span in spans)
    true_wait = 19 * 10.0 + 5.0
    assert spans[19][0] * 0.5 <= true_wait <= spans[19][1]


# --- what is learned


def test_loads_fall_back_from_gpu_to_model_to_service_to_the_default() -> None:
    desk = Desk(Policy(load_seconds_unknown=10.0))
    desk.add(gpu("g0"), gpu("g1"))
    model, other = ModelKey("A"), ModelKey("B")
    assert desk.book.load_seconds(G0, model, Service.A1111) == 10.0
    for seconds in (20.0, 2.0, 3.0):
        desk.tell(LoadMeasured(gpu=G0, model=model, seconds=seconds, service=Service.A1111))
    assert desk.book.load_seconds(G0, model, Service.A1111) == 3.0  # the median
    assert desk.book.load_seconds(G1, model, Service.A1111) == 20.0  # unsure: on the high side
    assert desk.book.load_seconds(G1, other, Service.A1111) == 20.0
    assert desk.book.load_seconds(G1, other, Service.COMFYUI) == 10.0


def test_service_seconds_grow_with_the_work_and_fall_with_speed() -> None:
    desk = Desk()
    desk.add(gpu("g0"), gpu("g1", speed=2.0))
    small = replace(job("j1"), work=Work(steps=20, pixels=512 * 512, images=1), signature="s")
    large = replace(small, work=Work(steps=40, pixels=1024 * 1024, images=1))
    desk.tell(ServiceMeasured(job=small, gpu=G0, seconds=4.0))
    assert desk.book.service_seconds(large, G0) == pytest.approx(32.0)
    assert desk.book.service_seconds(large, G1) == pytest.approx(16.0)
    assert desk.book.service_seconds(replace(small, kind="img2img"), G0) == pytest.approx(4.0)
    assert desk.book.service_seconds(job("j2", service=Service.COMFYUI), G0) == 15.0


def test_broken_measurements_are_left_out_and_tables_stay_small() -> None:
    learned = Learned(Policy())
    for seconds in (-1.0, float("nan"), float("inf"), 1e9):
        learned.load_measured(G0, ModelKey("A"), None, seconds)
        learned.service_measured(job("j1"), 1.0, seconds)
    assert learned.load_seconds(G0, ModelKey("A")) == 10.0
    for number in range(5000):
        learned.load_measured(G0, ModelKey(f"m{number}"), None, 1.0)
    assert len(learned.loads.samples) <= 4096


def test_what_was_learned_can_be_kept() -> None:
    before, after = Learned(Policy()), Learned(Policy())
    before.load_measured(G0, ModelKey("A"), Service.A1111, 3.0)
    before.service_measured(job("j1"), 1.0, 7.0)
    after.recall(before.values())
    assert after.values() == before.values()
    assert after.load_seconds(G0, ModelKey("A")) == 3.0
    assert after.service_seconds(job("j1"), 1.0) == 7.0
