"""The front door over simulated engines: lists, files, uploads, whole runs, and what stays closed."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gpulane.core.model import Account, JobId, Service
from gpulane.store.base import JobQuery
from gpulane.testing.comfyui import SimComfyUI
from tests.integration.web.comfyui.gateway import (
    ANN,
    BOB,
    EVE,
    VIC,
    Gateway,
    ear,
    gateway,
    prompt,
    result_of,
    slow_prompt,
    submit,
)

pytestmark = pytest.mark.anyio

MODELS = {"checkpoints": ["sd15.safetensors"], "loras": ["a.safetensors"]}
MORE_MODELS = {"checkpoints": ["sd15.safetensors", "xl.safetensors"], "loras": ["b.safetensors"]}


@contextlib.asynccontextmanager
async def two_engines(folder: Path) -> AsyncIterator[Gateway]:
    async with (
        SimComfyUI(models=MODELS, previews=True, seed=1) as one,
        SimComfyUI(models=MORE_MODELS, previews=True, version="0.3.64", seed=2) as two,
        gateway(folder, one, two) as door,
    ):
        yield door


async def test_run_on_an_engine_is_heard_and_its_picture_is_seen(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann, ear(ann) as heard:
        job = await submit(ann, slow_prompt(), client_id="c1", prompt_id="mine")
        assert job == "mine"
        record = await door.jobs.record_of_client(*_mine())
        assert record is not None
        await door.jobs.run(record.job.id)
        await heard.until_kind("run over")
        assert heard.kinds[-2:] == ["execution_success", "run over"]
        assert "frame 4" in heard.kinds
        assert {"execution_start", "execution_cached", "progress_state", "progress", "executed"} <= set(
            heard.kinds
        )
        assert not any(record.job.id in str(message) for message in heard.heard)
        image = _image(heard.all("executed")[0])
        async with ann.get("/history/mine") as answer:
            entry = (await answer.json())["mine"]
        assert entry["outputs"]["2"]["images"] == [image]
        assert entry["prompt"][3]["client_id"] == "c1"
        for path in ("/view", "/api/view"):
            async with ann.get(path, params=image) as answer:
                assert answer.status == 200
                assert (await answer.read()).startswith(b"\x89PNG")


async def test_files_of_two_engines_never_have_one_name(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann, door.person(BOB) as bob:
        made = [(person, JobId(await submit(person, prompt(n)))) for n, person in enumerate((ann, ann, bob))]
        for engine, (_, job) in zip((0, 1, 1), made, strict=True):
            await door.jobs.run(job, engine)
        names: list[str] = []
        pictures: list[bytes] = []
        for person, job in made:  # asked for after all have ended, as slow clients do
            names.append(await name_of(person, job))
            async with person.get("/view", params={"filename": names[-1]}) as answer:
                assert answer.status == 200
                pictures.append(await answer.read())
        assert names[0].startswith("rec_")
        assert len(set(names)) == len(set(pictures)) == 3
        async with ann.get("/view", params={"filename": names[2]}) as answer:
            assert answer.status == 404


async def name_of(person: aiohttp.ClientSession, job: JobId) -> str:
    """The file's name as the history has it."""
    async with person.get(f"/history/{job}") as answer:
        (output,) = (await answer.json())[job]["outputs"].values()
    return output["images"][0]["filename"]


async def test_copied_file_is_served_when_its_engine_is_gone(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        job = JobId(await submit(ann))
        await door.jobs.start(job)
        await door.jobs.finish(job, result=result_of(job, {}, "a.png", "b.html"))
        for number, text in enumerate((b"0123456789", b"<script>")):
            path = tmp_path / str(number)
            path.write_bytes(text)
            door.jobs.artifacts[job, number] = path
        door.engines.lose(0)
        async with ann.get("/view?filename=a.png", headers={"Range": "bytes=2-4"}) as answer:
            assert (answer.status, await answer.read()) == (206, b"234")
            assert answer.headers["Content-Type"] == "image/png"
        async with ann.head("/view?filename=a.png&type=output&subfolder=") as answer:
            assert (answer.status, answer.headers["Content-Length"]) == (200, "10")
        async with ann.get("/view?filename=a.png&preview=webp;90") as answer:
            assert answer.status == 200
        async with ann.get("/view?filename=b.html") as answer:
            assert answer.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "query",
    [
        "",
        "filename=",
        "filename=../a.png",
        "filename=a.png&subfolder=..%2f..",
        "filename=%2fetc%2fpasswd",
        "filename=..%5ca.png",
        "filename=no.png",
        "filename=no.png&type=temp",
        "filename=no.png+%5Boutput%5D&type=input",
    ],
)
async def test_other_names_are_not_found(tmp_path: Path, query: str) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, ann.get(f"/view?{query}") as answer:
        assert answer.status == 404


async def test_preview_comes_from_the_engine_that_made_the_file(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann:
        for engine in (0, 1):
            job = JobId(await submit(ann, prompt(engine, prefix=f"p{engine}")))
            await door.jobs.run(job, engine)
            async with ann.get(f"/view?filename={await name_of(ann, job)}&channel=rgb") as answer:
                assert answer.status == 200


async def test_upload_reaches_every_engine(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann:
        form = aiohttp.FormData()
        form.add_field("image", _png(), filename="up.png", content_type="image/png")
        async with ann.post("/upload/image", data=form) as answer:
            assert await answer.json() == {"name": "up.png", "subfolder": "", "type": "input"}
        async with ann.get("/view?filename=up.png&type=input") as answer:
            assert await answer.read() == _png()
        graph = prompt() | {"1": {"class_type": "LoadImage", "inputs": {"image": "up.png"}}}
        for engine in (0, 1):
            outcome = await door.jobs.run(JobId(await submit(ann, graph)), engine)
            assert outcome.failure is None
        async with ann.post("/upload/image", data=io.BytesIO(bytes(100 * 1024 * 1024 + 1))) as answer:
            assert answer.status == 413
            assert await answer.text() == "Maximum request body size 104857600 exceeded."


async def test_lists_are_merged(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann, door.person(EVE) as eve:
        async with ann.get("/api/object_info/CheckpointLoaderSimple") as answer:
            node = (await answer.json())["CheckpointLoaderSimple"]
        assert node["input"]["required"]["ckpt_name"][0] == ["sd15.safetensors", "xl.safetensors"]
        async with ann.get("/object_info") as answer:
            assert {"KSampler", "SaveImage"} <= set(await answer.json())
        async with ann.get("/models/loras") as answer:
            assert await answer.json() == ["a.safetensors", "b.safetensors"]
        async with ann.get("/models/nope") as answer:
            assert answer.status == 404
        async with ann.get("/embeddings") as answer:
            assert await answer.json() == []
        async with ann.get("/features") as answer:
            features = await answer.json()
        assert features == {"supports_preview_metadata": True, "max_upload_size": 104857600}
        async with ann.get("/system_stats") as answer:
            stats = await answer.json()
        assert [device["index"] for device in stats["devices"]] == [0, 1]
        assert stats["system"]["argv"] == []
        door.engines.lose(1)
        async with ann.get("/object_info/CheckpointLoaderSimple") as answer:
            node = (await answer.json())["CheckpointLoaderSimple"]
        assert node["input"]["required"]["ckpt_name"][0] == ["sd15.safetensors"]
        async with eve.get("/system_stats") as answer:
            assert (await answer.json())["system"].get("argv") is not None


async def test_what_no_engine_can_run_is_refused_with_the_node(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann:
        async with ann.post("/prompt", json={"prompt": prompt(node="NoSuch")}) as answer:
            told = await answer.json()
            assert (answer.status, told["error"]["type"]) == (400, "missing_node_type")
            assert told["error"]["extra_info"]["class_type"] == "NoSuch"
        graph = prompt() | {"9": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no.ckpt"}}}
        async with ann.post("/prompt", json={"prompt": graph}) as answer:
            told = await answer.json()
            assert answer.status == 400
            assert told["node_errors"]["9"]["errors"][0]["type"] == "value_not_in_list"
        assert await door.jobs.records(_every()) == ()


async def test_static_files_and_settings_are_relayed(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door, door.person(ANN) as ann, door.person(BOB) as bob:
        for path in ("/extensions", "/i18n", "/workflow_templates", "/users"):
            async with ann.get(path, headers={"Origin": door.url}) as answer:
                assert answer.status == 200, path
        async with ann.post("/settings", json={"x": 1}) as answer:
            assert answer.status == 200
        async with ann.get("/settings") as answer:
            assert (await answer.json())["x"] == 1
        door.engines.lose(0)
        door.engines.lose(1)
        async with bob.get("/extensions") as answer:
            assert answer.status == 503
            assert (await answer.json())["error"]["type"] == "no_engine"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/internal/logs"),
        ("GET", "/api/internal/folder_paths"),
        ("POST", "/manager/queue/install"),
        ("POST", "/some/custom/route"),
        ("PATCH", "/internal/logs/subscribe"),
    ],
)
async def test_closed_routes_are_refused(tmp_path: Path, method: str, path: str) -> None:
    async with (
        gateway(tmp_path) as door,
        door.person(ANN) as ann,
        ann.request(method, f"/comfy{path}") as answer,
    ):
        assert answer.status in {403, 404}
        assert "error" in await answer.json()


async def test_free_is_for_operators_and_reaches_no_engine(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, door.person(EVE) as eve:
        async with ann.post("/free", json={"unload_models": True}) as answer:
            assert answer.status == 403
        async with eve.post("/free", json={"unload_models": True}) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
        async with eve.post("/free", data=b"") as answer:
            assert answer.status == 500


async def test_somebody_else_sees_and_changes_nothing(tmp_path: Path) -> None:
    async with (
        two_engines(tmp_path) as door,
        door.person(ANN) as ann,
        door.person(BOB) as bob,
        door.person(EVE) as eve,
    ):
        done = JobId(await submit(ann, prompt(1)))
        await door.jobs.run(done)
        running, waiting = JobId(await submit(ann, prompt(2))), JobId(await submit(ann, prompt(3)))
        await door.jobs.start(running, 1)
        for stranger in (bob, eve):
            for job in (done, running, waiting):
                await _try_everything(stranger, job)
        states = [record.state for record in reversed(await door.jobs.records(_every()))]
        assert [str(state) for state in states] == ["succeeded", "running", "queued"]
        assert not door.jobs.cancels[running].is_set()
        async with ann.get(f"/history/{done}") as answer:
            assert done in await answer.json()


async def _try_everything(stranger: aiohttp.ClientSession, job: str) -> None:
    """Call every route that knows jobs, with somebody else's id and with none."""
    for path in ("/queue", "/history", f"/history/{job}", "/api/jobs", f"/api/jobs/{job}", "/prompt"):
        async with stranger.get(path) as answer:
            assert job not in await answer.text()
            assert '"rec' not in await answer.text()
    async with stranger.get("/prompt") as answer:
        assert await answer.json() == {"exec_info": {"queue_remaining": 0}}
    for query in ("filename=rec_00001_.png", f"filename=rec_00001_.png&prompt_id={job}"):
        async with stranger.get(f"/view?{query}") as answer:
            assert answer.status == 404
    orders: list[tuple[str, dict[str, object]]] = [
        ("/queue", {"delete": [job]}),
        ("/queue", {"clear": True}),
        ("/history", {"delete": [job]}),
        ("/history", {"clear": True}),
        ("/interrupt", {"prompt_id": job}),
        ("/interrupt", {}),
        (f"/api/jobs/{job}/cancel", {}),
        ("/api/jobs/cancel", {"job_ids": [job]}),
    ]
    for path, body in orders:
        async with stranger.post(path, json=body) as answer:
            assert answer.status == 200
            assert await answer.read() in {b"", b'{"cancelled":false}'}


def _image(executed: dict[str, object]) -> dict[str, str]:
    output = executed["output"]
    assert isinstance(output, dict)
    return output["images"][0]  # pyright: ignore[reportUnknownVariableType]


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def _mine() -> tuple[Account, Service, str]:
    return Account("ann"), Service.COMFYUI, "mine"


def _every() -> JobQuery:
    return JobQuery()


async def test_who_may_only_look_changes_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(VIC) as vic, ear(vic):
        orders = (
            "/prompt",
            "/queue",
            "/history",
            "/interrupt",
            "/free",
            "/upload/image",
            "/settings",
            "/api/jobs/cancel",
        )
        for path in orders:
            async with vic.post(path, json={"prompt": prompt()}) as answer:
                assert answer.status == 403, path
                assert "error" in await answer.json()
        async with vic.get("/queue") as answer:
            assert await answer.json() == {"queue_running": [], "queue_pending": []}
