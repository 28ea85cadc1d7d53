"""The application behind one listener: identity, table of paths, fronts, errors in each one's shape.

One catch-all route on purpose: aiohttp's router would decode paths that belong to engines.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Mapping
from typing import Final, assert_never

import structlog
from aiohttp import web

from gpulane.config import EngineSettings, Settings
from gpulane.core.model import Service
from gpulane.errors import BadRequest, ClientError, GpulaneError, NotFound, NotPermitted
from gpulane.web.api import NativeApi
from gpulane.web.errors import Internal, client_error, refusal
from gpulane.web.identity import Caller, Identities
from gpulane.web.metrics import Metrics
from gpulane.web.mount import MOUNT, NAME
from gpulane.web.paths import (
    Destination,
    Nobody,
    Redirect,
    ToService,
    ToUs,
    destination,
    origin_form,
    root_service,
)
from gpulane.web.ports import Front, WebContext

log = structlog.get_logger(__name__)

KEEPALIVE_SECONDS: Final = 75.0
"""An idle client connection is closed after this; nginx keeps its own for 60 s."""
HEADER_BYTES_MAX: Final = 16 * 1024
"""One header line, or the request line: cookies of other services on the same host name reach 8 KiB."""
PRESENT_SECONDS: Final = 1.0
"""How long the knowledge of which services have engines is used."""
_PREPARED: Final = web.RequestKey("PREPARED", bool)
_OPEN_PATHS: Final = frozenset({"/gpulane/healthz", "/gpulane/readyz"})
"""Answered to anybody: they tell nothing but yes or no, to machines that have no key."""


def build_app(
    context: WebContext, fronts: Mapping[Service, Front], *, root: Service | str | None = None
) -> web.Application:
    """Build the application of one listener; its shutdown closes the fronts.

    `root` is the service that owns all of it, or the name of an `http` service; None: the main listener,
    where the table of paths decides.
    """
    door = _Door(context, fronts, root)
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{anything:(?s:.*)}", door.respond)
    app.on_response_prepare.append(_note_prepared)
    app.on_shutdown.append(door.shut_down)
    return app


def make_runner(app: web.Application, *, shutdown_seconds: float = 10.0) -> web.AppRunner:
    """Make the server as the fronts need it.

    `handler_cancellation`: a client's leaving is noticed at once, by cancelling whatever answers it; what
    must not stop in the middle runs under `patience.finished`. `auto_decompress` off: bodies are relayed as
    they come.
    """
    return web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,
        auto_decompress=False,
        keepalive_timeout=KEEPALIVE_SECONDS,
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        shutdown_timeout=shutdown_seconds,
    )


class _Door:
    """Answers every request of one listener."""

    def __init__(
        self, context: WebContext, fronts: Mapping[Service, Front], root: Service | str | None
    ) -> None:
        self._context = context
        self._fronts = fronts
        self._identities = Identities(context.settings, listen=_address_of(context.settings, root))
        self._metrics = Metrics(context.jobs)
        self._api = NativeApi(context, self._metrics) if root is None else None
        self._service = root if isinstance(root, Service) or root is None else Service.HTTP
        self._services = frozenset(Service)
        self._present_until = 0.0
        self._name = "" if isinstance(root, Service) or root is None else root

    async def respond(self, request: web.Request) -> web.StreamResponse:
        """Find the owner, answer, and turn whatever goes wrong into the owner's words."""
        target = origin_form(request.raw_path)
        found = Nobody() if target is None else self._destination(target)
        service = found.service if isinstance(found, ToService) else None
        try:
            response = await self._answer(request, found)
        except GpulaneError as error:
            response = self._refused(request, client_error(error), service)
        except (ConnectionError, web.HTTPException):
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the client gets its service's own shape
            # The text alone: renderers that show local variables would show keys.
            log.error(
                "request_failed",
                method=request.method,
                owner=service or "gpulane",
                trace=traceback.format_exc(),
            )
            response = self._refused(request, Internal(), service)
        self._metrics.request_answered(service or "gpulane", request.method, response.status)
        return response

    async def shut_down(self, _: web.Application) -> None:
        """End what streams for ever, so that the server can stop."""
        self._metrics.close()
        if self._api is not None:
            self._api.close()
        for front in self._fronts.values():
            await front.close()

    def _destination(self, target: str) -> Destination:
        if self._service is not None:
            return ToService(service=self._service, target=target, name=self._name)
        present = self._present()
        root = root_service(self._context.settings.root, present)
        return destination(target, root=root, present=present)

    def _present(self) -> frozenset[Service]:
        """Tell which services have engines; asked anew now and then, not for each file."""
        now = asyncio.get_running_loop().time()
        if now >= self._present_until:
            self._present_until = now + PRESENT_SECONDS
            found = frozenset(engine.service for engine in self._context.engines.engines())
            # No engine at all (a gateway of a fleet, or none asked yet) tells nothing of what there will be.
            self._services = found or frozenset(Service)
        return self._services

    async def _answer(self, request: web.Request, found: Destination) -> web.StreamResponse:
        match found:
            case ToUs(target=target) if self._api is not None and target.partition("?")[0] in _OPEN_PATHS:
                return self._api.health(target.partition("?")[0])
            case _:
                identity = self._identities.identify(_caller(request))
        match found:
            case ToService():
                front = self._fronts.get(found.service)
                if front is None:
                    raise NotFound(f"No engine of the service {found.service.value} is served here.")
                request[MOUNT] = found.mount
                request[NAME] = found.name
                return await front.respond(request, found.target, identity)
            case ToUs():
                assert self._api is not None, "a service's own listener has no such paths"
                return await self._api.respond(request, found.target, identity)
            case Redirect():
                return web.Response(status=307, headers={"Location": found.location})
            case Nobody(is_closed=True):
                raise NotPermitted("This path is closed: it shows the insides of an engine.", code="closed")
            case Nobody():
                if origin_form(request.raw_path) is None:
                    raise BadRequest("A request's target begins with a slash.")
                raise NotFound(
                    "No such path.", hint="ComfyUI is under /comfy/, A1111 under /sd/, the page at /gpulane/."
                )
            case _:
                assert_never(found)

    def _refused(
        self, request: web.Request, error: ClientError, service: Service | None
    ) -> web.StreamResponse:
        if request.get(_PREPARED) is not True:
            return refusal(error, service)
        # The head of another answer is out: a second one would be read as its body. Cut it short instead.
        log.warning("answer_cut", code=error.code, message=error.message)
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=error.status)


def _address_of(settings: Settings, root: Service | str | None) -> str:
    """Find where this application listens: on loopback, only this machine's own names are answered."""
    match root:
        case Service.COMFYUI:
            own = settings.listen_comfyui
        case Service.A1111:
            own = settings.listen_a1111
        case Service.HTTP | Service.LOCK | None:
            own = None
        case name:
            engines = [engine for gpu in settings.gpus.values() for engine in gpu.engines]
            named = [e for e in engines if isinstance(e, EngineSettings) and e.name == name]
            own = next((engine.listen for engine in named), None)
    return own or settings.listen


def _caller(request: web.Request) -> Caller:
    return Caller(
        method=request.method, headers=request.headers, address=request.remote, scheme=request.scheme
    )


async def _note_prepared(request: web.BaseRequest, _: web.StreamResponse) -> None:
    request[_PREPARED] = True
