"""What the flows stand on: clients with accounts of their own, the gateway's process, and bounded waiting."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.drive.workload import Pictures, Workflows

UNTIL_SECONDS = 60.0
READY_SECONDS = 30.0
POLL_SECONDS = 0.05
STOP_SECONDS = 20.0
ENDED = frozenset({"succeeded", "failed", "cancelled"})


class Skipped(Exception):
    """A flow cannot be run here; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise AssertionError(f"no JSON ({self.status}): {self.body[:200]!r}") from error

    def ok(self) -> Self:
        assert self.status == 200, f"{self.status}: {self.body[:500].decode(errors='replace')}"
        return self


class Client:
    """Somebody who speaks HTTP: to the gateway, or to an engine directly."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url

    async def get(self, path: str, **query: str) -> Answer:
        async with self.http.get(self.url + path, params=query or None) as answer:
            return Answer(status=answer.status, headers=answer.headers, body=await answer.read())

    async def post(self, path: str, body: object = None, *, data: Any = None) -> Answer:
        async with self.http.post(self.url + path, json=body if data is None else None, data=data) as answer:
            return Answer(status=answer.status, headers=answer.headers, body=await answer.read())

    async def prompt(self, workflow: object, **more: object) -> str:
        answer = await self.post("/prompt", {"prompt": workflow, "client_id": "drive", **more})
        return answer.ok().json["prompt_id"]

    async def job(self, job: str) -> Any:
        return (await self.get(f"/gpulane/v1/jobs/{job}")).ok().json

    async def job_of(self, prompt_id: str) -> Any:
        """The native document of a prompt, whose id there may be another one."""
        answer = await self.get(f"/gpulane/v1/jobs/{prompt_id}")
        return answer.ok().json

    async def ended(self, job: str, seconds: float = UNTIL_SECONDS) -> Any:
        async def is_over() -> Any:
            found = await self.job(job)
            return found if found["state"] in ENDED else None

        return await until(is_over, seconds)

    async def succeeded(self, job: str, seconds: float = UNTIL_SECONDS) -> Any:
        found = await self.ended(job, seconds)
        assert found["state"] == "succeeded", f"{found['state']}: {found['error']}"
        return found

    async def started(self, job: str) -> Any:
        async def is_running() -> Any:
            found = await self.job(job)
            assert found["state"] not in ENDED, f"ended already: {found['state']} {found['error']}"
            return found if found["state"] == "running" else None

        return await until(is_running)


@dataclass(slots=True, kw_only=True)
class Gateway:
    """`gpulane serve` as a process of its own, which may be killed and started again."""

    settings: Path
    url: str
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> float:
        """Start it; the seconds until it said that it is ready."""
        began = time.monotonic()
        with self.log.open("ab") as log_file:
            self.process = await asyncio.create_subprocess_exec(
                program(), "serve", "-c", str(self.settings), stdout=asyncio.subprocess.PIPE, stderr=log_file
            )
        assert self.process.stdout is not None
        async with asyncio.timeout(READY_SECONDS):
            line = await self.process.stdout.readline()
        assert line.startswith(b"gpulane ready http://"), self.log.read_text()[-2000:]
        return time.monotonic() - began

    @property
    def log(self) -> Path:
        return self.settings.with_name("gateway.log")

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def stop(self) -> int:
        """End it in order; its exit status."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self.process.wait()
        await self.kill()
        return await self.process.wait()


@dataclass(slots=True, kw_only=True)
class Ground:
    """All that a flow may use."""

    folder: Path
    gateway: Gateway
    alice: Client
    bob: Client
    """Another account: without keys an account is an address."""
    comfyui: list[Client]
    """The engines, asked directly."""
    a1111: list[Client]
    workflows: Workflows
    pictures: Pictures
    notes: list[str] = field(default_factory=list[str])

    async def gpus(self) -> list[Any]:
        return (await self.alice.get("/gpulane/v1/gpus")).ok().json["gpus"]

    async def engine_of(self, job: Any) -> Client:
        """The engine that ran a job, to be asked directly."""
        return next(client for client in (*self.comfyui, *self.a1111) if client.url == job["engine"])

    async def is_quiet(self) -> bool:
        async def jobs(state: str) -> list[Any]:
            return (await self.alice.get("/gpulane/v1/jobs", state=state, limit="1")).ok().json["jobs"]

        states = [gpu["state"] for gpu in await self.gpus()]
        return not await jobs("queued") and not await jobs("running") and set(states) == {"idle"}

    async def are_engines_ready(self) -> bool:
        engines = [engine for gpu in await self.gpus() for engine in gpu["engines"]]
        return len(engines) == len(self.comfyui) + len(self.a1111) and all(
            engine["state"] == "ready" for engine in engines
        )

    def shared_gpu(self) -> int:
        """The first GPU with an engine of each kind."""
        if not self.comfyui or not self.a1111:
            raise Skipped("no GPU with a ComfyUI and an A1111")
        return 0


async def until(claim: Callable[[], Awaitable[Any]], seconds: float = UNTIL_SECONDS) -> Any:
    """Ask until the answer is true."""
    ends = time.monotonic() + seconds
    while True:
        found = await claim()
        if found:
            return found
        assert time.monotonic() < ends, f"not within {seconds:g} s: {getattr(claim, '__qualname__', claim)}"
        await asyncio.sleep(POLL_SECONDS)


@contextlib.asynccontextmanager
async def ground(folder: Path, comfyui: list[str], a1111: list[str], pace: float) -> AsyncIterator[Ground]:
    """Measure the engines, start a gateway over them, and stop it at the end."""
    port = free_port()
    settings = folder / "gpulane.yaml"
    settings.write_text(settings_text(folder, port, comfyui, a1111))
    gateway = Gateway(settings=settings, url=f"http://127.0.0.1:{port}")
    async with contextlib.AsyncExitStack() as stack:

        async def session(address: str | None = None) -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=0, local_addr=(address, 0) if address else None)
            limits = aiohttp.ClientTimeout(total=300, sock_connect=10)
            return await stack.enter_async_context(
                aiohttp.ClientSession(connector=connector, timeout=limits, max_field_size=65536)
            )

        direct = await session()
        engines = [Client(direct, url) for url in comfyui]
        painters = [Client(direct, url) for url in a1111]
        made = Ground(
            folder=folder,
            gateway=gateway,
            alice=Client(await session("127.0.0.1"), gateway.url),
            bob=Client(await session("127.0.0.2"), gateway.url),
            comfyui=engines,
            a1111=painters,
            workflows=await Workflows.measured(engines, pace),
            pictures=await Pictures.measured(painters, pace),
        )
        try:
            await gateway.start()
            await until(made.are_engines_ready)
            yield made
        finally:
            await gateway.kill()


def settings_text(folder: Path, port: int, comfyui: list[str], a1111: list[str]) -> str:
    """The first of each share a GPU, and so on; no kind is named, so that it has to be found."""
    lines = [f"listen: 127.0.0.1:{port}", "name: drive", f"data: {json.dumps(str(folder / 'data'))}", "gpus:"]
    for number in range(max(len(comfyui), len(a1111))):
        engines = [*a1111[number : number + 1], *comfyui[number : number + 1]]
        lines.append(f"  gpu{number}: {{engines: {json.dumps(engines)}}}")
    return "\n".join(lines) + "\n"


def program() -> str:
    """The installed command of this environment."""
    return str(Path(sys.executable).with_name("gpulane"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
