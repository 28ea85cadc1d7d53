"""An event loop whose clock jumps to the next timer: hours of waiting in milliseconds, the same order every
time.

For code that waits for nothing but the loop (no threads, no sockets). Ready callbacks are shuffled by a
seed, so that many seeds try many interleavings; a program in which nothing can ever happen again raises
Deadlock instead of hanging. It must never be used with code that runs threads: virtual time does not wait
for them.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

STEPS_MAX: Final = 5_000_000
"""A program that spins without time going on is stopped after so many rounds."""


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: nothing can happen any more."""


class _Selector:
    """Waits for nothing: it moves the clock to where the loop wants to sleep until."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        self._advance = advance

    def select(self, timeout: float | None) -> list[object]:
        self._advance(timeout)
        return []

    def close(self) -> None:
        pass


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Starts at time 0. Uses private names of asyncio's BaseEventLoop; its test runs on every Python we
    support.
    """

    _ready: deque[Any]
    _scheduled: list[Any]

    def __init__(self, seed: int | None = None) -> None:
        """Without a seed, ready callbacks keep their order."""
        super().__init__()
        self._now = 0.0
        self._chance = None if seed is None else random.Random(seed)
        self._selector = _Selector(self._advance)
        self._steps = 0

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass in which nothing ran, as when the process was stopped."""
        self._now += seconds

    def _advance(self, timeout: float | None) -> None:
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise Deadlock("the program spins: millions of rounds")
        if timeout is None:
            raise Deadlock("nothing is ready and no timer is set")
        self._now += max(timeout, 0.0)

    def _run_once(self) -> None:
        if self._chance is not None and len(self._ready) > 1:
            ready = list(self._ready)
            self._chance.shuffle(ready)
            self._ready.clear()
            self._ready.extend(ready)
        super()._run_once()  # type: ignore[misc]

    def _process_events(self, event_list: list[object]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run(main: Coroutine[Any, Any, T], *, seed: int | None = None, seconds_max: float = 1_000_000.0) -> T:
    """Run to the end in virtual time; a TimeoutError tells that it was not over after `seconds_max` of it."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds_max):
            return await main

    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(seed)) as runner:
        return runner.run(bounded())
