"""A whole gateway over simulated engines, in one process, with real sockets: for the tests beside it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gpulane.config import parse_settings
from gpulane.service import Running, running
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import SimComfyUI
from gpulane.testing.judge import Verdict, judge_files

UNTIL_SECONDS = 20.0
BRISK = """
probe: {interval_seconds: 0.3, timeout_seconds: 2, misses_max: 2, quiet_seconds: 0.2}
retry: {rest_seconds: 0.05}
hold: {rejoin_seconds: 1}
"""


@dataclass(slots=True)
class SimGpu:
    """One simulated card with an engine of each service."""

    card: Card
    a1111: SimA1111
    comfyui: SimComfyUI


@dataclass(slots=True)
class Fleet:
    """Cards and engines that outlive the gateways started over them."""

    folder: Path
    gpus: list[SimGpu] = field(default_factory=list[SimGpu])

    @contextlib.asynccontextmanager
    async def gateway(
        self, more: str = "", *, wait_for: int | None = None, key: str | None = None
    ) -> AsyncIterator["Client"]:
        """Start a gateway over the same data folder; leaving the block stops it as a second Ctrl-C does."""
        lines = [f"data: {self.folder / 'data'}", "listen: 127.0.0.1:0", "name: box", BRISK, more, "gpus:"]
        for number, gpu in enumerate(self.gpus):
            lines.append(
                f"  gpu{number}: {{engines: ['{gpu.a1111.server.url}', '{gpu.comfyui.server.url}']}}"
            )
        headers = {} if key is None else {"X-Api-Key": key}
        async with (
            running(parse_settings("\n".join(lines))) as service,
            aiohttp.ClientSession(headers=headers) as http,
        ):
            client = Client(service, http, service.addresses["main"])
            wanted = 2 * len(self.gpus) if wait_for is None else wait_for

            async def is_ready() -> bool:
                return await client.engines_ready() >= wanted

            await until(is_ready)
            yield client

    def judged(self) -> Verdict:
        return judge_files(Path(gpu.card.file) for gpu in self.gpus if gpu.card.file is not None)

    def computed(self) -> dict[str, int]:
        """How often each job was computed to a good end, by the cards' own logs."""
        return {job: n for jobs in self.judged().computed.values() for job, n in jobs.items()}


@dataclass(slots=True)
class Client:
    """What a user of the gateway does."""

    service: Running
    http: aiohttp.ClientSession
    url: str

    async def get(self, path: str) -> Any:
        async with self.http.get(self.url + path) as answer:
            return await answer.json(content_type=None)

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def engines_ready(self) -> int:
        gpus = (await self.get("/gpulane/v1/gpus"))["gpus"]
        return sum(engine["state"] == "ready" for gpu in gpus for engine in gpu["engines"])

    async def prompt(self, workflow: dict[str, object], **more: object) -> str:
        status, answer = await self.post("/prompt", {"prompt": workflow, "client_id": "test", **more})
        assert status == 200, answer
        return answer["prompt_id"]

    async def job(self, job: str) -> Any:
        return await self.get(f"/gpulane/v1/jobs/{job}")

    async def ended(self, job: str) -> Any:
        async def is_over() -> Any:
            found = await self.job(job)
            return found if found["state"] in {"succeeded", "failed", "cancelled"} else None

        return await until(is_over)

    async def is_running(self, job: str) -> bool:
        return (await self.job(job))["state"] == "running"


def slow(steps: int = 5, seed: int = 0, delay: float = 1.0) -> dict[str, object]:
    """A workflow that computes for steps x delay simulated seconds, a fiftieth of that in real time."""
    return {
        "1": {
            "class_type": "SimSlow",
            "inputs": {"steps": steps, "delay": delay, "seed": seed, "preview": False},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"s{seed}"}},
    }


def picture(steps: int = 2, seed: int = 0) -> dict[str, object]:
    """An A1111 request."""
    return {"prompt": f"picture {seed}", "steps": steps, "width": 64, "height": 64, "seed": seed}


async def until(claim: Callable[[], Awaitable[Any]], seconds: float = UNTIL_SECONDS) -> Any:
    """Ask until the answer is true."""
    ends = time.monotonic() + seconds
    while True:
        found = await claim()
        if found:
            return found
        assert time.monotonic() < ends, f"not within {seconds} s: {claim}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def small_fleet(folder: Path, gpus: int = 1, **options: float) -> AsyncIterator[Fleet]:
    """Start cards and engines."""
    async with contextlib.AsyncExitStack() as stack:
        fleet = Fleet(folder)
        for number in range(gpus):
            settings = CardOptions(**{"time_scale": 0.02, "vram_gib": 80.0, **options})  # type: ignore[arg-type]
            card = stack.enter_context(Card(folder / f"card{number}.jsonl", settings))
            fleet.gpus.append(
                SimGpu(
                    card,
                    await stack.enter_async_context(SimA1111(card=card)),
                    await stack.enter_async_context(SimComfyUI(card=card, plain_pictures=True)),
                )
            )
        yield fleet
