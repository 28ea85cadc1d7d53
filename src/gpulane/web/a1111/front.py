"""The front door: tells what each request is and hands it to the part that answers it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final, assert_never
from urllib.parse import unquote

import msgspec
from aiohttp import web

from gpulane.adapters.a1111.errors import Invalid, Problem
from gpulane.adapters.a1111.routes import API, OPERATOR_POSTS, classify, is_gradio_call
from gpulane.adapters.base import Route
from gpulane.core.model import JobState, Service
from gpulane.errors import NotPermitted, Unavailable
from gpulane.store.base import JobRecord
from gpulane.web.a1111 import progress
from gpulane.web.a1111.answers import (
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    ORDER_BYTES_MAX,
    json_answer,
    json_bytes,
    require_operator,
    require_user,
)
from gpulane.web.a1111.calls import Calls
from gpulane.web.a1111.engine_calls import EngineCalls
from gpulane.web.a1111.gradio import GradioCalls
from gpulane.web.a1111.lists import ASK_TIMEOUTS, LISTS, Lists, without_secrets
from gpulane.web.a1111.options import Options
from gpulane.web.a1111.own import OwnJobs, Starts, shown_id
from gpulane.web.a1111.page import Page
from gpulane.web.a1111.stopping import Stopping
from gpulane.web.bodies import read_body
from gpulane.web.ports import Identity, WebContext
from gpulane.web.relay_to import RelayTo

TRUE: Final = frozenset({"1", "true", "on", "yes", "t", "y"})
"""What FastAPI takes for true in a query."""


class A1111Front:
    """One per process, for all listeners."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._jobs = context.jobs
        self._lists = Lists(context.engines)
        self._own = OwnJobs(context.jobs)
        self._options = Options(context.engines, context.values, self._lists)
        self._calls = Calls(context, self._lists, self._options, self._own)
        self._stopping = Stopping(context.jobs, context.engines, self._own)
        self._relay = RelayTo(context)
        engine_calls = EngineCalls(context)
        self._page = Page(engine_calls)
        self._gradio = GradioCalls(context, self._relay, engine_calls)
        self._starts = Starts(lambda: asyncio.get_running_loop().time())
        self._end_listening = context.jobs.listen(self._starts.hear)

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        """Answer one request. `target` is origin-form with any mount prefix taken off."""
        path = target.partition("?")[0]
        route = classify(request.method, path, allow=self._context.settings.allow_routes)
        match route:
            case Route.JOB:
                require_user(identity)
                return await self._calls.answer(request, path, identity)
            case Route.OWN:
                return await self._answer_own(request, target, identity)
            case Route.RELAY:
                if request.method not in {"GET", "HEAD"}:
                    require_user(identity)
                return await self._pass_on(request, target, identity)
            case Route.CLOSED:
                return await self._answer_closed(request, target, identity)
            case _:
                assert_never(route)

    async def close(self) -> None:
        """Close what is open, so that the server can stop."""
        self._end_listening()
        await self._gradio.close()
        await self._relay.close()

    # --- what is answered here

    async def _answer_own(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        path, _, _ = target.partition("?")
        name = unquote(path)
        match request.method:
            case "OPTIONS":
                # As A1111 without --cors-allow-origins: pages of other sites get no access.
                return json_bytes(METHOD_NOT_ALLOWED, HTTPStatus.METHOD_NOT_ALLOWED)
            case "POST":
                return await self._answer_post(request, name, identity)
            case _:
                return await self._answer_get(request, target, name, identity)

    async def _answer_get(
        self, request: web.Request, target: str, name: str, identity: Identity
    ) -> web.StreamResponse:
        match name.removeprefix(API):
            case "options":
                return json_bytes(await self._options.shown(identity.account))
            case "progress":
                with_image = request.query.get("skip_current_image", "").lower() not in TRUE
                return json_answer(await self._shown_progress(identity, with_image=with_image))
            case "memory":
                return await self._pass_on(request, target, identity)
            case "cmd-flags":
                return await self._flags(identity)
            case "/internal/ping":
                return json_bytes(b"{}")
            case "/internal/pending-tasks":
                tasks = [shown_id(record) for record in await self._own.waiting(identity.account)]
                return json_answer({"size": len(tasks), "tasks": tasks})
            case _:
                return await self._list(request, target, name, identity)

    async def _answer_post(self, request: web.Request, name: str, identity: Identity) -> web.StreamResponse:
        match name.removeprefix(API):
            case "/internal/progress":
                return json_answer(await self._shown_task(request, identity))
            case "options":
                require_user(identity)
                await self._options.change(identity, await read_body(request, ORDER_BYTES_MAX))
                return json_answer(None)
            case "interrupt":
                require_user(identity)
                await self._stopping.interrupt(identity.account)
                return json_answer({})
            case "skip":
                require_user(identity)
                await self._stopping.skip(identity.account)
                return json_answer(None)
            case order:
                assert name in OPERATOR_POSTS, "every other path is told above"
                if order.startswith("refresh-"):
                    # Engines are described anew from time to time; a refresh of theirs would wait for their
                    # gpu.
                    require_user(identity)
                    return json_answer(None)
                # What is loaded is the queue's affair: an unload here would pull the model from under a job.
                require_operator(identity)
                return json_answer({})

    async def _list(
        self, request: web.Request, target: str, name: str, identity: Identity
    ) -> web.StreamResponse:
        document = self._lists.document(LISTS[name])
        if document is not None:
            return json_bytes(document)
        return await self._pass_on(request, target, identity)

    async def _flags(self, identity: Identity) -> web.StreamResponse:
        engine = self._relay.engine_of(Service.A1111, identity)
        status, body = await self._context.engines.wire(engine.url).get_json(
            "/sdapi/v1/cmd-flags", timeouts=ASK_TIMEOUTS
        )
        if status == HTTPStatus.NOT_FOUND:
            return json_bytes(NOT_FOUND, status)
        try:
            return json_bytes(without_secrets(body), status)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable("The engine does not tell its flags.", code="no_flags") from error

    # --- progress

    async def _shown_progress(self, identity: Identity, *, with_image: bool) -> progress.Shown:
        running = await self._own.running(identity.account)
        if running:
            shown = self._running(running[0])
            return progress.running_shown(shown, with_image=with_image)
        waiting = await self._own.waiting(identity.account)
        if not waiting:
            return progress.Shown()
        places = [self._jobs.place(record.job.id) for record in waiting]
        first = min(places, key=lambda place: place.position or 0)
        return progress.waiting_shown(first, self._waiting_count())

    async def _shown_task(self, request: web.Request, identity: Identity) -> progress.TaskShown:
        query = _task_query(await read_body(request, ORDER_BYTES_MAX))
        record = await self._own.find(identity.account, query.id_task) if query.id_task else None
        if record is None:
            # A bar over a call that was refused has to end at once.
            is_refused = self._gradio.is_refused(identity.account, query.id_task or "")
            return progress.TaskShown(completed=is_refused)
        if record.state is JobState.RUNNING:
            return progress.task_running(self._running(record), query)
        return progress.task_not_running(record, self._jobs.place(record.job.id), self._waiting_count())

    def _running(self, record: JobRecord) -> progress.Running:
        job = record.job.id
        return progress.Running(
            record=record, last=self._jobs.hub.last(job), elapsed_seconds=self._starts.seconds(job)
        )

    def _waiting_count(self) -> int:
        return self._jobs.queue().waiting

    # --- what is not

    async def _pass_on(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        engine = self._relay.engine_of(Service.A1111, identity)
        if self._page.rewrites(request, target.partition("?")[0]):
            return await self._page.answer(request, target, engine)
        return await self._relay.pass_on(request, target, engine)

    async def _answer_closed(
        self, request: web.Request, target: str, identity: Identity
    ) -> web.StreamResponse:
        """Let the page's harmless calls through; everything else stays closed."""
        if is_gradio_call(target.partition("?")[0]):
            require_user(identity)
            answer = await self._gradio.answer(request, target, identity)
            if answer is not None:
                return answer
        raise NotPermitted(
            "This path is closed: it would reach past the queue, or shows the insides of an engine.",
            hint="allow_routes in the settings opens it",
            code="closed",
        )


def _task_query(body: bytes) -> progress.TaskQuery:
    try:
        return msgspec.json.decode(body, type=progress.TaskQuery)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = Problem(loc=("body",), msg=str(error), type="value_error.jsondecode")
        raise Invalid(problem) from error
