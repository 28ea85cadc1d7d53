"""Rules of the decision tree one by one; their combinations are tried in tests/machines."""

from __future__ import annotations

from gpulane.core.events import (
    AttemptFailed,
    ClaimProposed,
    EngineReady,
    EngineUnloaded,
    GpuAdded,
    GpuDrained,
    GpuOccupied,
    JobPrioritised,
    LoadMeasured,
    ModelSeen,
    QueuePaused,
)
from gpulane.core.model import (
    NO_MODEL,
    Band,
    EngineUrl,
    Failure,
    FailureKind,
    GpuId,
    JobId,
    ModelKey,
    Service,
)
from gpulane.core.policy import Policy
from tests.unit.core.building import Desk, gpu

A1111, COMFY = Service.A1111, Service.COMFYUI


def first_jobs(desk: Desk) -> list[str]:
    return [str(start.candidates[0].job) for start in desk.starts()]


def holds(desk: Desk, name: str, model: str, service: Service = A1111) -> None:
    engine = EngineUrl(f"http://{name}:{service.value}")
    desk.tell(ModelSeen(gpu=GpuId(f"node/{name}"), engine=engine, model=ModelKey(model)))


def test_nothing_is_proposed_while_paused_or_without_work() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    assert desk.starts() == []
    desk.submit("j1")
    desk.tell(QueuePaused(n=2, paused=True))
    assert desk.starts() == []
    assert desk.timers() == []


def test_rule_1_a_warm_job_within_slack_goes_before_a_cold_one() -> None:
    desk = Desk(Policy(load_seconds_unknown=2.0))  # slack 40
    desk.add(gpu("g0"))
    holds(desk, "g0", "B")
    desk.f[Band.NORMAL, "hog"] = 39.0
    desk.submit("hogs", "hog", "B")
    desk.submit("anns", "ann", "A")
    assert [(c.job, c.rule) for c in desk.starts()[0].candidates] == [("hogs", "1"), ("anns", "2")]


def test_rule_2_beyond_slack_the_first_in_fair_order_goes() -> None:
    desk = Desk(Policy(load_seconds_unknown=2.0))
    desk.add(gpu("g0"))
    holds(desk, "g0", "B")
    desk.f[Band.NORMAL, "hog"] = 41.0
    desk.submit("hogs", "hog", "B")
    desk.submit("anns", "ann", "A")
    assert [(c.job, c.rule) for c in desk.starts()[0].candidates] == [("anns", "2"), ("hogs", "1")]


def test_slack_is_capped_per_usable_gpu() -> None:
    desk = Desk(Policy(load_seconds_unknown=10.0))  # 200, capped at 60
    desk.add(gpu("g0"))
    holds(desk, "g0", "B")
    desk.f[Band.NORMAL, "hog"] = 61.0
    desk.submit("hogs", "hog", "B")
    desk.submit("anns", "ann", "A")
    assert first_jobs(desk) == ["anns"]
    desk.add(gpu("g1", COMFY))
    assert first_jobs(desk) == ["hogs"]


def test_rule_5_warm_goes_to_the_fastest() -> None:
    desk = Desk()
    desk.add(gpu("g0"), gpu("g1", speed=2.0), gpu("g2", speed=3.0))
    holds(desk, "g0", "A")
    holds(desk, "g1", "A")
    desk.submit("j1")
    assert desk.starts()[0].gpu == "node/g1"


def test_rule_5_cold_goes_to_empty_then_to_spare_copies_then_to_the_oldest() -> None:
    desk = Desk()
    desk.add(gpu("g0"), gpu("g1"), gpu("g2"))
    for name, model in (("g0", "B"), ("g1", "C")):
        holds(desk, name, model)
    desk.submit("j1", model="A")
    assert desk.starts()[0].gpu == "node/g2"
    holds(desk, "g2", "C")
    assert desk.starts()[0].gpu == "node/g1"
    holds(desk, "g2", "D")
    assert desk.starts()[0].gpu == "node/g0"


def test_rule_5_a_gpu_last_used_by_the_same_service_counts_as_older() -> None:
    desk = Desk()
    desk.add(gpu("g0", A1111, COMFY))
    desk.submit("c", service=COMFY, model="B")
    desk.claim(desk.starts()[0])
    desk.end("c")
    desk.now = 5.0
    desk.add(gpu("g1", A1111, COMFY))
    holds(desk, "g1", "C")
    desk.book.gpus[GpuId("node/g1")].last_engine = EngineUrl("http://g1:a1111")
    desk.submit("j1", model="A")
    assert desk.starts()[0].gpu == "node/g1"


def test_bands_go_first_and_leave_what_they_cannot_use() -> None:
    desk = Desk()
    desk.add(gpu("g0", labels=frozenset({"big"})), gpu("g1"))
    desk.submit("low", "ann", band=Band.BATCH)
    desk.submit("high1", "bob", band=Band.INTERACTIVE, labels=frozenset({"big"}))
    desk.submit("high2", "bob", band=Band.INTERACTIVE, labels=frozenset({"big"}))
    assert [(s.gpu, s.candidates[0].job) for s in desk.starts()] == [("node/g0", "high1"), ("node/g1", "low")]


def test_priority_orders_an_accounts_own_jobs_only() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    desk.submit("a1", "ann")
    desk.submit("b1", "bob", priority=9)
    desk.submit("a2", "ann", priority=5)
    assert [c.job for c in desk.starts()[0].candidates] == ["a2", "a1", "b1"]
    desk.tell(JobPrioritised(n=4, job=JobId("a1"), band=Band.NORMAL, priority=6, account_f=0.0))
    assert [c.job for c in desk.starts()[0].candidates] == ["a1", "b1", "a2"]


def test_weight_divides_charges() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    for number in range(6):
        desk.submit(f"a{number}", "ann", weight=2.0)
        desk.submit(f"b{number}", "bob")
    order: list[str] = []
    for _ in range(6):
        made = desk.claim(desk.starts()[0])
        order.append(made.account)
        desk.end(made.id)
    assert order.count("ann") == 4


def test_needs_decide_who_may_run_where() -> None:
    desk = Desk()
    desk.add(gpu("g0"), offers=frozenset({"node:X"}))
    desk.add(gpu("g1"), offers=frozenset({"node:X", "node:Y"}))
    desk.submit("j1", needs=frozenset({"node:Y"}))
    assert [s.gpu for s in desk.starts()] == ["node/g1"]
    desk.tell(EngineReady(engine=EngineUrl("http://g1:a1111"), offers=frozenset({"node:X"})))
    assert desk.starts() == []
    desk.tell(EngineReady(engine=EngineUrl("http://g0:a1111"), offers=None))
    assert [s.gpu for s in desk.starts()] == ["node/g0"]


def test_a_gpu_is_avoided_while_another_could_run_the_job() -> None:
    desk = Desk()
    desk.add(gpu("g0"), gpu("g1"))
    desk.submit("j1")
    start = desk.starts()[0]
    desk.claim(start)
    token = desk.book.active[JobId("j1")].token
    failed = AttemptFailed(
        n=desk.next_n,
        job=JobId("j1"),
        token=token,
        failure=Failure(kind=FailureKind.NOT_STARTED, code="connect_failed", message="refused"),
        avoid=frozenset({start.gpu}),
        not_before_seconds=0.0,
        account_f=0.0,
    )
    desk.tell(failed)
    assert [(s.gpu, s.candidates[0].despite_avoid) for s in desk.starts()] == [("node/g1", False)]
    desk.tell(GpuDrained(n=desk.next_n, gpu=GpuId("node/g1"), draining=True))
    assert [(s.gpu, s.candidates[0].despite_avoid) for s in desk.starts()] == [("node/g0", True)]


def test_charges_name_load_and_service() -> None:
    desk = Desk()
    desk.add(gpu("g0", speed=2.0))
    desk.tell(LoadMeasured(gpu=GpuId("node/g0"), model=ModelKey("A"), seconds=7.0))
    desk.submit("j1")
    charge = desk.starts()[0].candidates[0].charge
    assert (charge.load_seconds, charge.service_seconds) == (7.0, desk.policy.service_seconds_unknown / 2)
    holds(desk, "g0", "A")
    assert desk.starts()[0].candidates[0].charge.load_seconds == 0.0


def test_jobs_without_a_model_are_warm_where_their_engine_was_used_last() -> None:
    desk = Desk()
    desk.add(gpu("g0", A1111, Service.HTTP))
    desk.submit("h1", service=Service.HTTP, model=NO_MODEL)
    assert desk.starts()[0].candidates[0].charge.load_seconds == 6.0, (
        "what nobody has asked may hold anything"
    )
    desk.tell(EngineUnloaded(gpu=GpuId("node/g0"), engine=EngineUrl("http://g0:a1111")))
    assert desk.starts()[0].candidates[0].charge.load_seconds == 0.0
    desk.claim(desk.starts()[0])
    desk.end("h1")
    desk.submit("h2", service=Service.HTTP, model=NO_MODEL)
    assert desk.starts()[0].candidates[0].rule == "1"
    desk.tell(ModelSeen(gpu=GpuId("node/g0"), engine=EngineUrl("http://g0:a1111"), model=ModelKey("A")))
    desk.submit("j1", "bob")
    assert {c.rule for c in desk.starts()[0].candidates} == {"1"}


def test_v_is_not_held_down_by_a_job_that_no_gpu_may_run() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    desk.submit("never", "zoe", labels=frozenset({"big"}))
    desk.f[Band.NORMAL, "ann"] = 50.0
    desk.submit("j1", "ann")
    assert desk.starts()[0].lowest_f == ((Band.NORMAL, 50.0),)


def test_v_does_not_count_claims_that_may_be_lost() -> None:
    desk = Desk()
    desk.add(gpu("g0"), gpu("g1"))
    desk.submit("j1", "ann")
    desk.submit("j2", "ann")
    start = desk.starts()[0]
    desk.tell(ClaimProposed(gpu=start.gpu, jobs=(start.candidates[0].job,)))
    assert desk.starts()[0].lowest_f == ((Band.NORMAL, 0.0),)


def test_at_most_so_many_candidates() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    for number in range(20):
        desk.submit(f"j{number:02}")
    jobs = [c.job for c in desk.starts()[0].candidates]
    assert jobs == [f"j{number:02}" for number in range(8)]


def test_an_occupied_gpu_gets_nothing() -> None:
    desk = Desk()
    desk.tell(GpuAdded(gpu=gpu("g0")))
    desk.submit("j1")
    assert desk.starts() == []
    desk.tell(EngineReady(engine=EngineUrl("http://g0:a1111"), offers=None))
    desk.tell(GpuOccupied(gpu=GpuId("node/g0"), why="recovering"))
    assert desk.starts() == []
