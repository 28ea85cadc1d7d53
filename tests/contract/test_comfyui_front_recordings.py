"""What real engines were recorded to say, brought through the front door: clients hear and read the same."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import cast

import msgspec
import pytest

from gpulane.core.model import Account, JobId, JobState, Service
from gpulane.engine.base import RecordedResult
from gpulane.engine.progress import Progress
from tests.contract.recordings import differences, recording, renamed
from tests.integration.web.comfyui.gateway import ANN, Gateway, Json, ear, gateway, label, submit

pytestmark = pytest.mark.anyio

VERSIONS = ("0.27.0", "0.3.64")
RUNS = ("run_flags", "run_noflags", "run_ksampler", "exec_error")
JPEG = b"\xff\xd8\xff\xe0"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", RUNS)
async def test_recorded_run_is_heard_as_it_was(tmp_path: Path, version: str, name: str) -> None:
    recorded = _first_run(recording(f"comfyui/{version}/{name}"))
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        job = JobId(await submit(ann, client_id="c1", prompt_id="mine"))
        record = await door.jobs.record_of_client(Account("ann"), Service.COMFYUI, "mine")
        assert record is not None
        assert job == "mine"
        await door.jobs.start(record.job.id)
        _say(door, record.job.id, recorded)
        is_error = any(kind == "execution_error" for kind in map(_kind, recorded))
        await door.jobs.finish(record.job.id, JobState.FAILED if is_error else JobState.SUCCEEDED)
        await heard.until_kind("run over")
        told = [message for message in heard.heard if label(message) not in {"status", "feature_flags"}]
        assert list(map(label, told)) == list(map(_kind, recorded))
        expected = renamed([m["text"] for m in recorded if "text" in m], {_prompt_id(recorded): "mine"})
        assert [message for message in told if not isinstance(message, bytes)] == expected


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", RUNS)
async def test_recorded_history_is_read_as_it_was(tmp_path: Path, version: str, name: str) -> None:
    prompt_id, entry = _history(recording(f"comfyui/{version}/{name}"))
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        job = JobId(await submit(ann, client_id="c1"))
        await door.jobs.start(job)
        document = msgspec.Raw(msgspec.json.encode(renamed(entry, {prompt_id: job})))
        is_error = cast("Json", entry["status"])["status_str"] != "success"
        state = JobState.FAILED if is_error else JobState.SUCCEEDED
        await door.jobs.finish(job, state, result=RecordedResult(document=document))
        async with ann.get(f"/history/{job}") as answer:
            told = (await answer.json())[job]
        expected = renamed(entry, {prompt_id: job})
        assert {key: told[key] for key in ("outputs", "status", "meta")} == {
            key: expected[key] for key in ("outputs", "status", "meta")
        }
        number, shown_id, graph, extra, outputs = told["prompt"]
        assert isinstance(number, int)
        assert [shown_id, graph, outputs] == [job, expected["prompt"][2], expected["prompt"][4]]
        assert extra["client_id"] == "c1"  # the client's own, not the gateway's


async def test_jobs_have_the_recorded_fields(tmp_path: Path) -> None:
    http = cast("list[Json]", recording("comfyui/0.27.0/cancel")["http"])
    listed = next(one["body"] for one in http if cast("Json", one["request"])["path"] == "/api/jobs?limit=2")
    cancelled, completed = cast("dict[str, list[Json]]", listed)["jobs"]
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        for state, outputs in (
            (JobState.SUCCEEDED, {"2": {"images": [_picture()]}}),
            (JobState.CANCELLED, {}),
        ):
            job = JobId(await submit(ann))
            await door.jobs.start(job)
            status: Json = {"status_str": "success", "completed": True, "messages": []}
            document = msgspec.json.encode({"outputs": outputs, "status": status})
            if state is JobState.CANCELLED:
                await door.jobs.cancel(job)
            await door.jobs.finish(job, state, result=RecordedResult(document=msgspec.Raw(document)))
        async with ann.get("/api/jobs?limit=2&sort_order=asc") as answer:
            told = await answer.json()
    assert differences(completed, told["jobs"][0]) == []
    assert differences(cancelled, told["jobs"][1]) == []


def _picture() -> dict[str, str]:
    return {"filename": "rec_00001_.png", "subfolder": "", "type": "output"}


def _first_run(recorded: Json) -> list[Json]:
    """The messages of the first whole run, without status."""
    messages = [m for m in cast("list[Json]", recorded["ws"]) if _kind(m) not in {"status", "feature_flags"}]
    return messages[: list(map(_kind, messages)).index("run over") + 1]


def _kind(message: Json) -> str:
    if "text" in message:
        return label(cast("Json", message["text"]))
    return f"frame {cast('Json', message['binary'])['type']}" if "binary" in message else "closed"


def _prompt_id(messages: list[Json]) -> str:
    text = next(cast("Json", m["text"]) for m in messages if "text" in m)
    return str(cast("Json", text["data"])["prompt_id"])


def _say(door: Gateway, job: JobId, recorded: list[Json]) -> None:
    for message in recorded:
        if "text" in message:
            text = renamed(message["text"], {_prompt_id(recorded): job})
            door.jobs.hub.publish(Progress(job=job, message=msgspec.json.encode(text)))
        elif cast("Json", message["binary"])["type"] == 4:
            door.jobs.show(job, JPEG)
        else:  # an engine sends the gateway type 4 alone, so these are of other clients
            frame = struct.pack(">II", 1, 1) + JPEG
            door.jobs.hub.publish(Progress(job=job, binary=frame))


def _history(recorded: Json) -> tuple[str, Json]:
    for one in cast("list[Json]", recorded["http"]):
        path = str(cast("Json", one["request"])["path"])
        if path.startswith("/history/") and isinstance(one["body"], dict):
            ((prompt_id, entry),) = cast("dict[str, Json]", one["body"]).items()
            return prompt_id, entry
    pytest.fail("no history was recorded")
