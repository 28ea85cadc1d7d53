"""One client's WebSocket: it reads feature flags, writes what its outbox holds, and is never waited for.

No pings are sent: ComfyUI sends none, and scripts that read only now and then would be cut off by them. No
compression either, since previews are JPEGs already.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from gpulane.core.model import Account
from gpulane.web.comfyui import frames
from gpulane.web.comfyui.outbox import Letter, Outbox, Worth

CLIENT_FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
"""ComfyUI's own limit; a larger frame closes the socket with 1009."""
CLOSE_SECONDS: Final = 2.0
"""How long a client may take to answer our close."""


class _Flags(msgspec.Struct):
    supports_preview_metadata: object = False


class _ClientMessage(msgspec.Struct):
    type: str = ""
    data: msgspec.Raw = msgspec.Raw(b"{}")


class ClientSocket:
    """One open socket of an account, under a client id."""

    def __init__(self, *, account: Account, client_id: str, features: bytes) -> None:
        self.account = account
        self.client_id = client_id
        self.takes_metadata = False
        """It negotiated previews with metadata (type 4)."""
        self._features = features
        self._outbox = Outbox()
        self._has_mail = asyncio.Event()
        self._is_over = False
        self._response = web.WebSocketResponse(
            max_msg_size=CLIENT_FRAME_BYTES_MAX, compress=False, timeout=CLOSE_SECONDS
        )
        self._transport: asyncio.Transport | None = None

    async def open(self, request: web.Request) -> None:
        """Answer the upgrade; what is sent before waits."""
        await self._response.prepare(request)
        self._transport = request.transport

    async def serve(self) -> web.WebSocketResponse:
        """Read and write until the client leaves or is given up."""
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(self._write(), name="comfyui socket writer")
            await self._read()
            self._is_over = True
            writer.cancel()
        return self._response

    def send_text(self, data: bytes, worth: Worth = Worth.ESSENTIAL) -> None:
        """Send a text message, now or when the client has read what is before it."""
        self._put(Letter(data=data, is_text=True, worth=worth))

    def send_preview(self, data: bytes) -> None:
        """Send a binary frame, unless the client is too slow for it."""
        self._put(Letter(data=data, is_text=False, worth=Worth.PREVIEW))

    async def close(self) -> None:
        """Say goodbye: the gateway stops."""
        self._is_over = True
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._response.close(code=WSCloseCode.GOING_AWAY, message=b"Server shutdown")
        except TimeoutError:
            self._give_up()

    def _put(self, letter: Letter) -> None:
        if self._is_over:
            return
        if self._outbox.put(letter):
            self._has_mail.set()
        else:
            self._give_up()

    def _give_up(self) -> None:
        """It does not read. A close frame would wait behind all it has not read."""
        self._is_over = True
        self._outbox.clear()
        if self._transport is not None:
            self._transport.abort()

    async def _write(self) -> None:
        try:
            while True:
                await self._has_mail.wait()
                self._has_mail.clear()
                while (letter := self._outbox.take()) is not None:
                    kind = WSMsgType.TEXT if letter.is_text else WSMsgType.BINARY
                    await self._response.send_frame(letter.data, kind)
        except (ConnectionError, RuntimeError):
            self._is_over = True  # it left; the reader notices

    async def _read(self) -> None:
        is_first = True
        async for message in self._response:
            if message.type is WSMsgType.TEXT:
                if is_first:
                    self._hear(str(message.data))
                is_first = False

    def _hear(self, text: str) -> None:
        """Only the first text message means something, and only when it tells feature flags."""
        try:
            said = msgspec.json.decode(text, type=_ClientMessage)
            if said.type != "feature_flags":
                return
            flags = msgspec.json.decode(said.data, type=_Flags)
        except (msgspec.DecodeError, RecursionError):
            return
        self.takes_metadata = flags.supports_preview_metadata is True
        self.send_text(frames.message("feature_flags", msgspec.Raw(self._features)))
