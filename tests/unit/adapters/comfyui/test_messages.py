"""Evidence of a job from messages and looks: recorded runs, and the rules one by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpulane.adapters.comfyui.messages import (
    Evidence,
    Look,
    Phase,
    Place,
    read_history,
    read_message,
    read_queue,
)
from gpulane.adapters.comfyui.result import Verdict, read_entry
from gpulane.core.model import JobId

JOB = JobId("c72bac4e-fb15-4d8b-9505-539657dcc911")
VERSIONS = ["0.3.64", "0.27.0"]


def hear(evidence: Evidence, kind: str, **data: object) -> bool:
    message = read_message(json.dumps({"type": kind, "data": {"prompt_id": JOB} | data}))
    assert message is not None
    return evidence.hear(message)


def entry(word: str = "success") -> Any:
    status: dict[str, Any] = {
        "status_str": "success" if word == "success" else "error",
        "messages": [[f"execution_{word}", {}]],
    }
    raw = read_history(json.dumps({JOB: {"outputs": {}, "status": status}}).encode(), JOB)
    assert raw is not None
    return raw


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "verdicts"),
    [
        ("run_ksampler", ["success"]),
        ("run_noflags", ["success"]),
        ("run_flags", ["success"]),
        ("run_basic_and_cached", ["success", "success"]),
        ("exec_error", ["error"]),
    ],
)
def test_recorded_runs(shared: Path, version: str, name: str, verdicts: list[str]) -> None:
    recording = json.loads((shared / "recordings" / "comfyui" / version / f"{name}.json").read_text())
    texts = [json.dumps(frame["text"]) for frame in recording["ws"] if "text" in frame]
    messages = [message for text in texts if (message := read_message(text)) is not None]
    assert len(messages) == len(texts)
    jobs = list(dict.fromkeys(message.job for message in messages if message.job))
    found: list[str] = []
    for job in jobs:
        evidence = Evidence(job=JobId(job))
        phases: list[Phase] = []
        for message in messages:
            evidence.hear(message)
            phases.append(evidence.phase)
        assert phases == sorted(phases)
        assert evidence.phase is Phase.FREE
        assert evidence.wants_entry
        assert evidence.verdict is not None
        found.append(evidence.verdict.value)
    assert found == verdicts


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_interrupts_are_no_errors(shared: Path, version: str) -> None:
    recording = json.loads((shared / "recordings" / "comfyui" / version / "cancel.json").read_text())
    kinds: dict[str, str] = {}
    for exchange in recording["http"]:
        body = exchange["body"]
        if not exchange["request"]["path"].startswith("/history/") or not isinstance(body, dict):
            continue
        for job, value in json.loads(json.dumps(body)).items():
            kinds[job] = read_entry(json.dumps(value).encode()).verdict.value
    assert set(kinds.values()) == {"success", "interrupted"}


def test_order_of_a_run() -> None:
    evidence = Evidence(job=JOB)
    evidence.accept()
    assert evidence.phase is Phase.WAITING
    hear(evidence, "execution_start")
    assert evidence.has_started
    hear(evidence, "execution_success")
    assert (evidence.phase, evidence.is_over) == (Phase.KNOWN, False)
    hear(evidence, "executing", node=None)
    assert (evidence.wants_entry, evidence.is_over) == (True, False)
    evidence.look(Look(began=evidence.heard, before=Place.ABSENT, entry=entry()))
    assert evidence.is_over


def test_messages_of_others_and_greetings_are_nothing() -> None:
    evidence = Evidence(job=JOB)
    for data in ({"prompt_id": "other", "node": None}, {"node": "1"}, {"node": None}):
        message = read_message(json.dumps({"type": "executing", "data": data}))
        assert message is not None
        assert not evidence.hear(message)
    assert evidence.phase is Phase.SENT


def test_word_of_the_history_goes_before_that_of_messages() -> None:
    evidence = Evidence(job=JOB)
    hear(evidence, "execution_success")
    evidence.look(Look(began=evidence.heard, before=Place.ABSENT, entry=entry("error")))
    assert evidence.entry is not None
    assert read_entry(evidence.entry).verdict is Verdict.ERROR


def test_late_messages_of_an_earlier_run_are_taken_back() -> None:
    evidence = Evidence(job=JOB)
    evidence.accept()
    hear(evidence, "execution_error")
    hear(evidence, "executing", node=None)
    evidence.look(Look(began=0, before=Place.RUNNING))
    assert evidence.wants_entry, "a look that began before proves nothing"
    evidence.look(Look(began=evidence.heard, before=Place.ABSENT, after=Place.RUNNING))
    assert (evidence.phase, evidence.verdict) == (Phase.STARTED, None)
    hear(evidence, "executing", node=None)
    evidence.look(Look(began=evidence.heard, before=Place.ABSENT, entry=entry()))
    assert evidence.is_over


def test_absent_is_lost_only_if_it_had_been_there() -> None:
    absent = Look(began=0, before=Place.ABSENT)
    evidence = Evidence(job=JOB)
    evidence.look(absent)
    assert evidence.phase is Phase.SENT
    evidence.look(absent, is_settled=True)
    assert evidence.phase is Phase.LOST
    evidence = Evidence(job=JOB)
    evidence.look(Look(began=0, before=Place.ABSENT, after=Place.WAITING))
    evidence.look(absent)
    assert evidence.phase is Phase.LOST


def test_cleared_history_is_made_up_for() -> None:
    evidence = Evidence(job=JOB)
    files = {"images": [{"filename": "a.png", "subfolder": "s", "type": "output"}]}
    hear(evidence, "executed", node="9", output=files)
    hear(evidence, "execution_success")
    hear(evidence, "executing", node=None)
    evidence.look(Look(began=evidence.heard, before=Place.ABSENT))
    assert evidence.entry is not None
    ended = read_entry(evidence.entry)
    assert ended.verdict is Verdict.SUCCESS
    assert [file.target for file in ended.files] == ["/view?filename=a.png&subfolder=s&type=output"]
    evidence = Evidence(job=JOB)
    hear(evidence, "execution_error", exception_type="torch.OutOfMemoryError", exception_message="no room")
    evidence.look(Look(began=evidence.heard, before=Place.ABSENT))
    assert evidence.entry is not None
    error = read_entry(evidence.entry).error
    assert error is not None
    assert error.exception_message == "no room"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "{}",
        '{"type":7}',
        '{"type":"a","data":[1]}',
        '{"type":"a","data":{"prompt_id":{}}}',
        "[" * 9999,
    ],
)
def test_strange_messages_are_none(text: str) -> None:
    assert read_message(text) is None


def test_numbers_that_are_none_do_not_blind_us() -> None:
    running, waiting = b'[NaN,"a",{"t":"NaN \\" [NaN]"},{},[]]', b'[-Infinity,"b",{},{},[]]'
    body = b'{"queue_running":[' + running + b'],"queue_pending":[' + waiting + b"]}"
    assert read_queue(body).place_of("b") is Place.WAITING
    raw = read_history(b'{"a":{"outputs":{"1":{"x":[NaN,Infinity,"NaN"]}}}}', "a")
    assert raw is not None
    assert json.loads(bytes(raw))["outputs"] == {"1": {"x": [None, None, "NaN"]}}
    message = read_message('{"type":"executed","data":{"node":"1","prompt_id":"a","output":{"x":[NaN]}}}')
    assert message is not None
    assert (message.job, message.output is not None) == ("a", True)
    with pytest.raises(ValueError):
        read_queue(b"<html>NaN</html>")


def test_status_tells_how_much_waits() -> None:
    message = read_message('{"type":"status","data":{"status":{"exec_info":{"queue_remaining":3}}}}')
    assert message is not None
    assert (message.queue_remaining, message.job) == (3, None)


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_queues(shared: Path, version: str) -> None:
    recording = json.loads((shared / "recordings" / "comfyui" / version / "queue_order.json").read_text())
    bodies = [
        x["body"] if isinstance(x["body"], str) else json.dumps(x["body"])
        for x in recording["http"]
        if x["request"]["method"] == "GET" and x["request"]["path"] == "/queue"
    ]
    assert bodies
    queue = read_queue(bodies[0].encode())
    assert len(queue.running) == 1
    assert len(queue.waiting) >= 5
    assert queue.place_of(queue.running[0]) is Place.RUNNING
    assert queue.place_of(queue.waiting[-1]) is Place.WAITING
    assert queue.place_of("no") is Place.ABSENT
