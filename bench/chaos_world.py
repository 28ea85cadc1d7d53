"""The cards, the engines and the gateway of a chaos run, and what is known of them from outside.

Everything is in one process and talks over real sockets. The cards have too little memory for two models, so
nearly every change of service is a hand-off. Strangers' work stands in the cards' logs like everybody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp

from gpulane.config import parse_settings
from gpulane.service import running
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions, CardUse
from gpulane.testing.comfyui import SimComfyUI
from gpulane.testing.http_engine import SimHttpEngine

CHECKPOINT: Final = "sd15.safetensors"
LLM: Final = "tiny-llm"
ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
OPTIONS: Final = CardOptions(
    vram_gib=12.0,
    time_scale=0.1,
    model_gib={CHECKPOINT: 7.0, LLM: 6.0},
    load_seconds={CHECKPOINT: 0.3, LLM: 0.3},
    seconds_per_step=0.4,
    unload_seconds=0.2,
)
START_SECONDS: Final = 30.0
SETTINGS: Final = """
listen: 127.0.0.1:0
name: box
probe:
  {interval_seconds: 0.3, timeout_seconds: 1, misses_max: 2, quiet_seconds: 0.2, canary_after_seconds: 0.6}
retry: {rest_seconds: 0.05, rest_seconds_max: 0.5, attempts_max: 5}
hold: {rejoin_seconds: 1}
handoff: {unload_seconds: 0.6, acknowledge_seconds: 0.3}
health: {hung_seconds_min: 1.5, hung_interrupt_seconds: 0.5, pause_seconds: 0.3, pause_seconds_max: 1}
log: {level: error}
"""

Found = TypeVar("Found")
Sim = SimA1111 | SimComfyUI | SimHttpEngine


@dataclass(slots=True, kw_only=True)
class Box:
    """One simulated card and its three engines."""

    name: str
    card: Card
    a1111: SimA1111
    comfyui: SimComfyUI
    llm: SimHttpEngine

    @property
    def engines(self) -> tuple[SimA1111, SimComfyUI, SimHttpEngine]:
        return (self.a1111, self.comfyui, self.llm)

    def struck(self, fault: str) -> int:
        return sum(engine.faults.struck[fault] for engine in self.engines)


@dataclass(slots=True, kw_only=True)
class World:
    """Everything of one run."""

    folder: Path
    http: aiohttp.ClientSession
    boxes: list[Box] = field(default_factory=list[Box])
    url: str = ""
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """The gateway answers, and has found again what ran before."""
    held: int = 0
    """Lock files that somebody else has: the gateway is not restarted then, for it could not see jobs of its
    last life that go on without their lock."""
    fired: Counter[str] = field(default_factory=Counter[str])
    """Faults that struck with work in flight."""
    accepted: set[str] = field(default_factory=set[str])
    strangers: set[str] = field(default_factory=set[str])
    """Jobs that were given to an engine directly."""
    _gateway: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    # -- the gateway

    async def start(self) -> None:
        lines = [SETTINGS, f"data: {self.folder / 'data'}", f"lock_dir: {self.folder / 'locks'}", "gpus:"]
        for box in self.boxes:
            llm = f"{{url: '{box.llm.url}', service: http, name: llm, probe_path: /health, unload: ollama}}"
            urls = f"'a1111:{box.a1111.url}', 'comfyui:{box.comfyui.url}', {llm}"
            lines.append(f"  {box.name}: {{engines: [{urls}]}}")
        service = await self._gateway.enter_async_context(running(parse_settings("\n".join(lines))))
        self.url = service.addresses["main"]
        await until(self._is_up, START_SECONDS)
        self.up.set()

    async def stop(self) -> None:
        """As a second Ctrl-C does: at once, whatever is under way."""
        self.up.clear()
        await self._gateway.aclose()

    async def _is_up(self) -> bool:
        async with self.http.get(f"{self.url}/gpulane/v1/gpus") as answer:
            return answer.status == 200

    # -- what it says

    async def get(self, path: str) -> Any:  # noqa: ANN401  foreign data here
        await self.up.wait()
        async with self.http.get(self.url + path) as answer:
            return await answer.json()

    async def gpus(self) -> dict[str, Any]:
        return {gpu["name"]: gpu for gpu in (await self.get("/gpulane/v1/gpus"))["gpus"]}

    async def job_on(self, box: Box) -> str | None:
        """The job that the gateway has on this card now."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            return (await self.gpus())[box.name]["job"]
        return None

    async def post(self, path: str, body: object = None) -> tuple[int, Any]:
        await self.up.wait()
        async with self.http.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def states(self) -> dict[str, tuple[str, str]]:
        """(state, service) of every job that the gateway knows."""
        found: dict[str, tuple[str, str]] = {}
        cursor = ""
        while True:
            page = await self.get(f"/gpulane/v1/jobs?limit=100{cursor}")
            found |= {job["id"]: (job["state"], job["service"]) for job in page["jobs"]}
            if not page.get("next_cursor"):
                return found
            cursor = f"&cursor={page['next_cursor']}"

    # -- strangers with the lock file

    @contextlib.contextmanager
    def flocked(self, box: Box, job: str) -> Iterator[bool]:
        """Try to hold the card's lock file; what is done with it stands in the card's log."""
        file = os.open(self.folder / "locks" / f"{box.name}.lock", os.O_RDWR)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self.held += 1
            use = CardUse(card=box.card, engine="stranger", service="lock")
            interval = use.begin("compute", job, None)
            try:
                yield True
            finally:
                use.end(interval)
                self.held -= 1
        finally:
            os.close(file)


async def until(claim: Callable[[], Awaitable[Found]], seconds: float, every: float = 0.02) -> Found | None:
    """Ask until the answer is true; answers what it last was."""
    ends = time.monotonic() + seconds
    while True:
        found: Found | None = None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            found = await claim()
        if found or time.monotonic() > ends:
            return found
        await asyncio.sleep(every)


@contextlib.asynccontextmanager
async def world(folder: Path, cards: int) -> AsyncIterator[World]:
    """Start cards, engines and the gateway."""
    (folder / "locks").mkdir(mode=0o700)
    async with contextlib.AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=120)
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout, connector=connector))
        made = World(folder=folder, http=http)
        for number in range(cards):
            card = stack.enter_context(Card(folder / f"card{number}.jsonl", OPTIONS))
            a1111 = SimA1111(card=card, checkpoints=[CHECKPOINT], plain_pictures=True, skip_load=True)
            comfyui = SimComfyUI(card=card, checkpoints=[CHECKPOINT], plain_pictures=True)
            llm = SimHttpEngine(card=card, models=[LLM], flavor="ollama")
            for engine in (a1111, comfyui, llm):
                await stack.enter_async_context(engine)
            made.boxes.append(Box(name=f"gpu{number}", card=card, a1111=a1111, comfyui=comfyui, llm=llm))
        await made.start()
        stack.push_async_callback(made.stop)
        yield made
