"""Several `http` engines of one NAME behind the whole gateway: the first that is free takes the next job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gpulane.config import parse_settings
from gpulane.service import running
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.http_engine import SimHttpEngine
from tests.integration.gateway.small_fleet import BRISK, Client, until

pytestmark = pytest.mark.anyio

LONG_TOKENS = 60
OPTIONS = CardOptions(load_seconds={"tiny-llm": 0.01})


@contextlib.asynccontextmanager
async def serving(folder: Path, names: tuple[str, ...]) -> AsyncIterator[tuple[Client, list[SimHttpEngine]]]:
    """Start a gateway over one engine on a card of its own per name."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(SimHttpEngine(card=Card(options=OPTIONS))) for _ in names]
        lines = [f"data: {folder / 'data'}", "listen: 127.0.0.1:0", "name: box", BRISK, "gpus:"]
        for number, (name, engine) in enumerate(zip(names, engines, strict=True)):
            about = f"{{url: '{engine.url}', service: http, name: {name}, probe_path: /health}}"
            lines.append(f"  gpu{number}: {{engines: [{about}]}}")
        service = await stack.enter_async_context(running(parse_settings("\n".join(lines))))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        client = Client(service, http, service.addresses["main"])

        async def is_ready() -> bool:
            return await client.engines_ready() == len(names)

        await until(is_ready)
        yield client, engines


async def chat(client: Client, name: str, tokens: int = 1) -> int:
    body: dict[str, object] = {"model": "tiny-llm", "messages": [], "max_tokens": tokens}
    status, _ = await client.post(f"/svc/{name}/v1/chat/completions", body)
    return status


async def test_jobs_of_one_name_go_to_whichever_engine_is_free_first(tmp_path: Path) -> None:
    async with serving(tmp_path, ("llm", "llm")) as (client, engines), asyncio.TaskGroup() as tasks:
        long = tasks.create_task(chat(client, "llm", LONG_TOKENS))

        async def is_busy() -> bool:
            return any(engine.sim_state()["running"] for engine in engines)

        await until(is_busy)
        other = next(engine for engine in engines if not engine.sim_state()["running"])
        assert await asyncio.gather(*(chat(client, "llm") for _ in range(6))) == [200] * 6
        assert other.runs == 6 and not long.done()
        assert await long == 200


async def test_jobs_stay_with_their_name(tmp_path: Path) -> None:
    async with serving(tmp_path, ("llm", "tts")) as (client, engines):
        assert await asyncio.gather(*(chat(client, "tts") for _ in range(4))) == [200] * 4
        assert [engine.runs for engine in engines] == [0, 4]


async def test_jobs_of_a_lost_engine_go_to_the_other_one_of_that_name(tmp_path: Path) -> None:
    async with serving(tmp_path, ("llm", "llm")) as (client, engines):
        await engines[0].server.stop()

        async def is_lost() -> bool:
            return await client.engines_ready() == 1

        await until(is_lost)
        assert await asyncio.gather(*(chat(client, "llm") for _ in range(3))) == [200] * 3
        assert engines[1].runs == 3
