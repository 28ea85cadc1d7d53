"""The step that must not be interrupted: event in, book changed, decisions out.

There is no await between an event and its decisions, so no other task can see the book half-way. Slow work
is begun here and reports back by further events; nothing here waits. A fault in here never reaches the store
or whoever told the event: the book is made anew from the store, and a wrong decision is taken again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, assert_never

import structlog

from gpulane.core.book import Book, GapInEvents
from gpulane.core.decisions import AskAgain, StartAttempt
from gpulane.core.events import ClaimProposed, LocalEvent, Snapshot, StoreEvent
from gpulane.core.policy import Policy
from gpulane.core.scheduler import decide

WAKE_SECONDS_MIN: Final = 0.001
"""An overrun prediction would make the timer spin (scheduling.md, trap 14)."""
WAKE_SECONDS_MAX: Final = 5.0
"""A belt for a missed wake-up: an idle gpu is looked at again at least this often."""
MISSED_MAX: Final = 10_000
"""Events kept while the book is being made anew; beyond that it is made anew once more."""

StoreListener = Callable[[tuple[StoreEvent, ...]], None]
_log = structlog.stdlib.get_logger(__name__)


class Loop:
    """Owns the book. One per process; everything runs on the event loop's thread."""

    def __init__(
        self,
        book: Book,
        policy: Policy,
        clock: Callable[[], float],
        carry_out: Callable[[StartAttempt], bool],
        *,
        on_broken: Callable[[], None],
    ) -> None:
        """`on_broken` is told once that the book has to be restored; `restore` ends that."""
        self.book = book
        self._policy = policy
        self._clock = clock
        self._carry_out = carry_out
        self._on_broken = on_broken
        self._listeners: list[StoreListener] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = True
        self._pending = False
        self._missed: deque[StoreEvent] | None = None
        """Events that came while the book is broken; None while it is whole."""

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
        self._record(events)
        self._decide()
        for listener in tuple(self._listeners):
            try:
                listener(events)
            except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
                # Events come inside the store's verbs: a fault in showing them must not look like the
                # store's.
                _log.exception("listener_broke")

    def tell(self, *events: LocalEvent) -> None:
        """Take what this process has learned."""
        now = self._clock()
        for event in events:
            try:
                self.book.apply(event, now)
            except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
                _log.exception("fact_not_recorded", told=type(event).__name__)
                self._break()
        self._decide()

    def restore(self, snapshot: Snapshot) -> None:
        """Make the book anew from the store, with the events that came meanwhile."""
        missed, self._missed = self._missed or (), None
        self.book.restore(snapshot, self._clock())
        self._record(tuple(missed))
        self._decide()

    def listen(self, listener: StoreListener) -> Callable[[], None]:
        """Pass every store event on, after the book has it; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def _record(self, events: tuple[StoreEvent, ...]) -> None:
        now = self._clock()
        for event in events:
            if self._missed is not None:
                self._missed.append(event)
                continue
            try:
                self.book.apply(event, now)
            except Exception as error:  # noqa: BLE001  a fault in here must not end what goes on beside it
                _log.exception("event_not_recorded", n=event.n, is_gap=isinstance(error, GapInEvents))
                self._break()
                self._missed_now().append(event)

    def _break(self) -> None:
        if self._missed is None:
            self._missed = deque(maxlen=MISSED_MAX)
            self._on_broken()

    def _missed_now(self) -> deque[StoreEvent]:
        assert self._missed is not None, "the book is broken"
        return self._missed

    def _decide(self) -> None:
        if self._stopped or self._pending or self._missed is not None:
            return
        self._pending = True  # carrying out tells the book of the proposal: that is no new question
        wake: float | None = None
        try:
            # A gpu that could not be taken is told to the book, and its job may go to another.
            for _ in range(len(self.book.gpus) + 1):
                is_whole, wake = self._decide_once()
                if is_whole:
                    break
        except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
            _log.exception("decision_broke")
        finally:
            self._pending = False
            self._ask_again(wake)

    def _decide_once(self) -> tuple[bool, float]:
        """Returns whether everything decided was begun, and when to ask again."""
        now = self._clock()
        wake, is_whole = now + WAKE_SECONDS_MAX, True
        for decision in decide(self.book, self._policy, now):
            match decision:
                case StartAttempt():
                    jobs = tuple(candidate.job for candidate in decision.candidates)
                    if self._carry_out(decision):
                        self.book.apply(ClaimProposed(gpu=decision.gpu, jobs=jobs), now)
                    else:
                        is_whole = False
                case AskAgain():
                    wake = min(wake, decision.at)
                case _:
                    assert_never(decision)
        return is_whole, wake

    def _ask_again(self, at: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        seconds = WAKE_SECONDS_MAX if at is None else at - self._clock()
        delay = min(max(seconds, WAKE_SECONDS_MIN), WAKE_SECONDS_MAX)
        self._timer = asyncio.get_running_loop().call_later(delay, self._decide)
