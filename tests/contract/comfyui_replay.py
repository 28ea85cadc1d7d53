"""Replays recorded ComfyUI exchanges against a simulated one."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import aiohttp

from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import SimComfyUI
from tests.contract.recordings import Json, differences, label, recording, renamed

PATIENCE_SECONDS = 20.0


class Listener:
    """A WebSocket client that keeps what it hears, in the shape of the recordings."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.messages: list[Json] = []
        self._news = asyncio.Event()

    async def listen(self) -> None:
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.messages.append({"text": json.loads(message.data)})
            elif message.type is aiohttp.WSMsgType.BINARY:
                self.messages.append({"binary": parsed(message.data)})
            self._news.set()

    async def until(self, what: str | Callable[[list[Json]], bool]) -> None:
        """Wait for a message with this label, or for a condition on all that came."""

        def is_there() -> bool:
            if callable(what):
                return what(self.messages)
            return any(label(message) == what for message in self.messages)

        async with asyncio.timeout(PATIENCE_SECONDS):
            while not is_there():
                self._news.clear()
                await self._news.wait()

    def count(self, what: str) -> int:
        return sum(label(message) == what for message in self.messages)


def uncut(body: Json) -> Json:
    """A body as it was; None when the recorder cut it off (it put `...` behind a text in any case)."""
    if not isinstance(body, str) or not body.endswith("..."):
        return body
    try:
        return json.loads(body.removesuffix("..."))
    except ValueError:
        return None


def parsed(frame: bytes) -> Json:
    """A binary frame as the recordings describe it."""
    kind = struct.unpack(">I", frame[:4])[0]
    described: dict[str, Json] = {"bytes": len(frame), "type": kind}
    if kind == 4:
        length = struct.unpack(">I", frame[4:8])[0]
        described |= {"metadata_len": length, "metadata": json.loads(frame[8 : 8 + length])}
    return described


class Replay:
    """One simulated ComfyUI and the recording that it is held to."""

    def __init__(self, name: str, version: str, engine: SimComfyUI, session: aiohttp.ClientSession) -> None:
        self.data: Json = recording(f"comfyui/{version}/{name}")
        self.http: list[Json] = [entry for entry in self.data["http"] if "request" in entry]
        for entry in self.http:
            entry["body"] = uncut(entry["body"])
        self.engine = engine
        self.session = session
        self.names: dict[str, str] = {}
        """Recorded prompt ids and ours."""
        self._group = asyncio.TaskGroup()
        self._listeners: list[Listener] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in self._listeners:
            await listener.socket.close()
        await self._group.__aexit__(kind, error, trace)

    async def connect(self, client_id: str, *, flags: bool = False) -> Listener:
        socket = await self.session.ws_connect(f"/ws?clientId={client_id}" if client_id else "/ws")
        listener = Listener(socket)
        self._listeners.append(listener)
        self._group.create_task(listener.listen())
        await listener.until(bool)
        if flags:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            await listener.until("feature_flags")
        return listener

    async def send(self, entry: Json) -> Json:
        """Send a recorded request and compare the answer; answers our body."""
        status, body = await self.ask(entry["request"])
        where = f"{entry['request']['method']} {entry['request']['path']}"
        assert status == entry["status"], f"{where}: {entry['status']} became {status} {str(body)[:300]}"
        real = entry["body"]
        if entry["request"]["path"].endswith("/prompt") and status == 200 and "prompt_id" in real:
            self.names[real["prompt_id"]] = body["prompt_id"]
        if real is None:
            return body
        if "_raw" in real:
            if "text/plain" in entry["headers"].get("Content-Type", ""):
                assert real["_raw"] == body, where
            return body
        found = differences(renamed(real, self.names), body)
        assert found == [], f"{where}: {found}"
        return body

    async def ask(self, request: Json) -> tuple[int, Json]:
        """Send a recorded request as it was."""
        options: dict[str, Json] = {"headers": request.get("headers") or {}}
        if request.get("data") is not None:
            options["data"] = request["data"].encode()
        elif request["json"] is not None:
            options["json"] = renamed(request["json"], self.names)
        path = renamed(request["path"], self.names)
        async with self.session.request(request["method"], path, **options) as answer:
            body = await answer.read()
            if "json" in answer.content_type:
                return answer.status, json.loads(body)
            return answer.status, body.decode("utf-8", "replace")


@asynccontextmanager
async def replaying(name: str, version: str, *, time_scale: float = 0.02) -> AsyncIterator[Replay]:
    card = Card(options=CardOptions(time_scale=time_scale))
    async with (
        SimComfyUI(card=card, version=version, test_node_prefix="GW", previews=True) as engine,
        aiohttp.ClientSession(engine.url) as session,
        Replay(name, version, engine, session) as replay,
    ):
        yield replay
