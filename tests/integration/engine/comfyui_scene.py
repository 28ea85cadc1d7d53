"""A simulated ComfyUI with our client on it, and short waits: what the tests of the client share."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiohttp

from gpulane.adapters.comfyui.prompt import parse_prompt
from gpulane.core.model import Account, EngineUrl, Job, JobId, Service
from gpulane.engine.base import AttemptContext, Outcome
from gpulane.engine.comfyui import ComfyUIClient, Timings
from gpulane.engine.progress import Progress, ProgressHub
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import MODERN_VERSION, SimComfyUI

WAIT_SECONDS = 10.0

QUICK = Timings(
    request_seconds=2,
    submit_seconds=5,
    socket_seconds=1,
    poll_first_seconds=0.05,
    poll_seconds=0.1,
    poll_share=0.5,
    quiet_seconds=0.3,
    refused_seconds=0.4,
    silent_seconds=1.0,
    zombie_seconds=0.5,
    suspect_seconds=0.2,
    stuck_seconds=1.2,
    interrupt_seconds=0.2,
    canary_seconds=0.5,
    ping_seconds=5,
    reconnect_seconds_min=0.02,
    reconnect_seconds_max=0.1,
)


def slow(*, steps: int = 5, delay: float = 0.02, seed: int = 1) -> dict[str, Any]:
    """A workflow of one slow node, of a file."""
    inputs = {"steps": steps, "delay": delay, "seed": seed, "preview": True}
    return {
        "1": {"class_type": "SimSlow", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "rec"}},
    }


@dataclass
class Scene:
    """One engine, one client, and all that was published."""

    sim: SimComfyUI
    client: ComfyUIClient
    hub: ProgressHub = field(default_factory=ProgressHub)
    heard: list[Progress] = field(default_factory=list[Progress])

    def attempt(self, graph: dict[str, Any], **more: object) -> AttemptContext:
        job = JobId(str(uuid4()))
        known = parse_prompt(json.dumps({"prompt": graph, **more}).encode(), job=job)
        return AttemptContext(
            job=Job(
                id=job, account=Account("ann"), service=Service.COMFYUI, kind="prompt", model=known.model
            ),
            request=known.request,
            meta=known.meta,
            hub=self.hub,
        )

    async def run(self, graph: dict[str, Any]) -> Outcome:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.client.run(self.attempt(graph))

    @asynccontextmanager
    async def running(self, attempt: AttemptContext) -> AsyncIterator["asyncio.Task[Outcome]"]:
        """Run an attempt beside the block, which starts once the engine is at work on it."""
        async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self.client.run(attempt))
            await until(lambda: self.is_running(attempt.job.id))
            yield task

    def is_running(self, job: str) -> bool:
        running = self.sim.queue.running
        return running is not None and running[1] == job

    def values(self, job: JobId) -> list[float]:
        return [p.value for p in self.heard if p.job == job and p.value is not None]

    async def post(self, target: str, value: object) -> int:
        """Somebody else, past the gateway."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.sim.url + target, json=value) as answer,
        ):
            return answer.status

    @property
    def runs(self) -> int:
        return self.sim.sim_state()["runs"]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, looking often."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def scene(
    *, version: str = MODERN_VERSION, timings: Timings = QUICK, load_seconds: float = 0.05
) -> AsyncIterator[Scene]:
    options = CardOptions(seconds_per_step=0.01, load_seconds={"sd15.safetensors": load_seconds})
    card = Card(options=options)
    async with SimComfyUI(card=card, version=version, previews=True) as sim:
        client = ComfyUIClient(EngineUrl(sim.url), timings=timings)
        here = Scene(sim, client)
        here.hub.listen(here.heard.append)
        await client.open()
        try:
            yield here
        finally:
            await client.close()
