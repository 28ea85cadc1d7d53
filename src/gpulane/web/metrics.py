"""What Prometheus is told: counts kept as events pass, and the queue and gpus as they are when it asks.

Labels have few values, always: no ids, accounts, paths or models.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpulane.core.events import AttemptFailed, JobClaimed, JobEnded, JobStarted, JobSubmitted, StoreEvent
from gpulane.core.model import GpuState, Service
from gpulane.web.ports import JobsPort

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """One registry per listener; nothing is global."""

    def __init__(self, jobs: JobsPort) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(jobs))
        self._requests = self._counter("requests", "Answered requests.", "owner", "method", "status")
        self._submitted = self._counter("jobs_submitted", "Jobs taken.", "service")
        self._claims = self._counter("claims", "Claims granted.")
        self._starts = self._counter("attempts_started", "Attempts started.")
        self._failures = self._counter("attempts_failed", "Attempts that failed and are made again.", "kind")
        self._ended = self._counter("jobs_ended", "Jobs that ended.", "state")
        self._stop = jobs.listen(self._hear)

    def request_answered(self, owner: str, method: str, status: int) -> None:
        """Count one answered request."""
        self._requests.labels(owner, method if method in _METHODS else "other", str(status)).inc()

    def text(self) -> bytes:
        """Write the exposition."""
        return generate_latest(self.registry)

    def close(self) -> None:
        """Hear no more events."""
        self._stop()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"gpulane_{name}", text, labels, registry=self.registry)

    def _hear(self, events: tuple[StoreEvent, ...]) -> None:
        for event in events:
            match event:
                case JobSubmitted():
                    self._submitted.labels(event.job.service.value).inc()
                case JobClaimed():
                    self._claims.inc()
                case JobStarted():
                    self._starts.inc()
                case AttemptFailed():
                    self._failures.labels(event.failure.kind.value).inc()
                case JobEnded():
                    self._ended.labels(event.state.value).inc()
                case _:
                    pass


class _Now(Collector):
    """Gauges read at each scrape."""

    def __init__(self, jobs: JobsPort) -> None:
        self._jobs = jobs

    def describe(self) -> Iterable[Metric]:
        """Name nothing, so that registering does not collect: the gateway may not run yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        queue = self._jobs.queue()
        jobs = GaugeMetricFamily("gpulane_jobs", "Jobs that have not ended, by state.", labels=["state"])
        jobs.add_metric(["waiting"], queue.waiting)
        jobs.add_metric(["running"], queue.running)
        yield jobs
        depth = GaugeMetricFamily("gpulane_queue_depth", "Waiting jobs, by service.", labels=["service"])
        for service in Service:
            depth.add_metric([service.value], queue.waiting_by_service.get(service, 0))
        yield depth
        yield GaugeMetricFamily(
            "gpulane_queue_paused", "Whether nothing is started.", value=float(queue.paused)
        )
        yield GaugeMetricFamily("gpulane_ready", "Whether jobs are taken.", value=float(self._jobs.is_ready))
        yield from self._gpus()

    def _gpus(self) -> Iterable[Metric]:
        states = GaugeMetricFamily("gpulane_gpu_state", "1 for the state it is in.", labels=["gpu", "state"])
        free = GaugeMetricFamily("gpulane_gpu_vram_free_bytes", "Free memory, where known.", labels=["gpu"])
        engines = GaugeMetricFamily(
            "gpulane_engine_state", "1 for the state it is in.", labels=["gpu", "engine", "service", "state"]
        )
        for gpu in self._jobs.gpus():
            for state in GpuState:
                states.add_metric([gpu.id, state.value], float(gpu.state is state))
            if gpu.vram_bytes_free is not None:
                free.add_metric([gpu.id], gpu.vram_bytes_free)
            for engine in gpu.engines:
                engines.add_metric([gpu.id, engine.url, engine.service.value, engine.state.value], 1.0)
        return (states, free, engines)
