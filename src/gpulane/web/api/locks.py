"""Locks over the native API: a gpu for another program, as a held call that streams what becomes of it.

Lines of JSON: `waiting` while it waits, `granted`, and one last event. The connection is the holder's sign of
life: when it breaks, a waiting lock is cancelled and a granted one is over. No rejoining: a program that has
lost its gpu must not believe that it has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import msgspec
from aiohttp import web

from gpulane.adapters.base import EngineRequest, Recognized
from gpulane.core.model import Band, EngineUrl, Service
from gpulane.engine.lock import HEADERS, LockTerms, lock_url
from gpulane.errors import BadRequest, GpulaneError, NotFound, StoreError
from gpulane.web.api.asked import Asked, Endpoint, json_response, own_record
from gpulane.web.api.documents import JobDocument, LockRequest
from gpulane.web.api.gpus import find_gpu
from gpulane.web.api.submitting import band_and_priority
from gpulane.web.api.views import job_document, reason_document
from gpulane.web.bodies import decode, read_body
from gpulane.web.errors import NotReady
from gpulane.web.held import hold
from gpulane.web.intake import Wishes, new_job
from gpulane.web.patience import finished
from gpulane.web.ports import HeldCall, Role, WebContext

BODY_BYTES_MAX: Final = 64 * 1024
LOOK_SECONDS: Final = 1.0
"""How often a waiting lock's place is looked at, and told when it has changed."""
BEAT_SECONDS: Final = 15.0
"""A silent stream says something this often: proxies cut it otherwise, and the holder knows that we live."""
_LOCK = "/gpulane/v1/locks/{id}"


class LocksApi:
    """The endpoints under /gpulane/v1/locks."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._jobs = context.jobs
        self._grants = context.grants

    def endpoints(self) -> tuple[Endpoint, ...]:
        """List them."""
        return (
            Endpoint(
                method="POST",
                path="/gpulane/v1/locks",
                answer=self.lock,
                summary="Wait for a GPU and hold it while the connection stands: lines of JSON events.",
                role=Role.USER,
                takes=LockRequest,
                content_type="application/x-ndjson",
            ),
            Endpoint(
                method="POST",
                path=f"{_LOCK}/hold",
                answer=self.show_hold,
                summary="Say that the lock file is held, before using the GPU. 409: let go of it.",
                role=Role.USER,
                gives=JobDocument,
            ),
            Endpoint(
                method="POST",
                path=f"{_LOCK}/release",
                answer=self.release,
                summary="End a lock well: its job has succeeded once the lock file is free.",
                role=Role.USER,
                gives=JobDocument,
            ),
        )

    async def lock(self, asked: Asked) -> web.StreamResponse:
        """Stream one lock from its place in the queue to its end."""
        wanted = decode(await read_body(asked.request, BODY_BYTES_MAX), LockRequest)
        job_id = self._context.new_job_id()
        terms = LockTerms(seconds_max=self._seconds_max(wanted), note=wanted.note)
        band, priority = band_and_priority(wanted.priority)
        recognized = Recognized(
            kind="lock",
            request=EngineRequest(method="LOCK", target="/"),
            signature="lock",
            meta=msgspec.json.encode(terms),
            digest=job_id,  # two locks are never the same one
        )
        wishes = Wishes(
            band=Band.NORMAL if band is None else band,
            priority=priority,
            labels=frozenset(wanted.labels),
            max_attempts=1,
            engine=self._engine(wanted),
            held=True,
        )
        new = new_job(job_id, Service.LOCK, recognized, asked.identity, attempts_max=1, wishes=wishes)
        call = await hold(self._jobs, new, recognized.request)
        try:
            return await _Stream(self._context, asked.request, call).run()
        finally:
            await self._end(call)

    async def show_hold(self, asked: Asked) -> web.StreamResponse:
        """Take the holder's word that it has the lock file, and look whether that is so."""
        record = await own_record(asked, self._jobs)
        match self._grants.hold(record.job.id):
            case True:
                return json_response(job_document(record, self._jobs))
            case False:
                raise NotReady(
                    "Nobody holds the GPU's lock file.",
                    hint="A lock works only on the GPU's own machine, where its lock file is.",
                    code="not_held",
                )
            case None:
                raise NotReady("The GPU is not granted, or not any more.", code="not_granted")

    async def release(self, asked: Asked) -> web.StreamResponse:
        """End a grant."""
        record = await own_record(asked, self._jobs)
        if record.job.service is not Service.LOCK:
            raise NotFound("No such lock.", code="no_such_job")
        if not self._grants.release(record.job.id):
            raise NotReady(
                f"There is nothing to release, the job is {record.state.value}.",
                hint="DELETE the job to leave the queue.",
                code="not_granted",
            )
        return json_response(job_document(record, self._jobs))

    async def _end(self, call: HeldCall) -> None:
        """Whatever ended the stream: a lock without its holder's connection is over."""
        is_over = call.answer.is_ended
        self._jobs.answered(call.job)  # nothing is kept for it, and nobody may join it
        if not is_over and not self._grants.abandon(call.job):
            await finished(self._jobs.cancel(call.job))

    def _engine(self, wanted: LockRequest) -> EngineUrl | None:
        return None if wanted.gpu is None else lock_url(find_gpu(self._jobs, wanted.gpu).id)

    def _seconds_max(self, wanted: LockRequest) -> float:
        most = self._context.settings.limits.lock_seconds_max
        if wanted.seconds_max > most:
            raise BadRequest(
                f"seconds_max is at most {most:g}.", hint="See limits.lock_seconds_max.", code="bad_field"
            )
        return wanted.seconds_max


class _Stream:
    """One lock, one holder."""

    def __init__(self, context: WebContext, request: web.Request, call: HeldCall) -> None:
        self._jobs = context.jobs
        self._request = request
        self._call = call
        self._response = web.StreamResponse(headers=dict(HEADERS))
        self._response.headers["X-Accel-Buffering"] = "no"
        self._response.headers["X-Gpulane-Job"] = call.job
        self._sent_at = _now()

    async def run(self) -> web.StreamResponse:
        """Tell the place until the engine has something to say; then pass that on until the end."""
        await self._response.prepare(self._request)
        lines = self._call.answer.chunks()
        said: bytes | None = b""
        place = b""
        # The task is awaited or cancelled below, whatever happens: a group would wrap what goes wrong.
        following = asyncio.get_running_loop().create_task(_next(lines))
        try:
            while said is not None:
                if not following.done():
                    place = await self._tell_place(place)
                    await asyncio.wait({following}, timeout=LOOK_SECONDS)
                if following.done():
                    said = following.result()
                    await self._write(said or b"")
                    following = asyncio.get_running_loop().create_task(_next(lines))
                elif _now() - self._sent_at >= BEAT_SECONDS:
                    await self._write(_line({"event": "alive"}))
        except GpulaneError as error:
            await self._write(_line(_last_event(error)))
        finally:
            following.cancel()
        await self._response.write_eof()
        return self._response

    async def _tell_place(self, before: bytes) -> bytes:
        """Say where it stands, if that has changed; nothing more once it is granted."""
        if self._call.answer.status:
            return before
        place = self._jobs.place(self._call.job)
        line = _line(
            {
                "event": "waiting",
                "job": self._call.job,
                "position": place.position,
                "reason": reason_document(place.reason),
            }
        )
        if line != before:
            await self._write(line)
        return line

    async def _write(self, line: bytes) -> None:
        if line:
            self._sent_at = _now()
            await self._response.write(line)


async def _next(lines: AsyncIterator[bytes]) -> bytes | None:
    return await anext(lines, None)


def _last_event(error: GpulaneError) -> dict[str, object]:
    """Say how a lock ended that was never granted."""
    if error.code == "cancelled":
        return {"event": "cancelled"}
    message = "The store does not answer now." if isinstance(error, StoreError) else error.message
    return {"event": "failed", "error": {"code": error.code, "message": message}}


def _line(document: dict[str, object]) -> bytes:
    return msgspec.json.encode(document) + b"\n"


def _now() -> float:
    return asyncio.get_running_loop().time()
