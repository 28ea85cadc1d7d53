"""Front door of `http` services: requests that need the gpu wait for it, everything else is passed on.

Nothing is looked into but the model that a body names; streamed answers pass as they come.
"""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from gpulane.adapters.base import Route
from gpulane.adapters.http.requests import recognize
from gpulane.adapters.http.routes import DEFAULT_JOBS, classify
from gpulane.config import EngineSettings, Settings
from gpulane.core.model import EngineState, Service
from gpulane.errors import NotFound, NotPermitted, Unavailable
from gpulane.web.bodies import MIB, read_body, suggestion, understood
from gpulane.web.held import hold, serve_held
from gpulane.web.identity import SAFE_METHODS
from gpulane.web.intake import Wishes, new_job
from gpulane.web.mount import NAME
from gpulane.web.ports import EngineView, Identity, Role, WebContext
from gpulane.web.relay_to import RelayTo

_USABLE = frozenset({EngineState.READY, EngineState.LEAKING})


class HttpFront:
    """One for all `http` services; which of them is meant stands in the path, or in the listener."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._relay = RelayTo(context)
        self._patterns = _patterns(context.settings)

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        """Answer one request."""
        engine = self._choose(request.get(NAME, ""), identity)
        if identity.role is Role.VIEWER and request.method not in SAFE_METHODS:
            raise NotPermitted("This takes the role user.")
        patterns = self._patterns.get(engine.url, DEFAULT_JOBS)
        match classify(request.method, target.partition("?")[0], patterns):
            case Route.JOB:
                return await self._hold(request, target, identity, engine)
            case Route.CLOSED:
                raise NotPermitted("This path hides dots or a second slash.", code="closed")
            case Route.RELAY | Route.OWN:
                if engine.state not in _USABLE:
                    raise _unavailable(engine)
                return await self._relay.pass_on(request, target, engine)

    async def close(self) -> None:
        """Close what is open. May be called twice."""
        await self._relay.close()

    async def _hold(
        self, request: web.Request, target: str, identity: Identity, engine: EngineView
    ) -> web.StreamResponse:
        settings = self._context.settings
        body = await read_body(request, int(settings.limits.body_mib * MIB), may_be_encoded=True)
        headers = tuple(request.headers.items())
        found = await understood(body, lambda: recognize(request.method, target, headers, body))
        # Which engine of that name it will be is decided when a gpu is free, not now.
        recognized = replace(found, needs=found.needs | {f"http:{engine.name}"})
        new = new_job(
            self._context.new_job_id(),
            Service.HTTP,
            recognized,
            identity,
            attempts_max=settings.retry.attempts_max,
            wishes=Wishes(held=True),
        )
        jobs = self._context.jobs
        return await serve_held(request, await hold(jobs, new, recognized.request), jobs)

    def _choose(self, name: str, identity: Identity) -> EngineView:
        """Find the account's own engine of that name: it answers what is no job, and says what is one."""
        engines = self._context.engines.engines(Service.HTTP)
        names = sorted({engine.name for engine in engines})
        named = [engine for engine in engines if engine.name == name or (not name and len(names) == 1)]
        if not named:
            hint = suggestion(name[:80], names) if names else "The settings name none."
            raise NotFound(f"No http service {name[:80]!r}.", hint=hint, code="no_such_service")
        # A lost one is better than none: its jobs wait for it.
        usable = [engine for engine in named if engine.state in _USABLE] or named
        return usable[sum(identity.account.encode()) % len(usable)]


def _unavailable(engine: EngineView) -> Unavailable:
    why = f": {engine.why}" if engine.why else ""
    return Unavailable(f"The engine does not answer now{why}.", code="no_engine")


def _patterns(settings: Settings) -> dict[str, tuple[str, ...]]:
    engines = [engine for gpu in settings.gpus.values() for engine in gpu.engines]
    return {
        engine.url: engine.jobs for engine in engines if isinstance(engine, EngineSettings) and engine.jobs
    }
