"""Faults at random while both services work: no overlap, every job ends, every gpu is usable at the end.

The oracle is the simulated cards' own logs. A failing seed is a parameter to keep.
"""

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.gateway.small_fleet import Client, Fleet, picture, slow, small_fleet, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

JOBS = 40
FAULTS = 14
COUNTED_FAULTS = (
    "crash_mid_jobs",
    "error_jobs",
    "fail_requests",
    "lose_jobs",
    "oom_jobs",
    "truncate_responses",
)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_fails_nothing_overlaps_and_everything_ends(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with small_fleet(tmp_path, gpus=2) as fleet, fleet.gateway() as client:
        async with asyncio.TaskGroup() as tasks:
            prompts = tasks.create_task(submit_prompts(client, chance.randrange(10**6)))
            calls = tasks.create_task(make_calls(client, chance.randrange(10**6)))
            tasks.create_task(break_things(fleet, client, chance))
        ended = [await client.ended(job) for job in prompts.result()]
        assert len(calls.result()) == JOBS
        for gpu in fleet.gpus:
            for engine in (gpu.a1111, gpu.comfyui):
                engine.faults.set(dict.fromkeys(COUNTED_FAULTS, 0))

        async def all_idle() -> bool:
            gpus = (await client.get("/gpulane/v1/gpus"))["gpus"]
            return all(gpu["state"] == "idle" for gpu in gpus)

        await until(all_idle, 60)
        # Every gpu takes work again, for both services.
        last = [await client.prompt(slow(steps=2, seed=1000 + n)) for n in range(6)]
        assert {(await client.ended(job))["state"] for job in last} == {"succeeded"}
        status, _ = await client.post("/sdapi/v1/txt2img", picture(seed=2000))
        assert status == 200
    verdict = fleet.judged()
    assert not verdict.overlaps, verdict.overlaps
    assert not verdict.doubtful, verdict.doubtful
    assert all(job["state"] in {"succeeded", "failed", "cancelled"} for job in ended)
    assert sum(job["state"] == "succeeded" for job in ended) >= JOBS / 2


async def submit_prompts(client: Client, seed: int) -> list[str]:
    chance = random.Random(seed)
    jobs: list[str] = []
    for number in range(JOBS):
        jobs.append(await client.prompt(slow(steps=chance.randrange(1, 8), seed=number)))
        if chance.random() < 0.15:
            async with client.http.delete(f"{client.url}/gpulane/v1/jobs/{chance.choice(jobs)}"):
                pass
        await asyncio.sleep(chance.random() * 0.1)
    return jobs


async def make_calls(client: Client, seed: int) -> list[int]:
    """Clients of A1111, some of which hang up."""
    chance = random.Random(seed)
    statuses: list[int] = []
    for number in range(JOBS):
        timeout = aiohttp.ClientTimeout(total=0.05 if chance.random() < 0.2 else 60)
        body = picture(steps=chance.randrange(1, 6), seed=number)
        try:
            async with client.http.post(
                f"{client.url}/sdapi/v1/txt2img", json=body, timeout=timeout
            ) as answer:
                await answer.read()
                statuses.append(answer.status)
        except TimeoutError:
            statuses.append(0)
    return statuses


async def break_things(fleet: Fleet, client: Client, chance: random.Random) -> None:
    for _ in range(FAULTS):
        await asyncio.sleep(chance.random() * 0.5)
        gpu = chance.choice(fleet.gpus)
        engine: Any = chance.choice([gpu.a1111, gpu.comfyui])
        fault = chance.choice(["restart", *COUNTED_FAULTS])
        if fault == "restart":
            await engine.server.restart()
        elif fault == "crash_mid_jobs":
            engine.faults.set({fault: 1})

            async def has_died(engine: Any = engine) -> bool:
                return not engine.server.is_up

            try:
                await until(has_died, 3)
            except AssertionError:
                engine.faults.set({fault: 0})
            else:
                await engine.server.restart()
        else:
            engine.faults.set({fault: 1})
