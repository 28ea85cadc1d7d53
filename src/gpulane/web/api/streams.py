"""Server-sent events: one job's, and the whole queue's. A stream waits for its own reader alone.

Each begins with the present state, or, taken up again with Last-Event-ID, with what was missed if that is
still known.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Final

import msgspec
from aiohttp import web

from gpulane.core.model import ENDED, JobId
from gpulane.engine.progress import Progress
from gpulane.store.base import JobRecord
from gpulane.web.api.asked import Asked, Endpoint, own_record
from gpulane.web.api.documents import (
    GpusMessage,
    JobMessage,
    PositionMessage,
    PreviewMessage,
    ProgressMessage,
    QueueMessage,
    StateMessage,
)
from gpulane.web.api.gpus import gpu_list
from gpulane.web.api.views import error_document, job_document, queue_document, reason_document
from gpulane.web.feed import Fact, Feed, Subscription
from gpulane.web.ports import Identity, JobsPort

LOOK_SECONDS: Final = 1.0
"""How often positions, gpus and counts are looked at for a stream; facts are sent at once."""
BEAT_SECONDS: Final = 15.0
"""A silent stream says something this often, or proxies cut it (nginx after 60 s)."""
PROGRESS_SECONDS: Final = 0.1
"""Progress and previews of one job are sent at most this often; the newest counts."""
RETRY_MS: Final = 2000
"""How soon a browser comes back."""
PREVIEW_BYTES_MAX: Final = 2 * 1024 * 1024


class StreamsApi:
    """The endpoints that answer with text/event-stream."""

    def __init__(self, jobs: JobsPort, feed: Feed) -> None:
        self._jobs = jobs
        self._feed = feed

    def endpoints(self) -> tuple[Endpoint, ...]:
        """List them."""
        return (
            Endpoint(
                method="GET",
                path="/gpulane/v1/jobs/{id}/events",
                answer=self.follow_job,
                summary="Follow a job: job, state, position, progress, preview. Ends with the job.",
                content_type="text/event-stream",
            ),
            Endpoint(
                method="GET",
                path="/gpulane/v1/events",
                answer=self.follow_queue,
                summary="Follow everything: gpus, queue, state, progress. Users hear of their own jobs.",
                content_type="text/event-stream",
            ),
        )

    async def follow_job(self, asked: Asked) -> web.StreamResponse:
        """Stream one job until it has ended."""
        record = await own_record(asked, self._jobs)
        last = self._feed.number_of(asked.request.headers.get("Last-Event-ID"))
        if record.state in ENDED and last is not None and last >= record.v:
            return web.Response(status=204)  # it has heard the end: an EventSource comes back no more
        subscription = self._feed.subscribe(record.job.id)
        try:
            stream = await _Writer.open(asked.request)
            await _JobStream(self._jobs, self._feed, stream, subscription).run(record, last)
            return stream.response
        finally:
            self._feed.unsubscribe(subscription)

    async def follow_queue(self, asked: Asked) -> web.StreamResponse:
        """Stream the whole queue."""
        last = self._feed.number_of(asked.request.headers.get("Last-Event-ID"))
        subscription = self._feed.subscribe(None)
        try:
            stream = await _Writer.open(asked.request)
            queue_stream = _QueueStream(
                self._jobs, self._feed, stream, subscription, asked.identity, is_operator=asked.is_operator
            )
            await queue_stream.run(last)
            return stream.response
        finally:
            self._feed.unsubscribe(subscription)


class _JobStream:
    """One job, one reader."""

    def __init__(self, jobs: JobsPort, feed: Feed, stream: _Writer, subscription: Subscription) -> None:
        self._jobs = jobs
        self._feed = feed
        self._stream = stream
        self._subscription = subscription
        self._heard = 0
        self._position: PositionMessage | None = None
        self._progress = _ProgressSender(jobs, stream)

    async def run(self, record: JobRecord, last: int | None) -> None:
        """Begin with what was missed, or the whole job; go on until its end."""
        job = record.job.id
        missed = None if last is None else self._feed.since(last)
        if last is not None and missed is not None:
            self._heard = last
            for fact in missed:
                if fact.job == job and await self._tell(fact):
                    return
        elif await self._tell_whole(job):
            return
        while not self._subscription.is_closed:
            await self._subscription.wait(PROGRESS_SECONDS if self._subscription.moved else LOOK_SECONDS)
            if self._subscription.is_behind:
                self._subscription.is_behind = False
                self._subscription.facts.clear()
                if await self._tell_whole(job):
                    return
            while self._subscription.facts:
                if await self._tell(self._subscription.facts.popleft()):
                    return
            await self._progress.send(self._subscription)
            await self._tell_position(job)
            await self._stream.beat()

    async def _tell(self, fact: Fact) -> bool:
        """Send a fact that was not sent yet; tell whether it was the end."""
        if fact.n <= self._heard:
            return False
        self._heard = fact.n
        if fact.is_end:
            await self._stream.send("state", state_message(fact), None)
            return await self._tell_whole(fact.job)
        await self._stream.send("state", state_message(fact), self._feed.event_id(fact.n))
        return False

    async def _tell_whole(self, job: JobId) -> bool:
        record = await self._jobs.record(job)
        if record is None:
            return True
        self._heard = max(self._heard, record.v)
        message = JobMessage(job=job_document(record, self._jobs))
        await self._stream.send("job", message, self._feed.event_id(self._heard))
        return record.state in ENDED

    async def _tell_position(self, job: JobId) -> None:
        place = self._jobs.place(job)
        message = PositionMessage(
            id=job,
            position=place.position,
            reason=reason_document(place.reason),
            estimated_start_seconds=place.estimated_start_seconds,
        )
        if message != self._position and (place.position is not None or self._position is not None):
            self._position = message
            await self._stream.send("position", message, None)


class _QueueStream:
    """Everything an identity may hear of, one reader."""

    def __init__(
        self,
        jobs: JobsPort,
        feed: Feed,
        stream: _Writer,
        subscription: Subscription,
        identity: Identity,
        *,
        is_operator: bool,
    ) -> None:
        self._jobs = jobs
        self._feed = feed
        self._stream = stream
        self._subscription = subscription
        self._identity = identity
        self._is_operator = is_operator
        self._own: dict[JobId, bool] = {}
        self._heard = 0
        self._said: dict[str, bytes] = {}
        self._progress = _ProgressSender(jobs, stream)

    async def run(self, last: int | None) -> None:
        """Tell counts and gpus, what was missed, and go on for ever."""
        missed = None if last is None else self._feed.since(last)
        self._heard = self._feed.n if last is None or missed is None else last
        await self._look(reload=missed is None)
        for fact in missed or ():
            await self._tell(fact)
        clock, is_stale = _Clock(), False
        while not self._subscription.is_closed:
            is_pressed = is_stale or bool(self._subscription.moved)
            await self._subscription.wait(PROGRESS_SECONDS if is_pressed else LOOK_SECONDS)
            is_stale = is_stale or bool(self._subscription.facts)
            is_behind, self._subscription.is_behind = self._subscription.is_behind, False
            while self._subscription.facts:
                await self._tell(self._subscription.facts.popleft())
            for job in tuple(self._subscription.moved):
                if not await self._is_own(job):
                    self._subscription.moved.discard(job)
            await self._progress.send(self._subscription)
            if is_behind or clock.is_over(LOOK_SECONDS / 4):
                is_stale = False
                await self._look(reload=is_behind)
            await self._stream.beat()

    async def _tell(self, fact: Fact) -> None:
        if fact.n <= self._heard:
            return
        self._heard = fact.n
        if fact.submitted is not None:
            self._own[fact.job] = self._is_operator or fact.submitted.account == self._identity.account
        if await self._is_own(fact.job):
            await self._stream.send("state", state_message(fact), self._feed.event_id(fact.n))
        if fact.is_end:
            self._own.pop(fact.job, None)

    async def _is_own(self, job: JobId) -> bool:
        if self._is_operator:
            return True
        if job not in self._own:
            record = await self._jobs.record(job)
            self._own[job] = record is not None and record.job.account == self._identity.account
        return self._own[job]

    async def _look(self, *, reload: bool) -> None:
        """Send gpus and counts if they have changed."""
        gpus = await gpu_list(self._jobs, self._identity, is_operator=self._is_operator)
        if self._has_changed("gpus", gpus):
            await self._stream.send("gpus", GpusMessage(gpus=gpus.gpus), None)
        queue = queue_document(self._jobs.queue())
        if self._has_changed("queue", queue) or reload:
            await self._stream.send("queue", QueueMessage(queue=queue, reload=reload), None)

    def _has_changed(self, kind: str, document: msgspec.Struct) -> bool:
        encoded = msgspec.json.encode(document)
        has_changed = self._said.get(kind) != encoded
        self._said[kind] = encoded
        return has_changed


class _ProgressSender:
    """Sends the newest progress of jobs that moved, each at most so often."""

    def __init__(self, jobs: JobsPort, stream: _Writer) -> None:
        self._jobs = jobs
        self._stream = stream
        self._clock = _Clock()
        self._image: bytes | None = None
        self._said: ProgressMessage | None = None

    async def send(self, subscription: Subscription) -> None:
        """Send what has moved, unless something was sent just now."""
        if not subscription.moved or not self._clock.is_over(PROGRESS_SECONDS):
            return
        moved = tuple(subscription.moved)
        subscription.moved.clear()
        for job in moved:
            last = self._jobs.hub.last(job)
            if last is not None:
                await self._send_one(last, with_preview=subscription.job is not None)

    async def _send_one(self, last: Progress, *, with_preview: bool) -> None:
        if last.value is not None:
            message = ProgressMessage(id=last.job, value=last.value, max=last.max, text=last.text)
            if message != self._said:
                self._said = message
                await self._stream.send("progress", message, None)
        if not with_preview or last.image is None or last.image is self._image:
            return
        self._image = last.image
        if len(last.image) <= PREVIEW_BYTES_MAX:
            data = base64.b64encode(last.image).decode("ascii")
            kind = last.image_type or "image/jpeg"
            await self._stream.send(
                "preview", PreviewMessage(id=last.job, content_type=kind, data=data), None
            )


class _Clock:
    """Tells whether enough time has passed since it last said so."""

    def __init__(self) -> None:
        self._at = 0.0

    def is_over(self, seconds: float) -> bool:
        now = _now()
        if now - self._at < seconds:
            return False
        self._at = now
        return True


class _Writer:
    """Writes events to one client; `send` waits while it is slow."""

    def __init__(self, response: web.StreamResponse) -> None:
        self.response = response
        self._sent_at = _now()

    @classmethod
    async def open(cls, request: web.Request) -> _Writer:
        """Send the head."""
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache, no-transform",
            "X-Accel-Buffering": "no",
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(f"retry: {RETRY_MS}\n\n".encode())
        return cls(response)

    async def send(self, kind: str, message: msgspec.Struct, event_id: str | None) -> None:
        """Send one event. JSON has no line break outside of its strings, and inside they are escaped."""
        id_line = f"id: {event_id}\n".encode() if event_id is not None else b""
        encoded = msgspec.json.encode(message)
        await self.response.write(
            b"event: " + kind.encode() + b"\n" + id_line + b"data: " + encoded + b"\n\n"
        )
        self._sent_at = _now()

    async def beat(self) -> None:
        """Send a comment if nothing was sent for a while."""
        if _now() - self._sent_at >= BEAT_SECONDS:
            await self.response.write(b": \n\n")
            self._sent_at = _now()


def _now() -> float:
    return asyncio.get_running_loop().time()


def state_message(fact: Fact) -> StateMessage:
    """Put a fact into words."""
    job = fact.submitted
    return StateMessage(
        id=fact.job,
        what=fact.what,
        state=None if fact.state is None else fact.state.value,
        gpu=fact.gpu,
        error=error_document(fact.failure),
        service=job.service.value if job else None,
        kind=job.kind if job else None,
        user=job.account if job else None,
        model=(job.model or None) if job else None,
    )
