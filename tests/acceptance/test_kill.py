"""kill -9 of the installed gateway, work queued and running: each accepted prompt ends exactly once (P2)."""

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.gateway.small_fleet import Fleet, slow, small_fleet, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PROMPTS = 40
KILLS = 4


@contextlib.asynccontextmanager
async def gateway_process(fleet: Fleet, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    settings = fleet.folder / "gpulane.yaml"
    gpus = "".join(
        f"  gpu{n}: {{engines: [{{url: '{g.a1111.server.url}', service: a1111}}, "
        f"{{url: '{g.comfyui.server.url}', service: comfyui}}]}}\n"
        for n, g in enumerate(fleet.gpus)
    )
    settings.write_text(
        f"listen: 127.0.0.1:{port}\ndata: {fleet.folder / 'data'}\nname: box\n"
        f"probe: {{interval_seconds: 0.3, quiet_seconds: 0.3}}\ngpus:\n{gpus}"
    )
    command = str(Path(sys.executable).with_name("gpulane"))
    with (fleet.folder / "gateway.log").open("ab") as log_file:
        process = await asyncio.create_subprocess_exec(
            command, "serve", "-c", str(settings), stdout=asyncio.subprocess.PIPE, stderr=log_file
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            line = await process.stdout.readline()
        log = (fleet.folder / "gateway.log").read_text()
        assert line.decode().startswith("gpulane ready http://"), log
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def submit(http: aiohttp.ClientSession, url: str, prompt_id: str, seed: int) -> None:
    """Submit as a careful client does: the same id again until it is answered."""

    async def is_accepted() -> bool:
        body = {"prompt": slow(steps=10, seed=seed), "client_id": "test", "prompt_id": prompt_id}
        try:
            async with http.post(f"{url}/prompt", json=body) as answer:
                assert answer.status == 200, await answer.text()
                assert (await answer.json())["prompt_id"] == prompt_id
                return True
        except aiohttp.ClientConnectionError:
            return False

    await until(is_accepted)


async def test_every_accepted_prompt_ends_exactly_once(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    ids = [str(uuid.uuid4()) for _ in range(PROMPTS)]
    async with small_fleet(tmp_path, gpus=2) as fleet, aiohttp.ClientSession() as http:
        submitting: asyncio.Future[list[None]] | None = None
        for kill in range(KILLS):
            async with gateway_process(fleet, port) as process:
                if submitting is None:
                    work = asyncio.gather(*(submit(http, url, job, seed) for seed, job in enumerate(ids)))
                    submitting = asyncio.ensure_future(work)
                # At different moments: while prompts come in, with some running, with some ended.
                await asyncio.sleep(0.15 + 0.3 * kill)
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()
        async with gateway_process(fleet, port) as process:
            assert submitting is not None
            await submitting
            histories: dict[str, str] = {}

            async def all_ended() -> bool:
                async with http.get(f"{url}/history") as answer:
                    history = await answer.json()
                histories.update({job: entry["status"]["status_str"] for job, entry in history.items()})
                return set(ids) <= set(histories)

            await until(all_ended, 60)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await process.wait() == 0
    assert histories == dict.fromkeys(ids, "success")
    verdict = fleet.judged()
    assert verdict.is_clean, verdict
    assert fleet.computed() == dict.fromkeys(fleet.computed(), 1), "computed once each"
    assert len(fleet.computed()) == PROMPTS
