"""The native API over real sockets: jobs, their owners, gpus, queue, description."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import msgspec
import pytest
from aiohttp import web

from gpulane.config import KeySettings, LimitSettings, Settings
from gpulane.config.settings import RoleName
from gpulane.core.model import (
    EngineState,
    EngineUrl,
    Failure,
    FailureKind,
    GpuId,
    JobId,
    JobState,
    ModelKey,
    Service,
)
from gpulane.engine.base import Artifact, RecordedResult
from gpulane.engine.progress import Progress
from gpulane.views import EngineView
from tests.integration.web.conftest import Door, Doors
from tests.integration.web.standin import StandIn

pytestmark = pytest.mark.anyio

WORKFLOW = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}
COMFYUI = {"service": "comfyui", "workflow": WORKFLOW}
A1111 = {"service": "a1111", "endpoint": "txt2img", "payload": {"prompt": "a cat", "steps": 4}}
JOBS = "/gpulane/v1/jobs"
ANN, BOB, OPS = ({"X-Api-Key": name} for name in ("ann-key", "bob-key", "ops-key"))


ROLES: tuple[tuple[str, RoleName], ...] = (
    ("ann", "user"),
    ("bob", "user"),
    ("ops", "operator"),
    ("eye", "viewer"),
)


def keyed() -> Settings:
    return Settings(
        keys=tuple(
            KeySettings(account=name, sha256=hashlib.sha256(f"{name}-key".encode()).hexdigest(), role=role)
            for name, role in ROLES
        )
    )


async def submitted(door: Door, body: object = None, **sent: Any) -> dict[str, Any]:
    return await door.json("POST", JOBS, status=202, json=body or COMFYUI, **sent)


async def test_job_has_the_documented_shape(door: Door) -> None:
    job = await submitted(door, {**COMFYUI, "priority": "interactive", "labels": ["big"], "max_attempts": 2})
    assert job["service"] == "comfyui" and job["kind"] == "prompt" and job["user"] == "127.0.0.1"
    assert job["state"] == "queued" and job["position"] == 1
    assert job["reason"] == {"code": "no_free_gpu", "text": "Every GPU is busy.", "args": {"gpus": 1}}
    assert job["estimated_start_seconds"] == [1.0, 2.0]
    assert (job["band"], job["priority"], job["labels"]) == ("interactive", 0, ["big"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", job["created_at"])
    assert job["gpu"] is job["started_at"] is job["error"] is job["progress"] is None
    record = await door.gateway.record(JobId(job["id"]))
    assert record is not None and record.job.max_attempts == 2
    body = await door.gateway.body(JobId(job["id"]))
    assert body is not None and job["id"].encode() in body


async def test_job_runs_and_ends(door: Door) -> None:
    job = JobId((await submitted(door, A1111))["id"])
    await door.gateway.start(job)
    door.gateway.hub.publish(Progress(job=job, value=3, max=20, text="sampling"))
    running = await door.json("GET", f"{JOBS}/{job}")
    assert running["state"] == "running" and running["position"] is None and running["reason"] is None
    assert running["progress"] == {"value": 3.0, "max": 20.0, "text": "sampling"}
    assert (running["gpu"], running["node"]) == ("box/gpu0", "box")
    assert running["attempts"][0]["state"] == "started"
    waits = await door.json("GET", f"{JOBS}/{job}/result", status=409)
    assert waits["error"]["code"] == "not_ready"
    failure = Failure(kind=FailureKind.ENGINE, code="out_of_memory", message="CUDA out of memory")
    await door.gateway.finish(job, state=JobState.FAILED, failure=failure)
    failed = await door.json("GET", f"{JOBS}/{job}")
    assert failed["state"] == "failed"
    assert failed["error"] == {"code": "out_of_memory", "message": "CUDA out of memory"}
    none = await door.json("GET", f"{JOBS}/{job}/result", status=409)
    assert none["error"]["code"] == "out_of_memory"


async def test_results_and_files(door: Door) -> None:
    job = JobId((await submitted(door))["id"])
    await door.gateway.start(job)
    picture = Artifact(name='out/a "b".png', content_type="image/png")
    page = Artifact(name="evil.html", content_type="text/html")
    result = RecordedResult(document=msgspec.Raw(b'{"outputs": {}}'), artifacts=(picture, page))
    door.gateway.keep_artifact(job, 0, b"\x89PNG0123", picture)
    door.gateway.keep_artifact(job, 1, b"<script>", page)
    await door.gateway.finish(job, result=result)
    assert await door.json("GET", f"{JOBS}/{job}/result") == {"outputs": {}}
    listed = (await door.json("GET", f"{JOBS}/{job}/artifacts"))["artifacts"]
    assert [file["url"] for file in listed] == [f"{JOBS}/{job}/artifacts/{n}" for n in (0, 1)]
    async with door.client.get(listed[0]["url"], headers={"Range": "bytes=1-3"}) as answer:
        assert (answer.status, await answer.read()) == (206, b"PNG")
        assert answer.headers["Content-Disposition"] == "inline; filename*=UTF-8''a%20%22b%22.png"
    async with door.client.get(listed[1]["url"]) as answer:
        assert answer.headers["Content-Disposition"].startswith("attachment")
        assert answer.headers["Content-Security-Policy"].startswith("sandbox")
    missing = await door.json("GET", f"{JOBS}/{job}/artifacts/2", status=404)
    assert missing["error"]["code"] == "no_such_artifact"


async def test_files_inside_the_answer_and_still_on_the_engine(doors: Doors, door: Door) -> None:
    async def view(request: web.Request) -> web.Response:
        return web.Response(body=f"from {request.raw_path}".encode())

    engine = await doors.engine(door, view, service=Service.COMFYUI)
    job = JobId((await submitted(door))["id"])
    await door.gateway.start(job)
    document = msgspec.json.encode(
        {"images": [base64.b64encode(b"first").decode(), "data:x;base64,c2Vjb25k"]}
    )
    files = (
        Artifact(name="0.png", content_type="image/png"),
        Artifact(name="there.png", content_type="image/png", target="/view?filename=a%20b.png"),
        Artifact(name="1.png", content_type="image/png"),
        Artifact(name="2.png", content_type="image/png"),
    )
    result = RecordedResult(document=msgspec.Raw(document), engine=engine.url, artifacts=files)
    await door.gateway.finish(job, result=result)
    found: list[bytes] = []
    for number in range(3):
        async with door.client.get(f"{JOBS}/{job}/artifacts/{number}") as answer:
            assert answer.status == 200 and answer.headers["Content-Type"] == "image/png"
            found.append(await answer.read())
    assert found == [b"first", b"from /view?filename=a%20b.png", b"second"]
    gone = await door.json("GET", f"{JOBS}/{job}/artifacts/3", status=404)
    assert gone["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"{", "bad_json", "not JSON"),
        (b"[]", "bad_field", "object"),
        (b"\xff", "bad_json", "not JSON"),
        ({"service": "comfy", "workflow": {}}, "bad_field", "service"),
        ({**COMFYUI, "prioritty": 1}, "unknown_field", "'priority'"),
        ({**COMFYUI, "priority": "urgent"}, "bad_field", "priority"),
        ({**COMFYUI, "priority": 10**9}, "bad_field", "priority"),
        ({**COMFYUI, "webhook": "http://127.0.0.1/"}, "not_supported", "webhook"),
        ({**COMFYUI, "deadline_seconds": 5}, "not_supported", "deadline_seconds"),
        ({**COMFYUI, "max_attempts": 0}, "bad_field", "max_attempts"),
        ({**COMFYUI, "labels": "big"}, "bad_field", "labels"),
        ({"service": "comfyui"}, "bad_field", "workflow"),
        ({**A1111, "endpoint": "txt2im"}, "bad_field", "'txt2img'"),
        ({**A1111, "workflow": {}}, "bad_field", "workflow"),
    ],
)
async def test_bad_requests_say_what_to_change(door: Door, body: object, code: str, words: str) -> None:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    refused = (await door.json("POST", JOBS, status=400, data=data))["error"]
    assert refused["code"] == code
    assert words in f"{refused['message']} {refused['hint']}"


async def test_broken_workflows_and_payloads_are_refused(door: Door) -> None:
    await door.json("POST", JOBS, status=400, json={"service": "comfyui", "workflow": []})
    refused = await door.json("POST", JOBS, status=422, json={**A1111, "payload": {"steps": "many"}})
    assert "steps" in refused["error"]["message"]
    assert await door.gateway.waiting() == []


async def test_limits(doors: Doors) -> None:
    door = await doors.open(Settings(limits=LimitSettings(body_mib=0.001, queued_max=1)))
    refused = await door.json("POST", JOBS, status=413, data=b" " * 2000)
    assert refused["error"]["code"] == "too_large"

    async def pieces() -> Any:
        for _ in range(8):
            yield b" " * 300

    await door.json("POST", JOBS, status=413, data=pieces())
    await door.json("POST", JOBS, status=415, data=b"x", headers={"Content-Encoding": "gzip"})
    await submitted(door)
    async with door.client.post(JOBS, json=COMFYUI) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "8")


async def test_idempotency_key_gives_the_same_job(door: Door) -> None:
    first = await submitted(door, headers={"Idempotency-Key": "k1"})
    again = await door.json("POST", JOBS, json={**COMFYUI, "idempotency_key": "k1"})
    assert again["id"] == first["id"]
    await door.json("POST", JOBS, status=409, json=A1111, headers={"Idempotency-Key": "k1"})
    await door.json(
        "POST", JOBS, status=400, json={**COMFYUI, "idempotency_key": "k2"}, headers={"Idempotency-Key": "k1"}
    )
    assert len(await door.gateway.waiting()) == 1


async def test_jobs_of_others_are_unknown(doors: Doors) -> None:
    door = await doors.open(keyed())
    job = (await submitted(door, headers=ANN))["id"]
    for method, path in (
        ("GET", f"{JOBS}/{job}"),
        ("DELETE", f"{JOBS}/{job}"),
        ("GET", f"{JOBS}/{job}/result"),
        ("GET", f"{JOBS}/{job}/artifacts/0"),
        ("GET", f"{JOBS}/{job}/events"),
    ):
        mine = await door.json(method, path, status=404, headers=BOB)
        none = await door.json(method, path.replace(job, "x"), status=404, headers=BOB)
        assert mine == none
    await door.json("PATCH", f"{JOBS}/{job}", status=404, headers=BOB, json={"priority": 1})
    assert (await door.json("GET", JOBS, headers=BOB))["jobs"] == []
    await door.json("GET", f"{JOBS}?user=ann", status=403, headers=BOB)
    assert len((await door.json("GET", f"{JOBS}?user=ann", headers=OPS))["jobs"]) == 1
    assert (await door.json("GET", f"{JOBS}/{job}", headers=OPS))["user"] == "ann"
    assert (await door.json("GET", f"{JOBS}/{job}", headers=ANN))["state"] == "queued"


async def test_roles(doors: Doors) -> None:
    door = await doors.open(keyed())
    await door.json("POST", JOBS, status=403, headers={"X-Api-Key": "eye-key"}, json=COMFYUI)
    await door.json("POST", "/gpulane/v1/queue/pause", status=403, headers=ANN)
    assert (await door.json("POST", "/gpulane/v1/queue/pause", headers=OPS))["paused"] is True
    assert (await door.json("POST", "/gpulane/v1/queue/unpause", headers=OPS))["paused"] is False


async def test_list_pages_and_filters(door: Door) -> None:
    made = [(await submitted(door))["id"] for _ in range(5)]
    first = await door.json("GET", f"{JOBS}?limit=3")
    second = await door.json("GET", f"{JOBS}?limit=3&cursor={first['next_cursor']}")
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == made[::-1]
    assert second["next_cursor"] is None
    assert (await door.json("GET", f"{JOBS}?state=running,failed"))["jobs"] == []
    assert (await door.json("GET", f"{JOBS}?service=a1111"))["jobs"] == []
    refused = await door.json("GET", f"{JOBS}?state=runing", status=400)
    assert "'running'" in refused["error"]["hint"]
    for query in ("limit=0", "limit=x", "cursor=-1", "service=sd"):
        await door.json("GET", f"{JOBS}?{query}", status=400)


async def test_cancel_and_priority(door: Door) -> None:
    job = (await submitted(door))["id"]
    changed = await door.json("PATCH", f"{JOBS}/{job}", json={"priority": 7})
    assert (changed["band"], changed["priority"]) == ("normal", 7)
    changed = await door.json("PATCH", f"{JOBS}/{job}", json={"priority": "batch"})
    assert changed["band"] == "batch"
    await door.json("PATCH", f"{JOBS}/{job}", status=400, json={})
    assert (await door.json("DELETE", f"{JOBS}/{job}"))["state"] == "cancelled"
    assert (await door.json("DELETE", f"{JOBS}/{job}"))["state"] == "cancelled"
    await door.json("PATCH", f"{JOBS}/{job}", status=409, json={"priority": 1})

    running = JobId((await submitted(door))["id"])
    await door.gateway.start(running)
    told = await door.json("DELETE", f"{JOBS}/{running}", status=202)
    assert told["state"] == "running" and told["cancel_wanted"]
    await door.gateway.finish(running)
    assert (await door.json("GET", f"{JOBS}/{running}"))["state"] == "cancelled"


def add_gpu(gateway: StandIn, gpu: str) -> None:
    gateway.add_engine(
        EngineView(
            url=EngineUrl(f"http://{gpu}"),
            service=Service.COMFYUI,
            name="",
            gpu=GpuId(gpu),
            state=EngineState.READY,
            why="",
            model=ModelKey("x.safetensors"),
            description=None,
        )
    )


async def test_gpus_drain_and_resume_by_both_names(door: Door) -> None:
    for gpu in ("box/gpu0", "box/gpu1", "attic/gpu1"):
        add_gpu(door.gateway, gpu)
    assert [g["id"] for g in (await door.json("GET", "/gpulane/v1/gpus"))["gpus"]] == [
        "box/gpu0",
        "box/gpu1",
        "attic/gpu1",
    ]
    shown = await door.json("GET", "/gpulane/v1/gpus/gpu0")
    assert shown["engines"][0]["model"] == "x.safetensors" and shown["vram"]["bytes_total"] is None
    assert (await door.json("POST", "/gpulane/v1/gpus/gpu0/drain"))["state"] == "draining"
    assert (await door.json("POST", "/gpulane/v1/gpus/box/gpu0/resume"))["state"] == "idle"
    assert (await door.json("POST", "/gpulane/v1/gpus/attic%2Fgpu1/drain"))["state"] == "draining"
    refused = await door.json("POST", "/gpulane/v1/gpus/gpu1/drain", status=400)
    assert "box/gpu1, attic/gpu1" in refused["error"]["hint"]
    await door.json("GET", "/gpulane/v1/gpus/gpu9", status=404)
    await door.json("GET", "/gpulane/v1/queue/pause", status=405)


async def test_description_covers_every_endpoint(door: Door) -> None:
    told = await door.json("GET", "/gpulane/v1/openapi.json")
    assert set(told["paths"][JOBS]) == {"get", "post"}
    assert {"get", "delete", "patch"} == set(told["paths"][JOBS + "/{id}"])
    names = set(re.findall(r"#/components/schemas/(\w+)", msgspec.json.encode(told).decode()))
    assert names <= set(told["components"]["schemas"])
