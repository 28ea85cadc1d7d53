"""Asks an engine in a client's name: its headers and cookies go along, our keys do not."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from gpulane.relay import HeaderRules
from gpulane.relay.http import forwarding_of
from gpulane.web.identity import Identities
from gpulane.web.mount import MOUNT
from gpulane.web.ports import EngineView, WebContext
from gpulane.wire import EngineClient, EngineResponse, Timeouts

TIMEOUTS: Final = Timeouts(first_byte_seconds=60.0, idle_seconds=60.0)
"""For what is read whole; an engine that loads a model may hold its event loop for long."""
_READ_WHOLE: Final = frozenset({"accept-encoding", "if-none-match", "if-modified-since", "if-range", "range"})
"""Not sent when the answer is read here: it must come whole and unzipped."""


class EngineCalls:
    """One per front."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._identities = Identities(context.settings)

    def client(self, engine: EngineView) -> EngineClient:
        return self._context.engines.wire(engine.url)

    def rules(self, request: web.Request, engine: EngineView) -> HeaderRules:
        """Return which headers pass between this client and this engine."""
        return HeaderRules(
            engine_host=self.client(engine).origin.authority,
            prefix=request.get(MOUNT, ""),
            dropped=self._identities.secret_headers | _READ_WHOLE,
        )

    def headers(self, request: web.Request, engine: EngineView) -> list[tuple[str, str]]:
        """Return the client's headers as the engine is to get them."""
        is_trusted = self._identities.is_trusted(request.remote)
        forwarding = forwarding_of(request, is_trusted=is_trusted)
        return self.rules(request, engine).for_engine(request.headers.items(), forwarding)

    async def ask(
        self, request: web.Request, engine: EngineView, method: str, target: str, body: bytes | None = None
    ) -> EngineResponse:
        """Send a request that is ours or rebuilt; the caller reads the answer whole. Raises WireError."""
        headers = [*self.headers(request, engine), ("Accept-Encoding", "identity")]
        return await self.client(engine).request(method, target, headers, body, timeouts=TIMEOUTS)
