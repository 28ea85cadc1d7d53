"""The simulated engines' switches, and the engines as processes that share a card."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import SimComfyUI
from gpulane.testing.faults import Faults
from gpulane.testing.http_engine import SimHttpEngine
from gpulane.testing.judge import judge_files, judge_logs

pytestmark = pytest.mark.anyio

SimEngine = SimComfyUI | SimA1111 | SimHttpEngine

SECONDS = 15.0


def workflow(seed: int = 1, steps: int = 4) -> dict[str, Any]:
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 7.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "positive": ["2", 0],
                "negative": ["2", 0],
                "latent_image": ["3", 0],
                "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
    }


PICTURE = {"prompt": "a cat", "steps": 4, "width": 64, "height": 64, "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


@asynccontextmanager
async def started(make: Callable[[Card], SimEngine], *, context_gib: float = 0.3) -> AsyncIterator[Any]:
    card = Card(options=CardOptions(time_scale=0.0, context_gib=context_gib))
    async with make(card) as engine, aiohttp.ClientSession(engine.url) as session:
        yield engine, session


def comfyui(card: Card) -> SimComfyUI:
    return SimComfyUI(card=card)


def a1111(card: Card) -> SimA1111:
    return SimA1111(card=card)


def http(card: Card) -> SimHttpEngine:
    return SimHttpEngine(card=card)


every_kind = pytest.mark.parametrize(
    ("make", "path", "body"),
    [
        (comfyui, "/prompt", {"prompt": workflow()}),
        (a1111, "/sdapi/v1/txt2img", PICTURE),
        (http, "/v1/chat/completions", CHAT),
    ],
)


async def state_of(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get("/sim/state") as answer:
        return await answer.json()


async def until(session: aiohttp.ClientSession, condition: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                if condition(await state_of(session)):
                    return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.005)


async def set_faults(session: aiohttp.ClientSession, **faults: Any) -> None:
    async with session.post("/sim/faults", json=faults) as answer:
        assert answer.status == 200, await answer.text()


async def history(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get("/history") as answer:
        return await answer.json()


@every_kind
async def test_a_job_is_computed_and_logged(make: Any, path: str, body: Any) -> None:
    async with started(make) as (engine, session):
        async with session.post(path, json=body) as answer:
            assert answer.status == 200
        await until(session, lambda state: state["runs"] == 1)
        verdict = judge_logs({"gpu": [json.dumps(line) for line in engine.card.lines()]})
        assert verdict.is_clean and not verdict.unfinished
        assert [len(jobs) for jobs in verdict.computed.values()] == [1]


@every_kind
async def test_a_crash_in_the_middle_and_a_new_life(make: Any, path: str, body: Any) -> None:
    async with started(make) as (engine, session):
        port = engine.server.port
        await set_faults(session, crash_mid_jobs=1)
        try:
            async with session.post(path, json=body) as answer:
                assert path == "/prompt"  # only ComfyUI answers before it runs
                await answer.read()
        except aiohttp.ClientError:
            assert path != "/prompt"
        async with asyncio.timeout(SECONDS):
            while engine.server.is_up:
                await asyncio.sleep(0.005)
        with pytest.raises(aiohttp.ClientError):
            await session.get("/sim/state")
        assert engine.card.bytes_used() == 0
        await engine.server.restart()
        assert engine.server.port == port
        assert (await state_of(session))["lives"] == 2
        async with session.post(path, json=body) as answer:
            assert answer.status == 200
        await until(session, lambda state: state["runs"] == 1)
        verdict = judge_logs({"gpu": [json.dumps(line) for line in engine.card.lines()]})
        assert [found.outcome for _, found in verdict.unfinished] == ["lost"]


@every_kind
async def test_requests_fail_late_or_are_refused(make: Any, path: str, body: Any) -> None:
    async with started(make) as (engine, session):
        await set_faults(session, fail_requests=2)
        for expected in (500, 500, 200):
            async with session.post(path, json=body) as answer:
                assert answer.status == expected
        await set_faults(session, latency_seconds=30)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await session.post(path, json=body)
        await set_faults(session, latency_seconds=0)
        await set_faults(session, refuse_seconds=0.2)
        with pytest.raises(aiohttp.ClientError):
            await session.post(path, json=body)
        await until(session, lambda state: state["up"])
        assert engine.server.lives == 1, "it never died"


@every_kind
async def test_an_answer_may_break_off(make: Any, path: str, body: Any) -> None:
    async with started(make) as (_, session):
        await set_faults(session, truncate_responses=1)
        with pytest.raises(aiohttp.ClientError):
            async with session.post(path, json=body) as answer:
                await answer.read()


async def test_a_slow_body_is_whole() -> None:
    async with started(comfyui) as (_, session):
        await set_faults(session, slow_body_bytes_per_second=500)
        started_at = asyncio.get_running_loop().time()
        async with session.get("/features") as answer:
            assert (await answer.json())["max_upload_size"]
        assert asyncio.get_running_loop().time() - started_at > 0.2


async def test_a_wrong_switch_is_refused() -> None:
    async with started(comfyui) as (_, session):
        for wrong in ({"no_such": 1}, {"unload": "maybe"}, {"fail_requests": True}, {"fail_requests": "x"}):
            async with session.post("/sim/faults", json=wrong) as answer:
                assert answer.status == 400, wrong


@pytest.mark.parametrize(
    ("fault", "kind"), [("oom_jobs", "torch.OutOfMemoryError"), ("error_jobs", "RuntimeError")]
)
async def test_a_comfyui_prompt_fails(fault: str, kind: str) -> None:
    async with started(comfyui) as (_, session):
        await set_faults(session, **{fault: 1})
        await session.post("/prompt", json={"prompt": workflow()})
        await until(session, lambda state: state["runs"] == 1)
        (record,) = (await history(session)).values()
        event, data = record["status"]["messages"][-1]
        assert (event, data["exception_type"]) == ("execution_error", kind)
        await session.post("/prompt", json={"prompt": workflow(2)})
        await until(session, lambda state: state["runs"] == 2)
        assert list((await history(session)).values())[1]["status"]["completed"]


@pytest.mark.parametrize(
    ("fault", "kind"), [("oom_jobs", "OutOfMemoryError"), ("error_jobs", "RuntimeError")]
)
async def test_an_a1111_job_fails(fault: str, kind: str) -> None:
    async with started(a1111) as (_, session):
        await set_faults(session, **{fault: 1})
        async with session.post("/sdapi/v1/txt2img", json=PICTURE) as answer:
            assert (answer.status, (await answer.json())["error"]) == (500, kind)
        async with session.post("/sdapi/v1/txt2img", json=PICTURE) as answer:
            assert answer.status == 200


async def test_a_lost_prompt_leaves_no_trace() -> None:
    async with started(comfyui) as (_, session):
        await set_faults(session, lose_jobs=1)
        async with session.post("/prompt", json={"prompt": workflow()}) as answer:
            lost = (await answer.json())["prompt_id"]
        await session.post("/prompt", json={"prompt": workflow(2)})
        await until(session, lambda state: state["runs"] == 1)
        assert lost not in await history(session)


async def test_a_zombie_answers_and_runs_nothing() -> None:
    async with started(comfyui) as (_, session):
        await set_faults(session, zombie=True)
        await session.post("/prompt", json={"prompt": workflow()})
        await until(session, lambda state: state["runner_dead"])
        async with session.get("/prompt") as answer:
            assert (await answer.json())["exec_info"]["queue_remaining"] == 1
        await set_faults(session, zombie=False, restart=True)
        await until(session, lambda state: not state["runner_dead"] and state["lives"] == 2)


async def test_an_a1111_job_may_be_lost_and_an_a1111_may_be_a_zombie() -> None:
    async with started(a1111) as (engine, session):
        await set_faults(session, lose_jobs=1)
        with pytest.raises(aiohttp.ClientError):
            await session.post("/sdapi/v1/txt2img", json=PICTURE)
        await set_faults(session, zombie=True)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.post("/sdapi/v1/txt2img", json=PICTURE)
        async with session.get("/sdapi/v1/progress") as answer:
            assert answer.status == 200
        assert engine.runs == 0


async def test_an_unload_under_the_sampler_breaks_the_job() -> None:
    async with started(a1111) as (_, session), asyncio.TaskGroup() as group:
        await session.post("/sim/faults", json={})
        running = group.create_task(session.post("/sdapi/v1/txt2img", json=PICTURE | {"steps": 100_000}))
        await until(session, lambda state: state["running"] is not None)
        await session.post("/sdapi/v1/unload-checkpoint")
        assert (await running).status == 500


async def test_a_hanging_job_holds_the_queue() -> None:
    async with started(comfyui) as (_, session):
        await set_faults(session, hang_jobs=1)
        for seed in (1, 2):
            await session.post("/prompt", json={"prompt": workflow(seed)})
        await until(session, lambda state: state["running"] is not None and len(state["pending"]) == 1)
        await session.post("/interrupt")
        assert (await state_of(session))["runs"] == 0


async def test_sockets_are_dropped_muted_and_stalled() -> None:
    async with started(comfyui) as (_, session):
        socket = await session.ws_connect("/ws?clientId=a")
        await socket.receive(timeout=SECONDS)
        await set_faults(session, mute_ws=True)
        await session.post("/prompt", json={"prompt": workflow(1), "client_id": "a"})
        await until(session, lambda state: state["runs"] == 1)
        await set_faults(session, mute_ws=False, stall_ws=True)
        await session.post("/prompt", json={"prompt": workflow(2), "client_id": "a"})
        await until(session, lambda state: state["runs"] == 2)
        await set_faults(session, stall_ws=False)
        first = await socket.receive_json(timeout=SECONDS)
        assert first["data"] == {"status": {"exec_info": {"queue_remaining": 1}}}, "the second prompt's"
        await set_faults(session, drop_ws=True)
        while (await socket.receive(timeout=SECONDS)).type is aiohttp.WSMsgType.TEXT:
            pass
        assert socket.closed


@pytest.mark.parametrize(
    ("make", "path", "body"),
    [(comfyui, "/free", {"unload_models": True}), (a1111, "/sdapi/v1/unload-checkpoint", {})],
)
async def test_unloading_may_be_late_a_lie_or_hang(make: Any, path: str, body: Any) -> None:
    async with started(make, context_gib=0.0) as (engine, session):
        await load_something(make, session)
        used = engine.card.bytes_used()
        assert used > 0
        await set_faults(session, unload="lies")
        await session.post(path, json=body)
        await set_faults(session, unload="hangs")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.post(path, json=body)
        assert engine.card.bytes_used() == used
        await set_faults(session, unload="late", unload_seconds=0.1)
        await session.post(path, json=body)
        assert engine.card.bytes_used() == used
        await until(session, lambda state: not state["resident"])
        await load_something(make, session)
        await set_faults(session, unload="ok")
        await session.post(path, json=body)
        await until(session, lambda state: not state["resident"])


async def load_something(make: Any, session: aiohttp.ClientSession) -> None:
    if make is a1111:
        async with session.post("/sdapi/v1/reload-checkpoint") as answer:
            assert answer.status == 200
    else:
        runs = (await state_of(session))["runs"]
        await session.post("/prompt", json={"prompt": workflow(runs + 1)})
        await until(session, lambda state: state["runs"] == runs + 1)


async def test_a1111_must_reload_after_an_unload() -> None:
    async with started(a1111) as (_, session):
        await session.post("/sdapi/v1/unload-checkpoint")
        async with session.post("/sdapi/v1/txt2img", json=PICTURE) as answer:
            assert "same device" in (await answer.json())["errors"]
        await session.post("/sdapi/v1/reload-checkpoint")
        async with session.post("/sdapi/v1/txt2img", json=PICTURE) as answer:
            assert answer.status == 200


async def test_forge_loads_by_itself() -> None:
    async with started(lambda card: SimA1111(card=card, forge=True)) as (engine, session):
        await session.post("/sdapi/v1/unload-checkpoint")
        assert engine.card.resident(engine.url) == {}
        await session.post("/sdapi/v1/reload-checkpoint")
        assert engine.card.resident(engine.url) == {}
        async with session.post("/sdapi/v1/txt2img", json=PICTURE) as answer:
            assert answer.status == 200
        assert engine.card.resident(engine.url)
        for path, status in (("/sdapi/v1/sd-modules", 200), ("/sdapi/v1/sd-vae", 404)):
            async with session.get(path) as answer:
                assert answer.status == status


async def test_a_streamed_completion() -> None:
    async with started(http) as (_, session):
        async with session.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            assert answer.content_type == "text/event-stream"
            lines = [line async for line in answer.content if line.strip()]
        assert len(lines) == 4 and lines[-1] == b"data: [DONE]\n"
        async with session.post("/api/generate", json={"stream": False}) as answer:
            assert (await answer.json())["done"]
        async with session.post("/v1/chat/completions", json={"model": "none"}) as answer:
            assert answer.status == 404


async def test_faults_from_the_start() -> None:
    def failing(card: Card) -> SimComfyUI:
        return SimComfyUI(card=card, faults=Faults(fail_requests=1))

    async with started(failing) as (_, session), session.get("/queue") as answer:
        assert answer.status == 500


async def test_processes_that_name_one_file_share_a_card(tmp_path: Path) -> None:
    file = tmp_path / "gpu0"
    async with (
        process("comfyui", file) as (one, url_one),
        process("a1111", file) as (_, url_two),
        aiohttp.ClientSession() as session,
    ):
        async with session.post(url_one + "/prompt", json={"prompt": workflow()}) as answer:
            assert answer.status == 200
        async with session.post(url_two + "/sdapi/v1/txt2img", json=PICTURE) as answer:
            assert answer.status == 200
        used = await bytes_used(session, url_two)
        one.kill()
        await one.wait()
        assert await bytes_used(session, url_two) < used, "a dead process holds nothing"
    services = {
        line["service"] for line in map(json.loads, file.read_text().splitlines()) if "service" in line
    }
    assert services == {"comfyui", "a1111"}
    assert not judge_files([file]).unreadable


async def bytes_used(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url + "/sdapi/v1/memory") as answer:
        return (await answer.json())["cuda"]["system"]["used"]


async def test_a_process_ends_in_order_and_by_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "gpu0"
    async with process("http", file) as (running, _):
        running.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(running.wait(), SECONDS) == 0
    assert json.loads(file.read_text().splitlines()[-1])["event"] == "engine_down"
    async with process("a1111", file) as (running, url), aiohttp.ClientSession() as session:
        await session.post(url + "/sim/faults", json={"crash": True})
        assert await asyncio.wait_for(running.wait(), SECONDS) == 137


async def test_a_busy_port_is_told(tmp_path: Path) -> None:
    async with process("http", tmp_path / "gpu0") as (_, url):
        port = url.rpartition(":")[2]
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gpulane.testing.process", "http", "--port", port),
            *("--gpu", str(tmp_path / "gpu0")),
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await asyncio.wait_for(second.communicate(), SECONDS)
        assert second.returncode == 2
        assert port in err.decode()


@asynccontextmanager
async def process(kind: str, file: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gpulane.testing.process", kind, "--gpu", str(file)),
        *("--time-scale", "0.001", "--plain-pictures"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert running.stdout is not None
    try:
        ready = await asyncio.wait_for(running.stdout.readline(), SECONDS)
        yield running, ready.decode().split()[-1]
    finally:
        if running.returncode is None:
            running.terminate()
            await asyncio.wait_for(running.wait(), SECONDS)
