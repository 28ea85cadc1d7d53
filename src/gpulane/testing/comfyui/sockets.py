"""The WebSockets of a simulated ComfyUI, with the real one's rules about client ids.

One loop sends everything to everybody in turn, so a client that does not read stalls all others, as it really
does.
"""

import asyncio
import json
import struct
from collections import deque
from typing import Final
from uuid import uuid4

from aiohttp import WSMsgType, web

from gpulane.testing.card import Json
from gpulane.testing.faults import Faults
from gpulane.testing.pictures import preview_jpeg

STALL_POLL_SECONDS: Final = 0.02
MAX_CLIENT_FRAME_BYTES: Final = 4 * 1024**2
MAX_OUTBOX: Final = 1_000_000
"""Messages waiting for a stalled client; the oldest go first."""

Message = tuple[str | bytes, str | None]
"""What to send, and to which client; None is everybody."""


class SocketHub:
    """All open sockets by client id, and the loop that feeds them."""

    def __init__(self, *, faults: Faults, features: Json) -> None:
        self._faults = faults
        self._features = features
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._flags: dict[str, Json] = {}
        self._open: set[web.WebSocketResponse] = set()
        self._outbox: deque[Message] = deque(maxlen=MAX_OUTBOX)
        self._has_mail = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def forget_all(self) -> None:
        """The process is gone, and with it what it knew of its clients."""
        self._sockets.clear()
        self._flags.clear()
        self._open.clear()
        self._outbox.clear()

    async def close_all(self) -> None:
        """Close every socket as a server that goes away."""
        for socket in list(self._open):
            await socket.close(code=1001, message=b"Server shutdown")

    def send(self, event: str, data: Json, client_id: str | None) -> None:
        """Queue an event for one client, or for all."""
        if self._sockets:
            self._post(json.dumps({"type": event, "data": data}), client_id)

    def hears(self, client_id: str | None) -> bool:
        """Whether there is a socket for this client; for None, whether there is any."""
        return bool(self._sockets) if client_id is None else client_id in self._sockets

    def send_text(self, text: str, client_id: str | None) -> None:
        """Queue an event that is JSON already."""
        if self._sockets:
            self._post(text, client_id)

    def send_bytes(self, payload: bytes, client_id: str | None) -> None:
        if self._sockets:
            self._post(payload, client_id)

    def send_preview(
        self, client_id: str | None, node_id: str, prompt_id: str, *, with_metadata: bool
    ) -> None:
        """A preview as a frame of type 4, or of type 1 for those who did not negotiate it."""
        if not self._sockets:
            return
        image, mime = preview_jpeg()
        if with_metadata:
            metadata = json.dumps(
                {
                    "node_id": node_id,
                    "prompt_id": prompt_id,
                    "display_node_id": node_id,
                    "parent_node_id": None,
                    "real_node_id": node_id,
                    "image_type": mime,
                }
            ).encode()
            self.send_bytes(struct.pack(">II", 4, len(metadata)) + metadata + image, client_id)
        else:
            self.send_bytes(struct.pack(">II", 1, 1 if mime == "image/jpeg" else 2) + image, client_id)

    def takes_metadata(self, client_id: str | None) -> bool:
        """Whether this client negotiated previews with metadata. A prompt of nobody is shown as type 1."""
        return client_id is not None and bool(self._flags.get(client_id, {}).get("supports_preview_metadata"))

    def _post(self, payload: str | bytes, client_id: str | None) -> None:
        self._outbox.append((payload, client_id))
        self._has_mail.set()

    async def publish(self) -> None:
        """Send what is queued, one after the other, for ever."""
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            while self._outbox:
                while self._faults.stall_ws:  # noqa: ASYNC110 - a plain switch
                    await asyncio.sleep(STALL_POLL_SECONDS)
                payload, client_id = self._outbox.popleft()
                if self._faults.mute_ws:
                    continue
                if client_id is None:
                    sockets = list(self._sockets.values())
                else:
                    sockets = [self._sockets[client_id]] if client_id in self._sockets else []
                for socket in sockets:
                    await _deliver(socket, payload)

    async def serve(self, request: web.Request, hello: Json, running: Json | None) -> web.WebSocketResponse:
        """Serve one client until it leaves. `running` tells a client that comes back which node is on."""
        socket = web.WebSocketResponse(max_msg_size=MAX_CLIENT_FRAME_BYTES)
        await socket.prepare(request)
        sid = request.query.get("clientId", "") or uuid4().hex
        self._sockets[sid] = socket  # whoever had this id stays open and hears nothing more
        self._flags[sid] = {}
        self._open.add(socket)
        try:
            await _deliver(socket, json.dumps({"type": "status", "data": {**hello, "sid": sid}}))
            if running is not None and running["client_id"] == sid and running["node"] is not None:
                again = {"type": "executing", "data": {"node": running["node"]}}
                await _deliver(socket, json.dumps(again))
            is_first = True
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await self._hear(socket, sid, message.data, is_first=is_first)
                    is_first = False
        finally:
            self._open.discard(socket)
            # As in the original: it takes the id away even from a newer socket of the same client.
            self._sockets.pop(sid, None)
            self._flags.pop(sid, None)
        return socket

    async def _hear(self, socket: web.WebSocketResponse, sid: str, text: str, *, is_first: bool) -> None:
        """Only the first message counts, and only when it is about feature flags."""
        try:
            message: Json = json.loads(text)
        except ValueError:
            return
        if is_first and isinstance(message, dict) and message.get("type") == "feature_flags":  # pyright: ignore[reportUnknownMemberType]
            self._flags[sid] = message.get("data", {})  # pyright: ignore[reportUnknownMemberType]
            await _deliver(socket, json.dumps({"type": "feature_flags", "data": self._features}))


async def _deliver(socket: web.WebSocketResponse, payload: str | bytes) -> None:
    try:
        if isinstance(payload, str):
            await socket.send_str(payload)
        else:
            await socket.send_bytes(payload)
    except (ConnectionError, RuntimeError):
        pass  # it left; its reader notices
