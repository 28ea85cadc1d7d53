"""What is learned from measurements: how long loads, hand-offs and jobs take, and how much memory. Recent
medians with fallbacks (of memory the largest); plain data in and out.

A load time that is too low is the dangerous side (more switches, longer waits), so fallbacks are on the
high side. Service seconds never contain a load, load seconds no hand-off.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from gpulane.core.model import NO_MODEL, GpuId, Job, ModelKey, Seconds, Service
from gpulane.core.policy import Policy

SAMPLES_MAX: Final = 9
"""Measurements kept per key: enough for a median that forgets a warm page cache within a day's work."""
KEYS_MAX: Final = 4096
"""Keys kept per table; the one learned first goes first."""
SECONDS_MAX: Final = 86_400.0
"""Longer measurements are broken clocks."""
BYTES_MAX: Final = 1 << 50
"""More memory than any card has: a broken measurement."""
FALLBACK_QUANTILE: Final = 0.75
"""What a fallback reads from the measurements of others: above the median, see above."""

K = TypeVar("K", bound=Hashable)
Rows = tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedValues:
    """All measurements as plain data, for a shell to keep over restarts."""

    loads: Rows = ()
    """((gpu, model), seconds), ((model,), seconds), ((service,), seconds): oldest first."""
    services: Rows = ()
    """((service, kind, signature), seconds per unit of work at speed 1), likewise shorter keys."""
    handoffs: Rows = ()
    """((gpu,), seconds)."""
    peaks: Rows = ()
    """((gpu, service, model), bytes), ((service, model), bytes)."""


@dataclass(slots=True)
class Table(Generic[K]):
    """Recent measurements by key, with their quantiles at hand."""

    samples: dict[K, tuple[float, ...]] = field(default_factory=dict[K, tuple[float, ...]])
    medians: dict[K, float] = field(default_factory=dict[K, float])
    highs: dict[K, float] = field(default_factory=dict[K, float])

    def add(self, key: K, value: float) -> None:
        if key not in self.samples and len(self.samples) >= KEYS_MAX:
            oldest = next(iter(self.samples))
            del self.samples[oldest], self.medians[oldest], self.highs[oldest]
        kept = (*self.samples.get(key, ()), value)[-SAMPLES_MAX:]
        ranked = sorted(kept)
        self.samples[key] = kept
        self.medians[key] = ranked[len(ranked) // 2]
        self.highs[key] = ranked[min(len(ranked) - 1, int(len(ranked) * FALLBACK_QUANTILE))]


@dataclass(slots=True)
class Learned:
    """Load seconds per (gpu, model) and service seconds per (service, kind, signature) and amount of work."""

    policy: Policy
    loads: Table[tuple[str, ...]] = field(default_factory=Table[tuple[str, ...]])
    rates: Table[tuple[str, ...]] = field(default_factory=Table[tuple[str, ...]])
    handoffs: Table[tuple[str, ...]] = field(default_factory=Table[tuple[str, ...]])
    peaks: Table[tuple[str, ...]] = field(default_factory=Table[tuple[str, ...]])

    def load_measured(self, gpu: GpuId, model: ModelKey, service: Service | None, seconds: Seconds) -> None:
        if not 0 <= seconds <= SECONDS_MAX:
            return
        self.loads.add((gpu, model), seconds)
        self.loads.add((model,), seconds)
        if service is not None:
            self.loads.add((service, "", ""), seconds)

    def handoff_measured(self, gpu: GpuId, seconds: Seconds) -> None:
        """Takes what a hand-off with an unload took."""
        if 0 <= seconds <= SECONDS_MAX:
            self.handoffs.add((gpu,), seconds)

    def vram_measured(self, gpu: GpuId, service: Service, model: ModelKey, bytes_peak: int) -> None:
        if not 0 < bytes_peak <= BYTES_MAX or service is Service.LOCK:
            return
        self.peaks.add((gpu, service, model), float(bytes_peak))
        if model != NO_MODEL:  # what is not named is not the same elsewhere
            self.peaks.add((service, model), float(bytes_peak))

    def service_measured(self, job: Job, speed: float, seconds: Seconds) -> None:
        if not 0 <= seconds <= SECONDS_MAX:
            return
        rate = seconds * speed / max(job.work.amount, 1.0)
        self.rates.add((job.service, job.kind, job.signature), rate)
        self.rates.add((job.service, job.kind), rate)
        # Rates of unlike kinds share no unit of work; their seconds do compare.
        self.rates.add((job.service,), seconds * speed)

    def load_seconds(self, gpu: GpuId, model: ModelKey, service: Service | None = None) -> Seconds:
        """Returns c: measured here, else for the model elsewhere, else for the service, else the default."""
        known = self.loads.medians.get((gpu, model))
        if known is None:
            known = self.loads.highs.get((model,))
        if known is None and service is not None:
            known = self.loads.highs.get((service, "", ""))
        return self.policy.load_seconds_unknown if known is None else known

    def handoff_seconds(self, gpu: GpuId) -> Seconds:
        """Returns what a hand-off takes on this gpu."""
        return self.handoffs.medians.get((gpu,), self.policy.handoff_seconds)

    def vram_peak(self, gpu: GpuId, service: Service, model: ModelKey) -> int | None:
        """Returns the most that a job of this model has lately needed: here, else on other gpus; None is
        unknown.
        """
        samples = self.peaks.samples.get((gpu, service, model))
        if samples is None and model != NO_MODEL:
            samples = self.peaks.samples.get((service, model))
        return int(max(samples)) if samples else None

    def service_seconds_high(self, job: Job, speed: float) -> Seconds:
        """Returns a service time that most jobs like this stay below: for patience, never for fairness."""
        rates = self.rates.highs
        rate = rates.get((job.service, job.kind, job.signature))
        if rate is None:
            rate = rates.get((job.service, job.kind))
        if rate is not None:
            return rate * max(job.work.amount, 1.0) / speed
        return rates.get((job.service,), self.policy.service_seconds_unknown) / speed

    def service_seconds(self, job: Job, speed: float) -> Seconds:
        """Returns the predicted service time, without a load."""
        rates = self.rates.medians
        rate = rates.get((job.service, job.kind, job.signature))
        if rate is None:
            rate = rates.get((job.service, job.kind))
        if rate is not None:
            return rate * max(job.work.amount, 1.0) / speed
        return rates.get((job.service,), self.policy.service_seconds_unknown) / speed

    def typical_seconds(self, service: Service) -> Seconds:
        """Returns what a job of this service takes, for positions and estimates over many jobs."""
        return max(self.rates.medians.get((service,), self.policy.service_seconds_unknown), 0.001)

    def values(self) -> LearnedValues:
        return LearnedValues(
            loads=tuple(self.loads.samples.items()),
            services=tuple(self.rates.samples.items()),
            handoffs=tuple(self.handoffs.samples.items()),
            peaks=tuple(self.peaks.samples.items()),
        )

    def recall(self, values: LearnedValues) -> None:
        """Takes over what an earlier process had learned."""
        tables = (
            (self.loads, values.loads),
            (self.rates, values.services),
            (self.handoffs, values.handoffs),
            (self.peaks, values.peaks),
        )
        for table, rows in tables:
            for key, samples in rows:
                for value in samples:
                    table.add(tuple(key), value)
