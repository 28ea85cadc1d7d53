"""How long an engine waits between two ComfyUI jobs, and what an idle gateway costs.

    python bench/gap.py [--jobs 200] [--gpus 2]      `executing: null` sent -> next POST /prompt received
    python bench/gap.py --idle 30                    CPU and memory of an idle gateway with two engines
    python bench/gap.py --start 100000               start to `ready` with so many jobs waiting in the store

The gateway is a process of its own (`gpulane serve`); the engines are simulated, in this process, over real
sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from gpulane.testing.card import Card, CardOptions, Json
from gpulane.testing.comfyui import SimComfyUI

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class TimedComfyUI(SimComfyUI):
    """Notes when it says that it is done, and when the next prompt arrives."""

    def __init__(self, card: Card) -> None:
        super().__init__(card=card, plain_pictures=True)
        self.done_at: float | None = None
        self.gaps: list[float] = []
        send = self.hub.send

        def timed_send(event: str, data: Json, client_id: str | None) -> None:
            send(event, data, client_id)
            if event == "executing" and data.get("node") is None:
                self.done_at = time.perf_counter()

        self.hub.send = timed_send

    async def _post_prompt(self, request: web.Request) -> web.Response:
        if self.done_at is not None:
            self.gaps.append(time.perf_counter() - self.done_at)
            self.done_at = None
        return await super()._post_prompt(request)


@contextlib.asynccontextmanager
async def gateway(folder: Path, engines: list[str]) -> AsyncIterator[tuple[str, int, float]]:
    """Start `gpulane serve`; yields its URL, its process id and the seconds until it was ready."""
    command = [str(Path(sys.executable).with_name("gpulane")), "serve", *engines]
    began = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--listen", "127.0.0.1:0", "--data", str(folder / "data"),
            stdout=asyncio.subprocess.PIPE, stderr=log,
        )  # fmt: skip
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    seconds = time.perf_counter() - began
    assert line.startswith("gpulane ready"), (folder / "log").read_text()
    try:
        yield line.split()[-1], process.pid, seconds
    finally:
        process.terminate()
        await process.wait()


def workflow(seed: int) -> dict[str, Any]:
    return {
        "1": {"class_type": "SimSlow", "inputs": {"steps": 4, "delay": 0.02, "seed": seed, "preview": False}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "gap"}},
    }


async def until_ready(http: aiohttp.ClientSession, url: str) -> None:
    for _ in range(400):
        async with http.get(f"{url}/gpulane/v1/gpus") as answer:
            gpus = (await answer.json())["gpus"]
        if all(engine["state"] == "ready" for gpu in gpus for engine in gpu["engines"]):
            return
        await asyncio.sleep(0.05)
    raise SystemExit("the engines did not become ready")


async def measure_gaps(folder: Path, jobs: int, gpus: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        cards = [
            stack.enter_context(Card(folder / f"card{n}", CardOptions(vram_gib=80))) for n in range(gpus)
        ]
        engines = [await stack.enter_async_context(TimedComfyUI(card)) for card in cards]
        url, pid, _ = await stack.enter_async_context(gateway(folder, [engine.url for engine in engines]))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await until_ready(http, url)
        before = cpu_seconds(pid)
        for seed in range(jobs):
            async with http.post(f"{url}/prompt", json={"prompt": workflow(seed)}) as answer:
                assert answer.status == 200, await answer.text()
        while True:
            async with http.get(f"{url}/queue") as answer:
                queue = await answer.json()
            if not queue["queue_running"] and not queue["queue_pending"]:
                break
            await asyncio.sleep(0.5)
        gaps = sorted(1000 * gap for engine in engines for gap in engine.gaps)
        used = cpu_seconds(pid) - before
        print(
            f"gap ms, {len(gaps)} jobs of 80 ms on {gpus} gpus: p50 {statistics.median(gaps):.2f}  "
            f"p90 {gaps[int(len(gaps) * 0.9)]:.2f}  p99 {gaps[int(len(gaps) * 0.99)]:.2f}  "
            f"gateway {1000 * used / jobs:.1f} CPU-ms per job"
        )


async def measure_idle(folder: Path, seconds: float) -> None:
    async with contextlib.AsyncExitStack() as stack:
        card = stack.enter_context(Card(folder / "card", CardOptions(vram_gib=80)))
        engines = [await stack.enter_async_context(SimComfyUI(card=card)) for _ in range(2)]
        joined = "+".join(engine.url for engine in engines)
        url, pid, _ = await stack.enter_async_context(gateway(folder, [joined]))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await until_ready(http, url)
        await asyncio.sleep(3)
        before = cpu_seconds(pid)
        await asyncio.sleep(seconds)
        share = 100 * (cpu_seconds(pid) - before) / seconds
        print(
            f"idle, two engines, {seconds:g} s: {share:.2f} % of a core, {memory_mib(pid):.1f} MiB resident"
        )


async def measure_start(folder: Path, jobs: int) -> None:
    from gpulane.core.model import Account, Job, JobId, Service
    from gpulane.store.base import NewJob, QueueLimits
    from gpulane.store.sqlite import SqliteStore

    if jobs:
        store = SqliteStore(folder / "data", clock=time.time)
        (folder / "data").mkdir()
        await store.open()
        limits = QueueLimits(queued_max=10**9, queued_per_account_max=10**9)
        for begin in range(0, jobs, 500):
            await asyncio.gather(
                *(
                    store.enqueue(
                        NewJob(
                            job=Job(
                                id=JobId(str(uuid.uuid4())), account=Account(f"a{n % 500}"),
                                service=Service.COMFYUI, kind="prompt",
                            ),
                            body=b"x" * 4096,
                        ),
                        limits,
                    )
                    for n in range(begin, min(begin + 500, jobs))
                )
            )  # fmt: skip
        await store.close()
    times: list[float] = []
    memory = 0.0
    for _ in range(3):
        async with gateway(folder, ["comfyui:1"]) as (_, pid, seconds):
            times.append(seconds)
            memory = memory_mib(pid)
    seconds = statistics.median(times)
    print(f"start to ready with {jobs} jobs waiting: {seconds:.2f} s (median of 3), {memory:.0f} MiB")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def memory_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--idle", type=float)
    parser.add_argument("--start", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.idle is not None:
            asyncio.run(measure_idle(folder, options.idle))
        elif options.start is not None:
            asyncio.run(measure_start(folder, options.start))
        else:
            asyncio.run(measure_gaps(folder, options.jobs, options.gpus))


if __name__ == "__main__":
    main()
