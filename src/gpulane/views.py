"""What the running gateway shows of itself: plain data between the dispatcher, which fills it in, and the
web, which shows it.

The two never import each other; they meet in these classes and in the ports that `service` hands over.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpulane.core.model import EngineState, EngineUrl, GpuId, GpuState, JobId, ModelKey, Service
from gpulane.engine.base import Description
from gpulane.relay.answer import HeldAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCall:
    """A request whose client waits."""

    job: JobId
    answer: HeldAnswer
    """Filled by the engine client; has a gpu header to add once begun."""
    joined: bool = False
    """It joined an identical call of the same account that was there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why something is so: a stable code, a sentence, and the values in it."""

    code: str
    text: str
    args: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a waiting job stands now."""

    position: int | None
    """1 goes next; None when it does not wait."""
    reason: Reason | None
    estimated_start_seconds: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine, as shown."""

    url: EngineUrl
    service: Service
    name: str
    gpu: GpuId
    state: EngineState
    why: str
    """What is wrong with it; empty when nothing is."""
    model: ModelKey
    description: Description | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """One gpu, as shown."""

    id: GpuId
    name: str
    node: str
    uuid: str
    state: GpuState
    why: str
    """What occupies it when no job does (`stranger`, `recovering` ...); empty when nothing does."""
    job: JobId | None
    engines: tuple[EngineView, ...]
    vram_bytes_total: int | None
    vram_bytes_free: int | None
    labels: frozenset[str]
    utilization_percent: float | None = None
    """By the driver; None is unknown, as below."""
    temperature_celsius: float | None = None
    power_watts: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """Counts for pages and metrics."""

    waiting: int
    running: int
    paused: bool
    waiting_by_service: dict[Service, int]
