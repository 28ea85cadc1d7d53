"""The whole gateway: its check, both services on one GPU, a kill, a stranger, the native API."""

import asyncio
import contextlib
import io
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image

from tests.drive.comfyui_flows import histories_with, new_seed, told
from tests.drive.ground import Ground, Skipped, program, until
from tests.drive.watching import watching

MIXED_JOBS = 20
KILL_JOBS = 8


async def check(ground: Ground) -> str:
    """`gpulane check` finds every engine and its kind; so does the gateway."""
    process = await asyncio.create_subprocess_exec(
        program(),
        "check",
        "-c",
        str(ground.gateway.settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, f"exit {process.returncode}: {output[-1500:]}"
    engines = [engine for gpu in await ground.gpus() for engine in gpu["engines"]]
    for service, clients in (("comfyui", ground.comfyui), ("a1111", ground.a1111)):
        found = {engine["url"] for engine in engines if engine["service"] == service}
        assert found == {client.url for client in clients}, f"{service}: {found}"
    return "exit 0; found " + ", ".join(f"{e['service']} {e['version'] or '?'}" for e in engines)


async def mixed(ground: Ground) -> str:
    """Both services at once on one GPU: never both busy, by the engines' own word."""
    number = ground.shared_gpu()
    one, other = ground.comfyui[number], ground.a1111[number]
    async with others_drained(ground, number), watching(one, other) as seen, asyncio.TaskGroup() as tasks:
        painting = [
            tasks.create_task(who.post("/sdapi/v1/txt2img", ground.pictures.slow(0.5, seed=new_seed())))
            for who in (ground.alice, ground.bob)
            for _ in range(MIXED_JOBS // 4)
        ]
        prompts = [
            (who, await who.prompt(ground.workflows.slow(0.5, seed=new_seed())))
            for who in (ground.alice, ground.bob)
            for _ in range(MIXED_JOBS // 4)
        ]
        for who, prompt in prompts:
            await who.succeeded(prompt, 120)
        for task in painting:
            (await task).ok()
    text = seen.verdict()
    assert seen.busy_comfyui and seen.busy_a1111, f"the watched GPU did not work for both: {text}"
    return f"{len(prompts)} prompts and {len(painting)} pictures; {text}"


@contextlib.asynccontextmanager
async def others_drained(ground: Ground, number: int) -> AsyncIterator[None]:
    """Have one GPU do all the work."""
    others = [gpu["id"] for gpu in await ground.gpus() if gpu["name"] != f"gpu{number}"]
    try:
        for gpu in others:
            (await ground.alice.post(f"/gpulane/v1/gpus/{gpu}/drain")).ok()
        yield
    finally:
        for gpu in others:
            (await ground.alice.post(f"/gpulane/v1/gpus/{gpu}/resume")).ok()


async def kill(ground: Ground) -> str:
    """kill -9 with prompts queued and running, then a start: each ends exactly once."""
    async with contextlib.AsyncExitStack() as stack:
        cards = [await stack.enter_async_context(watching(engine, None)) for engine in ground.comfyui]
        jobs = [
            await ground.alice.prompt(ground.workflows.slow(1, seed=new_seed())) for _ in range(KILL_JOBS)
        ]
        await ground.alice.started(jobs[0])
        await asyncio.sleep(0.3)  # in the middle of the run
        before = [(await ground.alice.job(job))["state"] for job in jobs]
        assert ground.gateway.process is not None
        ground.gateway.process.kill()
        await ground.gateway.process.wait()
        ready_seconds = await ground.gateway.start()
        ended = [await ground.alice.succeeded(job, 120) for job in jobs]
    starts = sum((card.starts for card in cards), Counter[str]())
    twice = [job for job in jobs if starts[job] > 1 or await histories_with(ground, job) != 1]
    assert not twice, f"run twice, or in no history: {twice}"
    attempts = [len(job["attempts"]) for job in ended]
    running, queued = before.count("running"), before.count("queued")
    return (
        f"{running} running and {queued} queued, killed, ready after {ready_seconds:.1f} s; "
        f"{len(ended)} succeeded, each once ({sum(attempts)} attempts)"
    )


async def stranger(ground: Ground) -> str:
    """A prompt sent past the gateway: while it runs, nothing of ours is started on that GPU."""
    engine = ground.comfyui[0]
    painter = ground.a1111[0] if ground.a1111 else None
    async with watching(engine, painter) as seen:
        jobs = [
            await ground.alice.prompt(ground.workflows.slow(1, seed=new_seed()))
            for _ in range(3 * len(ground.comfyui))
        ]

        async def is_ours_running() -> bool:
            return bool((await engine.get("/queue")).ok().json["queue_running"])

        # Sent while the gateway sends one of its own, it could come first: nobody could prevent that.
        await until(is_ours_running)
        strange = await engine.prompt(ground.workflows.slow(4, seed=new_seed()))

        async def is_over() -> bool:
            return strange in (await engine.get(f"/history/{strange}")).ok().json

        await until(is_over, 120)
        for job in jobs:
            await ground.alice.succeeded(job, 120)
    seen.verdict()
    behind = seen.waiting_behind.get(strange)
    assert behind is not None, "the stranger's prompt was never seen running"
    assert not behind, f"{len(behind)} of ours sent while the stranger's prompt ran"
    return f"ran alone on its GPU, {len(jobs)} of ours before and after it"


async def native(ground: Ground) -> str:
    """Jobs of both kinds over the native API, with result and files; a wrong one is refused."""
    bodies: list[dict[str, Any]] = []
    if ground.comfyui:
        bodies.append({"service": "comfyui", "workflow": ground.workflows.quick(new_seed(), "drive/native")})
    if ground.a1111:
        payload = ground.pictures.small(seed=new_seed())
        bodies.append({"service": "a1111", "endpoint": "txt2img", "payload": payload})
    seen: list[str] = []
    for body in bodies:
        key = f"drive-{new_seed()}"
        answer = await ground.alice.post("/gpulane/v1/jobs", body | {"idempotency_key": key})
        assert answer.status == 202, f"{answer.status}: {answer.body[:300]!r}"
        again = await ground.alice.post("/gpulane/v1/jobs", body | {"idempotency_key": key})
        job = answer.json["id"]
        assert again.json["id"] == job, "the same idempotency key made another job"
        await ground.alice.succeeded(job)
        result = (await ground.alice.get(f"/gpulane/v1/jobs/{job}/result")).ok().json
        assert result, "an empty result"
        files = (await ground.alice.get(f"/gpulane/v1/jobs/{job}/artifacts")).ok().json["artifacts"]
        assert files, "no artifact"
        picture = (await ground.alice.get(files[0]["url"])).ok()
        size = Image.open(io.BytesIO(picture.body)).size
        assert size == (64, 64), size
        seen.append(f"{body['service']}: result and {files[0]['content_type']}")
    wrong = await ground.alice.post("/gpulane/v1/jobs", {"service": "comfyui", "workflow": 7})
    assert 400 <= wrong.status < 500 and wrong.json["error"]["code"], told(wrong)
    if not seen:
        raise Skipped("no engine")
    return "; ".join(seen)
