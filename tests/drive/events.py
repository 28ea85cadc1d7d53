"""A ComfyUI client's event socket that keeps all it hears."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.drive.ground import Client

LAST_SECONDS = 60.0


@dataclass(slots=True)
class Heard:
    """Messages in the order in which they came."""

    messages: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    previews: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, prompt_id: str) -> list[str]:
        """The kinds of the messages about one prompt, `end` for the last `executing`."""
        return [
            "end" if kind == "executing" and data.get("node") is None else kind
            for kind, data in self.messages
            if data.get("prompt_id") == prompt_id
        ]

    async def end_of(self, prompt_id: str) -> list[str]:
        async with asyncio.timeout(LAST_SECONDS):
            while "end" not in (kinds := self.of(prompt_id)):
                self.news.clear()
                await self.news.wait()
        return kinds


@contextlib.asynccontextmanager
async def listening(client: Client, client_id: str) -> AsyncIterator[Heard]:
    heard = Heard()
    url = f"{client.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
    async with client.http.ws_connect(url, max_msg_size=0) as socket, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read(socket, heard))
        try:
            yield heard
        finally:
            reading.cancel()


async def read(socket: aiohttp.ClientWebSocketResponse, heard: Heard) -> None:
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            told = json.loads(message.data)
            heard.messages.append((told["type"], told.get("data") or {}))
        elif message.type is aiohttp.WSMsgType.BINARY:
            heard.previews += 1
        heard.news.set()
