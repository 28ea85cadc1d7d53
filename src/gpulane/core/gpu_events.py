"""How the facts of one gpu, and what is learned, change with what is told of it and its engines. Of jobs it
knows nothing.
"""

from __future__ import annotations

from typing import assert_never

from gpulane.core.events import (
    CardMeasured,
    EngineLeaking,
    EngineLost,
    EngineReady,
    EngineUnloaded,
    GpuFreed,
    GpuOccupied,
    GpuPaused,
    HandoffMeasured,
    LoadMeasured,
    ModelSeen,
    ServiceMeasured,
    VramMeasured,
)
from gpulane.core.gpus import EngineFacts, GpuFacts
from gpulane.core.learned import Learned
from gpulane.core.model import NO_MODEL, EngineState, Gpu, Seconds, Service
from gpulane.core.policy import Policy

EngineEvent = EngineReady | EngineLost | EngineLeaking
GpuEvent = GpuOccupied | GpuFreed | GpuPaused | CardMeasured | ModelSeen | EngineUnloaded | HandoffMeasured
Measured = LoadMeasured | ServiceMeasured | VramMeasured


def new_facts(gpu: Gpu, policy: Policy, now: Seconds) -> GpuFacts:
    """Returns what is known of a gpu that has just been told of: its engines may hold anything."""
    return GpuFacts(
        gpu=gpu,
        engines={
            engine.url: EngineFacts(engine=engine, may_hold=engine.service is not Service.LOCK)
            for engine in gpu.engines
        },
        skip_leaking=policy.skip_leaking,
        bytes_total=gpu.vram_bytes,
        idle_since=now,
    )


def engine_changed(facts: GpuFacts, event: EngineEvent, now: Seconds) -> None:
    engine = facts.engines[event.engine]
    match event:
        case EngineReady():
            # An engine that leaks answers its probes all the same: only EngineLeaking ends that, or its loss.
            if not engine.is_usable:
                facts.idle_since = now
                engine.state, engine.why = EngineState.READY, ""
                engine.may_hold = engine.engine.service is not Service.LOCK
            engine.offers, engine.described = event.offers, True
        case EngineLost():
            engine.state, engine.why = EngineState.LOST, event.why
            engine.let_go()
            engine.unloaded = False
            if facts.last_engine == event.engine:
                facts.last_engine, facts.served_seconds = None, 0.0
        case EngineLeaking():
            if engine.is_usable:
                engine.state = EngineState.LEAKING if event.leaking else EngineState.READY
                engine.why = event.why if event.leaking else ""
        case _:
            assert_never(event)


def gpu_changed(facts: GpuFacts, event: GpuEvent, now: Seconds) -> None:
    match event:
        case GpuOccupied():
            facts.occupied = event.why
        case GpuFreed():
            if facts.occupied is not None:
                facts.occupied, facts.idle_since = None, now
        case GpuPaused():
            facts.paused_until, facts.failures = now + event.seconds, event.failures
        case CardMeasured():
            facts.bytes_total = event.bytes_total if event.bytes_total > 0 else facts.gpu.vram_bytes
        case HandoffMeasured():
            facts.handed_over(event.unloaded)
        case ModelSeen() | EngineUnloaded():
            models_changed(facts, event)
        case _:
            assert_never(event)


def models_changed(facts: GpuFacts, event: ModelSeen | EngineUnloaded) -> None:
    engine = facts.engines.get(event.engine)
    if engine is None:
        return
    match event:
        case ModelSeen():
            if engine.resident != event.model:
                facts.served_seconds = 0.0
            engine.hold(event.model)
            if facts.unproved == event.engine:
                facts.unproved = None
        case EngineUnloaded():
            if engine.held != NO_MODEL:
                facts.served_seconds = 0.0
            engine.let_go()
            engine.unloaded = True
        case _:
            assert_never(event)


def learn(learned: Learned, event: GpuEvent | Measured, speed: float) -> None:
    """Takes from an event what is worth knowing next time; most tell nothing of that kind."""
    match event:
        case LoadMeasured():
            learned.load_measured(event.gpu, event.model, event.service, event.seconds)
        case ServiceMeasured():
            learned.service_measured(event.job, speed, event.seconds)
        case VramMeasured():
            learned.vram_measured(event.gpu, event.service, event.model, event.bytes_peak)
        case HandoffMeasured() if event.unloaded:
            learned.handoff_measured(event.gpu, event.seconds)
        case _:
            pass
