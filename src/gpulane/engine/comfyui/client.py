"""One ComfyUI as the dispatcher sees it: the ServiceClient for `comfyui`.

A job is submitted once. If the answer is missing it is looked for, never sent again; and a run ends only by
the engine's word that it is done, or with `engine_idle=False`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import msgspec

from gpulane.adapters.comfyui.messages import Message, Place
from gpulane.adapters.comfyui.prompt import PromptMeta, read_meta, with_client_id
from gpulane.adapters.comfyui.result import Verdict, read_entry
from gpulane.core.model import EngineUrl, JobId, Service
from gpulane.engine.base import BUSY, AttemptContext, Description, Found, Outcome, ProbeReport, Vram
from gpulane.engine.comfyui import outcome as outcomes
from gpulane.engine.comfyui.api import Answer, EngineApi
from gpulane.engine.comfyui.description import describe, read_vram
from gpulane.engine.comfyui.events import EventSocket
from gpulane.engine.comfyui.orders import Canary, erase, interrupt, unload
from gpulane.engine.comfyui.timings import Timings
from gpulane.engine.comfyui.watch import Ending, Watch
from gpulane.engine.control import named
from gpulane.errors import EngineError

REFUSED = frozenset({400, 401, 403, 404, 405, 407, 411, 413, 414, 415, 421, 429, 431})
"""Answers to POST /prompt that prove that nothing was queued. 409 (the id exists) and any 5xx do not:
ComfyUI was seen to answer 500 to a prompt that it then ran."""

FOUND = {
    Verdict.SUCCESS: Found.SUCCEEDED,
    Verdict.ERROR: Found.FAILED,
    Verdict.INTERRUPTED: Found.INTERRUPTED,
}


class ComfyUIClient:
    """One engine."""

    def __init__(self, url: EngineUrl, *, timings: Timings | None = None) -> None:
        self._url = url
        self._timings = timings or Timings()
        self._api = EngineApi(url, self._timings)
        self._events = EventSocket(self._api, self._timings, self)
        self._events.keep_id_while(lambda: bool(self._watches))
        self._canary = Canary(self._api, seconds=self._timings.canary_seconds)
        self._watches: dict[JobId, Watch] = {}
        self._reader: asyncio.Task[None] | None = None
        self._is_socket_suspect = False
        self._vram = Vram()
        self._vram_at: float | None = None

    @property
    def url(self) -> EngineUrl:
        return self._url

    @property
    def service(self) -> Service:
        return Service.COMFYUI

    async def open(self) -> None:
        if self._reader is None:
            # Lives as long as the client: `close` ends it and waits for its end.
            self._reader = asyncio.create_task(self._events.run(), name=f"events of {self._api.name}")

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None
        await self._api.close()

    # --- the socket's listener

    def on_message(self, message: Message, raw: bytes) -> None:
        for watch in tuple(self._watches.values()):
            watch.hear(message, raw)

    def on_frame(self, frame: bytes) -> None:
        for watch in tuple(self._watches.values()):
            watch.hear_frame(frame)

    def on_connected(self) -> None:
        self._is_socket_suspect = self._events.connects_of_id > 1
        for watch in self._watches.values():
            watch.look_now()

    # --- asking

    async def probe(self, own: frozenset[JobId], *, fresh: bool = False) -> ProbeReport:
        queue = await self._api.queue(fresh=fresh)
        if not fresh:
            await self._refresh_vram()
        ours = own | self._canary.ids
        strange = [job for job in (*queue.running, *queue.waiting) if job not in ours]
        return ProbeReport(
            idle=queue.is_empty,
            strange_jobs=tuple(strange),
            vram_bytes_free=self._vram.bytes_free,
            vram_bytes_total=self._vram.bytes_total,
        )

    def known_idle(self) -> bool | None:
        if self._watches or self._canary.ids:
            return False
        remaining = self._events.queue_remaining
        return None if self._is_socket_suspect or remaining is None else remaining == 0

    async def _refresh_vram(self) -> None:
        now = time.monotonic()
        if self._vram_at is None or now - self._vram_at >= self._timings.vram_seconds:
            self._vram = await self.vram()
            self._vram_at = now

    async def vram(self) -> Vram:
        return read_vram(await self._api.get("/system_stats"))

    async def describe(self) -> Description:
        return await describe(self._api)

    async def canary(self) -> bool:
        return await self._canary.sing(self._events.client_id)

    async def find(self, job: JobId, *, fresh: bool = True) -> Found:
        queue = await self._api.queue(fresh=fresh)
        place = queue.place_of(job)
        if place is Place.ABSENT:
            entry = await self._api.entry(job, fresh=fresh)
            if entry is not None:
                return FOUND[self._verdict(entry)]
            place = (await self._api.queue(fresh=fresh)).place_of(job)
        match place:
            case Place.RUNNING:
                return Found.RUNNING
            case Place.WAITING:
                return Found.WAITING
            case Place.ABSENT:
                return Found.ABSENT

    def _verdict(self, entry: msgspec.Raw) -> Verdict:
        try:
            return read_entry(entry).verdict
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(f"the history of {self._api.name} cannot be read: {error}") from error

    # --- ordering

    async def erase(self, job: JobId) -> None:
        await erase(self._api, job)

    async def interrupt(self, job: JobId) -> None:
        await interrupt(self._api, job)

    async def unload(self) -> None:
        if self._watches:
            raise named(EngineError(f"{self._api.name} runs a job: it is not unloaded now", sent=False), BUSY)
        await unload(self._api, seconds=self._timings.acknowledge_seconds)
        self._vram_at = None

    async def make_loadable(self) -> None:
        """Nothing: it loads what a prompt needs."""

    # --- running

    async def run(self, attempt: AttemptContext) -> Outcome:
        """Send the job once and follow it.

        1. Cancelled before it was sent: nothing happened.
        2. No connection: not started.
        3. Taken (200): follow it.
        4. Refused with proof: not started, or the content's fault.
        5. Anything else, no answer included: it may be in the engine, so it is looked for and followed.
        """
        await self._events.ready(self._timings.socket_seconds)
        if attempt.cancel_wanted.is_set():
            return outcomes.cancelled_unsent()
        meta = _meta_of(attempt)
        with self._watching(attempt, meta) as watch:
            try:
                answer = await self._submit(attempt)
            except EngineError as error:
                if not error.sent:
                    return outcomes.not_sent(error.message)
                watch.look_now()
                return await self._follow(attempt, watch, refusal=error.message)
            if answer.status in REFUSED:
                return outcomes.refused(answer, self._url)
            if answer.status != 200:
                watch.look_now()
                return await self._follow(attempt, watch, refusal=f"it answered {answer.status}")
            watch.evidence.accept()
            return await self._follow(attempt, watch, node_errors=_node_errors(answer))

    async def follow(self, attempt: AttemptContext) -> Outcome:
        with self._watching(attempt, _meta_of(attempt)) as watch:
            watch.evidence.accept()
            watch.look_now()
            return await self._follow(attempt, watch)

    async def _submit(self, attempt: AttemptContext) -> Answer:
        request = attempt.request
        body = with_client_id(request.body, self._events.client_id)
        return await self._api.submit(request.target, dict(request.headers), body)

    @contextlib.contextmanager
    def _watching(self, attempt: AttemptContext, meta: PromptMeta) -> Iterator[Watch]:
        watch = Watch(
            attempt,
            api=self._api,
            socket=self._events,
            timings=self._timings,
            loaders=frozenset(meta.loaders),
        )
        self._watches[attempt.job.id] = watch
        try:
            yield watch
        finally:
            del self._watches[attempt.job.id]

    async def _follow(
        self,
        attempt: AttemptContext,
        watch: Watch,
        *,
        node_errors: msgspec.Raw | None = None,
        refusal: str | None = None,
    ) -> Outcome:
        began, breaks = time.monotonic(), self._events.breaks
        ending = await watch.follow()
        self._settle_socket(watch)
        is_cancel_wanted = attempt.cancel_wanted.is_set()
        if ending is not Ending.OVER:
            return outcomes.given_up(ending, is_cancel_wanted=is_cancel_wanted)
        return outcomes.over(
            watch.evidence,
            attempt.job,
            url=self._url,
            is_cancel_wanted=is_cancel_wanted,
            has_restarted=self._events.breaks > breaks,
            load_seconds=watch.load_seconds,
            elapsed_seconds=time.monotonic() - began,
            node_errors=node_errors,
            refusal=refusal,
        )

    def _settle_socket(self, watch: Watch) -> None:
        """Renew a socket that was mute, or is not the first of its id: not to be trusted with the next
        job.
        """
        if watch.is_mute or self._events.connects_of_id > 1:
            self._is_socket_suspect = True
            self._events.renew()


def _meta_of(attempt: AttemptContext) -> PromptMeta:
    try:
        return read_meta(attempt.meta)
    except (msgspec.DecodeError, RecursionError):
        return PromptMeta()  # of a job that was made without the front door


def _node_errors(answer: Answer) -> msgspec.Raw | None:
    try:
        raw = msgspec.json.decode(answer.body, type=dict[str, msgspec.Raw]).get("node_errors")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if raw is None or bytes(raw) in {b"{}", b"null", b"[]"} else raw.copy()
