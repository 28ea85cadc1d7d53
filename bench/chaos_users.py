"""The users of a chaos run: every service, impatient clients, cancels, programs that want a card for
themselves.

A user submits again what a stopping gateway did not accept, and never waits without a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from typing import Final

import aiohttp
from chaos_world import CHECKPOINT, ENDED, LLM, World, until

AT_ONCE: Final = 24
"""Users who wait for something at one time."""
RUNS_POLL_SECONDS: Final = 0.01
"""How often it is asked whether a job runs that is to be cancelled then."""
CANCELS: Final = 0.06
LEAVES: Final = 0.06
LOCKS: Final = 0.03
TRIES: Final = 20
MORE: Final = 2
"""So many times the jobs at most, while faults are left: each must meet work."""
JOB_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.15


def workflow(seed: int, steps: int) -> dict[str, object]:
    sampler = {
        "model": ["1", 0],
        "positive": ["2", 0],
        "negative": ["2", 0],
        "latent_image": ["3", 0],
        "seed": seed,
        "steps": steps,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": f"a cat {seed}", "clip": ["1", 1]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": sampler},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "c"}},
    }


def picture(seed: int, steps: int) -> dict[str, object]:
    return {"prompt": f"picture {seed}", "steps": steps, "width": 512, "height": 512, "seed": seed}


def chat(seed: int, tokens: int) -> dict[str, object]:
    return {"model": LLM, "max_tokens": tokens, "messages": [{"role": "user", "content": f"word {seed}"}]}


class Users:
    """Submits so many jobs and waits for each."""

    def __init__(
        self,
        world: World,
        jobs: int,
        seed: int,
        *,
        may_go_on: Callable[[int], bool],
        is_over: Callable[[], bool],
    ) -> None:
        """`may_go_on`: whether job number n is due; faults and jobs are to end about the same time.
        `is_over`: whether all faults were fired.
        """
        self._world = world
        self._jobs = jobs
        self._chance = random.Random(f"users {seed}")
        self._may_go_on = may_go_on
        self._is_over = is_over
        self.unanswered = 0

    async def run(self) -> None:
        places = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(MORE * self._jobs):
                if number >= self._jobs and self._is_over():
                    return
                while not self._may_go_on(number):  # noqa: ASYNC110  the pace is the faults'
                    await asyncio.sleep(0.05)
                await places.acquire()
                task = group.create_task(self._one(number))
                task.add_done_callback(lambda _task: places.release())

    async def _one(self, number: int) -> None:
        chance = self._chance
        drawn, leaves = chance.random(), chance.random() < LEAVES
        seconds = chance.uniform(0.05, 0.6) if leaves else JOB_SECONDS
        steps = chance.randrange(1, 5)
        if drawn < LOCKS:
            await self._lock(number)
        elif drawn < 0.45:
            await self._prompt(number, steps, cancels=chance.random() < CANCELS * 2)
        elif drawn < 0.8:
            await self._call("/sdapi/v1/txt2img", picture(number, steps), seconds)
        else:
            await self._call("/svc/llm/v1/chat/completions", chat(number, steps * 4), seconds)

    async def _prompt(self, number: int, steps: int, *, cancels: bool) -> None:
        world = self._world
        job = ""
        for _ in range(TRIES):
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                status, answer = await world.post("/prompt", {"prompt": workflow(number, steps)})
                if status == 200:
                    job = answer["prompt_id"]
                    break
            await asyncio.sleep(0.2)
        if not job:
            self.unanswered += 1
            return
        world.accepted.add(job)
        if cancels:
            if self._chance.random() < 0.5:
                await asyncio.sleep(self._chance.random() * 0.6)
            else:
                await self._runs(job)
            await self._cancel(job)

        async def is_over() -> bool:
            return (await world.get(f"/gpulane/v1/jobs/{job}"))["state"] in ENDED

        if not await until(is_over, JOB_SECONDS, POLL_SECONDS):
            print(f"not over within {JOB_SECONDS:.0f} s: {job}", flush=True)

    async def _runs(self, job: str) -> None:
        """Wait until the job runs, or has ended."""
        world = self._world

        async def has_begun() -> bool:
            return (await world.get(f"/gpulane/v1/jobs/{job}"))["state"] in {"running", *ENDED}

        await until(has_begun, JOB_SECONDS, RUNS_POLL_SECONDS)

    async def _cancel(self, job: str) -> None:
        world = self._world
        await world.up.wait()
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            before = await world.get(f"/gpulane/v1/jobs/{job}")
            async with world.http.delete(f"{world.url}/gpulane/v1/jobs/{job}") as answer:
                if answer.status < 300 and before["state"] not in ENDED:
                    world.fired[f"cancel of a {before['state']} job"] += 1

    async def _call(self, path: str, body: dict[str, object], seconds: float) -> None:
        """A call that is held until its answer, or until the client has no patience left."""
        world = self._world
        timeout = aiohttp.ClientTimeout(total=seconds)
        for _ in range(TRIES):
            await world.up.wait()
            try:
                async with world.http.post(world.url + path, json=body, timeout=timeout) as answer:
                    await answer.read()
                    return
            except TimeoutError:
                if seconds < JOB_SECONDS:
                    world.fired["client hangs up"] += 1
                else:
                    self.unanswered += 1
                    print(f"no answer within {seconds:.0f} s: {path}", flush=True)
                return
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)  # the gateway went away under it

    async def _lock(self, number: int) -> None:
        """`gpulane lock`: held by the file, so that engines must keep away."""
        world = self._world
        for _ in range(TRIES):
            await world.up.wait()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                body = {"seconds_max": 20.0, "note": f"program {number}"}
                timeout = aiohttp.ClientTimeout(total=JOB_SECONDS)
                url = world.url + "/gpulane/v1/locks"
                async with world.http.post(url, json=body, timeout=timeout) as answer:
                    if answer.status == 200 and await self._listen(answer):
                        return
            await asyncio.sleep(0.2)

    async def _listen(self, answer: aiohttp.ClientResponse) -> bool:
        """Follow the lock's lines; returns whether it was granted, or ended otherwise."""
        async for line in answer.content:
            event = json.loads(line)
            if event["event"] == "granted":
                await self._hold(event)
            if event["event"] != "waiting":
                return True
        return False

    async def _hold(self, granted: dict[str, str]) -> None:
        world, job = self._world, granted["job"]
        world.accepted.add(job)
        box = next(box for box in world.boxes if granted["gpu"].endswith(box.name))
        with world.flocked(box, job) as is_ours:
            if not is_ours:
                return
            status, _ = await world.post(f"/gpulane/v1/locks/{job}/hold", {})
            if status == 200:
                await asyncio.sleep(0.05 + self._chance.random() * 0.3)
                world.fired["lock job"] += 1
        await world.post(f"/gpulane/v1/locks/{job}/release", {})
