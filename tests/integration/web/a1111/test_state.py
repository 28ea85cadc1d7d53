"""Options, progress, interrupt, skip and lists: what a caller sees is its own."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpulane.core.model import EngineState
from gpulane.engine.progress import Progress
from tests.integration.web.a1111.ground import ANN, BOB, EVE, Ground, Wanted, ground, until

pytestmark = pytest.mark.anyio

TXT2IMG = "/sdapi/v1/txt2img"
OPTIONS = "/sdapi/v1/options"
PROGRESS = "/sdapi/v1/progress"
SMALL = {"prompt": "a cat", "steps": 4, "width": 64, "height": 64, "seed": 1}
LONG = SMALL | {"steps": 400, "width": 512, "height": 512}
TWO = Wanted(
    checkpoints=(("alpha.safetensors", "beta.safetensors"), ("beta.safetensors", "gamma.safetensors"))
)


async def rendered(here: Ground, key: str = ANN, **more: Any) -> str:
    told = await here.ask("POST", TXT2IMG, body=SMALL | more, key=key)
    return json.loads(told["info"])["sd_model_name"]


# --- options


async def test_a_checkpoint_is_the_callers_own(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        before = dict(here.sims[0].options)
        assert await here.ask("POST", OPTIONS, body={"sd_model_checkpoint": "beta"}) is None
        assert (await here.ask("GET", OPTIONS))["sd_model_checkpoint"] == "beta.safetensors"
        assert (await here.ask("GET", OPTIONS, key=BOB))["sd_model_checkpoint"] == "alpha.safetensors"
        assert here.sims[0].options == before
        assert await rendered(here) == "beta"
        assert await rendered(here, key=BOB) == "alpha"
        assert await rendered(here, override_settings={"sd_model_checkpoint": "alpha"}) == "alpha"


async def test_a_whole_dictionary_posted_back_changes_what_differs(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        whole = await here.ask("GET", OPTIONS)
        whole |= {"sd_model_checkpoint": "beta.safetensors", "CLIP_stop_at_last_layers": 2}
        assert await here.ask("POST", OPTIONS, body=whole) is None
        shown = await here.ask("GET", OPTIONS)
        assert shown["CLIP_stop_at_last_layers"] == 2
        assert await rendered(here) == "beta"
        job = json.loads(list(here.gateway.requests.values())[-1].body)
        assert job["override_settings"]["CLIP_stop_at_last_layers"] == 2


async def test_what_options_refuses(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        told = await here.ask("POST", OPTIONS, body={"sd_model_checkpoint": "betta.safetensors"}, status=500)
        assert told["error"] == "RuntimeError"
        assert told["errors"].startswith("model 'betta.safetensors' not found; did you mean beta.safe")
        told = await here.ask("POST", OPTIONS, body={"no_such_option": 1}, status=500)
        assert told["error"] == "KeyError" and told["errors"] == "'no_such_option'"
        for key in (ANN, EVE):
            told = await here.ask("POST", OPTIONS, body={"outdir_samples": "/etc"}, key=key, status=403)
            assert "outdir_samples" in told["detail"]
        assert here.sims[0].options["outdir_samples"] != "/etc"
        await here.ask("POST", OPTIONS, body={"CLIP_stop_at_last_layers": 2}, key="key-of-vic", status=403)


async def test_another_accounts_overrides_do_not_show(tmp_path: Path) -> None:
    async with ground(tmp_path, Wanted(time_scale=0.2)) as here, asyncio.TaskGroup() as tasks:
        call = tasks.create_task(
            here.ask("POST", TXT2IMG, body=LONG | {"override_settings": {"sd_model_checkpoint": "beta"}})
        )
        await until(here.has_steps)
        shown = await here.ask("GET", OPTIONS, key=BOB)
        assert shown["sd_model_checkpoint"] == "alpha.safetensors"
        await here.ask("POST", "/sdapi/v1/interrupt")
        await call


# --- progress, interrupt, skip


async def test_progress_is_the_callers_own(tmp_path: Path) -> None:
    async with ground(tmp_path, Wanted(time_scale=0.2)) as here:
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(here.ask("POST", TXT2IMG, body=LONG | {"force_task_id": "task(a)"}))
            await until(here.has_steps)
            job = next(iter(here.gateway.answers))
            await until(lambda: (last := here.gateway.hub.last(job)) is not None and bool(last.value))
            here.gateway.hub.publish(Progress(job=job, image=b"picture", image_type="image/jpeg"))
            shown = await here.ask("GET", PROGRESS)
            assert 0 < shown["progress"] <= 1 and shown["eta_relative"] > 0
            assert shown["state"]["job_count"] == 1 and shown["state"]["job"] == "scripts_txt2img"
            assert shown["state"]["sampling_steps"] == 400
            assert shown["current_image"] == "cGljdHVyZQ=="
            assert (await here.ask("GET", f"{PROGRESS}?skip_current_image=true"))["current_image"] is None
            assert (await here.ask("GET", PROGRESS, key=BOB))["progress"] == 0
            task = await here.ask("POST", "/internal/progress", body={"id_task": "task(a)"})
            assert task["active"] and not task["queued"] and 0 < task["progress"] <= 1
            assert task["live_preview"] == "data:image/jpeg;base64,cGljdHVyZQ=="
            again = {"id_task": job, "id_live_preview": task["id_live_preview"]}
            task = await here.ask("POST", "/internal/progress", body=again)
            assert task["active"] and task["live_preview"] is None
            unknown = await here.ask("POST", "/internal/progress", body={"id_task": "task(a)"}, key=BOB)
            assert not unknown["active"] and unknown["textinfo"] == "Waiting..."
            # Bob's interrupt is not Ann's; Ann's is.
            await here.ask("POST", "/sdapi/v1/interrupt", key=BOB)
            assert not here.sims[0].state.interrupted
            await here.ask("POST", "/sdapi/v1/interrupt")
        assert len(call.result()["images"]) == 1
        assert (await here.ask("POST", "/internal/progress", body={"id_task": "task(a)"}))["completed"]
        assert (await here.ask("GET", PROGRESS))["state"]["job_count"] == 0


async def test_a_waiting_call_shows_its_position(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        here.gateway.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(here.ask("POST", TXT2IMG, body=SMALL | {"force_task_id": "task(w)"}))
            await until(here.is_held)
            shown = await here.ask("GET", PROGRESS)
            assert shown["progress"] == 0 and shown["state"]["job_count"] == 0
            assert shown["textinfo"] == "In queue: 1/1, about 2 s"
            task = await here.ask("POST", "/internal/progress", body={"id_task": "task(w)"})
            assert task["queued"] and task["textinfo"] == "In queue: 1/1, about 2 s"
            pending = await here.ask("GET", "/internal/pending-tasks")
            assert pending == {"size": 1, "tasks": ["task(w)"]}
            assert await here.ask("GET", "/internal/pending-tasks", key=BOB) == {"size": 0, "tasks": []}
            here.gateway.gate.set()
            await call
        assert await here.ask("GET", "/internal/pending-tasks") == {"size": 0, "tasks": []}


async def test_skip_reaches_the_engine_of_the_callers_job_only(tmp_path: Path) -> None:
    async with ground(tmp_path, Wanted(time_scale=0.2)) as here:
        assert await here.ask("POST", "/sdapi/v1/skip") is None
        assert not here.sims[0].state.skipped
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(here.ask("POST", TXT2IMG, body=LONG))
            await until(here.has_steps)
            assert await here.ask("POST", "/sdapi/v1/skip", key=BOB) is None
            assert not here.sims[0].state.skipped and not call.done()
            assert await here.ask("POST", "/sdapi/v1/skip") is None
        assert call.result()["images"]


async def test_bad_body_of_internal_progress(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        told = await here.ask("POST", "/internal/progress", body={"id_task": 7}, status=422)
        assert told["detail"][0]["loc"] == ["body"]


# --- lists and the rest


async def test_lists_are_merged_in_the_order_of_the_settings(tmp_path: Path) -> None:
    async with ground(tmp_path, TWO) as here:
        titles = [model["title"] for model in await here.ask("GET", "/sdapi/v1/sd-models")]
        assert titles == ["alpha.safetensors", "beta.safetensors", "gamma.safetensors"]
        views = here.gateway.engine_views
        here.gateway.engine_views = [replace(views[0], state=EngineState.LOST), views[1]]
        titles = [model["title"] for model in await here.ask("GET", "/sdapi/v1/sd-models")]
        assert titles[0] == "alpha.safetensors"
        samplers = await here.ask("GET", "/sdapi/v1/samplers")
        assert len({sampler["name"] for sampler in samplers}) == len(samplers) > 10
        scripts = await here.ask("GET", "/sdapi/v1/scripts")
        assert "x/y/z plot" in scripts["txt2img"]


async def test_what_no_engine_has_is_asked_of_one(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        assert await here.ask("GET", "/sdapi/v1/sd-modules", status=404) == {"detail": "Not Found"}
        assert (await here.ask("GET", "/sdapi/v1/memory"))["cuda"]["system"]["total"] > 0


async def test_flags_tell_no_secret(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        flags = await here.ask("GET", "/sdapi/v1/cmd-flags")
        assert "gradio_auth" in flags and "api_auth" in flags
        assert all(flags[name] is None for name in ("gradio_auth", "api_auth", "ngrok", "tls_keyfile"))
        assert flags["skip_torch_cuda_test"] is True


async def test_orders_about_the_engine_reach_none(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        loaded = here.sims[0].checkpoints.is_on_gpu
        assert await here.ask("POST", "/sdapi/v1/refresh-checkpoints") is None
        await here.ask("POST", "/sdapi/v1/unload-checkpoint", status=403)
        assert await here.ask("POST", "/sdapi/v1/unload-checkpoint", key=EVE) == {}
        assert await here.ask("POST", "/sdapi/v1/reload-checkpoint", key=EVE) == {}
        assert here.sims[0].checkpoints.is_on_gpu is loaded


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("OPTIONS", TXT2IMG, 405),
        ("GET", TXT2IMG, 405),
        ("GET", "/sdapi/v1/nope", 404),
        ("GET", "/sd/internal/sysinfo", 403),
        ("POST", "/sdapi/v1/server-kill", 403),
        ("POST", "/agent-scheduler/v1/queue/txt2img", 403),
        ("POST", "/upload", 403),
    ],
)
async def test_paths_that_are_none_of_ours(tmp_path: Path, method: str, path: str, status: int) -> None:
    async with ground(tmp_path) as here:
        await here.ask(method, path, status=status)
