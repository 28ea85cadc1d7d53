"""Calls that are jobs, through the front door to a simulated engine."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from pathlib import Path

import pytest

from gpulane.web.bodies import BIG_BODY_BYTES, READERS_MAX, understood
from tests.integration.web.a1111.ground import ANN, BOB, Wanted, ground, until

pytestmark = pytest.mark.anyio

TXT2IMG = "/sdapi/v1/txt2img"
SMALL = {"prompt": "a cat", "steps": 4, "width": 64, "height": 64, "seed": 1}


async def test_answer_is_the_engines_own_with_our_headers(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        async with here.client.post(TXT2IMG, json=SMALL, headers={"X-Api-Key": ANN}) as answer:
            told = await answer.json()
        record = await here.gateway.only()
        assert answer.status == 200 and len(told["images"]) == 1
        assert json.loads(told["info"])["sd_model_name"] == "alpha"
        assert answer.headers["X-Gpulane-Job"] == record.job.id
        assert answer.headers["X-Gpulane-Gpu"] == "box/gpu0"
        assert "x-process-time" in answer.headers
        assert told["parameters"]["force_task_id"] == record.job.id
        assert record.job.held and record.job.account == "ann"
        assert here.gateway.answered_jobs == [record.job.id]


async def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        wrong = SMALL | {"override_settings": {"sd_model_checkpoint": "alfa"}}
        told = await here.ask("POST", TXT2IMG, body=wrong, status=422)
        assert told["error"] == "HTTPException" and "alpha.safetensors" in told["detail"]
        told = await here.ask("POST", TXT2IMG, body=SMALL | {"sampler_name": "Eulr a"}, status=422)
        assert "Euler a" in told["detail"] and told["code"] == "unknown_sampler"
        told = await here.ask("POST", TXT2IMG, body=SMALL | {"steps": "many"}, status=422)
        assert told["detail"][0]["loc"] == ["body", "steps"]
        assert here.sims[0].runs == 0 and not here.gateway.answers


async def test_body_over_the_limit(tmp_path: Path) -> None:
    async with ground(tmp_path, Wanted(limits={"body_mib": 0.001})) as here:
        told = await here.ask("POST", TXT2IMG, body=SMALL | {"prompt": "x" * 2000}, status=413)
        assert told["code"] == "too_large" and told["error"]


async def test_viewers_start_nothing(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        await here.ask("POST", TXT2IMG, body=SMALL, key="key-of-vic", status=403)
        await here.ask("GET", "/sdapi/v1/sd-models", key="key-of-vic")


async def test_img2img_extras_and_interrogate(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        picture = (await here.ask("POST", TXT2IMG, body=SMALL))["images"][0]
        told = await here.ask("POST", "/sdapi/v1/img2img", body=SMALL | {"init_images": [picture]})
        assert told["images"]
        await here.ask("POST", "/sdapi/v1/img2img", body=SMALL, status=404)
        told = await here.ask(
            "POST", "/sdapi/v1/extra-single-image", body={"image": picture, "upscaler_1": "Lanczos"}
        )
        assert told["image"]
        told = await here.ask("POST", "/sdapi/v1/interrogate", body={"image": picture})
        assert told["caption"]
        told = await here.ask("POST", "/sdapi/v1/png-info", body={"image": picture})
        assert "info" in told


async def test_cancelled_while_waiting(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        here.gateway.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(here.ask("POST", TXT2IMG, body=SMALL, status=409))
            await until(here.is_held)
            await here.ask("POST", "/sdapi/v1/interrupt", key=BOB)
            assert not call.done()
            assert await here.ask("POST", "/sdapi/v1/interrupt") == {}
        assert call.result()["code"] == "cancelled"
        here.gateway.gate.set()
        assert (await here.ask("POST", TXT2IMG, body=SMALL))["images"]
        assert here.sims[0].runs == 1


async def test_same_task_id_is_the_same_call(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        here.gateway.gate.clear()
        named = SMALL | {"force_task_id": "task(mine)"}
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(here.ask("POST", TXT2IMG, body=named))
            await until(here.is_held)
            second = tasks.create_task(here.ask("POST", TXT2IMG, body=named))
            told = await here.ask("POST", TXT2IMG, body=named | {"seed": 2}, status=400)
            assert told["code"] == "task_id_taken"
            # Bob's ids are his own.
            other = tasks.create_task(here.ask("POST", TXT2IMG, body=named, key=BOB))
            here.gateway.gate.set()
        assert first.result() == second.result()
        assert other.result()["images"]
        assert here.sims[0].runs == 2
        await here.ask("POST", TXT2IMG, body=named | {"seed": 2})
        assert here.sims[0].runs == 3


async def test_same_task_id_at_the_same_time(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        named = SMALL | {"force_task_id": "task(twice)"}
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(here.ask("POST", TXT2IMG, body=named)) for _ in range(4)]
        assert all(call.result() == calls[0].result() for call in calls)
        assert here.sims[0].runs == 1


async def test_a_client_that_leaves_is_told_to_the_gateway(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        here.gateway.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(here.ask("POST", TXT2IMG, body=SMALL))
            await until(here.is_held)
            call.cancel()
        await until(lambda: bool(here.gateway.left))
        assert here.gateway.left == list(here.gateway.answers)
        assert here.gateway.answered_jobs == []


async def test_big_bodies_are_understood_beside_the_loop(tmp_path: Path) -> None:
    """With both reading threads taken big bodies wait, small ones do not; whoever leaves makes no job."""
    big = json.dumps(SMALL | {"prompt": "x" * (BIG_BODY_BYTES + 1)}).encode()
    go = threading.Event()
    async with ground(tmp_path) as here, asyncio.TaskGroup() as tasks:

        async def ask() -> int:
            headers = {"X-Api-Key": ANN}
            async with here.client.post(TXT2IMG, data=io.BytesIO(big), headers=headers) as answer:
                return answer.status

        blocked = [
            tasks.create_task(understood(bytes(BIG_BODY_BYTES + 1), lambda: go.wait(10.0)))
            for _ in range(READERS_MAX)
        ]
        await asyncio.sleep(0)
        leaving, staying = (tasks.create_task(ask()) for _ in range(2))
        await here.ask("POST", TXT2IMG, body=SMALL | {"seed": 2})
        assert not leaving.done() and not staying.done()
        leaving.cancel()
        await asyncio.wait({leaving})
        await here.ask("POST", TXT2IMG, body=SMALL | {"seed": 3})  # by now the gateway knows that it left
        go.set()
        assert await staying == 200
        assert all([await one for one in blocked])
        assert len(here.gateway.answers) == 3 and here.sims[0].runs == 3


async def test_nothing_listens_any_more_without_engines(tmp_path: Path) -> None:
    async with ground(tmp_path, Wanted(checkpoints=())) as here:
        told = await here.ask("GET", "/sdapi/v1/options", status=503)
        assert told["code"] == "no_engine"
        assert await here.ask("GET", "/internal/ping") == {}
        assert (await here.ask("GET", "/sdapi/v1/progress"))["state"]["job_count"] == 0
