"""Passes a request that is no job to an engine of its service: the one that the account's requests stick to.

What fails on the way becomes a ClientError, which the application says in the service's own shape.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from gpulane.core.model import Service
from gpulane.errors import Unavailable
from gpulane.relay import HeaderRules, Tunnels, relay_http, tunnel
from gpulane.relay.websocket import LINGER_SECONDS
from gpulane.web.bodies import MIB
from gpulane.web.identity import Identities
from gpulane.web.mount import MOUNT
from gpulane.web.patience import finished
from gpulane.web.ports import EngineView, Identity, WebContext
from gpulane.wire import Timeouts

TIMEOUTS: Final = Timeouts(first_byte_seconds=600.0, idle_seconds=None)
"""Engines block their event loop for long: an import, a list of a network folder. SSE is silent for hours."""


class RelayTo:
    """One per front: counts its tunnels and closes them with it."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._identities = Identities(context.settings)
        self._tunnels = Tunnels()

    def engine_of(self, service: Service, identity: Identity, key: str | None = None) -> EngineView:
        """Find the live engine for this account (or another key). Raises Unavailable."""
        engine = self._context.engines.sticky(service, key or identity.account)
        if engine is None:
            raise Unavailable(
                f"No {service.value} engine answers now.", hint="`gpulane gpus` says why.", code="no_engine"
            )
        return engine

    async def pass_on(self, request: web.Request, target: str, engine: EngineView) -> web.StreamResponse:
        """Relay HTTP or an upgrade. Raises ClientError or WireError while nothing has been answered."""
        client = self._context.engines.wire(engine.url)
        rules = HeaderRules(
            engine_host=client.origin.authority,
            prefix=request.get(MOUNT, ""),
            dropped=self._identities.secret_headers,
        )
        is_trusted = self._identities.is_trusted(request.remote)
        if "upgrade" in request.headers.get("Connection", "").lower() and "Upgrade" in request.headers:
            # The last bytes of a side that has closed still go to the other.
            return await finished(
                tunnel(
                    request,
                    client,
                    target=target,
                    rewrite=rules,
                    tunnels=self._tunnels,
                    is_proxy_trusted=is_trusted,
                ),
                grace_seconds=LINGER_SECONDS,
            )
        return await relay_http(
            request,
            client,
            target=target,
            rewrite=rules,
            body_bytes_max=int(self._context.settings.limits.body_mib * MIB),
            is_proxy_trusted=is_trusted,
            timeouts=TIMEOUTS,
        )

    async def close(self) -> None:
        """Close what is open, after what was received has been sent."""
        self._tunnels.close_all()
