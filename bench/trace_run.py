"""Real requests through the whole of it: production trace -> foreign clients -> gateway -> simulated GPUs.

    python bench/trace_run.py                          520 requests, about 5 minutes; writes docs/trace-run.*
    python bench/trace_run.py --requests 60 --quick    a short one; prints its report and writes nothing

Gateway, engines, clients and the judge are processes of their own; they meet over loopback sockets only. It
ends with 1 when a target is missed. It never repeats a request and never helps a client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import aiohttp
from trace_input import KEPT_TRACE, ROOT, STEP_SECONDS, WHOLE_TRACE, Ask, densest, plan, read_rows
from trace_page import as_markdown
from trace_report import Run, Targets, report

GPUS: Final = 4
VRAM_GIB: Final = 256.0
"""Room for all checkpoints of both services: handing a card over is another matter."""
START_SECONDS_MAX: Final = 60.0
REST_SECONDS_MAX: Final = 300.0
"""What is still waiting so long after the last arrival will not come."""
SAMPLE_SECONDS: Final = 0.1
WATCHER: Final = "watcher"
"""The account that looks at the queue; it sends no jobs."""
PAGE: Final = 500
QUICK_COMPRESSION: Final = 60.0
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")

Process = asyncio.subprocess.Process


@contextlib.asynccontextmanager
async def process(command: Sequence[str], *, log: Path, takes_input: bool = False) -> AsyncIterator[Process]:
    """A child that is ended with the block: in order, and after ten seconds at once."""
    with log.open("ab") as errors:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if takes_input else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=1 << 20,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            async with asyncio.timeout(10):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def first_line(child: Process, log: Path) -> str:
    assert child.stdout is not None
    async with asyncio.timeout(START_SECONDS_MAX):
        line = (await child.stdout.readline()).decode().strip()
    if not line:
        raise SystemExit(f"a process ended before it was ready:\n{log.read_text()[-4000:]}")
    return line


async def start_engines(
    stack: contextlib.AsyncExitStack, folder: Path, arguments: argparse.Namespace, checkpoints: Sequence[str]
) -> list[list[str]]:
    """Two engines on each card; answers their URLs by card."""
    choices = [part for checkpoint in checkpoints for part in ("--checkpoint", checkpoint)]
    children: list[tuple[int, Process, Path]] = []
    for number in range(GPUS):
        for kind in ("a1111", "comfyui"):
            log = folder / f"{kind}{number}.log"
            command = [
                sys.executable, "-m", "gpulane.testing.process", kind, "--plain-pictures",
                "--gpu", str(folder / f"card{number}.jsonl"), "--vram-gib", str(VRAM_GIB),
                "--speed", str(arguments.speed), "--time-scale", str(1 / arguments.compress),
                "--seconds-per-step", str(STEP_SECONDS), *choices,
            ]  # fmt: skip
            children.append((number, await stack.enter_async_context(process(command, log=log)), log))
    urls: list[list[str]] = [[] for _ in range(GPUS)]
    for number, child, log in children:
        urls[number].append((await first_line(child, log)).split()[-1])
    return urls


async def start_gateway(
    stack: contextlib.AsyncExitStack, folder: Path, urls: list[list[str]], keys: dict[str, str]
) -> tuple[str, Process]:
    """The installed `gpulane serve` over these engines; answers its URL."""
    settings = {
        "listen": "127.0.0.1:0",
        "name": "box",
        "data": str(folder / "data"),
        "probe": {"interval_seconds": 1.0},
        "gpus": {f"gpu{number}": {"engines": engines} for number, engines in enumerate(urls)},
        "keys": [
            {
                "account": account,
                "sha256": hashlib.sha256(key.encode()).hexdigest(),
                "role": "operator" if account == WATCHER else "user",
            }
            for account, key in keys.items()
        ],
    }
    (folder / "gpulane.yaml").write_text(json.dumps(settings, indent=1))  # YAML takes JSON as it is
    log = folder / "gateway.log"
    command = [str(Path(sys.executable).with_name("gpulane")), "serve", "-c", str(folder / "gpulane.yaml")]
    child = await stack.enter_async_context(process(command, log=log))
    line = await first_line(child, log)
    if not line.startswith("gpulane ready http://"):
        raise SystemExit(f"the gateway did not start: {line}\n{log.read_text()[-4000:]}")
    return line.split()[-1], child


async def until_engines_are_ready(http: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(START_SECONDS_MAX):
        while True:
            gpus = (await get(http, "/gpulane/v1/gpus"))["gpus"]
            states = [engine["state"] for gpu in gpus for engine in gpu["engines"]]
            if states == ["ready"] * (2 * GPUS):
                return
            await asyncio.sleep(0.1)


async def get(http: aiohttp.ClientSession, path: str) -> Any:  # noqa: ANN401 - our own API, as JSON
    async with http.get(path) as answer:
        answer.raise_for_status()
        return await answer.json()


async def start_clients(
    stack: contextlib.AsyncExitStack, folder: Path, url: str, asks: Sequence[Ask], keys: dict[str, str]
) -> list[Process]:
    """A process for each client library, for comfyapi one for each account; set up when this returns."""
    shares: dict[str, list[Ask]] = {}
    for ask in asks:
        share = f"{ask.client}-{ask.account}" if ask.client == "comfyapi" else ask.client
        shares.setdefault(share, []).append(ask)
    children: list[Process] = []
    for share, own in shares.items():
        command = [sys.executable, str(ROOT / "bench" / "trace_clients.py"), own[0].client]
        child = await stack.enter_async_context(
            process(command, log=folder / f"{share}.log", takes_input=True)
        )
        accounts = sorted({ask.account for ask in own})
        setup = {
            "url": url,
            "keys": {name: keys[name] for name in accounts},
            "asks": [asdict(a) for a in own],
        }
        assert child.stdin is not None
        child.stdin.write(json.dumps(setup).encode() + b"\n")
        await child.stdin.drain()
        children.append(child)
    for child, share in zip(children, shares, strict=True):
        await first_line(child, folder / f"{share}.log")
    return children


async def drive(
    children: Sequence[Process], http: aiohttp.ClientSession, run: Run, seconds_max: float
) -> None:
    """Let the clients go, note what they report and how deep the queue is."""
    begin = time.monotonic() + 0.5
    for child in children:
        assert child.stdin is not None
        child.stdin.write(json.dumps({"begin": begin}).encode() + b"\n")
        child.stdin.close()

    async def read(child: Process) -> None:
        assert child.stdout is not None
        async for line in child.stdout:
            run.outcomes.append(json.loads(line))

    async def sample() -> None:
        while True:
            queue = await get(http, "/gpulane/v1/queue")
            run.depths.append((time.monotonic() - begin, queue["waiting"], queue["running"]))
            await asyncio.sleep(SAMPLE_SECONDS)

    async with asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(sample())
        with contextlib.suppress(TimeoutError):  # whoever has no outcome then is reported as such
            async with asyncio.timeout(seconds_max):
                await asyncio.gather(*(read(child) for child in children))
        sampling.cancel()
    run.seconds = time.monotonic() - begin


async def all_jobs(http: aiohttp.ClientSession) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await get(http, f"/gpulane/v1/jobs?limit={PAGE}{cursor}")
        jobs += page["jobs"]
        if page["next_cursor"] is None:
            return jobs
        cursor = f"&cursor={page['next_cursor']}"


async def judge(folder: Path) -> dict[str, Any]:
    """The judge shares no code with the gateway, and reads nothing but the cards' logs."""
    cards = [str(folder / f"card{number}.jsonl") for number in range(GPUS)]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gpulane.testing.judge",
        "--json",
        "--strict",
        *cards,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await child.communicate()
    return json.loads(out)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


async def carry_out(asks: list[Ask], arguments: argparse.Namespace, folder: Path) -> Run:
    """Start everything, send everything, stop everything, then let the logs be judged."""
    run = Run(asks=asks)
    keys = {account: secrets.token_urlsafe(18) for account in sorted({ask.account for ask in asks})}
    keys[WATCHER] = secrets.token_urlsafe(18)
    async with contextlib.AsyncExitStack() as stack:
        urls = await start_engines(stack, folder, arguments, sorted({ask.checkpoint for ask in asks}))
        async with contextlib.AsyncExitStack() as gateway_stack:
            url, gateway = await start_gateway(gateway_stack, folder, urls, keys)
            headers = {"Authorization": f"Bearer {keys[WATCHER]}"}
            http = await gateway_stack.enter_async_context(aiohttp.ClientSession(url, headers=headers))
            await until_engines_are_ready(http)
            async with contextlib.AsyncExitStack() as client_stack:
                children = await start_clients(client_stack, folder, url, asks, keys)
                before = cpu_seconds(gateway.pid)
                children_before = _children_cpu_seconds()
                await drive(children, http, run, asks[-1].at_seconds + REST_SECONDS_MAX)
                run.gateway_cpu_seconds = cpu_seconds(gateway.pid) - before
            run.clients_cpu_seconds = _children_cpu_seconds() - children_before
            run.jobs = await all_jobs(http)
        run.gateway_exit = gateway.returncode
        run.gateway_log = (folder / "gateway.log").read_text()
        children_before = _children_cpu_seconds()
    run.engines_cpu_seconds = _children_cpu_seconds() - children_before
    run.verdict = await judge(folder)
    run.cards = [
        [json.loads(line) for line in (folder / f"card{number}.jsonl").read_text().splitlines()]
        for number in range(GPUS)
    ]
    return run


def _children_cpu_seconds() -> float:
    """Of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Drives a production trace through the gateway.")
    parser.add_argument("--requests", type=int, default=520, help="consecutive requests of the trace")
    parser.add_argument("--compress", type=float, default=20.0, help="how many times faster than it was")
    parser.add_argument(
        "--speed",
        type=float,
        default=0.7,
        help="of the cards, relative to the trace's: below 1 a queue builds up",
    )
    parser.add_argument(
        "--trace", type=Path, help="default: the whole trace where it is, else the 500 rows kept"
    )
    parser.add_argument(
        "--quick", action="store_true", help="compress 60 times, need no depth, write nothing"
    )
    parser.add_argument("--keep", type=Path, help="a folder for logs and data, instead of a temporary one")
    parser.add_argument("--report", type=Path, help="folder for trace-run.md and .json; default: docs")
    arguments = parser.parse_args(argv)
    arguments.trace = arguments.trace or (WHOLE_TRACE if WHOLE_TRACE.exists() else KEPT_TRACE)
    if arguments.quick:
        arguments.compress = QUICK_COMPRESSION
    elif arguments.report is None:
        arguments.report = ROOT / "docs"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    rows = read_rows(arguments.trace)
    rows = densest(rows, min(arguments.requests, len(rows)))
    asks = plan(rows, arguments.compress)
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trace-")))
        folder.mkdir(parents=True, exist_ok=True)
        run = asyncio.run(carry_out(asks, arguments, folder))
    targets = Targets.quick() if arguments.quick else Targets()
    document = report(run, rows=rows, arguments=arguments, targets=targets)
    text = as_markdown(document)
    print(text)
    if arguments.report is not None:
        (arguments.report / "trace-run.md").write_text(text)
        (arguments.report / "trace-run.json").write_text(json.dumps(document, indent=2) + "\n")
    return 1 if document["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
