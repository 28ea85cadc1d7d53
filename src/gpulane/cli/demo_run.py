"""The demo's parts, all in this process, so that nothing is left behind however it ends: simulated cards and
engines, the real gateway, people who use it, and what is shown of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import aiohttp
import msgspec
from rich.live import Live
from rich.text import Text

from gpulane.cli.demo_people import PEOPLE, live
from gpulane.cli.documents import GpuList, JobList, Queue
from gpulane.cli.output import console, is_terminal, print_lines
from gpulane.cli.overview import PATHS, Snapshot, overview, plain_overview
from gpulane.config import EngineSettings, GpuSettings, ProbeSettings, SchedulingSettings, Settings
from gpulane.config.parse import check_settings, listen_address
from gpulane.service import running
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.judge import Verdict, judge_files
from gpulane.testing.process import make_engine

DRAWN_SECONDS: Final = 0.25
LINE_SECONDS: Final = 1.0
"""Where nobody looks, one plain line is printed so often."""
READY_SECONDS: Final = 15.0
JUDGE_SHARE: Final = 0.05
"""Reading the cards' logs may take this share of the time; the logs grow."""
CARD: Final = CardOptions(
    vram_gib=24.0,
    seconds_per_step=0.16,
    jitter=0.2,
    load_seconds={
        "sd15.safetensors": 1.0,
        "dreamshaper_8.safetensors": 1.2,
        "sd_xl_base_1.0.safetensors": 2.5,
    },
)
BRISK: Final = SchedulingSettings(
    load_seconds_unknown=1.5, service_seconds_unknown=2.0, slack_loads=4.0, slack_cap_seconds_per_gpu=3.0
)
"""People take turns about ten times as fast here as on real cards: nobody watches for minutes."""
Document = TypeVar("Document")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoWishes:
    """What was asked for on the command line."""

    gpus: int
    seconds: float | None
    listen: str
    allow_anonymous: bool
    folder: Path


@dataclass(slots=True, kw_only=True)
class _Judge:
    """What the simulated cards' own logs say; they know nothing of the gateway."""

    files: list[Path]
    verdict: Verdict = field(default_factory=Verdict)
    _next_at: float = 0.0

    def look(self, *, at_once: bool = False) -> Verdict:
        """Judge the logs anew, now and then."""
        began = time.monotonic()
        if at_once or began >= self._next_at:
            self.verdict = judge_files(self.files)
            took = time.monotonic() - began
            self._next_at = began + max(LINE_SECONDS / 2, took / JUDGE_SHARE)
        return self.verdict

    def done(self) -> dict[str, int]:
        """Count jobs computed to a good end, by service."""
        return {service: len(jobs) for service, jobs in sorted(self.verdict.computed.items())}


async def run_demo(wishes: DemoWishes) -> None:
    """Run until the time is over or a signal comes. Raises ConfigError when it cannot start."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    settings = check_settings(
        Settings(listen=wishes.listen, allow_anonymous=wishes.allow_anonymous), source="command line"
    )
    files = [wishes.folder / f"gpu{number}.jsonl" for number in range(wishes.gpus)]
    judge = _Judge(files=files)
    began = time.monotonic()
    async with _engines(files) as urls, running(_with_gpus(settings, urls, wishes.folder)) as service:
        address = _own_address(service.addresses["main"])
        print_lines([("gpulane ready ", ""), (service.addresses["main"], "bold"), *_where(address)])
        async with aiohttp.ClientSession(address) as http:
            await _until_ready(http, stop)
            people = asyncio.create_task(live(address, stop, gpus=wishes.gpus))
            try:
                await _show(http, address, judge, stop, wishes.seconds)
            finally:
                stop.set()
                people.cancel()
                await asyncio.gather(people, return_exceptions=True)
    judge.look(at_once=True)
    print_lines(_summary(judge, wishes.gpus, time.monotonic() - began))


@contextlib.asynccontextmanager
async def _engines(files: list[Path]) -> AsyncIterator[list[tuple[str, str]]]:
    """Start an A1111 and a ComfyUI per card; gives their URLs."""
    async with contextlib.AsyncExitStack() as stack:
        urls: list[tuple[str, str]] = []
        for file in files:
            card = stack.enter_context(Card(file, CARD))
            a1111 = await stack.enter_async_context(make_engine("a1111", card=card))
            comfyui = await stack.enter_async_context(make_engine("comfyui", card=card, previews=True))
            urls.append((a1111.server.url, comfyui.server.url))
        yield urls


def _with_gpus(settings: Settings, urls: list[tuple[str, str]], folder: Path) -> Settings:
    gpus = {
        f"gpu{number}": GpuSettings(
            engines=(
                EngineSettings(url=a1111, service="a1111"),
                EngineSettings(url=comfyui, service="comfyui"),
            ),
            vram_gib=CARD.vram_gib,
        )
        for number, (a1111, comfyui) in enumerate(urls)
    }
    probe = ProbeSettings(interval_seconds=1.0, quiet_seconds=0.2)
    return msgspec.structs.replace(
        settings, gpus=gpus, data=str(folder / "data"), name="demo", probe=probe, scheduling=BRISK
    )


def _own_address(address: str) -> str:
    """Return where this machine itself reaches the listener."""
    host, port = listen_address(address.removeprefix("http://"))
    return f"http://127.0.0.1:{port}" if host in {"0.0.0.0", "::"} else address


async def _until_ready(http: aiohttp.ClientSession, stop: asyncio.Event) -> None:
    """Wait until every engine has been seen, so that the first requests are not refused."""
    ends = time.monotonic() + READY_SECONDS
    while time.monotonic() < ends and not stop.is_set():
        gpus = (await _get(http, GpuList, PATHS[0])).gpus
        if all(engine.state == "ready" for gpu in gpus for engine in gpu.engines):
            return
        await asyncio.sleep(0.05)


async def _show(
    http: aiohttp.ClientSession, address: str, judge: _Judge, stop: asyncio.Event, seconds: float | None
) -> None:
    """Draw, or print a line, again and again."""
    began = time.monotonic()
    ends = None if seconds is None else began + seconds
    draws = is_terminal()
    step = DRAWN_SECONDS if draws else LINE_SECONDS
    with contextlib.ExitStack() as stack:
        picture = stack.enter_context(Live(console=console(), auto_refresh=False)) if draws else None
        while not stop.is_set() and (ends is None or time.monotonic() < ends):
            snapshot = await _snapshot(http)
            judge.look()
            if picture is None:
                _print_line(snapshot, judge, time.monotonic() - began)
            else:
                picture.update(overview(snapshot, _footer(judge, address)), refresh=True)
            left = step if ends is None else min(step, ends - time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(0.0, left))


async def _snapshot(http: aiohttp.ClientSession) -> Snapshot:
    gpus, queue, jobs = await asyncio.gather(
        _get(http, GpuList, PATHS[0]), _get(http, Queue, PATHS[1]), _get(http, JobList, PATHS[2])
    )
    names = {person.address: person.name for person in PEOPLE}
    return Snapshot(gpus=gpus.gpus, queue=queue, jobs=jobs.jobs, names=names)


async def _get(http: aiohttp.ClientSession, kind: type[Document], path: str) -> Document:
    async with http.get(path) as answer:
        return msgspec.json.decode(await answer.read(), type=kind)


def _where(address: str) -> list[tuple[str, str]]:
    return [("   page ", "dim"), (f"{address}/gpulane/", "underline"), ("   Ctrl-C ends", "dim")]


def _footer(judge: _Judge, address: str) -> Text:
    done = judge.done()
    overlaps = len(judge.verdict.overlaps)
    return Text.assemble(
        ("done  ", "bold"),
        "   ".join(f"{service} {count}" for service, count in done.items()) or "nothing yet",
        ("    overlaps  ", "bold"),
        (str(overlaps), "green" if overlaps == 0 else "bold red"),
        ("    page  ", "bold"),
        (f"{address}/gpulane/", "underline"),
        "    Ctrl-C ends",
    )


def _print_line(snapshot: Snapshot, judge: _Judge, seconds: float) -> None:
    done = sum(judge.done().values())
    overlaps = len(judge.verdict.overlaps)
    print(f"{seconds:4.0f} s | {plain_overview(snapshot)} | done {done} | overlaps {overlaps}", flush=True)


def _summary(judge: _Judge, gpus: int, seconds: float) -> list[tuple[str, str]]:
    done, overlaps = judge.done(), len(judge.verdict.overlaps)
    services = ", ".join(f"{service} {count}" for service, count in done.items())
    return [
        (f"{sum(done.values())} jobs done", "bold"),
        (f" ({services})" if services else "", ""),
        (f" on {gpus} simulated GPU{'s' * (gpus != 1)} in {seconds:.0f} s; overlaps ", ""),
        (str(overlaps), "green" if overlaps == 0 else "bold red"),
    ]
