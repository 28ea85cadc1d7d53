"""ComfyUI's front door: tells what a request is, and gives it to whoever answers it. Holds what the parts
share.

With and without `/api` in front every route is the same. It never lets a request reach an engine that
could touch the gpu or somebody else's work behind the queue's back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, assert_never
from urllib.parse import unquote

import structlog
from aiohttp import web

from gpulane.adapters.base import Route
from gpulane.adapters.comfyui.routes import classify
from gpulane.core.model import Service
from gpulane.errors import NotFound, NotPermitted, TooLarge
from gpulane.web.comfyui.answers import (
    done,
    is_operator,
    json_bytes,
    read_order,
    require_user,
    too_large,
    trouble,
)
from gpulane.web.comfyui.archive import Archive
from gpulane.web.comfyui.events import Events
from gpulane.web.comfyui.files import FileIndex, Files, copied_answer, read_wanted
from gpulane.web.comfyui.lists import UPLOAD_BYTES_MAX, Lists
from gpulane.web.comfyui.live import LiveJobs
from gpulane.web.comfyui.orders import Orders
from gpulane.web.comfyui.own import OwnJobs
from gpulane.web.comfyui.sockets import ClientSocket
from gpulane.web.comfyui.submit import Submission
from gpulane.web.ports import Identity, WebContext
from gpulane.web.relay_to import RelayTo

_log = structlog.stdlib.get_logger(__name__)


def wall_clock_ms() -> int:
    """Tell the time as ComfyUI stamps messages."""
    return time.time_ns() // 1_000_000


class ComfyUIFront:
    """Implements `gpulane.web.ports.Front`."""

    def __init__(self, context: WebContext, *, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._context = context
        own = OwnJobs(context.jobs)
        self._lists = Lists(context.engines)
        self._live = LiveJobs(own)
        self._archive = Archive(context.jobs, self._lists)
        index = FileIndex(context.jobs, own)
        self._files = Files(context.jobs, context.engines, index, self._lists, context.data_folder)
        self._orders = Orders(context.jobs, own, self._live, self._archive)
        self._submission = Submission(context, own, self._lists, self._live)
        self._relay = RelayTo(context)
        self._beside: set[asyncio.Task[None]] = set()
        self._events = Events(
            context.jobs, self._live, spawn=self._spawn, on_executed=index.note, now_ms=now_ms
        )

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        """Answer one request; what goes wrong is raised, for the application to put into ComfyUI's words."""
        path, _, query = target.partition("?")
        route = classify(
            request.method, path, allow=_allowed(self._context.settings.allow_routes, request.method)
        )
        match route:
            case Route.JOB:
                return await self._submission.submit(request, identity)
            case Route.OWN:
                return await self._own(request, path, query, identity)
            case Route.RELAY:
                if request.method not in {"GET", "HEAD", "OPTIONS"}:
                    require_user(identity)
                return await self._pass_on(request, target, identity)
            case Route.CLOSED:
                raise NotPermitted(
                    "This path is closed: it would show or change the insides of an engine for everybody.",
                    hint="`allow_routes` in the settings opens paths of custom nodes.",
                    code="closed",
                )
            case _:
                assert_never(route)

    async def close(self) -> None:
        """Close the sockets and what runs beside."""
        await self._events.close()
        await self._relay.close()
        for task in tuple(self._beside):
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)

    # --- routes of our own

    async def _own(
        self, request: web.Request, path: str, query: str, identity: Identity
    ) -> web.StreamResponse:
        method = "GET" if request.method == "HEAD" else request.method
        match method, _parts(path):
            case "GET", ["ws"]:
                return await self._socket(request, identity)
            case "GET", ["view"]:
                return await self._view(request, query, identity)
            case "POST", ["upload", "image" | "mask" as sort]:
                return await self._upload(request, f"/upload/{sort}", identity)
            case "POST", ["free"]:
                return await self._free(request, identity)
            case _, ["jobs", *rest]:
                return await self._jobs(request, method, path, rest, identity)
            case _, ["prompt" | "queue" | "interrupt" | "history", *_] as parts:
                return await self._order(request, method, parts, identity)
            case _, parts:
                return await self._list(parts, identity)

    async def _order(
        self, request: web.Request, method: str, parts: list[str], identity: Identity
    ) -> web.StreamResponse:
        match method, parts:
            case "GET", ["prompt"]:
                return await self._orders.prompt_info(identity)
            case "GET", ["queue"]:
                return await self._orders.queue(identity)
            case "POST", ["queue"]:
                return await self._orders.change_queue(request, identity)
            case "POST", ["interrupt"]:
                return await self._orders.interrupt(request, identity)
            case "GET", ["history"]:
                return await self._orders.history(request, identity)
            case "GET", ["history", prompt_id]:
                return await self._orders.history_of(prompt_id, identity)
            case "POST", ["history"]:
                return await self._orders.change_history(request, identity)
            case _:
                raise NotFound("No such path.")

    async def _jobs(
        self, request: web.Request, method: str, path: str, rest: list[str], identity: Identity
    ) -> web.StreamResponse:
        if not path.startswith("/api/"):
            raise NotFound("No such path.")  # as in ComfyUI: /jobs alone is none
        match method, rest:
            case "GET", []:
                return await self._orders.jobs(request, identity)
            case "GET", [job_id]:
                return await self._orders.job(job_id, identity)
            case "POST", ["cancel"]:
                return await self._orders.cancel_jobs(request, identity)
            case "POST", [job_id, "cancel"]:
                return await self._orders.cancel_job(job_id, identity)
            case _:
                raise NotFound("No such path.")

    async def _list(self, parts: list[str], identity: Identity) -> web.StreamResponse:
        found: bytes | None = None
        match parts:
            case ["object_info"]:
                found = self._lists.object_info()
            case ["object_info", name]:
                found = self._lists.object_info_of(name)
            case ["models" | "embeddings"] | ["models", _]:
                found = await self._lists.union("/" + "/".join(parts))
            case ["features"]:
                found = self._lists.features()
            case ["system_stats"]:
                first = self._relay.engine_of(Service.COMFYUI, identity)
                found = await self._lists.system_stats(first, with_arguments=is_operator(identity))
            case _:
                pass
        if found is None:
            raise NotFound("No engine has such a list.")
        return json_bytes(found)

    async def _socket(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        self._events.check_room(identity.account)
        await self._live.load(identity.account)
        socket = ClientSocket(
            account=identity.account,
            client_id=request.query.get("clientId") or self._context.new_job_id().replace("-", ""),
            features=self._lists.features(),
        )
        await socket.open(request)
        self._events.join(socket)
        try:
            return await socket.serve()
        finally:
            self._events.part(socket)

    async def _view(self, request: web.Request, query: str, identity: Identity) -> web.StreamResponse:
        """GET /view: the copied file first, else from the engine that made it; uploads from the account's
        engine.
        """
        wanted = read_wanted(query)
        place = await self._files.place_of(identity.account, wanted)
        target = f"/view?{query}"
        if place is None:
            if wanted.kind == "input" or self._files.was_uploaded(identity.account, wanted):
                return await self._pass_on(request, target, identity)
            raise NotFound("No such file.")
        if place.copied is not None and (place.engine is None or not wanted.is_changed):
            return copied_answer(place.copied, wanted.filename)
        if place.engine is None:
            raise NotFound("The engine that has this file does not answer now.", code="unavailable")
        return await self._relay.pass_on(request, target, place.engine)

    async def _upload(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        require_user(identity)
        first = self._relay.engine_of(Service.COMFYUI, identity)
        try:
            return await self._files.upload(request, target, first, identity.account)
        except TooLarge:
            return too_large(UPLOAD_BYTES_MAX)

    async def _free(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """POST /free: taken from operators and not passed on, see docs/comfyui.md."""
        if not is_operator(identity):
            raise NotPermitted("Only operators may unload models: the gpus are shared.")
        return trouble() if await read_order(request, dict[str, object]) is None else done()

    async def _pass_on(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        return await self._relay.pass_on(request, target, self._relay.engine_of(Service.COMFYUI, identity))

    # --- what runs beside requests

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._beside.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("look_up_failed", exc_info=error)


def _parts(path: str) -> list[str]:
    """Split a path and take `/api` off. Parts are decoded one by one: a client's own id may hold a slash."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    while len(parts) > 1 and parts[0] == "api":
        parts = parts[1:]
    return parts


def _allowed(patterns: tuple[str, ...], method: str) -> tuple[str, ...]:
    """Return the paths that `METHOD /path` settings open for this method."""
    split = (pattern.partition(" ") for pattern in patterns)
    return tuple(path for allowed, _, path in split if allowed.upper() == method.upper())
