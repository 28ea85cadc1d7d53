"""What is refused at the door, and what the refusal tells."""

from __future__ import annotations

from gpulane.core.admission import Admitted, Limits, Refused, admit
from gpulane.core.events import EngineLost, EngineReady
from gpulane.core.model import EngineUrl, Service
from tests.unit.core.building import Desk, gpu, job

X = frozenset({"node:X"})


def refused(answer: Admitted | Refused) -> Refused:
    assert isinstance(answer, Refused)
    return answer


def test_a_possible_job_is_admitted() -> None:
    desk = Desk()
    desk.add(gpu("g0"), offers=X)
    assert admit(desk.book, job("j1", needs=X)) == Admitted()


def test_no_gpu_of_the_service() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    answer = refused(admit(desk.book, job("j1", service=Service.COMFYUI)))
    assert answer.reason.code == "no_gpu_of_service"
    assert "comfyui" in answer.reason.text
    assert not answer.is_temporary


def test_refused_only_when_every_gpu_says_a_definite_no() -> None:
    desk = Desk()
    desk.add(gpu("g0"), offers=X)
    desk.add(gpu("g1"), ready=False)
    wanted = job("j1", needs=frozenset({"node:Y"}))
    assert admit(desk.book, wanted) == Admitted()  # g1 has not told yet
    desk.tell(EngineReady(engine=EngineUrl("http://g1:a1111"), offers=None))
    assert admit(desk.book, wanted) == Admitted()  # it never tells
    desk.tell(EngineReady(engine=EngineUrl("http://g1:a1111"), offers=X))
    answer = refused(admit(desk.book, wanted))
    assert answer.reason.code == "impossible"
    assert [(r.code, dict(r.args)["gpu"]) for r in answer.per_gpu] == [
        ("needs_not_offered", "node/g0"),
        ("needs_not_offered", "node/g1"),
    ]


def test_a_lost_engine_does_not_refuse_what_it_offered() -> None:
    desk = Desk()
    desk.add(gpu("g0"), offers=X)
    desk.tell(EngineLost(engine=EngineUrl("http://g0:a1111"), why="no answer"))
    assert admit(desk.book, job("j1", needs=X)) == Admitted()


def test_nearest_names_of_the_same_family() -> None:
    desk = Desk()
    offers = frozenset(
        {"checkpoint:dreamshaper_8.safetensors", "checkpoint:sdxl.safetensors", "sampler:Euler a"}
    )
    desk.add(gpu("g0"), offers=offers)
    needs = frozenset({"checkpoint:Dreamshaper_7.safetensors", "sampler:euler A"})
    answer = refused(admit(desk.book, job("j1", needs=needs)))
    assert answer.nearest == ("dreamshaper_8.safetensors", "Euler a")
    assert "dreamshaper_8.safetensors" in answer.reason.text
    node = job("j2", needs=frozenset({"CheckpointLoaderSimple.ckpt_name=sdxl"}))
    assert refused(admit(desk.book, node)).nearest == ()


def test_labels_and_pins() -> None:
    desk = Desk()
    desk.add(gpu("g0"), gpu("g1", labels=frozenset({"small"})))
    answer = refused(admit(desk.book, job("j1", labels=frozenset({"big", "new"}))))
    assert {r.code for r in answer.per_gpu} == {"labels_missing"}
    assert "big, new" in answer.reason.text


def test_limits_pass_with_time() -> None:
    desk = Desk()
    desk.add(gpu("g0"))
    for number in range(3):
        desk.submit(f"j{number}")
    desk.claim(desk.starts()[0])
    limits = Limits(queued_max=100, queued_per_account_max=2)
    answer = refused(admit(desk.book, job("j9"), limits))
    assert (answer.reason.code, answer.is_temporary) == ("account_full", True)
    assert admit(desk.book, job("j9", "bob"), limits) == Admitted()
    assert refused(admit(desk.book, job("j9", "bob"), Limits(queued_max=2))).reason.code == "queue_full"
