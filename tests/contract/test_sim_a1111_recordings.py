"""The simulated webui does what the recorded real 1.10.1 did.

Not covered: the Gradio queue (`ws_*`, `ui_*`, `predict_bypass`, `gradio4_*`), `server_stop_restart`,
`webuiapi_calls`, the unload under a running sampler in `during_run`, lists whose content is an installation's
(extensions, scripts, models found there), and of `config` all but its dependencies.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.pictures import render_png
from tests.contract.recordings import Json, differences, recording

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 20.0

NOT_SIMULATED = (
    "/app_id",
    "/token",
    "/startup-events",
    "/info",
    "/robots.txt",
    "/internal/profile-startup",
    "/internal/sysinfo",
    "/sdapi/v1/script-info",
    "/sdapi/v1/realesrgan-models",
    "/docs",
)

OURS = {
    # the recordings are of a CPU, without memory figures
    "$.cuda.error is missing",
    "$.cuda.system is new",
    "$.cuda.active is new",
    "$.cuda.allocated is new",
    "$.cuda.reserved is new",
    "$.cuda.inactive is new",
    "$.cuda.events is new",
    # whether there is a preview at this moment
    '$.textinfo: str "" became NoneType null',
    "$.use_cpu is empty",
    # a config file lay beside the recorded checkpoints
    '$[0].config: str "/srv/webui/models/Stable-diffusion/tinyA.yaml" became NoneType null',
}

PICTURE = base64.b64encode(
    render_png("a cat", 1, "x", 64, 64, {"parameters": "a cat\nSteps: 6, Size: 64x64"})
)


@asynccontextmanager
async def webui(
    *, time_scale: float = 0.0, seconds_per_step: float = 2.4, nowebui: bool = False, skip_load: bool = False
) -> AsyncIterator[tuple[SimA1111, aiohttp.ClientSession]]:
    checkpoints = ("tinyA.safetensors", "tinyB.safetensors")
    options = CardOptions(
        time_scale=time_scale,
        seconds_per_step=seconds_per_step,
        load_seconds=dict.fromkeys(checkpoints, 0.5),
    )
    async with (
        SimA1111(
            card=Card(options=options),
            checkpoints=checkpoints,
            nowebui=nowebui,
            skip_load=skip_load,
            strict_unload=False,  # the recordings are of a CPU
        ) as engine,
        aiohttp.ClientSession(engine.url) as session,
    ):
        yield engine, session


def whole(value: Json) -> Json:
    """A request with a real picture where the recorder left a mark."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list):
        return [whole(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    is_cut = isinstance(value, str) and value.endswith("chars>")
    return (
        (("data:image/png;base64," if value.startswith("data:") else "") + PICTURE.decode())
        if is_cut
        else value
    )


async def ask(session: aiohttp.ClientSession, call: Json) -> tuple[int, Json]:
    request = call.get("request")
    data = None
    if request is not None:
        data = request if isinstance(request, str) else json.dumps(whole(request))
    headers = {"Content-Type": "application/json"} if data else {}
    async with session.request(call["method"], call["path"], data=data, headers=headers) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if "json" in answer.content_type else text


def compare(call: Json, status: int, body: Json) -> None:
    name = call["name"]
    assert status == call["status"], (name, body)
    real = call["response"]
    if real is None or isinstance(real, str) or status == 405:
        return
    if call["path"].endswith("/options") and set(real) < set(body):
        body = {key: body[key] for key in real}  # the recorder kept what mattered
    if status >= 400:
        assert body == real, name
        return
    if isinstance(real, dict) and isinstance(real.get("info"), str) and real["info"].startswith("{"):  # pyright: ignore[reportUnknownMemberType]
        compare_info(name, str(real["info"]), body["info"])  # pyright: ignore[reportUnknownArgumentType]
        if call["path"].endswith("img"):
            assert set(body["parameters"]) == set(real["parameters"]), name  # pyright: ignore[reportUnknownArgumentType]
    if call["path"].endswith("/png-info"):
        assert body.keys() == real.keys()
        return
    found = differences(real, body)
    # An eta is null until the first step, and when that was is not recorded.
    assert [line for line in found if line not in OURS and not line.startswith("$.eta:")] == [], name


def compare_info(name: str, real: str, ours: str) -> None:
    """`info` is JSON in a string; the recorder cut most of them."""
    if real.endswith("chars>"):
        assert list(json.loads(ours))[:4] == [
            "prompt",
            "all_prompts",
            "negative_prompt",
            "all_negative_prompts",
        ]
    else:
        assert differences(json.loads(real), json.loads(ours)) == [], name


async def test_gets() -> None:
    async with webui() as (_, session):
        for call in recording("a1111/basic_get"):
            if call["path"] not in NOT_SIMULATED:
                compare(call, *(await ask(session, call)))


async def test_posts() -> None:
    async with webui() as (_, session):
        for call in recording("a1111/basic_post"):
            compare(call, *(await ask(session, call)))


async def test_the_full_answer_of_txt2img() -> None:
    real = recording("a1111/txt2img_full_response")
    async with webui() as (_, session):
        request = {"prompt": "a cat", "steps": 6, "width": 128, "height": 128, "seed": 1}
        async with session.post("/sdapi/v1/txt2img", json=request) as answer:
            ours = await answer.json()
    assert differences(real, ours) == []
    assert ours["parameters"] == real["parameters"]
    theirs, mine = json.loads(real["info"]), json.loads(ours["info"])
    for changing in ("subseed", "all_subseeds", "job_timestamp"):
        assert type(theirs.pop(changing)) is type(mine.pop(changing))
    assert mine == theirs


async def test_without_the_ui() -> None:
    async with webui(nowebui=True, skip_load=True) as (engine, session):
        for call in recording("a1111/nowebui_skipload"):
            if call["path"] in NOT_SIMULATED:
                continue
            if call["name"] == "unload_when_nothing_loaded":
                assert engine.checkpoints.loaded is None
            compare(call, *(await ask(session, call)))
            if call["name"] == "unload_when_nothing_loaded":
                assert engine.checkpoints.loaded == "tinyA.safetensors", "it loads first"


async def test_progress_of_a_running_job() -> None:
    calls = {call["name"]: call for call in recording("a1111/progress_running")}
    async with webui(time_scale=0.1) as (engine, session), asyncio.TaskGroup() as group:
        running = group.create_task(ask(session, calls["run0"]))
        await until_step(engine, 3)
        for name, call in calls.items():
            if "running" in name or name.startswith("progress_"):
                compare(call, *(await ask(session, call)))
        compare(calls["run0"], *(await running))
        compare(calls["internal_progress_done"], *(await ask(session, calls["internal_progress_done"])))


async def until_step(engine: SimA1111, step: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while engine.state.sampling_step < step:
            await asyncio.sleep(0.002)


async def test_waiting_jobs_come_in_order() -> None:
    calls = recording("a1111/concurrent_fifo")
    jobs = [call for call in calls if call["path"].endswith("txt2img")]
    async with webui(time_scale=0.05) as (engine, session), asyncio.TaskGroup() as group:
        for bad in (
            "task(bad1)",
            "task(bad2)",
        ):  # as before this recording: two bad pictures left their marks
            body = {"init_images": ["xxxx"], "force_task_id": bad}
            await (await session.post("/sdapi/v1/img2img", json=body)).read()
        ended: list[str] = []

        async def run(call: Json) -> None:
            compare(call, *(await ask(session, call)))
            ended.append(call["name"])

        for number, call in enumerate(sorted(jobs, key=lambda job: job["t_start"])):
            group.create_task(run(call))
            await until_pending(engine, 2 + number)
        for name in ("waitprog_0", "waitprog_0_task(fifo0)", "waitprog_0_task(fifo2)", "waitprog_0_pending"):
            call = next(call for call in calls if call["name"] == name)
            status, body = await ask(session, call)
            compare(call, status, body)
            if "fifo2" in name:
                assert body["textinfo"] == call["response"]["textinfo"] == "In queue: 4/6"
    assert ended == [job["name"] for job in sorted(jobs, key=lambda job: job["t_end"])]


async def until_pending(engine: SimA1111, count: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(engine.tasks.pending) < count or engine.tasks.current is None:
            await asyncio.sleep(0.002)


async def test_checkpoints_change_under_those_who_wait() -> None:
    calls: list[Json] = recording("a1111/checkpoint_switching")
    first_part = calls[: next(i for i, call in enumerate(calls) if call["name"] == "run_preview")]
    first_part = [call for call in first_part if call["t_end"] <= 11.1]
    scale = 0.2
    async with webui(time_scale=scale) as (_, session), asyncio.TaskGroup() as group:
        started = asyncio.get_running_loop().time()

        async def at_its_time(call: Json) -> None:
            await asyncio.sleep(started + call["t_start"] * scale - asyncio.get_running_loop().time())
            status, body = await ask(session, call)
            assert status == call["status"]
            if "sd_model_name" in str(call["response"]):
                ran = json.loads(body["info"])["sd_model_name"]
                assert ran == call["response"]["sd_model_name"], call["name"]
            elif call["method"] == "GET":
                assert body["sd_model_checkpoint"] == call["response"]["sd_model_checkpoint"], call["name"]

        for call in first_part:
            group.create_task(at_its_time(call))


@pytest.mark.parametrize(("name", "images"), [("interrupt", 1), ("skip", 3)])
async def test_interrupt_ends_the_job_and_skip_one_image(name: str, images: int) -> None:
    calls = {call["name"]: call for call in recording("a1111/interrupt_niter")}
    async with webui(time_scale=0.05) as (engine, session), asyncio.TaskGroup() as group:
        job = calls[f"niter3_{name}"]
        assert len(job["response"]["images"]) == images
        running = group.create_task(ask(session, job))
        await until_step(engine, 2)
        compare(calls[name], *(await ask(session, calls[name])))
        status, body = await running
        compare(job, status, body)
        assert len(body["images"]) == images


async def test_an_interrupt_leaves_waiters_alone() -> None:
    calls = {call["name"]: call for call in recording("a1111/interrupt_with_waiters")}
    async with webui(time_scale=0.05) as (engine, session), asyncio.TaskGroup() as group:
        jobs: list[asyncio.Task[tuple[int, Json]]] = []
        for number in range(3):
            jobs.append(group.create_task(ask(session, calls[f"int{number}"])))
            await until_pending(engine, number)
        await until_step(engine, 2)
        compare(calls["interrupt"], *(await ask(session, calls["interrupt"])))
        compare(calls["progress_after_interrupt"], *(await ask(session, calls["progress_after_interrupt"])))
        for number, job in enumerate(jobs):
            compare(calls[f"int{number}"], *(await job))
        assert engine.runs == 3


async def test_a_client_that_leaves_stops_nothing() -> None:
    """Neither a running nor a waiting job notices."""
    calls = recording("a1111/client_disconnect_waiting")
    waiter = next(call for call in calls if call["name"] == "waiter_disc")
    long = next(call for call in calls if call["name"] == "long")
    async with webui(time_scale=0.05) as (engine, session), asyncio.TaskGroup() as group:
        running = group.create_task(ask(session, long))
        await until_pending(engine, 0)
        leaving = group.create_task(ask(session, waiter))
        await until_pending(engine, 1)
        leaving.cancel()
        await running
        async with asyncio.timeout(PATIENCE_SECONDS):
            while engine.runs < 2:
                await asyncio.sleep(0.005)
    ids = [line["job"] for line in engine.card.lines() if line["event"] == "job"]
    assert ids == ["task(long)", "task(wdisc)"]


@pytest.mark.parametrize(("held", "is_blocked"), [(30, False), (45, True)])
async def test_held_jobs_take_all_threads(held: int, is_blocked: bool) -> None:
    recorded = recording(f"a1111/threadpool_{held}")
    during = [call for call in recorded["calls"] if call["name"] == "during_progress"]
    assert (during[0]["status"] is None) == is_blocked
    async with (
        webui(time_scale=1.0, seconds_per_step=0.05) as (engine, session),
        asyncio.TaskGroup() as group,
    ):
        body = {"steps": 50, "width": 512, "height": 512}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(engine.url, connector=connector) as many:
            jobs = [group.create_task(post(many, body)) for _ in range(held)]
            await until_pending(engine, min(held, 40) - 1)
            if is_blocked:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await session.get("/sdapi/v1/progress")
            else:
                async with session.get("/sdapi/v1/progress") as answer:
                    assert answer.status == 200
            for job in jobs:
                job.cancel()


async def post(session: aiohttp.ClientSession, body: Json) -> None:
    async with session.post("/sdapi/v1/txt2img", json=body) as answer:
        await answer.read()


async def test_options_during_a_run() -> None:
    """A plain option is set at once; a checkpoint waits for the running job, and so does a refresh."""
    calls = recording("a1111/during_run")
    cheap, checkpoint = calls[0], next(c for c in calls if c["name"] == "ckpt_option_during_run")
    refresh = next(call for call in calls if call["name"] == "refresh_ckpts_during_run")
    long = next(call for call in calls if call["name"] == "long")
    async with webui(time_scale=0.05) as (engine, session), asyncio.TaskGroup() as group:
        running = group.create_task(ask(session, long))
        await until_step(engine, 1)
        compare(cheap, *(await ask(session, cheap)))
        assert not running.done()
        for call in (checkpoint, refresh):
            compare(call, *(await ask(session, call)))
            assert engine.runs == 1
        await running


async def test_the_functions_of_the_page_are_classified_alike() -> None:
    """A gateway finds the jobs among the page's functions by `js` and target: these are the recorded ones."""
    real = recording("a1111/config")
    async with webui() as (_, session), session.get("/config") as answer:
        ours = await answer.json()
    assert len(ours["dependencies"]) == len(real["dependencies"])
    for mine, theirs in zip(ours["dependencies"], real["dependencies"], strict=True):
        assert mine["targets"] == theirs["targets"]
        assert (mine["js"] or "")[:50] == (theirs["js"] or "")[:50]
    submit = [i for i, dependency in enumerate(ours["dependencies"]) if dependency["js"] == "submit"]
    assert submit == [99, 100]
