"""What the book knows of one gpu and its engines, and whether a job could run there. It never chooses
among gpus.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpulane.core.model import (
    NO_MODEL,
    Engine,
    EngineState,
    EngineUrl,
    Gpu,
    GpuState,
    JobId,
    ModelKey,
    Seconds,
    Service,
)
from gpulane.core.queues import ClassKey
from gpulane.core.reasons import Reason, reason

HANDOFF = "handoff"
"""`GpuOccupied.why` of a card that changes services."""


@dataclass(slots=True, eq=False, kw_only=True)
class EngineFacts:
    """One engine, as its probes tell."""

    engine: Engine
    state: EngineState = EngineState.STARTING
    described: bool = False
    """Whether it has ever told what it offers: until then every need counts as possible."""
    offers: frozenset[str] | None = None
    resident: ModelKey = NO_MODEL
    why: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Proposal:
    """A claim under way."""

    jobs: tuple[JobId, ...]


@dataclass(slots=True, eq=False, kw_only=True)
class GpuFacts:
    """One gpu, as events tell."""

    gpu: Gpu
    engines: dict[EngineUrl, EngineFacts]
    draining: bool = False
    present: bool = True
    """False when its node has left."""
    occupied: str | None = None
    job: JobId | None = None
    """Claimed or started here."""
    started: bool = False
    proposal: Proposal | None = None
    rest_until: Seconds = 0.0
    claims_lost: int = 0
    """Claims refused in a row."""
    last_engine: EngineUrl | None = None
    unproved: EngineUrl | None = None
    """The engine that is loading a model for the current claim and has not been seen to hold it."""
    before_claim: tuple[EngineUrl | None, dict[EngineUrl, ModelKey], Seconds] = (None, {}, 0.0)
    """Last engine, resident models and served seconds when the current claim was made."""
    idle_since: Seconds = 0.0
    free_at: Seconds = 0.0
    """When the current job is expected to end."""
    served_seconds: Seconds = 0.0
    """Predicted service since its model was loaded."""

    @property
    def is_up(self) -> bool:
        return self.present and any(e.state is EngineState.READY for e in self.engines.values())

    @property
    def last_service(self) -> Service | None:
        last = self.engines.get(self.last_engine) if self.last_engine else None
        return last.engine.service if last else None

    @property
    def is_empty(self) -> bool:
        """No engine is known to hold a model."""
        return all(e.resident == NO_MODEL for e in self.engines.values())

    def is_idle(self, now: Seconds) -> bool:
        """Nothing runs, is claimed, is being claimed or occupies it; it takes work."""
        return (
            self.job is None
            and self.proposal is None
            and self.occupied is None
            and not self.draining
            and self.rest_until <= now
            and self.is_up
        )

    def holds(self, engine: EngineUrl, model: ModelKey) -> bool:
        """Whether a job of this model starts on the engine without a load. Without a model: without a
        hand-off.
        """
        return self.last_engine == engine if model == NO_MODEL else self.engines[engine].resident == model

    def claim(self, engine: EngineUrl | None, model: ModelKey, predicted: Seconds) -> None:
        """Counts the model as loaded from the claim on: others must not load a second copy meanwhile."""
        self.before_claim = (
            self.last_engine,
            {url: e.resident for url, e in self.engines.items()},
            self.served_seconds,
        )
        self.unproved = None
        if engine is None:
            return
        if not self.holds(engine, model):
            self.unproved = engine
            self.served_seconds = 0.0
        for url, facts in self.engines.items():
            # A hand-off unloads the others; where it does not, ModelSeen tells.
            facts.resident = model if url == engine else NO_MODEL
        self.last_engine = engine
        self.served_seconds += predicted

    def unclaim(self) -> None:
        """Takes back what `claim` assumed: nothing was sent to the engine."""
        last, residents, self.served_seconds = self.before_claim
        for url, facts in self.engines.items():
            # The others may have been unloaded already; where they were not, ModelSeen tells.
            facts.resident = residents.get(url, NO_MODEL) if url == self.last_engine else NO_MODEL
        self.last_engine = last
        self.unproved = None

    def free(self, now: Seconds, *, proved: bool) -> None:
        """Ends the claim. `proved`: the attempt succeeded, so its model is loaded."""
        if self.unproved is not None and not proved and self.unproved in self.engines:
            self.engines[self.unproved].resident = NO_MODEL
        self.unproved = None
        self.job, self.started = None, False
        self.idle_since = now

    def forget_models(self) -> None:
        for facts in self.engines.values():
            facts.resident = NO_MODEL
        self.unproved = None
        self.served_seconds = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine, to be shown."""

    url: EngineUrl
    service: Service
    state: EngineState
    model: ModelKey
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """One gpu, to be shown."""

    gpu: Gpu
    state: GpuState
    engines: tuple[EngineView, ...]
    job: JobId | None
    started: bool
    occupied: str | None
    draining: bool
    idle_since: Seconds
    rest_until: Seconds
    served_seconds: Seconds
    model: ModelKey = NO_MODEL
    """What its last used engine holds."""
    labels: frozenset[str] = field(default_factory=frozenset[str])


def view(facts: GpuFacts) -> GpuView:
    last = facts.engines.get(facts.last_engine) if facts.last_engine else None
    return GpuView(
        gpu=facts.gpu,
        state=shown_state(facts),
        engines=tuple(
            EngineView(url=url, service=e.engine.service, state=e.state, model=e.resident, why=e.why)
            for url, e in facts.engines.items()
        ),
        job=facts.job,
        started=facts.started,
        occupied=facts.occupied,
        draining=facts.draining,
        idle_since=facts.idle_since,
        rest_until=facts.rest_until,
        served_seconds=facts.served_seconds,
        model=last.resident if last else NO_MODEL,
        labels=facts.gpu.labels,
    )


def shown_state(facts: GpuFacts) -> GpuState:
    if not facts.is_up:
        return GpuState.LOST
    if facts.draining:
        return GpuState.DRAINING
    if (facts.job is not None and not facts.started) or facts.occupied == HANDOFF:
        return GpuState.HANDOFF
    if facts.job is not None or facts.occupied is not None:
        return GpuState.BUSY
    return GpuState.IDLE


# --- may a job run here?


def able_engines(key: ClassKey, facts: GpuFacts) -> tuple[EngineUrl, ...]:
    """Returns the engines of the gpu that could take such a job now, were they idle; in the order of the
    settings.
    """
    if facts.draining or not facts.present or not key.labels <= facts.gpu.labels:
        return ()
    return tuple(
        url
        for url, e in facts.engines.items()
        if e.state is EngineState.READY
        and e.engine.service is key.service
        and key.engine in {None, url}
        and (e.offers is None or key.needs <= e.offers)
    )


def obstacle(key: ClassKey, facts: GpuFacts) -> Reason | None:
    """Returns why the gpu can never run such a job, or None when it can, may, or cannot be told yet."""
    gpu = facts.gpu.id
    engines = [e for e in facts.engines.values() if e.engine.service is key.service]
    if key.engine is not None:
        engines = [e for e in engines if e.engine.url == key.engine]
        if not engines:
            return reason("engine_elsewhere", gpu=gpu, engine=key.engine)
    if not engines:
        return reason("no_engine_of_service", gpu=gpu, service=key.service.value)
    missing_labels = sorted(key.labels - facts.gpu.labels)
    if missing_labels:
        return reason("labels_missing", gpu=gpu, labels=", ".join(missing_labels))
    if any(not e.described or e.offers is None or key.needs <= e.offers for e in engines):
        return None
    missing = min((sorted(key.needs - (e.offers or frozenset())) for e in engines), key=lambda m: (len(m), m))
    return reason("needs_not_offered", gpu=gpu, needs=", ".join(missing))
