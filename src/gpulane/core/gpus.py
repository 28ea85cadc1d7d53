"""What the book knows of one gpu and its engines, and whether a job could run there. It never chooses
among gpus.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpulane.core.handoff import CardMemory, HandoffPlan, Holding, plan
from gpulane.core.learned import Learned
from gpulane.core.model import (
    NO_MODEL,
    Engine,
    EngineState,
    EngineUrl,
    Gpu,
    GpuState,
    HandoffMode,
    JobId,
    ModelKey,
    Seconds,
    Service,
)
from gpulane.core.queues import ClassKey
from gpulane.core.reasons import Reason, reason

HANDOFF = "handoff"
"""`GpuOccupied.why` of a card that changes services."""
USABLE = frozenset({EngineState.READY, EngineState.LEAKING})


@dataclass(slots=True, eq=False, kw_only=True)
class EngineFacts:
    """One engine, as its probes tell."""

    engine: Engine
    state: EngineState = EngineState.STARTING
    described: bool = False
    """Whether it has ever told what it offers: until then every need counts as possible."""
    offers: frozenset[str] | None = None
    resident: ModelKey = NO_MODEL
    """What it holds, or will once the claim under way is carried out: what `decide` goes by."""
    held: ModelKey = NO_MODEL
    """What it was last proved to hold: what a hand-off goes by."""
    may_hold: bool = True
    """False only where it is known to hold nothing: its memory was seen to come free, or it is gone."""
    unloaded: bool = False
    """It was told to unload and has not been seen to hold a model since."""
    why: str = ""

    @property
    def is_usable(self) -> bool:
        return self.state in USABLE

    def hold(self, model: ModelKey) -> None:
        """Notes what it was proved to hold; NO_MODEL: something, or nothing."""
        self.resident = self.held = model
        if model != NO_MODEL:
            self.may_hold, self.unloaded = True, False

    def let_go(self) -> None:
        """Notes that it holds nothing."""
        self.resident = self.held = NO_MODEL
        self.may_hold = False


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
    paused_until: Seconds = 0.0
    """Left alone until then, because attempts kept failing here."""
    failures: int = 0
    """Failed attempts in a row that led to the pause."""
    skip_leaking: bool = False
    """Whether it takes no jobs while an engine of it leaks."""
    bytes_total: int | None = None
    """Memory of the card; None is unknown."""
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
        return self.present and any(e.is_usable for e in self.engines.values())

    @property
    def is_serving(self) -> bool:
        """Up, and not for locks alone: a lock needs no engine, so it says nothing about the gpu."""
        served = [e for e in self.engines.values() if e.engine.service is not Service.LOCK]
        return self.present and (any(e.is_usable for e in served) if served else self.is_up)

    @property
    def leaking(self) -> EngineUrl | None:
        """The engine that keeps the card's memory, if any."""
        return next((url for url, e in self.engines.items() if e.state is EngineState.LEAKING), None)

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
            and self.paused_until <= now
            and self.is_up
        )

    def holds(self, engine: EngineUrl, model: ModelKey) -> bool:
        """Whether a job of this model starts on the engine without a load. Without a model: without a
        hand-off.
        """
        return self.last_engine == engine if model == NO_MODEL else self.engines[engine].resident == model

    def claim(
        self,
        engine: EngineUrl | None,
        model: ModelKey,
        predicted: Seconds,
        unloads: tuple[EngineUrl, ...] = (),
    ) -> None:
        """Counts the model as loaded from the claim on: others must not load a second copy meanwhile.

        `unloads` are the engines that a hand-off is expected to unload; the others keep what they hold.
        """
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
        self.engines[engine].resident = model
        for url in unloads:
            # Should it turn out otherwise, HandoffMeasured or ModelSeen tells.
            self.engines[url].resident = NO_MODEL
        self.last_engine = engine
        self.served_seconds += predicted
        if self.started:
            self.start()

    def start(self) -> None:
        """From here on the engine of the claim may load, and hold that until it was seen to let go."""
        self.started = True
        if (last := self.engines.get(self.last_engine or EngineUrl(""))) is not None:
            last.may_hold = last.engine.service is not Service.LOCK

    def forget_job(self) -> None:
        """Drops the claim, for what became of it is not known: any engine may have loaded meanwhile."""
        self.job, self.started = None, False
        for engine in self.engines.values():
            engine.may_hold = engine.engine.service is not Service.LOCK

    def unclaim(self) -> None:
        """Takes back what `claim` assumed: no job was sent to the engine."""
        last, residents, self.served_seconds = self.before_claim
        for url, facts in self.engines.items():
            # Others may have been told to unload already, without anybody having seen it.
            planned = url != self.last_engine and facts.resident == NO_MODEL
            facts.resident = NO_MODEL if planned else residents.get(url, NO_MODEL)
        self.last_engine = last
        self.unproved = None

    def free(self, now: Seconds, *, proved: bool) -> None:
        """Ends the claim. `proved`: the attempt succeeded, so its model is loaded."""
        if (
            self.started
            and proved
            and (last := self.engines.get(self.last_engine or EngineUrl(""))) is not None
        ):
            last.hold(last.resident)
        if self.unproved is not None and not proved and self.unproved in self.engines:
            self.engines[self.unproved].resident = self.engines[self.unproved].held = NO_MODEL
        self.unproved = None
        self.job, self.started = None, False
        self.idle_since = now

    def forget_models(self) -> None:
        for facts in self.engines.values():
            facts.resident = facts.held = NO_MODEL
        self.unproved = None
        self.served_seconds = 0.0

    def handed_over(self, unloaded: tuple[EngineUrl, ...]) -> None:
        """Corrects what `claim` assumed of the other engines by what the hand-off did."""
        for url, facts in self.engines.items():
            if url != self.last_engine:
                facts.resident = NO_MODEL if url in unloaded else facts.held


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
    paused_until: Seconds = 0.0
    failures: int = 0
    """Failed attempts in a row that led to the pause."""
    bytes_total: int | None = None
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
        paused_until=facts.paused_until,
        failures=facts.failures,
        bytes_total=facts.bytes_total,
        labels=facts.gpu.labels,
    )


def shown_state(facts: GpuFacts) -> GpuState:
    if not facts.is_serving:
        return GpuState.LOST
    if facts.draining:
        return GpuState.DRAINING
    if (facts.job is not None and not facts.started) or facts.occupied == HANDOFF:
        return GpuState.HANDOFF
    if facts.job is not None or facts.occupied is not None:
        return GpuState.BUSY
    return GpuState.IDLE


# --- what a start costs here beside the load


def handoff_plan(
    facts: GpuFacts,
    engine: EngineUrl,
    model: ModelKey,
    learned: Learned,
    *,
    bytes_free: int | None = None,
    unload_all: bool = False,
) -> HandoffPlan:
    """Returns what the card must give up before a job of this model runs on the engine."""
    gpu = facts.gpu
    card = CardMemory(
        engines=tuple(
            Holding(
                engine=url,
                mode=e.engine.handoff,
                holds=e.may_hold and e.is_usable and e.engine.service is not Service.LOCK,
                model=e.held,
                bytes_peak=learned.vram_peak(gpu.id, e.engine.service, e.held)
                if e.held != NO_MODEL
                else None,
                unloaded=e.unloaded,
            )
            for url, e in facts.engines.items()
        ),
        bytes_free=bytes_free,
        bytes_total=facts.bytes_total,
        warm_together=gpu.warm_together,
        margin_bytes=learned.policy.handoff_margin_bytes,
    )
    need = learned.vram_peak(gpu.id, facts.engines[engine].engine.service, model)
    return plan(card, engine, need, unload_all=unload_all)


def expected_unloads(
    facts: GpuFacts, engine: EngineUrl, model: ModelKey, learned: Learned
) -> tuple[EngineUrl, ...]:
    """Returns the engines that a hand-off to the engine would unload, as far as can be told beforehand."""
    if len(facts.engines) == 1:
        return ()
    if not any(
        e.may_hold and url != engine and e.is_usable and e.engine.handoff is not HandoffMode.NEVER
        for url, e in facts.engines.items()
    ):
        return ()
    return handoff_plan(facts, engine, model, learned).unload


def start_seconds(
    facts: GpuFacts, engine: EngineUrl, model: ModelKey, service: Service, learned: Learned
) -> Seconds:
    """Returns c: how long it takes until the engine can serve a job of the model: the load, unless it holds
    it, and a hand-off where one is expected.
    """
    warm = model == NO_MODEL or facts.holds(engine, model)
    load = 0.0 if warm else learned.load_seconds(facts.gpu.id, model, service)
    if expected_unloads(facts, engine, model, learned):
        load += learned.handoff_seconds(facts.gpu.id)
    return load


# --- may a job run here?


def able_engines(key: ClassKey, facts: GpuFacts) -> tuple[EngineUrl, ...]:
    """Returns the engines of the gpu that could take such a job now, were they idle; in the order of the
    settings.
    """
    if facts.draining or not facts.present or not key.labels <= facts.gpu.labels:
        return ()
    if facts.skip_leaking and facts.leaking is not None:
        return ()
    return tuple(
        url
        for url, e in facts.engines.items()
        if e.is_usable
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
