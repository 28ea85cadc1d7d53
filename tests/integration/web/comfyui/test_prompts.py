"""POST /prompt, the queue, the history: in ComfyUI's shapes, the caller's own alone."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

from gpulane.core.model import Account, JobId, JobState
from gpulane.engine.base import RecordedResult
from gpulane.store.base import JobQuery
from tests.integration.web.comfyui.gateway import (
    ANN,
    BOB,
    GatewayJobs,
    Json,
    gateway,
    prompt,
    result_of,
    submit,
)

pytestmark = pytest.mark.anyio


async def test_prompt_is_stored_and_answered(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        async with ann.post("/api/prompt", json={"prompt": prompt(), "client_id": "c1"}) as answer:
            told = await answer.json()
        assert answer.status == 200
        record = await door.jobs.record(JobId(told["prompt_id"]))
        assert record is not None
        assert told == {"prompt_id": record.job.id, "number": record.job.arrival, "node_errors": {}}
        async with ann.get("/prompt") as answer:
            assert await answer.json() == {"exec_info": {"queue_remaining": 1}}


async def test_clients_own_id_is_the_one_it_sees(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, door.person(BOB) as bob:
        body = {"prompt": prompt(), "prompt_id": "my own/id"}
        for _ in range(2):  # the same again is the same job
            async with ann.post("/prompt", json=body) as answer:
                told = await answer.json()
                assert told["prompt_id"] == "my own/id"
        assert await submit(bob, prompt_id="my own/id") == "my own/id"
        async with ann.post("/prompt", json=body | {"prompt": prompt(seed=7)}) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["type"] == "invalid_prompt_id"
        async with ann.get("/queue") as answer:
            queue = await answer.json()
        assert [item[1] for item in queue["queue_pending"]] == ["my own/id"]
        record = next(iter(await door.jobs.records(JobQuery(account=Account("ann")))))
        await door.jobs.start(record.job.id)
        await door.jobs.finish(record.job.id, result=result_of(record.job.id))
        async with ann.get("/history/my%20own%2Fid") as answer:
            entry = (await answer.json())["my own/id"]
        assert record.job.id not in str(entry)
        assert entry["status"]["messages"][0][1]["prompt_id"] == "my own/id"


async def test_queue_shows_running_and_waiting(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        extra = {"extra_pnginfo": {"workflow": {"id": "w1"}}, "api_key_comfy_org": "secret"}
        first = await submit(ann, client_id="c1", extra_data=extra)
        second = await submit(ann, front=True)
        third = await submit(ann, number=-99)
        await door.jobs.start(JobId(first))
        async with ann.get("/queue") as answer:
            text = await answer.text()
        assert "secret" not in text
        queue = msgspec.json.decode(text, type=dict[str, list[list[object]]])
        number, prompt_id, graph, shown, _ = queue["queue_running"][0]
        assert (prompt_id, graph) == (first, prompt())
        assert isinstance(number, int)
        assert isinstance(shown, dict)
        assert shown["client_id"] == "c1"
        assert shown["extra_pnginfo"] == {"workflow": {"id": "w1"}}
        numbers = {str(item[1]): float(str(item[0])) for item in queue["queue_pending"]}
        assert numbers[third] == -99
        assert numbers[second] < 0


async def test_delete_and_clear_touch_waiting_jobs_only(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann, door.person(BOB) as bob:
        running, waiting, other = [await submit(ann) for _ in range(3)]
        foreign = await submit(bob)
        await door.jobs.start(JobId(running))
        async with ann.post("/queue", json={"delete": [waiting, running, foreign, "unknown"]}) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
        assert await _states(door.jobs, running, waiting, other, foreign) == "running cancelled queued queued"
        async with ann.post("/queue", json={"clear": True}) as answer:
            assert answer.status == 200
        assert (
            await _states(door.jobs, running, waiting, other, foreign) == "running cancelled cancelled queued"
        )
        async with ann.get(f"/history/{waiting}") as answer:
            assert await answer.json() == {}


async def test_interrupt_reaches_own_running_jobs_only(tmp_path: Path) -> None:
    async with gateway(tmp_path, engines=2) as door, door.person(ANN) as ann, door.person(BOB) as bob:
        mine, waiting, theirs = await submit(ann), await submit(ann), await submit(bob)
        await door.jobs.start(JobId(mine), 0)
        await door.jobs.start(JobId(theirs), 1)
        for body in ({"prompt_id": theirs}, {"prompt_id": waiting}, {"prompt_id": "unknown"}):
            async with ann.post("/interrupt", json=body) as answer:
                assert (answer.status, await answer.read()) == (200, b"")
        assert not door.jobs.cancels[JobId(mine)].is_set()
        async with ann.post("/interrupt", data=b"") as answer:
            assert answer.status == 200
        assert door.jobs.cancels[JobId(mine)].is_set()
        assert not door.jobs.cancels[JobId(theirs)].is_set()
        assert await _states(door.jobs, waiting) == "queued"


async def test_history_pages_and_forgets(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        ids = [await submit(ann) for _ in range(4)]
        for job in map(JobId, ids):
            await door.jobs.start(job)
            await door.jobs.finish(job, result=result_of(job))

        async def asked(query: str) -> list[str]:
            async with ann.get(f"/history{query}") as answer:
                return list(await answer.json())

        assert await asked("") == ids
        assert await asked("?max_items=2") == ids[2:]
        assert await asked("?max_items=2&offset=0") == ids[:2]
        assert await asked("?max_items=2&offset=3") == ids[3:]
        async with ann.post("/history", json={"delete": [ids[0], "unknown"]}) as answer:
            assert answer.status == 200
        assert await asked("") == ids[1:]
        async with ann.post("/history", json={"clear": True}) as answer:
            assert answer.status == 200
        assert await asked("") == []


async def test_ends_without_a_result_have_a_history(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        failed, stopped = await submit(ann), await submit(ann)
        await door.jobs.start(JobId(failed))
        await door.jobs.finish(JobId(failed), JobState.FAILED)
        await door.jobs.start(JobId(stopped))
        await door.jobs.cancel(JobId(stopped))
        await door.jobs.finish(JobId(stopped), JobState.SUCCEEDED, result=result_of(JobId(stopped)))
        async with ann.get("/history") as answer:
            told = await answer.json()
        assert told[failed]["status"]["messages"][-1][0] == "execution_error"
        assert told[failed]["status"]["messages"][-1][1]["exception_message"] == "CUDA out of memory"
        assert told[failed]["prompt"][2] == prompt()
        assert told[stopped]["status"]["messages"][-1][0] == "execution_interrupted"


async def test_result_of_a_cleared_history_still_has_its_prompt(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        job = JobId(await submit(ann))
        await door.jobs.start(job)
        document: Json = {
            "outputs": {},
            "status": {"status_str": "success", "completed": True, "messages": []},
        }
        raw = msgspec.Raw(msgspec.json.encode(document))
        await door.jobs.finish(job, result=RecordedResult(document=raw))
        async with ann.get(f"/history/{job}") as answer:
            assert (await answer.json())[job]["prompt"][2] == prompt()


async def test_jobs_list_like_the_new_version(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        done, running, waiting, gone = [await submit(ann) for _ in range(4)]
        await door.jobs.start(JobId(done))
        picture = {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}
        await door.jobs.finish(JobId(done), result=result_of(JobId(done), {"2": picture}))
        await door.jobs.start(JobId(running))
        async with ann.post(f"/api/jobs/{gone}/cancel") as answer:
            assert await answer.json() == {"cancelled": True}
        async with ann.get("/api/jobs") as answer:
            listed = await answer.json()
        shown = {job["id"]: job for job in listed["jobs"]}
        assert set(shown) == {done, running, waiting}
        assert listed["pagination"] == {"offset": 0, "limit": None, "total": 3, "has_more": False}
        assert [shown[i]["status"] for i in (done, running, waiting)] == [
            "completed",
            "in_progress",
            "pending",
        ]
        assert shown[done]["preview_output"] == picture["images"][0] | {"nodeId": "2", "mediaType": "images"}
        async with ann.get("/api/jobs?status=pending,in_progress&limit=1&sort_order=asc") as answer:
            page = await answer.json()
        assert [job["id"] for job in page["jobs"]] == [running]
        assert page["pagination"]["has_more"] is True
        async with ann.get(f"/api/api/jobs/{done}") as answer:
            assert (await answer.json())["outputs"] == {"2": picture}
        async with ann.get(f"/api/jobs/{gone}") as answer:
            assert (answer.status, await answer.json()) == (404, {"error": "Job not found"})
        async with ann.post("/api/jobs/cancel", json={"job_ids": [running, waiting]}) as answer:
            assert await answer.json() == {"cancelled": True}
        assert door.jobs.cancels[JobId(running)].is_set()
        async with ann.get("/api/jobs?status=nonsense") as answer:
            assert answer.status == 400
        async with ann.get("/jobs") as answer:
            assert answer.status == 404


async def test_refusals_are_in_comfyuis_shape(tmp_path: Path) -> None:
    async with gateway(tmp_path) as door, door.person(ANN) as ann:
        async with ann.post("/prompt", json={}) as answer:
            assert (answer.status, (await answer.json())["error"]["type"]) == (400, "no_prompt")
        async with ann.post("/prompt", data=b"{not json") as answer:
            assert answer.status == 400
        async with ann.post("/prompt", data=io.BytesIO(b" " * (17 * 1024 * 1024))) as answer:
            assert answer.status == 413
            assert await answer.text() == "Maximum request body size 16777216 exceeded."
        door.jobs.queued_max = 0
        async with ann.post("/prompt", json={"prompt": prompt()}) as answer:
            assert answer.status == 429
            assert answer.headers["Retry-After"] == "7"
            assert (await answer.json())["node_errors"] == {}
        async with ann.post("/queue", data=b"[") as answer:
            assert answer.status == 500


async def _states(jobs: GatewayJobs, *ids: str) -> str:
    records = [await jobs.record(JobId(one)) for one in ids]
    return " ".join(record.state if record else "gone" for record in records)
