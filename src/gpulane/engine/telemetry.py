"""Memory, load, temperature and power of NVIDIA cards, by the driver's own word.

A card is looked up by its UUID, never by its place in a list. What is not known is None, never zero; no
caller ever sees an exception or waits longer than the limit. A driver can hang, and a call into it cannot be
ended: so each runs in a thread of its own that the process does not wait for, and after a failure nothing is
asked for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, TypeVar, cast

import structlog

from gpulane.engine.nvml import TEMPERATURE_GPU, Nvml, concerns_one_card, load

CALL_SECONDS: Final = 2.0
"""A healthy driver answers within milliseconds, a starting one within a second."""
REST_SECONDS: Final = 1.0
"""After the first failure; doubled with each further one."""
REST_SECONDS_MAX: Final = 60.0
THREADS_HUNG_MAX: Final = 4
"""With so many threads hanging in the driver it is not asked again until one comes back."""
CARDS_MAX: Final = 64

_log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReading:
    """One look at one card. None: the driver does not tell."""

    uuid: str
    name: str = ""
    bytes_used: int | None = None
    bytes_free: int | None = None
    bytes_total: int | None = None
    utilization_percent: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it tells nothing at all."""
        values = (self.bytes_total, self.utilization_percent, self.temperature_celsius, self.power_watts)
        return all(value is None for value in values)


class Telemetry:
    """The cards of this machine. Without the library, or without a driver, all is unknown."""

    def __init__(
        self,
        nvml: Nvml | None = None,
        *,
        call_seconds: float = CALL_SECONDS,
        rest_seconds: float = REST_SECONDS,
        rest_seconds_max: float = REST_SECONDS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nvml`: the library; by default the installed one."""
        self._nvml = nvml if nvml is not None else load()
        self._call_seconds = call_seconds
        self._rest_seconds = rest_seconds
        self._rest_seconds_max = rest_seconds_max
        self._clock = clock
        self._turn = asyncio.Lock()
        self._is_open = False
        self._has_worked = False
        self._failures = 0
        self._ask_again_at = float("-inf")
        self._hung = 0

    @property
    def is_there(self) -> bool:
        """Whether the driver answered when it was last asked."""
        return self._is_open

    async def open(self) -> None:
        """Connect to the driver, where there is one."""
        await self._ask(lambda nvml: nvml.nvmlDeviceGetCount())

    async def read(self, uuid: str) -> CardReading | None:
        """Look at one card; None: nothing is known of it now."""
        if not uuid.isascii():
            return None
        found = await self._ask(lambda nvml: _read_by_uuid(nvml, uuid))
        return None if found is None or found.is_empty else found

    async def cards(self) -> tuple[CardReading, ...]:
        """Look at all cards, in no order that means anything."""
        return await self._ask(_read_all) or ()

    async def close(self) -> None:
        """Let go of the driver. It may be opened again."""
        nvml = self._nvml
        if nvml is not None and self._is_open:
            self._is_open = False
            with contextlib.suppress(Exception):
                await self._in_time(nvml.nvmlShutdown)

    async def _ask(self, question: Callable[[Nvml], T]) -> T | None:
        """Ask one question at a time; connects first where that is needed, and rests after failures."""
        nvml = self._nvml
        if nvml is None:
            return None
        async with self._turn:
            if self._clock() < self._ask_again_at or self._hung >= THREADS_HUNG_MAX:
                return None
            connect = not self._is_open
            try:
                answer = await self._in_time(lambda: _asked(nvml, question, connect=connect))
            except Exception as error:  # noqa: BLE001 - whatever a driver or its binding throws: unknown
                self._failed(error)
                return None
            self._succeeded()
            return answer

    def _failed(self, error: Exception) -> None:
        self._is_open = False
        rest = min(self._rest_seconds_max, self._rest_seconds * 2.0**self._failures)
        if self._failures == 0 and self._has_worked:
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            _log.warning("telemetry_lost", why=why)
        self._failures = min(self._failures + 1, 30)
        self._ask_again_at = self._clock() + rest

    def _succeeded(self) -> None:
        if self._failures and self._has_worked:
            _log.info("telemetry_back")
        self._is_open = self._has_worked = True
        self._failures = 0

    async def _in_time(self, work: Callable[[], T]) -> T:
        """Run in a thread. Raises what it raises, and TimeoutError; the thread is then left to itself."""
        call = _Call(work, asyncio.get_running_loop(), self._came_back)
        try:
            async with asyncio.timeout(self._call_seconds):
                return await call.result
        except BaseException:
            if call.is_running:
                self._hung += 1
                call.is_given_up = True
            raise

    def _came_back(self) -> None:
        self._hung -= 1


class _Call(Generic[T]):
    """One call in a daemon thread: neither the loop's end nor the process's waits for it."""

    def __init__(
        self, work: Callable[[], T], loop: asyncio.AbstractEventLoop, came_back: Callable[[], None]
    ) -> None:
        self.result: asyncio.Future[T] = loop.create_future()
        self.is_running = True
        self.is_given_up = False
        self._work = work
        self._loop = loop
        self._came_back = came_back
        threading.Thread(target=self._run, name="nvml", daemon=True).start()

    def _run(self) -> None:
        try:
            result = self._work()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            settle = partial(self._settle, None, error)
        else:
            settle = partial(self._settle, result, None)
        # A loop that was closed meanwhile has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(settle)

    def _settle(self, result: T | None, error: Exception | None) -> None:
        self.is_running = False
        if self.is_given_up:
            self._came_back()
        if self.result.done():
            return
        if error is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(cast("T", result))


# --- in the thread


def _asked(nvml: Nvml, question: Callable[[Nvml], T], *, connect: bool) -> T:
    if connect:
        # What was opened before a driver went away does not work with the one that comes after it.
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
        nvml.nvmlInit()
    return question(nvml)


def _read_by_uuid(nvml: Nvml, uuid: str) -> CardReading | None:
    handle = _told(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(uuid))
    return None if handle is None else _reading(nvml, handle, uuid)


def _read_all(nvml: Nvml) -> tuple[CardReading, ...]:
    found: list[CardReading] = []
    for index in range(min(nvml.nvmlDeviceGetCount(), CARDS_MAX)):
        # An index serves to see each card once; what a card is called is its UUID.
        handle = _told(nvml, partial(nvml.nvmlDeviceGetHandleByIndex, index))
        uuid = None if handle is None else _told(nvml, partial(nvml.nvmlDeviceGetUUID, handle))
        if uuid is not None:
            found.append(_reading(nvml, handle, uuid))
    return tuple(found)


def _reading(nvml: Nvml, handle: object, uuid: str) -> CardReading:
    memory = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    if memory is not None and memory.total <= 0:
        # Chips that share the RAM have no memory of their own to tell of.
        memory = None
    load = _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    heat = _told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, TEMPERATURE_GPU))
    milliwatts = _told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return CardReading(
        uuid=uuid,
        name=_told(nvml, lambda: nvml.nvmlDeviceGetName(handle)) or "",
        bytes_used=None if memory is None else memory.used,
        bytes_free=None if memory is None else memory.free,
        bytes_total=None if memory is None else memory.total,
        utilization_percent=None if load is None else float(load.gpu),
        temperature_celsius=None if heat is None else float(heat),
        power_watts=None if milliwatts is None else milliwatts / 1000.0,
    )


def _told(nvml: Nvml, ask: Callable[[], T]) -> T | None:
    """Ask; None where this card does not tell. Raises what is wrong with the driver."""
    try:
        return ask()
    except nvml.NVMLError as error:
        if not concerns_one_card(nvml, error):
            raise
        return None
