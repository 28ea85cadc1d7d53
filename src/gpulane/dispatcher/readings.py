"""What the driver said last of each gpu of this node; nothing without a driver, or a UUID in the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from gpulane.core.model import Gpu, GpuId
from gpulane.engine.telemetry import CardReading, Telemetry

READ_SECONDS: Final = 5.0


class Readings:
    """For pages and people; what hands cards over measures for itself, at its moment."""

    def __init__(self, telemetry: Telemetry, gpus: Iterable[Gpu]) -> None:
        self._telemetry = telemetry
        self._gpus = tuple(gpus)
        self._last: dict[GpuId, CardReading | None] = {}

    def last(self, gpu: GpuId) -> CardReading | None:
        return self._last.get(gpu)

    async def run(self) -> None:
        """Read for ever, until cancelled."""
        while self._telemetry.is_there:
            for gpu in self._gpus:
                self._last[gpu.id] = await self._telemetry.read(gpu.uuid)
            await asyncio.sleep(READ_SECONDS)
