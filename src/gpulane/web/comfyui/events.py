"""Brings the events of jobs to the sockets of their own clients, and to nobody else.

A socket hears of a job when account and client id are both the submitter's. How a prompt ended is told
only when its end is recorded, so that /history answers whoever asks at that moment. Nothing here waits for
a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
import structlog

from gpulane.adapters.comfyui.messages import read_message
from gpulane.adapters.comfyui.result import VERDICTS
from gpulane.adapters.comfyui.rewrite import (
    PREVIEW_WITH_METADATA,
    frame_type,
    plain_preview,
    rewrite_frame,
    rewrite_message,
)
from gpulane.core.events import AttemptFailed, JobEnded, JobStarted, JobSubmitted, StoreEvent
from gpulane.core.model import Account, JobId, Service
from gpulane.engine.progress import Progress
from gpulane.errors import StoreError, Unavailable
from gpulane.web.comfyui import frames
from gpulane.web.comfyui.live import LiveJob, LiveJobs
from gpulane.web.comfyui.outbox import Worth
from gpulane.web.comfyui.sockets import ClientSocket
from gpulane.web.ports import JobsPort

STATUS_SECONDS: Final = 0.2
"""Each status makes every open page ask for the queue and the history (comfyui.md 9)."""
SOCKETS_MAX: Final = 4_096
SOCKETS_PER_ACCOUNT_MAX: Final = 512

_log = structlog.stdlib.get_logger(__name__)
_WORTH: Final = {"progress": Worth.PROGRESS, "progress_state": Worth.PROGRESS}

Spawn = Callable[[Coroutine[Any, Any, None]], None]
"""Runs something beside; whoever gave it ends it."""


class Events:
    """All sockets of this process, and what they hear."""

    def __init__(
        self,
        jobs: JobsPort,
        live: LiveJobs,
        *,
        spawn: Spawn,
        on_executed: Callable[[Account, JobId, msgspec.Raw], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._jobs = jobs
        self._live = live
        self._spawn = spawn
        self._on_executed = on_executed
        self._now_ms = now_ms
        self._sockets: dict[Account, dict[str, set[ClientSocket]]] = {}
        self._statuses: dict[Account, _StatusPace] = {}
        self._repeats: set[tuple[Account, str]] = set()
        self._stops = [jobs.listen(self._hear), jobs.hub.listen(self._hear_progress)]

    # --- sockets come and go

    def check_room(self, account: Account) -> None:
        """Refuse one socket too many."""
        mine = sum(map(len, self._sockets.get(account, {}).values()))
        every = sum(len(group) for clients in self._sockets.values() for group in clients.values())
        if every >= SOCKETS_MAX or mine >= SOCKETS_PER_ACCOUNT_MAX:
            raise Unavailable("too many open WebSocket connections", retry_after_seconds=5.0)

    def join(self, socket: ClientSocket) -> None:
        """Greet a socket, tell it what runs, and let it hear from now on."""
        remaining = self._live.remaining(socket.account)
        socket.send_text(frames.status(remaining, sid=socket.client_id))
        for live in self._live.running_of(socket.account, socket.client_id):
            for message in live.replay.messages():
                socket.send_text(rewrite_message(message, job=live.job, prompt_id=live.shown_id))
        self._sockets.setdefault(socket.account, {}).setdefault(socket.client_id, set()).add(socket)

    def part(self, socket: ClientSocket) -> None:
        """Let a socket hear nothing more. Others under the same client id go on."""
        clients = self._sockets.get(socket.account, {})
        group = clients.get(socket.client_id, set())
        group.discard(socket)
        if not group:
            clients.pop(socket.client_id, None)
        if not clients:
            self._sockets.pop(socket.account, None)
            pace = self._statuses.pop(socket.account, None)
            if pace is not None:
                pace.close()

    async def close(self) -> None:
        """Close every socket and hear nothing more. May be called twice."""
        while self._stops:
            self._stops.pop()()
        for pace in self._statuses.values():
            pace.close()
        everybody = [
            socket for clients in self._sockets.values() for group in clients.values() for socket in group
        ]
        async with asyncio.TaskGroup() as closing:
            for socket in everybody:
                closing.create_task(socket.close())

    # --- facts about jobs

    def _hear(self, events: tuple[StoreEvent, ...]) -> None:
        for event in events:
            try:
                self._take(event)
            except Exception:  # noqa: BLE001 - logged
                # Whoever tells us is in the middle of deciding: a fault here costs messages, never the queue.
                _log.exception("event_not_told")

    def _take(self, event: StoreEvent) -> None:
        match event:
            case JobSubmitted() if event.job.service is Service.COMFYUI:
                if not self._live.stored(event.job):
                    self._spawn(self._look_up(event.job.id))
                self._status(event.job.account)
            case JobStarted():
                if (live := self._live.get(event.job)) is not None:
                    live.has_run = True
            case AttemptFailed():
                self._live.fell_back(event.job)
            case JobEnded():
                if (live := self._live.ended(event.job)) is not None:
                    self._end(live, event)
            case _:
                pass

    async def _look_up(self, job: JobId) -> None:
        """A job that came through another door, or another node's: its client may be here all the same."""
        try:
            record = await self._jobs.record(job)
        except StoreError:
            return  # nobody hears of it; the queue and the history still have it
        if record is not None and self._live.get(job) is not None:
            self._live.adopt(record)

    def _end(self, live: LiveJob, event: JobEnded) -> None:
        wanted = frames.ENDING[event.state]
        told = [text for kind, text in live.held if kind == wanted]
        made = frames.ending(event.state, live.shown_id, event.failure, self._now_ms())
        self._tell(live, told[-1] if told else made)
        self._status(live.account)
        self._tell(live, frames.end_of_run(live.shown_id))
        if not live.has_run and live.client_id is not None:
            # The page takes any end for that of the prompt it shows; what really runs is told once more.
            self._repeat_soon(live.account, live.client_id)

    def _repeat_soon(self, account: Account, client_id: str) -> None:
        """Tell a client what runs, once after however many cancels came together."""
        if not self._repeats:
            asyncio.get_running_loop().call_soon(self._repeat)
        self._repeats.add((account, client_id))

    def _repeat(self) -> None:
        repeats, self._repeats = self._repeats, set()
        for account, client_id in repeats:
            for live in self._live.running_of(account, client_id):
                for text in (live.replay.start, *live.replay.messages()):
                    if text is not None:
                        self._tell(live, text)

    # --- what engines say

    def _hear_progress(self, progress: Progress) -> None:
        try:
            self._pass_on(progress)
        except Exception:  # noqa: BLE001 - logged
            _log.exception("progress_not_told", job=progress.job)

    def _pass_on(self, progress: Progress) -> None:
        if progress.message is not None:
            self._hear_message(progress.job, progress.message)
        if progress.binary is not None and (live := self._live.get(progress.job)) is not None:
            self._show(live, progress.binary)

    def _hear_message(self, job: JobId, text: bytes) -> None:
        message = read_message(text)
        if message is None or message.kind == "status":
            return
        is_end = message.kind in VERDICTS or message.is_idle_word
        if not is_end:
            self._live.note(job, message.kind, text)
        live = self._live.get(job)
        if live is None:
            return
        if is_end:
            live.hold(message.kind, text)
            return
        if message.kind == "executed" and message.output is not None:
            self._on_executed(live.account, job, message.output)
        self._tell(live, text, _WORTH.get(message.kind, Worth.ESSENTIAL))

    def _tell(self, live: LiveJob, message: bytes, worth: Worth = Worth.ESSENTIAL) -> None:
        sockets = self._sockets_of(live)
        if sockets:
            text = rewrite_message(message, job=live.job, prompt_id=live.shown_id)
            for socket in sockets:
                socket.send_text(text, worth)

    def _show(self, live: LiveJob, frame: bytes) -> None:
        sockets = self._sockets_of(live)
        if not sockets:
            return
        if frame_type(frame) != PREVIEW_WITH_METADATA:
            for socket in sockets:
                socket.send_preview(frame)
            return
        rich = rewrite_frame(frame, job=live.job, prompt_id=live.shown_id)
        plain = None if all(socket.takes_metadata for socket in sockets) else plain_preview(frame)
        for socket in sockets:
            chosen = rich if socket.takes_metadata else plain
            if chosen is not None:
                socket.send_preview(chosen)

    def _sockets_of(self, live: LiveJob) -> tuple[ClientSocket, ...]:
        if live.client_id is None:
            return ()
        return tuple(self._sockets.get(live.account, {}).get(live.client_id, ()))

    # --- status

    def _status(self, account: Account) -> None:
        """Tell every socket of an account how much remains: at most five times a second, always at last."""
        if account not in self._sockets:
            return
        pace = self._statuses.get(account)
        if pace is None:
            pace = self._statuses[account] = _StatusPace(lambda: self._send_status(account))
        pace.ask()

    def _send_status(self, account: Account) -> None:
        text = frames.status(self._live.remaining(account))
        for group in self._sockets.get(account, {}).values():
            for socket in group:
                socket.send_text(text)


class _StatusPace:
    """Calls `send` at once when it has not for a while, else once when the while is over."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send
        self._last = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def ask(self) -> None:
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        wait = self._last + STATUS_SECONDS - loop.time()
        if wait <= 0:
            self._fire()
        else:
            self._timer = loop.call_later(wait, self._fire)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._last = asyncio.get_running_loop().time()
        self._send()
