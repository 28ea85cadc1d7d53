"""The step that must not be interrupted: event in, book changed, decisions out.

There is no await between an event and its decisions, so no other task can see the book half-way. Slow work
is begun here and
reports back by further events; nothing here waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, assert_never

from gpulane.core.book import Book
from gpulane.core.decisions import AskAgain, StartAttempt
from gpulane.core.events import ClaimProposed, LocalEvent, StoreEvent
from gpulane.core.policy import Policy
from gpulane.core.scheduler import decide

WAKE_SECONDS_MIN: Final = 0.001
"""An overrun prediction would make the timer spin (scheduling.md, trap 14)."""
WAKE_SECONDS_MAX: Final = 5.0
"""A belt for a missed wake-up: an idle gpu is looked at again at least this often."""

StoreListener = Callable[[tuple[StoreEvent, ...]], None]


class Loop:
    """Owns the book. One per process; everything runs on the event loop's thread."""

    def __init__(
        self,
        book: Book,
        policy: Policy,
        clock: Callable[[], float],
        carry_out: Callable[[StartAttempt], bool],
    ) -> None:
        self.book = book
        self._policy = policy
        self._clock = clock
        self._carry_out = carry_out
        self._listeners: list[StoreListener] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = True
        self._pending = False

    def start(self) -> None:
        """Begin to decide."""
        self._stopped = False
        self._decide()

    def stop(self) -> None:
        """Decide nothing more; facts are still recorded."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def hear(self, events: tuple[StoreEvent, ...]) -> None:
        """Take what the store has made true."""
        now = self._clock()
        for event in events:
            self.book.apply(event, now)
        self._decide()
        for listener in tuple(self._listeners):
            listener(events)

    def tell(self, *events: LocalEvent) -> None:
        """Take what this process has learned."""
        now = self._clock()
        for event in events:
            self.book.apply(event, now)
        self._decide()

    def listen(self, listener: StoreListener) -> Callable[[], None]:
        """Pass every store event on, after the book has it; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def _decide(self) -> None:
        if self._stopped or self._pending:
            return
        self._pending = True  # carrying out tells the book of the proposal: that is no new question
        try:
            self._decide_once()
        finally:
            self._pending = False

    def _decide_once(self) -> None:
        now = self._clock()
        wake: float | None = now + WAKE_SECONDS_MAX
        for decision in decide(self.book, self._policy, now):
            match decision:
                case StartAttempt():
                    jobs = tuple(candidate.job for candidate in decision.candidates)
                    if self._carry_out(decision):
                        self.book.apply(ClaimProposed(gpu=decision.gpu, jobs=jobs), now)
                case AskAgain():
                    wake = min(wake, decision.at)
                case _:
                    assert_never(decision)
        if self._timer is not None:
            self._timer.cancel()
        delay = min(max(wake - now, WAKE_SECONDS_MIN), WAKE_SECONDS_MAX)
        self._timer = asyncio.get_running_loop().call_later(delay, self._decide)
