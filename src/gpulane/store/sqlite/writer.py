"""One thread that owns a database: takes everything that came in while the last commit ran, commits it once,
answers all.

Nothing is answered before its commit. A call that fails does not spoil the others of its batch: what was done
for them is undone and each is done again by itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, Protocol, TypeVar, cast

from gpulane.core.events import StoreEvent
from gpulane.errors import StoreError

BATCH_MAX: Final = 256
"""Calls in one commit; more would let the first of them wait for the last."""
PENDING_MAX: Final = 20_000
"""Calls that may wait for the thread; more is refused, since somebody above forgot a limit."""

T = TypeVar("T")


@dataclass(slots=True)
class Call:
    """What one caller wants done in the thread, and what came of it."""

    work: Callable[[], object]
    future: asyncio.Future[object]
    value: object = None
    error: Exception | None = None


@dataclass(slots=True)
class Batch:
    """What one commit answers."""

    calls: list[Call]
    events: Sequence[StoreEvent] = ()


class Database(Protocol):
    """What the thread drives. Only the thread calls it."""

    def commit(self) -> Sequence[StoreEvent]:
        """Make durable what the calls since the last commit did; returns what there is to tell."""
        ...

    def undo(self) -> None:
        """Forget what was done since the last commit."""
        ...


class Writer:
    """The thread, and the way in."""

    def __init__(self, name: str, database: Database, tell: Callable[[Sequence[StoreEvent]], None]) -> None:
        self._database = database
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._pending = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread; returns once it is durable."""
        if self._is_closed:
            raise StoreError("the store is closed")
        if self._pending >= PENDING_MAX:
            raise StoreError("the disk cannot keep up: too many changes wait to be written")
        future: asyncio.Future[object] = self._loop.create_future()
        self._pending += 1
        self._calls.put(Call(work, future))
        return cast("T", await future)

    async def close(self) -> None:
        """Finish what was asked, then end the thread."""
        if not self._is_closed:
            self._is_closed = True
            self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    # -- in the thread

    def _run(self) -> None:
        while True:
            calls = self._take()
            work = [call for call in calls if call is not None]
            try:
                for batch in self._done(work) if work else ():
                    self._loop.call_soon_threadsafe(self._deliver, batch)
            except RuntimeError:  # the loop was closed: nobody waits any more
                return
            if len(work) < len(calls):
                return

    def _take(self) -> list[Call | None]:
        calls = [self._calls.get()]
        try:
            while len(calls) < BATCH_MAX and calls[-1] is not None:
                calls.append(self._calls.get_nowait())
        except Empty:
            pass
        return calls

    def _done(self, calls: list[Call]) -> list[Batch]:
        """1. all in one commit  2. the store failed: all fail alike  3. a call failed: each in a commit of
        its own.
        """
        try:
            for call in calls:
                call.value = call.work()
            return [Batch(calls, self._database.commit())]
        except StoreError as error:
            self._undo()
            for call in calls:
                call.error = error
            return [Batch(calls)]
        except Exception:  # noqa: BLE001  a fault of one call, told to its caller below
            self._undo()
            return [self._done_alone(call) for call in calls]

    def _done_alone(self, call: Call) -> Batch:
        try:
            call.value = call.work()
            return Batch([call], self._database.commit())
        except Exception as error:  # noqa: BLE001  goes to the caller
            self._undo()
            call.error = error
            return Batch([call])

    def _undo(self) -> None:
        try:
            self._database.undo()
        except StoreError:
            pass  # the next call meets it again, and its caller is told

    # -- on the event loop

    def _deliver(self, batch: Batch) -> None:
        self._pending -= len(batch.calls)
        try:
            if batch.events:
                self._tell(batch.events)
        finally:
            for call in batch.calls:
                if call.future.done():  # its caller was cancelled; what it asked is done all the same
                    continue
                if call.error is None:
                    call.future.set_result(call.value)
                else:
                    call.future.set_exception(call.error)
