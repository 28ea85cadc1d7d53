"""A gateway that starts its engines itself: real processes, over real sockets, through the API."""

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpulane.config import parse_settings
from gpulane.core.model import EngineState, EngineUrl, GpuState, Service
from gpulane.engine.os_process import mark_of, marked
from gpulane.service import running
from gpulane.testing.judge import judge_files
from tests.integration.gateway.small_fleet import slow, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BRISK = "probe: {interval_seconds: 0.2, timeout_seconds: 2, misses_max: 2, quiet_seconds: 0.2}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(slots=True)
class Scene:
    """A settings file with one engine, and the gateways started over it."""

    folder: Path
    port: int
    listen: int

    @property
    def engine(self) -> EngineUrl:
        return EngineUrl(f"http://127.0.0.1:{self.port}")

    @property
    def card(self) -> Path:
        return self.folder / "card.jsonl"

    def sim(self, *more: str) -> list[str]:
        command = [sys.executable, "-m", "gpulane.testing.process", "comfyui", "--port", str(self.port)]
        return [*command, "--gpu", str(self.card), "--time-scale", "0.02", "--plain-pictures", *more]

    def write(self, engine: str) -> None:
        text = f"listen: 127.0.0.1:{self.listen}\ndata: {self.folder / 'data'}\nname: box\n{BRISK}\n"
        text += f"gpus:\n  gpu0:\n    engines:\n      - {{url: {self.engine}, service: comfyui, {engine}}}\n"
        (self.folder / "gpulane.yaml").write_text(text)

    def marked(self) -> list[int]:
        return list(marked(mark_of(self.folder / "data", self.engine)))

    @contextlib.asynccontextmanager
    async def gateway(self, *, end: signal.Signals = signal.SIGTERM) -> AsyncIterator["Client"]:
        program = str(Path(sys.executable).with_name("gpulane"))
        with (self.folder / "gateway.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                program,
                "serve",
                "-c",
                str(self.folder / "gpulane.yaml"),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(20):
                line = await process.stdout.readline()
            assert line.startswith(b"gpulane ready"), (self.folder / "gateway.log").read_text()
            async with aiohttp.ClientSession(f"http://127.0.0.1:{self.listen}") as http:
                yield Client(http, self.engine)
        finally:
            if process.returncode is None:
                process.send_signal(end)
            async with asyncio.timeout(20):
                await process.wait()


@dataclass(slots=True)
class Client:
    """What an operator and a user do."""

    http: aiohttp.ClientSession
    engine: str

    async def json(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        async with self.http.request(method, path, json=body) as answer:
            return answer.status, await answer.json()

    async def shown(self) -> dict[str, Any]:
        return (await self.json("GET", "/gpulane/v1/engines"))[1]["engines"][0]

    async def restart(self, *, force: bool = False) -> tuple[int, Any]:
        body = {"url": self.engine, "force": force}
        return await self.json("POST", "/gpulane/v1/engines/restart", body)

    async def log(self) -> str:
        async with self.http.get("/gpulane/v1/engines/log", params={"url": self.engine}) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.text()

    async def shows(self, claim: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        async def is_so() -> dict[str, Any] | None:
            found = await self.shown()
            return found if claim(found) else None

        return await until(is_so)

    async def is_ready(self) -> dict[str, Any]:
        return await self.shows(lambda e: e["state"] == "ready" and e["process"]["state"] == "ready")

    async def prompt(self, steps: int) -> str:
        body = {"prompt": slow(steps=steps, seed=time.monotonic_ns() % 10_000), "client_id": "test"}
        status, answer = await self.json("POST", "/prompt", body)
        assert status == 200, answer
        return answer["prompt_id"]

    async def job(self, job: str) -> dict[str, Any]:
        return (await self.json("GET", f"/gpulane/v1/jobs/{job}"))[1]

    async def renders(self, job: str) -> None:
        """Wait until the engine itself has it in hands: the record says `running` before the first byte."""

        async def is_rendered() -> bool:
            async with self.http.get(f"{self.engine}/queue") as answer:
                return job in str((await answer.json())["queue_running"])

        await until(is_rendered)

    def in_state(self, job: str, *states: str) -> Callable[[], Awaitable[bool]]:
        async def is_so() -> bool:
            return (await self.job(job))["state"] in states

        return is_so


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, free_port(), free_port())


async def test_started_ready_killed_and_started_again_restarted_and_stopped_in_the_end(scene: Scene) -> None:
    scene.write(f"command: {shlex.join(scene.sim())!r}, env: {{OUR_TOKEN: verysecret}}")
    async with scene.gateway() as client:
        first = await client.is_ready()
        assert (first["process"]["restarts"], first["can_restart"], first["gpu"]) == (0, True, "box/gpu0")
        assert "sim-engine ready" in await client.log()
        assert "verysecret" not in str(first)

        os.kill(first["process"]["pid"], signal.SIGKILL)
        away = await client.shows(lambda e: e["process"]["state"] == "backing_off")
        assert away["state"] == "lost"
        assert "was ended by SIGKILL; started again after 1 s" in away["why"]
        second = await client.is_ready()
        assert second["process"]["restarts"] == 1
        assert second["process"]["pid"] != first["process"]["pid"]

        job = await client.prompt(steps=60)
        await client.renders(job)
        status, refused = await client.restart()
        assert (status, refused["error"]["code"]) == (409, "engine_in_use")
        status, third = await client.restart(force=True)
        assert (status, third["process"]["restarts"]) == (200, 2)
        await client.is_ready()
        await until(client.in_state(job, "succeeded"))
        attempts = (await client.job(job))["attempts"]
        assert [a["state"] for a in attempts] == ["failed", "finished"], [dict(a) for a in attempts]
    assert scene.marked() == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", scene.port), 1)


async def test_a_killed_gateway_finds_its_engine_and_its_render_again(scene: Scene) -> None:
    scene.write(f"command: {shlex.join(scene.sim())!r}")
    async with scene.gateway(end=signal.SIGKILL) as client:
        pid = (await client.is_ready())["process"]["pid"]
        job = await client.prompt(steps=60)
        await client.renders(job)
    assert scene.marked() == [pid]
    async with scene.gateway() as client:
        found = await client.is_ready()
        assert (found["process"]["pid"], found["process"]["is_adopted"]) == (pid, True)
        await until(client.in_state(job, "succeeded"))
        attempts = (await client.job(job))["attempts"]
        assert [a["state"] for a in attempts] == ["finished"], [dict(a) for a in attempts]
        assert scene.marked() == [pid]
    assert scene.marked() == []
    verdict = judge_files([scene.card])
    assert verdict.is_clean, verdict
    assert list(verdict.computed.values()) == [{job: 1}]


async def test_one_that_never_gets_ready_says_so(scene: Scene) -> None:
    scene.write("command: sleep 100, ready_seconds: 1")
    async with scene.gateway() as client:
        starting = await client.shows(lambda e: e["process"]["state"] == "starting")
        assert starting["state"] == "starting"
        away = await client.shows(lambda e: e["process"]["state"] == "backing_off")
        assert "answered no probe within 1 s (ready_seconds)" in away["process"]["why"]
        assert away["state"] == "lost"
    assert scene.marked() == []


async def test_a_hung_engine_of_somebody_else_is_restarted_by_its_command(scene: Scene) -> None:
    """The script stops the engine by its number and leaves a new one running, as service managers do."""
    script, number = scene.folder / "restart.sh", scene.folder / "engine.pid"
    script.write_text(
        f"kill -9 $(cat {number}); sleep 0.1\nnohup {shlex.join(scene.sim())} &\necho $! > {number}\n"
    )
    engine = await asyncio.create_subprocess_exec(*scene.sim(), stdout=asyncio.subprocess.DEVNULL)
    number.write_text(str(engine.pid))
    scene.write(f"restart: 'sh {script}'")
    try:
        async with scene.gateway() as client:
            before = await client.shows(lambda e: e["state"] == "ready")
            assert (before["process"], before["can_restart"]) == (None, True)
            async with client.http.post(f"{scene.engine}/sim/faults", json={"zombie": True}) as answer:
                assert answer.status == 200
            job = await client.prompt(steps=1)
            await until(client.in_state(job, "running"))
            assert (await client.restart())[1]["error"]["code"] == "engine_in_use"
            status, shown = await client.restart(force=True)
            assert (status, shown["state"]) == (200, "starting")
            await until(client.in_state(job, "succeeded"))
            assert await engine.wait() == -signal.SIGKILL

            script.write_text("echo no such unit >&2; exit 5\n")
            status, refused = await client.restart()
            assert (status, refused["error"]["code"]) == (503, "restart_failed")
            assert "ended with status 5: no such unit" in refused["error"]["message"]
            await client.shows(lambda e: e["state"] == "ready")
    finally:
        for pid in {int(number.read_text()), engine.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await engine.wait()


async def test_stopped_for_a_hand_off_it_is_no_loss_and_comes_back(scene: Scene) -> None:
    scene.write(f"command: {shlex.join(scene.sim())!r}, stop_to_unload: true")
    settings = parse_settings((scene.folder / "gpulane.yaml").read_text())
    async with running(settings) as service:
        gateway, url = service.gateway, scene.engine

        async def is_ready() -> bool:
            return gateway.engines(Service.COMFYUI)[0].state is EngineState.READY

        await until(is_ready)
        await gateway.supervision.stop_for_handoff(url)
        view = gateway.engines(Service.COMFYUI)[0]
        assert (view.state, view.why) == (EngineState.STOPPED, "stopped to free the card")
        assert scene.marked() == []
        assert gateway.gpus()[0].state is GpuState.IDLE, "jobs may be placed on it"
        assert await gateway.supervision.start_again(url)
        assert await gateway.supervision.start_again(url, seconds=0.0), "it runs"
        await until(is_ready)
        assert len(scene.marked()) == 1
    assert scene.marked() == []


async def test_refusals(scene: Scene) -> None:
    engine = await asyncio.create_subprocess_exec(*scene.sim(), stdout=asyncio.subprocess.DEVNULL)
    scene.write("handoff: auto")
    try:
        async with scene.gateway() as client:
            for url, status, code in (
                ("127.0.0.1:1", 404, "no_such_engine"),
                (scene.engine, 409, "cannot_restart"),
                ("nowhere", 400, "bad_query"),
            ):
                answer = await client.json("POST", "/gpulane/v1/engines/restart", {"url": url})
                assert (answer[0], answer[1]["error"]["code"]) == (status, code)
            status, answer = await client.json("GET", f"/gpulane/v1/engines/log?url={scene.engine}")
            assert (status, answer["error"]["code"]) == (404, "no_process")
    finally:
        engine.kill()
        await engine.wait()
