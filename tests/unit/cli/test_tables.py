"""Rows, sentences and the live picture, from documents as the gateway gives them."""

from datetime import UTC, datetime

import msgspec
import pytest
from rich.console import Console

from gpulane.cli.documents import Artifact, Gpu, Job, Queue
from gpulane.cli.output import Rows, plain_rows
from gpulane.cli.overview import Snapshot, overview, plain_overview, share_done
from gpulane.cli.tables import explanation, gpu_rows, job_facts, job_rows, seconds_text
from gpulane.cli.waiting import file_name

NOW = datetime(2026, 1, 1, 12, 0, 30, tzinfo=UTC)
BASE = {
    "id": "00000000-0000-4000-8000-000000000001",
    "service": "comfyui",
    "kind": "prompt",
    "user": "anna",
    "state": "queued",
    "model": "sd15.safetensors",
    "created_at": "2026-01-01T12:00:00.000Z",
    "unknown_field_of_later": 1,
}
GPU = {
    "id": "box/gpu0",
    "name": "gpu0",
    "state": "busy",
    "job": BASE["id"],
    "engines": [
        {"url": "http://127.0.0.1:1", "service": "a1111", "state": "ready"},
        {"url": "http://127.0.0.1:2", "service": "comfyui", "state": "lost", "why": "refused", "model": "m"},
    ],
    "vram": {"bytes_total": 24 << 30, "bytes_free": 6 << 30},
}


def job(**changes: object) -> Job:
    return msgspec.convert({**BASE, **changes}, Job)


def gpu(**changes: object) -> Gpu:
    return msgspec.convert({**GPU, **changes}, Gpu)


def drawn(snapshot: Snapshot, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(overview(snapshot))
    text = console.export_text()
    console.file.close()
    return text


def test_jobs_as_rows() -> None:
    running = job(
        state="running",
        gpu="box/gpu0",
        started_at="2026-01-01T12:00:10Z",
        progress={"value": 5, "max": 20},
    )
    failed = job(state="failed", error={"code": "x", "message": "out of memory\nmore"})
    waiting = job(position=3, reason={"code": "busy", "text": "all busy", "args": {}})
    lines = plain_rows(job_rows([running, failed, waiting], now=NOW))
    assert lines[0].split() == ["ID", "STATE", "SERVICE", "USER", "MODEL", "GPU", "AGE", "TOOK", "WHAT"]
    assert lines[1].split()[1:] == ["running", "comfyui", "anna", "sd15", "gpu0", "30", "s", "20", "s", "25%"]
    assert lines[2].endswith("out of memory")
    assert lines[3].endswith("place 3: all busy")
    assert len({len(line.split("queued")[0]) for line in lines[3:]}) == 1


def test_gpus_have_a_row_per_engine() -> None:
    rows = gpu_rows([gpu()]).rows
    assert rows[0][:4] == ("box/gpu0", "busy", str(BASE["id"]), "6.0 of 24 GiB")
    assert rows[1][:4] == ("", "", "", "")
    assert rows[1][-1] == "lost: refused"


def test_nothing_is_said_in_words() -> None:
    assert plain_rows(Rows(columns=("a", "b"), rows=(("", "x"),))) == ["A  B", "-  x"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "succeeded"}, "it waits no more: succeeded"),
        (
            {"state": "failed", "error": {"code": "oom", "message": "no memory"}},
            "it waits no more: failed: no memory (oom)",
        ),
        (
            {"state": "running", "started_at": "2026-01-01T12:00:10Z", "gpu": "box/gpu0"},
            "it waits no more: it runs on box/gpu0",
        ),
        ({}, "no place yet"),
        (
            {
                "position": 2,
                "reason": {"code": "busy", "text": "all busy", "args": {}},
                "estimated_start_seconds": [3.2, 9.9],
            },
            "place 2; all busy (busy); starts in 3 to 10 s",
        ),
    ],
)
def test_explanations(changes: dict[str, object], words: str) -> None:
    assert explanation(job(**changes)) == words


def test_facts_of_a_job() -> None:
    found = dict(
        job_facts(
            job(
                state="running",
                cancel_wanted=True,
                started_at="2026-01-01T12:00:10Z",
                attempts=[{"number": 1, "gpu": "box/gpu0", "state": "started", "engine": "http://e"}],
            ),
            now=NOW,
        )
    )
    assert found["state"] == "running (to be cancelled)"
    assert found["runs for"] == "20 s"
    assert found["attempt 1"] == "started on box/gpu0 http://e"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0 s"), (0.25, "0.2 s"), (42, "42 s"), (600, "10 min"), (9000, "2 h"), (300_000, "3 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        (None, None),
        ({"value": 3, "max": None}, None),
        ({"value": 3, "max": 0}, None),
        ({"value": 3, "max": 4}, 0.75),
        ({"value": 9, "max": 4}, 1.0),
    ],
)
def test_share_done(progress: object, share: float | None) -> None:
    assert share_done(job(progress=progress)) == share


def test_overview() -> None:
    running = job(state="running", progress={"value": 5, "max": 20})
    second = job(id="b", user="127.0.0.3", position=2, reason={"code": "x", "text": "all busy", "args": {}})
    first = job(id="a", user="cleo", position=1)
    snapshot = Snapshot(
        gpus=(gpu(), gpu(id="box/gpu1", name="gpu1", state="lost", job=None, why="stranger", engines=[])),
        queue=Queue(waiting=14, running=1),
        jobs=(second, first, running),
        names={"127.0.0.3": "ben"},
    )
    lines = drawn(snapshot).splitlines()
    assert lines[1].split() == ["gpu0", "busy", "comfyui", "anna", "sd15", *lines[1].split()[5:]]
    assert "25%" in lines[1]
    assert lines[2].split() == ["gpu1", "lost", "stranger"]
    assert lines[5].split()[:2] == ["1", "cleo"]
    assert lines[6].split()[:2] == ["2", "ben"]
    assert "and 4 more" in drawn(snapshot)
    assert plain_overview(snapshot) == "gpu0 busy comfyui sd15.safetensors 25% | gpu1 lost | waiting 14"


def test_overview_of_a_narrow_terminal_keeps_its_lines() -> None:
    snapshot = Snapshot(gpus=(gpu(),), queue=Queue(paused=True), jobs=(job(state="running"),))
    lines = drawn(snapshot, width=60).splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert any("paused" in line for line in lines)


def test_names_of_files_stay_in_their_folder() -> None:
    given = ["a/b.png", "../../etc/passwd", "..", "", "C:\\x\\y.png", "x" * 500, "ä b?.png"]
    names = {file_name("0123456789", Artifact(number=n, name=name)) for n, name in enumerate(given)}
    assert len(names) == 7
    assert all("/" not in name and "\\" not in name and len(name) < 200 for name in names)
    assert all(name.startswith("01234567_") for name in names)
