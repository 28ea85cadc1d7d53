"""Calls that are jobs: understood, queued, answered with the engine's own answer while their client waits.

A client's own task id names its newest call. While that call has not ended, the same id with the same
content is the same job (a client that asks again must not render twice), and with other content it is
refused; afterwards it may be used again, as in A1111.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Final
from weakref import WeakValueDictionary

from aiohttp import web

from gpulane.adapters.a1111.requests import RequestContext, recognize
from gpulane.adapters.base import Recognized
from gpulane.core.model import ENDED, Account, JobId, Service
from gpulane.errors import BadRequest, GpulaneError
from gpulane.store.base import JobRecord, NewJob
from gpulane.web.a1111.answers import call_failed
from gpulane.web.a1111.lists import Lists
from gpulane.web.a1111.options import Options
from gpulane.web.a1111.own import OwnJobs
from gpulane.web.bodies import MIB, read_body, understood
from gpulane.web.held import hold, send_answer
from gpulane.web.intake import Wishes, new_job
from gpulane.web.ports import HeldCall, Identity, Role, WebContext

DIGESTS_MAX: Final = 10_000
"""Named calls whose content is remembered; the oldest goes first."""


class Calls:
    """Answers the job routes."""

    def __init__(self, context: WebContext, lists: Lists, options: Options, own: OwnJobs) -> None:
        self._context = context
        self._lists = lists
        self._options = options
        self._own = own
        self._readers: Counter[JobId] = Counter()
        self._digests: dict[JobId, str] = {}
        self._naming: WeakValueDictionary[tuple[Account, str], asyncio.Lock] = WeakValueDictionary()

    async def answer(self, request: web.Request, path: str, identity: Identity) -> web.StreamResponse:
        """Make a job of the request, wait for it and pass its answer on."""
        body = await read_body(request, int(self._context.settings.limits.body_mib * MIB))
        job_id = self._context.new_job_id()
        context = await self._request_context(job_id, identity)
        recognized = await understood(body, lambda: recognize(path, body, context))
        try:
            return await self._serve(request, await self._admitted(job_id, recognized, identity))
        except GpulaneError as error:
            raise call_failed(error) from error

    async def _request_context(self, job_id: JobId, identity: Identity) -> RequestContext:
        return RequestContext(
            job=job_id,
            catalogue=self._lists.catalogue(),
            carried=await self._options.carried(identity.account),
            is_admin=identity.role is Role.ADMIN,
        )

    # --- which job it is

    async def _admitted(self, job_id: JobId, recognized: Recognized, identity: Identity) -> HeldCall:
        """Find or make the job; its client counts as waiting from here on."""
        task = recognized.client_job_id
        if not task:
            return await self._held(job_id, recognized, identity)
        key = (identity.account, task)
        # Two calls of one new name that come together: the second must find the first.
        lock = self._naming.setdefault(key, asyncio.Lock())
        async with lock:
            known = await self._own.find(identity.account, task)
            if known is not None:
                same = self._open_call(known, recognized)
                if same is not None:
                    return same
                # The store keeps a client's id for good; the newest call of that name is remembered here.
                recognized = replace(recognized, client_job_id=None)
            call = await self._held(job_id, recognized, identity)
            self._own.name(identity.account, task, call.job)
            self._note_digest(call.job, recognized.digest)
            return call

    async def _held(self, job_id: JobId, recognized: Recognized, identity: Identity) -> HeldCall:
        return await hold(self._context.jobs, self._new_job(job_id, recognized, identity), recognized.request)

    def _open_call(self, known: JobRecord, recognized: Recognized) -> HeldCall | None:
        """Return the call of that id which another connection waits for. Raises BadRequest."""
        job = known.job.id
        if known.state in ENDED:
            return None
        if self._digests.get(job) != recognized.digest:
            raise BadRequest(
                f"force_task_id {recognized.client_job_id!r} names another call that has not ended.",
                hint="take a new one for each call",
                code="task_id_taken",
            )
        answer = self._context.jobs.held_answer(job)
        # One whose client has left is joined by the gateway.
        return (
            HeldCall(job=job, answer=answer, joined=True)
            if answer is not None and self._readers[job]
            else None
        )

    def _note_digest(self, job: JobId, digest: str) -> None:
        self._digests[job] = digest
        while len(self._digests) > DIGESTS_MAX:
            del self._digests[next(iter(self._digests))]

    def _new_job(self, job_id: JobId, recognized: Recognized, identity: Identity) -> NewJob:
        attempts_max = self._context.settings.retry.attempts_max
        wishes = Wishes(held=True)
        return new_job(job_id, Service.A1111, recognized, identity, attempts_max=attempts_max, wishes=wishes)

    # --- its answer

    async def _serve(self, request: web.Request, call: HeldCall) -> web.StreamResponse:
        """Send the answer. Several connections may read one call; the gateway hears of the last one's end."""
        self._readers[call.job] += 1
        try:
            response = await send_answer(request, call.job, call.answer, self._context.jobs)
        except GpulaneError:
            self._end_reading(call.job, has_whole=True)
            raise
        except BaseException:  # the client left (cancelled, or a broken connection), or the server stops
            self._end_reading(call.job, has_whole=False)
            raise
        self._end_reading(call.job, has_whole=True)
        return response

    def _end_reading(self, job: JobId, *, has_whole: bool) -> None:
        self._readers[job] -= 1
        if self._readers[job] > 0:
            return
        del self._readers[job]
        if has_whole:
            self._context.jobs.answered(job)
        else:
            self._context.jobs.leave(job)
