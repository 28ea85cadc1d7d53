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
        held = self._calls.get(self._left.pop((account, service, digest), JobId("")))
        if held is None:
            return None
        _cancel(held)
        held.clients += 1
        if not held.is_running and not held.is_over:
            self._on_away(held.job.id, False)
        return held

    def leave(self, job: JobId) -> None:
        """Note that one client of the call went away."""
        held = self._calls.get(job)
        if held is None:
            return
        held.clients -= 1
        if held.clients > 0:
            return
        self._left[held.key] = job
        if held.is_over:
            self._keep_answer(held)
        elif held.is_running:
            if self._settings.on_disconnect == "interrupt":
                self._on_given_up(job)
        else:
            self._on_away(job, True)
            held.timer = asyncio.get_running_loop().call_later(
                self._settings.rejoin_seconds, self._on_given_up, job
            )

    def started(self, job: JobId) -> None:
        """Note that an attempt of the call runs."""
        held = self._calls.get(job)
        if held is not None:
            held.is_running = True

    def waits_again(self, job: JobId) -> None:
        """Note that the call's attempt failed and it waits for another."""
        held = self._calls.get(job)
        if held is not None:
            held.is_running = False
            if held.clients <= 0:
                self._on_away(job, True)
                held.timer = asyncio.get_running_loop().call_later(
                    self._settings.rejoin_seconds, self._on_given_up, job
                )

    def over(self, job: JobId) -> None:
        """Note that the job has ended; its answer stays for whoever still reads, or for a while."""
        held = self._calls.get(job)
        if held is None:
            return
        _cancel(held)
        held.is_over = True
        held.is_running = False
        if held.clients <= 0:
            self._keep_answer(held)

    def done(self, job: JobId) -> None:
        """Note that a client has its whole answer: nobody will ask again."""
        held = self._calls.get(job)
        if held is not None and held.is_over and held.clients <= 1:
            self._drop(held)

    def drop(self, job: JobId) -> None:
        """Forget a call that was never stored."""
        held = self._calls.get(job)
        if held is not None:
            self._drop(held)

    def close(self) -> None:
        for held in tuple(self._calls.values()):
            self._drop(held)

    def _keep_answer(self, held: Held) -> None:
        _cancel(held)
        held.timer = asyncio.get_running_loop().call_later(
            self._settings.orphan_result_seconds, self._drop, held
        )
        kept = [other for other in self._calls.values() if other.is_over and other.clients <= 0]
        for oldest in kept[: max(0, len(kept) - ORPHANS_MAX)]:
            self._drop(oldest)

    def _drop(self, held: Held) -> None:
        _cancel(held)
        held.answer.close()
        self._calls.pop(held.job.id, None)
        if self._left.get(held.key) == held.job.id:
            del self._left[held.key]


def _cancel(held: Held) -> None:
    if held.timer is not None:
        held.timer.cancel()
        held.timer = None
