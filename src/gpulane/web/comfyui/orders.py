"""The queue, the history and /api/jobs of one account: what they show, and the orders that touch the caller's
own jobs alone.

ComfyUI answers orders with 200 and nothing, also those that hit nothing: unknown ids, and other people's,
look alike.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import web

from gpulane.core.model import ENDED, WAITING, JobId
from gpulane.store.base import Code, JobRecord
from gpulane.web.comfyui.answers import done, json_answer, json_bytes, read_order, require_user, trouble
from gpulane.web.comfyui.archive import Archive
from gpulane.web.comfyui.entries import STATUSES, JobEntry, job_status, unended_entry, whole_entry
from gpulane.web.comfyui.live import LiveJobs
from gpulane.web.comfyui.own import OwnJobs, is_running, leaves_trace, shown_id
from gpulane.web.patience import finished
from gpulane.web.ports import Identity, JobsPort

QUEUE_ITEMS_MAX: Final = 2_000
"""Waiting prompts shown by one GET /queue: each may hold megabytes."""
HISTORY_ITEMS_MAX: Final = 1_000
"""Entries of one GET /history without max_items."""
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""One list is cut here."""
IDS_MAX: Final = 10_000
BREATH_JOBS: Final = 50
"""Cancels in a row; each is two messages to its client."""
UNENDED_STATUSES: Final = frozenset({"pending", "in_progress"})


class _QueueOrder(msgspec.Struct):
    clear: object = False
    delete: list[str] = msgspec.field(default_factory=list[str])


class _Interrupt(msgspec.Struct):
    prompt_id: object = None


class _CancelOrder(msgspec.Struct):
    job_ids: list[str] = msgspec.field(default_factory=list[str])


class Orders:
    """Answers for one account at a time."""

    def __init__(self, jobs: JobsPort, own: OwnJobs, live: LiveJobs, archive: Archive) -> None:
        self._jobs = jobs
        self._own = own
        self._live = live
        self._archive = archive

    # --- the queue

    async def prompt_info(self, identity: Identity) -> web.Response:
        """GET /prompt: how much of the caller's remains."""
        await self._live.load(identity.account)
        return json_answer({"exec_info": {"queue_remaining": self._live.remaining(identity.account)}})

    async def queue(self, identity: Identity) -> web.Response:
        """GET /queue."""
        shown: dict[bool, list[list[msgspec.Raw]]] = {True: [], False: []}
        size = 0
        for record in (await self._own.unended(identity.account))[:QUEUE_ITEMS_MAX]:
            item = await self._archive.queue_item(record)
            size += sum(len(memoryview(part)) for part in item)
            if size > ANSWER_BYTES_MAX:
                break
            shown[is_running(record)].append(item)
        return json_answer({"queue_running": shown[True], "queue_pending": shown[False]})

    async def change_queue(self, request: web.Request, identity: Identity) -> web.Response:
        """POST /queue: delete waiting prompts, or all of them. What runs is not touched."""
        require_user(identity)
        order = await read_order(request, _QueueOrder)
        if order is None:
            return trouble()
        if order.clear:
            wanted = await self._own.unended(identity.account)
        else:
            wanted = await self._named(identity, order.delete)
        await finished(self._cancel_all([record for record in wanted if record.state in WAITING]))
        return done()

    async def interrupt(self, request: web.Request, identity: Identity) -> web.Response:
        """POST /interrupt: the caller's running prompt of that id, or all that run for the caller."""
        require_user(identity)
        order = await read_order(request, _Interrupt) or _Interrupt()
        if order.prompt_id:
            wanted = await self._named(identity, [str(order.prompt_id)])
        else:
            wanted = await self._own.unended(identity.account)
        await finished(self._cancel_all([record for record in wanted if is_running(record)]))
        return done()

    # --- the history

    async def history(self, request: web.Request, identity: Identity) -> web.Response:
        """GET /history: oldest first; with `max_items` alone the newest ones."""
        try:
            most = int(request.query["max_items"]) if "max_items" in request.query else None
            offset = int(request.query.get("offset", -1))
        except ValueError:
            return trouble()
        ended = await self._own.ended(identity.account)
        chosen = paged(ended, most, offset)
        written: list[bytes] = []
        size = 0
        for record in reversed(chosen):
            entry = (await self._archive.written(record)).history
            size += len(entry)
            if size > ANSWER_BYTES_MAX:
                break
            written.append(msgspec.json.encode(shown_id(record)) + b":" + entry)
        return json_bytes(b"{" + b",".join(reversed(written)) + b"}")

    async def history_of(self, prompt_id: str, identity: Identity) -> web.Response:
        """GET /history/{id}: `{}` for what is unknown or has not ended."""
        record = await self._own.find(identity.account, prompt_id)
        if record is None or record.state not in ENDED or not leaves_trace(record):
            return json_answer({})
        entry = (await self._archive.written(record)).history
        return json_bytes(b"{" + msgspec.json.encode(prompt_id) + b":" + entry + b"}")

    async def change_history(self, request: web.Request, identity: Identity) -> web.Response:
        """POST /history: forget ended jobs, or all of them."""
        require_user(identity)
        order = await read_order(request, _QueueOrder)
        if order is None:
            return trouble()
        if order.clear:
            wanted = await self._own.ended(identity.account)
        else:
            wanted = await self._named(identity, order.delete)
        await finished(self._forget_all([record for record in wanted if record.state in ENDED]))
        return done()

    # --- /api/jobs

    async def jobs(self, request: web.Request, identity: Identity) -> web.Response:
        """GET /api/jobs: queue and history in one list."""
        query = request.query
        wanted = [status for status in query.get("status", "").split(",") if status]
        for status in wanted:
            if status not in STATUSES:
                known = ", ".join(STATUSES)
                return json_answer(
                    {"error": f"Invalid status value(s): {status}. Valid values: {known}"}, 400
                )
        try:
            limit = int(query["limit"]) if "limit" in query else None
            offset = max(0, int(query.get("offset", 0)))
        except ValueError:
            return json_answer({"error": "limit and offset must be integers"}, 400)
        records = await self._with_status(identity, frozenset(wanted or STATUSES))
        if (workflow := query.get("workflow_id")) is not None:
            shown = [(record, await self._entry(record)) for record in records]
            records = [record for record, entry in shown if entry.workflow_id == workflow]
        key = duration_of if query.get("sort_by") == "execution_duration" else submission_of
        records.sort(key=key, reverse=query.get("sort_order", "desc") != "asc")
        end = len(records) if limit is None else offset + max(0, limit)
        jobs = [(await self._entry(record)).fields for record in records[offset:end]]
        page = {"offset": offset, "limit": limit, "total": len(records), "has_more": end < len(records)}
        return json_answer({"jobs": jobs, "pagination": page})

    async def job(self, job_id: str, identity: Identity) -> web.Response:
        """GET /api/jobs/{id}."""
        record = await self._own.find(identity.account, job_id)
        if record is None or (record.state in ENDED and not leaves_trace(record)):
            return json_answer({"error": "Job not found"}, 404)
        if record.state not in ENDED:
            item = await self._archive.queue_item(record)
            fields = unended_entry(record, item).fields
            return json_answer(fields | {"workflow": {"prompt": item[2], "extra_data": item[3]}})
        entry = await self._archive.entry(record)
        return json_answer(whole_entry((await self._archive.written(record)).job, entry))

    async def cancel_job(self, job_id: str, identity: Identity) -> web.Response:
        """POST /api/jobs/{id}/cancel."""
        require_user(identity)
        return await self._cancel_answer(identity, [job_id])

    async def cancel_jobs(self, request: web.Request, identity: Identity) -> web.Response:
        """POST /api/jobs/cancel."""
        require_user(identity)
        order = await read_order(request, _CancelOrder)
        if order is None:
            return json_answer({"error": "job_ids must be a list of strings"}, 400)
        return await self._cancel_answer(identity, order.job_ids)

    async def _cancel_answer(self, identity: Identity, ids: list[str]) -> web.Response:
        wanted = await self._named(identity, ids)
        count = await finished(self._cancel_all([record for record in wanted if record.state not in ENDED]))
        return json_answer({"cancelled": count > 0})

    async def _with_status(self, identity: Identity, statuses: frozenset[str]) -> list[JobRecord]:
        """Read only what can match: pages ask for the queue and the history by themselves, all the time."""
        found: list[JobRecord] = []
        if statuses & UNENDED_STATUSES:
            found += (await self._own.unended(identity.account))[:QUEUE_ITEMS_MAX]
        if statuses - UNENDED_STATUSES:
            found += await self._own.ended(identity.account, HISTORY_ITEMS_MAX)
        return [record for record in found if job_status(record) in statuses]

    async def _entry(self, record: JobRecord) -> JobEntry:
        if record.state in ENDED:
            return (await self._archive.written(record)).job
        return unended_entry(record, await self._archive.queue_item(record))

    # --- what orders do

    async def _named(self, identity: Identity, ids: list[str]) -> list[JobRecord]:
        found = [await self._own.find(identity.account, name) for name in ids[:IDS_MAX]]
        return [record for record in found if record is not None]

    async def _cancel_all(self, records: list[JobRecord]) -> int:
        count = 0
        for number, record in enumerate(records):
            if number % BREATH_JOBS == 0:
                await asyncio.sleep(0)  # the sockets send what has come before more comes
            reply = await self._jobs.cancel(record.job.id)
            count += reply.code in {Code.CANCELLED, Code.CANCELLING}
        return count

    async def _forget_all(self, records: list[JobRecord]) -> None:
        for record in records:
            await self._jobs.forget(record.job.id)
            self._archive.forget(JobId(record.job.id))


def paged(records: list[JobRecord], most: int | None, offset: int) -> list[JobRecord]:
    """Choose as ComfyUI does: from `offset` on when it is given, else the newest `most`."""
    if most is None:
        return records[max(0, offset) :][-HISTORY_ITEMS_MAX:]
    most = max(0, most)
    start = offset if offset >= 0 else max(0, len(records) - most)
    return records[start : start + most]


def submission_of(record: JobRecord) -> float:
    return record.submitted_at


def duration_of(record: JobRecord) -> float:
    """Return how long it ran; 0 for what has not."""
    if record.started_at is None or record.finished_at is None:
        return 0.0
    return max(0.0, record.finished_at - record.started_at)
