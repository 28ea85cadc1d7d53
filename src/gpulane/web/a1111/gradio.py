"""Gradio's calls: functions known to be harmless pass to the engine, all others end here, in Gradio's own
words.

POST /run/predict and /api/predict run queued gpu functions directly (recordings: predict_bypass), so they
are judged like the queue. Generating from the page is answered with an error for now; no byte of it reaches
an engine.
"""

from __future__ import annotations

from collections import OrderedDict
from http import HTTPStatus
from typing import Final
from urllib.parse import unquote

from aiohttp import web

from gpulane.adapters.a1111.gradio import function_of
from gpulane.core.model import Account, Service
from gpulane.relay import RawResponse
from gpulane.web.a1111.answers import json_answer
from gpulane.web.a1111.engine_calls import EngineCalls
from gpulane.web.a1111.functions import FunctionLists, Functions
from gpulane.web.a1111.queue_socket import QueueSockets
from gpulane.web.bodies import MIB, read_body, understood
from gpulane.web.ports import EngineView, Identity, WebContext
from gpulane.web.relay_to import RelayTo

REFUSAL: Final = (
    "Generating, and changing models or settings, from this page comes with a later version; "
    "use the API (/sdapi/v1/...) or ComfyUI meanwhile."
)
JOIN: Final = "/queue/join"
REFUSED_MAX: Final = 1_000
"""Task ids of refused calls that are remembered, so that the page's bar ends."""
ANSWER_BYTES_MAX: Final = 256 * MIB


class GradioCalls:
    """Judges and answers them."""

    def __init__(self, context: WebContext, relay: RelayTo, calls: EngineCalls) -> None:
        self._body_bytes_max = int(context.settings.limits.body_mib * MIB)
        self._relay = relay
        self._calls = calls
        self._functions = FunctionLists(calls)
        self._sockets = QueueSockets(self._functions, calls, frame_bytes_max=self._body_bytes_max)
        self._refused: OrderedDict[tuple[Account, str], None] = OrderedDict()

    async def answer(
        self, request: web.Request, target: str, identity: Identity
    ) -> web.StreamResponse | None:
        """Answer a call; None when this path stays closed."""
        name = unquote(target.partition("?")[0]).rstrip("/")
        engine = self._relay.engine_of(Service.A1111, identity)
        match request.method, name:
            case "GET", "/queue/join":
                socket = await self._sockets.serve(request, target, engine, REFUSAL)
                self._note_refused(identity.account, socket.refused_task)
                return socket.response
            case "GET", "/queue/data":
                # Gradio 4's one stream of a page's events: of what was let through, by its own secret hash.
                return await self._relay.pass_on(request, target, engine)
            case "POST", "/queue/join" | "/run/predict" | "/api/predict":
                return await self._call(request, target, engine, is_queued=name == JOIN)
            case _:
                return None

    def is_refused(self, account: Account, task: str) -> bool:
        """Tell whether a task of the page was refused."""
        return (account, task) in self._refused

    async def close(self) -> None:
        await self._sockets.close()

    def _note_refused(self, account: Account, task: str | None) -> None:
        if task:
            self._refused[account, task] = None
            while len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)

    async def _call(
        self, request: web.Request, target: str, engine: EngineView, *, is_queued: bool
    ) -> web.StreamResponse:
        body = await read_body(request, self._body_bytes_max)
        number = await understood(body, lambda: function_of(body))
        functions = await self._functions.of(request, engine)
        if number is None or number not in functions.passing:
            return refused(number, functions, is_queued=is_queued)
        response = await self._calls.ask(request, engine, "POST", target, body)
        async with response:
            told = await response.read(ANSWER_BYTES_MAX)
        headers = self._calls.rules(request, engine).for_client(response.headers)
        answer = RawResponse(
            status=response.status, reason=response.reason, raw_headers=headers, length=len(told), first=told
        )
        await answer.prepare(request)
        await answer.write_eof()
        return answer


def refused(number: int | None, functions: Functions, *, is_queued: bool) -> web.Response:
    """Refuse a POST as Gradio would tell an error: 3 shows `error`, the queue of 4 `detail`."""
    if is_queued:
        return json_answer({"detail": REFUSAL}, HTTPStatus.UNPROCESSABLE_ENTITY)
    if number in functions.silent:
        return json_answer({"data": [], "is_generating": False, "duration": 0.0, "average_duration": 0.0})
    return json_answer({"error": REFUSAL}, HTTPStatus.INTERNAL_SERVER_ERROR)
