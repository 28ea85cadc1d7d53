"""How fast the embedded store is: durable job cycles, a claim at any depth of the queue, opening a full
store.

    python bench/store.py [--jobs 20000] [--callers 64] [--depths 1000 100000] [--open 100000] [--save FILE]

Prints a table with medians and the load of the machine; writes nothing unless --save.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from gpulane.core.model import Account, ClaimId, EngineUrl, GpuId, Job, JobId, JobState, NodeId, Service
from gpulane.store.base import ClaimCandidate, ClaimRequest, Code, NewJob, QueueLimits, Reply
from gpulane.store.sqlite import SqliteStore

NODE = NodeId("bench")
ENGINE = EngineUrl("http://127.0.0.1:8188")
LIMITS = QueueLimits(queued_max=10_000_000, queued_per_account_max=10_000_000)
META = b'{"client_id":"c0ffee","endpoint":"prompt"}'
BODY = os.urandom(4096)
ROUNDS = 3


def new(number: int, body: bytes = BODY) -> NewJob:
    job = Job(
        id=JobId(f"{number * 2654435761 % 2**32:08x}-0000-4000-8000-{number:012d}"),
        account=Account(f"account-{number % 40}"),
        service=Service.COMFYUI,
        kind="prompt",
        signature="0123456789abcdef",
        needs=frozenset(
            {"node:KSampler", f"CheckpointLoaderSimple.ckpt_name=model-{number % 30}.safetensors"}
        ),
    )
    return NewJob(job=job, meta=META, body=body, digest=f"{number:064x}")


def claim(gpu: GpuId, number: int, job: JobId) -> ClaimRequest:
    return ClaimRequest(
        node=NODE,
        boot=1,
        gpu=gpu,
        claim=ClaimId(f"{number:016x}"),
        lease_seconds=30.0,
        candidates=(ClaimCandidate(job=job, engine=ENGINE, charge_seconds=5.0),),
    )


async def opened(folder: Path, gpus: int) -> SqliteStore:
    store = SqliteStore(folder, time.time)
    await store.open()
    await store.register(NODE, 1, tuple((gpu_id(i), f"uuid-{i}") for i in range(gpus)), "bench")
    return store


def gpu_id(number: int) -> GpuId:
    return GpuId(f"bench/gpu{number}")


def expect(reply: Reply) -> Reply:
    assert reply.code is Code.OK, reply
    return reply


async def cycle(store: SqliteStore, gpu: GpuId, number: int) -> None:
    job = new(number)
    expect(await store.enqueue(job, LIMITS))
    token = expect(await store.claim(claim(gpu, number, job.job.id))).token
    assert token is not None
    expect(await store.start(job.job.id, token))
    expect(
        await store.finish(
            job.job.id, token, state=JobState.SUCCEEDED, failure=None, used_seconds=4.0, result=b"{}" * 180
        )
    )


async def cycles(folder: Path, jobs: int, callers: int) -> float:
    """Returns whole jobs per second."""
    store = await opened(folder, callers)
    each = jobs // callers

    async def caller(number: int) -> None:
        for i in range(each):
            await cycle(store, gpu_id(number), number * each + i)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(caller(number))
    took = time.perf_counter() - began
    await store.close()
    return each * callers / took


async def fill(store: SqliteStore, jobs: int) -> None:
    body = BODY if jobs <= 100_000 else b"{}"  # a claim does not look at it
    for start in range(0, jobs, 256):
        numbers = range(start, min(start + 256, jobs))
        await asyncio.gather(*(store.enqueue(new(number, body), LIMITS) for number in numbers))


async def claim_cost(folder: Path, depth: int, claims: int = 64) -> tuple[float, float]:
    """Returns microseconds per claim: of the transition and its rows alone, and of 64 durable ones
    together."""
    store = await opened(folder, claims)
    await fill(store, depth)
    picked = [new(i * (depth // claims)).job.id for i in range(claims)]
    durable: list[float] = []
    for round_number in range(ROUNDS):
        began = time.perf_counter()
        replies = await asyncio.gather(
            *(store.claim(claim(gpu_id(i), round_number * claims + i, job)) for i, job in enumerate(picked))
        )
        durable.append((time.perf_counter() - began) / claims * 1e6)
        for job, reply in zip(picked, replies, strict=True):
            assert reply.token is not None
            await store.release(job, reply.token, "bench")
    one: list[float] = []
    for i, job in enumerate(picked):
        began = time.perf_counter()
        reply = expect(await store.claim(claim(gpu_id(0), 10_000 + i, job)))
        one.append((time.perf_counter() - began) * 1e6)
        assert reply.token is not None
        await store.release(job, reply.token, "bench")
    await store.close()
    return statistics.median(durable), statistics.median(one)


async def opening(folder: Path, waiting: int) -> tuple[float, float]:
    """Returns seconds to open with its snapshot, and KiB of memory per waiting job."""
    if not (folder / "queue.db").exists():
        store = await opened(folder, 1)
        await fill(store, waiting)
        await store.close()
    code = (
        "import asyncio,sys,time,pathlib\n"
        "from gpulane.store.sqlite import SqliteStore\n"
        "def rss():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "async def main():\n"
        "    store = SqliteStore(pathlib.Path(sys.argv[1]), time.time)\n"
        "    before, began = rss(), time.perf_counter()\n"
        "    await store.open()\n"
        "    snapshot = await store.snapshot()\n"
        "    took = time.perf_counter() - began\n"
        "    print(took, (rss() - before) / max(1, len(snapshot.waiting)) / 1024)\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(folder), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    took, kib = out.split()
    return float(took), float(kib)


async def measure(options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    root = Path(tempfile.mkdtemp(prefix="gpulane-bench-", dir=options.folder))
    try:
        rates: list[float] = []
        for number in range(ROUNDS):
            rates.append(await cycles(root / f"cycles{number}", options.jobs, options.callers))
        figures[f"jobs/s: enqueue+claim+start+finish, {options.callers} callers"] = statistics.median(rates)
        for depth in options.depths:
            together, alone = await claim_cost(root / f"depth{depth}", depth)
            figures[f"us per claim, 64 together, {depth} waiting"] = together
            figures[f"us per claim, one after the other, {depth} waiting"] = alone
        if options.open:
            opened_at = [await opening(root / f"open{options.open}", options.open) for _ in range(ROUNDS)]
            figures[f"s to open with {options.open} waiting"] = statistics.median(s for s, _ in opened_at)
            figures[f"KiB of memory per waiting job of {options.open}"] = opened_at[0][1]
    finally:
        shutil.rmtree(root)
    figures["load average, 1 min"] = os.getloadavg()[0]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the embedded store.")
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="*", default=[1_000, 100_000])
    parser.add_argument("--open", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--save", type=Path, default=None, help="write the figures as JSON")
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    if options.uvloop:
        import uvloop

        figures = uvloop.run(measure(options))
    else:
        figures = asyncio.run(measure(options))
    for name, value in figures.items():
        print(f"{value:12.2f}  {name}")
    if options.save:
        options.save.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))


if __name__ == "__main__":
    main()
