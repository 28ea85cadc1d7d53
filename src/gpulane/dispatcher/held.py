"""Calls whose clients wait: their requests, their answers, and what becomes of both when a client leaves.

A held call's body lives here and nowhere else, and dies with the process. When the client of a *waiting*
call leaves, the
call is not started but keeps its place for `rejoin_seconds`; when the client of a *running* one leaves, it
ends as the settings
say and its answer is kept for `orphan_result_seconds`. The identical request of the same account joins
either one: clients
behind proxies with short time-outs ask again, and must not render twice. Two clients that both still wait
are two jobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from gpulane.adapters.base import EngineRequest
from gpulane.config import HoldSettings
from gpulane.core.model import Account, Job, JobId, Service
from gpulane.relay.answer import HeldAnswer

ORPHANS_MAX: Final = 1_000
"""Answers kept for clients that left; the oldest goes first."""
ORPHAN_BYTES_MAX: Final = 256 * 1024**2
"""Memory that they may take together; those in spool files are not counted."""

Key = tuple[Account, Service, str]


@dataclass(slots=True, kw_only=True)
class Held:
    """One held call."""

    job: Job
    request: EngineRequest
    meta: bytes
    answer: HeldAnswer
    digest: str
    clients: int = 1
    is_running: bool = False
    is_over: bool = False
    is_answered: bool = False
    """A client has its whole answer: nobody will ask again."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def key(self) -> Key:
        return (self.job.account, self.job.service, self.digest)


class HeldCalls:
    """All held calls of this process, and the answers of those whose client left."""

    def __init__(
        self,
        settings: HoldSettings,
        *,
        on_away: Callable[[JobId, bool], None],
        on_given_up: Callable[[JobId], None],
    ) -> None:
        self._settings = settings
        self._on_away = on_away
        self._on_given_up = on_given_up
        self._calls: dict[JobId, Held] = {}
        self._left: dict[Key, JobId] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Held]:
        return iter(tuple(self._calls.values()))

    def get(self, job: JobId) -> Held | None:
        return self._calls.get(job)

    def add(self, held: Held) -> None:
        """Keep a new call, before its job is stored."""
        self._calls[held.job.id] = held

    def join(self, account: Account, service: Service, digest: str) -> Held | None:
        """Find the identical call whose client left, and take its client's place."""
        job = self._left.get((account, service, digest))
        held = None if job is None else self._calls.get(job)
        if held is not None:
            self._unleave(held)
        return held

    def join_open(self, job: JobId) -> Held | None:
        """Join a call by its job: a client has named it again."""
        held = self._calls.get(job)
        if held is None or held.is_answered:
            return None
        self._unleave(held)
        return held

    def leave(self, job: JobId) -> None:
        """Note that one client of the call went away."""
        held = self._calls.get(job)
        if held is None:
            return
        held.clients = max(0, held.clients - 1)
        if held.clients:
            return
        self._left[held.key] = job
        if held.is_over:
            self._keep_answer(held)
        elif not held.is_running:
            self._keep_place(held)
        elif self._settings.on_disconnect == "interrupt":
            self._give_up(held)

    def started(self, job: JobId) -> None:
        """Note that an attempt of the call runs: from here on its client may be away."""
        held = self._calls.get(job)
        if held is None:
            return
        held.is_running = True
        if not held.clients:
            _cancel(held)
            if self._settings.on_disconnect == "interrupt":
                self._give_up(held)

    def waits_again(self, job: JobId) -> None:
        """Note that the call waits (again): its attempt failed, or its claim was given back."""
        held = self._calls.get(job)
        if held is None:
            return
        held.is_running = False
        if not held.clients:
            self._keep_place(held)

    def over(self, job: JobId) -> None:
        """Note that the job has ended; its answer stays for whoever still reads, or for a while."""
        held = self._calls.get(job)
        if held is None:
            return
        _cancel(held)
        held.is_over = True
        held.is_running = False
        if held.is_answered:
            self._drop(held)
        elif not held.clients:
            self._keep_answer(held)

    def done(self, job: JobId) -> None:
        """Note that a client has its whole answer, perhaps before the job's end is recorded."""
        held = self._calls.get(job)
        if held is None:
            return
        held.clients = max(0, held.clients - 1)
        if held.clients:
            return
        held.is_answered = True
        self._forget_key(held)
        if held.is_over:
            self._drop(held)

    def drop(self, job: JobId) -> None:
        """Forget a call that was never stored."""
        held = self._calls.get(job)
        if held is not None:
            self._drop(held)

    def away(self) -> tuple[JobId, ...]:
        """Waiting calls whose clients are away: a book made anew has to be told."""
        return tuple(
            held.job.id
            for held in self._calls.values()
            if not (held.clients or held.is_running or held.is_over)
        )

    def close(self) -> None:
        for held in tuple(self._calls.values()):
            self._drop(held)

    # --- what becomes of a call without a client

    def _keep_place(self, held: Held) -> None:
        _cancel(held)
        self._on_away(held.job.id, True)
        held.timer = asyncio.get_running_loop().call_later(self._settings.rejoin_seconds, self._give_up, held)

    def _give_up(self, held: Held) -> None:
        """Nobody may join it from here on: it is going to be cancelled."""
        self._forget_key(held)
        self._on_given_up(held.job.id)

    def _unleave(self, held: Held) -> None:
        was_away = not held.clients
        self._forget_key(held)
        held.clients += 1
        if not was_away:
            return
        _cancel(held)
        if not held.is_running and not held.is_over:
            self._on_away(held.job.id, False)

    def _keep_answer(self, held: Held) -> None:
        """Keep a whole answer; what went wrong is not worth keeping: who asks again wants another try."""
        _cancel(held)
        if not held.answer.is_finished:
            self._drop(held)
            return
        held.timer = asyncio.get_running_loop().call_later(
            self._settings.orphan_result_seconds, self._drop, held
        )
        kept = [other for other in self._calls.values() if other.is_over and not other.clients]
        size = sum(_memory_bytes(other) for other in kept)
        for number, oldest in enumerate(kept):
            if len(kept) - number <= ORPHANS_MAX and size <= ORPHAN_BYTES_MAX:
                break
            size -= _memory_bytes(oldest)
            self._drop(oldest)

    def _drop(self, held: Held) -> None:
        _cancel(held)
        held.answer.close()
        self._calls.pop(held.job.id, None)
        self._forget_key(held)

    def _forget_key(self, held: Held) -> None:
        if self._left.get(held.key) == held.job.id:
            del self._left[held.key]


def _memory_bytes(held: Held) -> int:
    return 0 if held.answer.is_spooled else held.answer.bytes_written


def _cancel(held: Held) -> None:
    if held.timer is not None:
        held.timer.cancel()
        held.timer = None
