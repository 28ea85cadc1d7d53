"""One simulated run: users, store, engines and operators in virtual time around the real book and the real
decide.

Faults end after a while (liveness): from then on every job must end and every gpu fall idle, else `run`
raises.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import cast

from gpulane.core.book import Book, GapInEvents
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    ClaimLost,
    ClaimProposed,
    EngineLost,
    EngineReady,
    EngineUnloaded,
    Event,
    GpuAdded,
    GpuFreed,
    GpuOccupied,
    JobClaimed,
    LoadMeasured,
    ModelSeen,
    ServiceMeasured,
    StoreEvent,
)
from gpulane.core.gpus import able_engines
from gpulane.core.model import (
    NO_MODEL,
    Account,
    Engine,
    EngineUrl,
    Failure,
    FailureKind,
    Gpu,
    GpuId,
    Job,
    JobId,
    JobState,
    ModelKey,
    NodeId,
    Seconds,
    Service,
    Token,
)
from gpulane.core.policy import Policy
from gpulane.core.retry import Again, after_failure
from gpulane.core.scheduler import decide
from gpulane.sim.store import ToyStore

NODE = NodeId("node")
STORE_SECONDS = 0.003
"""From a proposal to the store's answer."""
START_SECONDS = 0.02
"""From a claim to its start."""
INTERRUPT_SECONDS = 0.4
"""From a wanted cancel to an idle engine."""
EVENTS_MAX = 200_000
"""Actions of one run; more is a loop that does not end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked for, and of how many gpus."""

    gpus: int = 4
    jobs: int = 60
    accounts: int = 6
    models: int = 5
    arrival_seconds: Seconds = 2.0
    """Mean gap between jobs."""
    service_seconds: Seconds = 8.0
    load_seconds: Seconds = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often things go wrong, until they do no more."""

    until_seconds: Seconds = 150.0
    engine_dies_seconds: Seconds = 40.0
    """Mean time between deaths of engines, over all of them; 0: never."""
    engine_back_seconds: Seconds = 15.0
    drain_seconds: Seconds = 60.0
    """Mean time between drains; each is lifted after a while; 0: never."""
    cancel_share: float = 0.15
    attempt_fails_share: float = 0.1
    claim_lost_share: float = 0.1
    event_lost_share: float = 0.01


CALM = Faults(
    until_seconds=0.0,
    engine_dies_seconds=0.0,
    drain_seconds=0.0,
    cancel_share=0.0,
    attempt_fails_share=0.0,
    claim_lost_share=0.0,
    event_lost_share=0.0,
)
"""Nothing goes wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a run."""

    seed: int
    trace: tuple[str, ...]
    ends: tuple[tuple[str, int], ...]
    """How many jobs ended in each state."""
    starts: int
    switches: int
    """Starts on a gpu that held another model; first loads are extra."""
    wait_seconds_mean: Seconds
    makespan_seconds: Seconds
    faults: int


@dataclass(slots=True, eq=False)
class Card:
    """The truth about one gpu."""

    gpu: Gpu
    job: JobId | None = None
    token: Token | None = None
    holds: dict[EngineUrl, ModelKey] = field(default_factory=dict[EngineUrl, ModelKey])
    dead: set[EngineUrl] = field(default_factory=set[EngineUrl])


@dataclass(slots=True, eq=False)
class Simulation:
    """The state of one run. `actions` is a heap of what will happen."""

    seed: int
    workload: Workload
    faults: Faults
    policy: Policy
    check_every: int = 10
    rng: random.Random = field(init=False)
    book: Book = field(init=False)
    store: ToyStore = field(default_factory=ToyStore)
    cards: dict[GpuId, Card] = field(default_factory=dict[GpuId, Card])
    now: Seconds = 0.0
    actions: list[tuple[Seconds, int, Callable[[], None]]] = field(
        default_factory=list[tuple[Seconds, int, Callable[[], None]]]
    )
    made: int = 0
    wake_at: Seconds = float("inf")
    trace: list[str] = field(default_factory=list[str])
    waits: list[Seconds] = field(default_factory=list[Seconds])
    submitted: dict[JobId, Seconds] = field(default_factory=dict[JobId, Seconds])
    switches: int = 0
    fault_count: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.book = Book(self.policy)

    # -- the loop

    def at(self, seconds: Seconds, action: Callable[[], None]) -> None:
        """Lets something happen in so many seconds."""
        self.made += 1
        heapq.heappush(self.actions, (self.now + seconds, self.made, action))

    def run(self) -> Report:
        self.set_up()
        done = 0
        while self.actions:
            self.now, _, action = heapq.heappop(self.actions)
            action()
            self.propose()
            done += 1
            assert done < EVENTS_MAX, f"seed {self.seed}: does not end"
            if done % self.check_every == 0:
                self.book.check()
        self.book.check()
        self.all_ended()
        return self.report()

    def tell(self, event: Event | None) -> None:
        """Gives the book an event, unless it is lost on the way; then the next store event shows the gap."""
        if event is None:
            return
        self.trace.append(f"{self.now:.3f} {line(event)}")
        if isinstance(event, StoreEvent) and self.goes_wrong(self.faults.event_lost_share):
            return
        try:
            self.book.apply(event, self.now)
        except GapInEvents:
            self.restore()

    def restore(self) -> None:
        self.trace.append(f"{self.now:.3f} restored at {self.store.n}")
        self.book.restore(self.store.snapshot(self.now), self.now)

    def goes_wrong(self, share: float) -> bool:
        wrong = self.now < self.faults.until_seconds and self.rng.random() < share
        self.fault_count += wrong
        return wrong

    # -- users, and what is there at the start

    def set_up(self) -> None:
        for i in range(self.workload.gpus):
            engines = tuple(
                Engine(url=EngineUrl(f"http://{service.value}:{i}"), service=service)
                for service in (Service.COMFYUI, Service.A1111)
            )
            gpu = Gpu(id=GpuId(f"node/gpu{i}"), node=NODE, name=f"gpu{i}", uuid=str(i), engines=engines)
            self.cards[gpu.id] = Card(gpu)
            self.tell(GpuAdded(gpu=gpu))
            for engine in engines:
                self.tell(EngineReady(engine=engine.url, offers=None))
        when = 0.0
        for i in range(self.workload.jobs):
            when += self.rng.expovariate(1.0 / self.workload.arrival_seconds)
            self.at(when, lambda i=i: self.submit(i))
        if self.faults.engine_dies_seconds:
            self.at(self.rng.expovariate(1 / self.faults.engine_dies_seconds), self.engine_dies)
        if self.faults.drain_seconds:
            self.at(self.rng.expovariate(1 / self.faults.drain_seconds), self.drain)
        self.at(self.faults.until_seconds, self.calm)

    def submit(self, number: int) -> None:
        rng = self.rng
        job = Job(
            id=JobId(f"job{number:05}"),
            account=Account(f"account{min(int(rng.paretovariate(0.8)), self.workload.accounts)}"),
            service=rng.choice((Service.COMFYUI, Service.A1111)),
            kind="simulated",
            model=ModelKey(f"model{min(int(rng.paretovariate(0.9)), self.workload.models)}"),
            arrival=self.store.n + 1,
            weight=rng.choice((1.0, 1.0, 2.0)),
        )
        self.submitted[job.id] = self.now
        self.tell(self.store.enqueue(job))
        if rng.random() < self.faults.cancel_share:
            self.at(rng.uniform(0.0, 60.0), lambda: self.cancel(job.id))

    def cancel(self, job: JobId) -> None:
        record = self.store.records[job]
        gpu, token, started = record.gpu, record.token, record.started
        event = self.store.cancel(job)
        self.tell(event)
        if event is None or gpu is None or token is None:
            return
        if started:
            self.at(INTERRUPT_SECONDS, lambda: self.finish(gpu, job, token, JobState.CANCELLED, 1.0))

    # -- the dispatcher

    def propose(self) -> None:
        for decision in decide(self.book, self.policy, self.now):
            if isinstance(decision, StartAttempt):
                jobs = tuple(c.job for c in decision.candidates)
                self.tell(ClaimProposed(gpu=decision.gpu, jobs=jobs))
                self.at(STORE_SECONDS, lambda start=decision: self.answer(start))
            elif decision.at < self.wake_at:
                self.wake_at = decision.at
                self.at(decision.at - self.now, self.wake)

    def wake(self) -> None:
        self.wake_at = float("inf")

    def answer(self, start: StartAttempt) -> None:
        if self.goes_wrong(self.faults.claim_lost_share):
            self.tell(ClaimLost(gpu=start.gpu, rest_seconds=0.2))
            return
        candidates = tuple((c.job, c.charge) for c in start.candidates)
        event = self.store.claim(start.gpu, NODE, candidates, start.lowest_f, self.now)
        if event is None:
            self.tell(ClaimLost(gpu=start.gpu))
            return
        engine = next(c.engine for c in start.candidates if c.job == event.job)
        self.tell(event)
        if self.book.n < event.n:  # the reply carries n: an event lost on the way shows at once
            self.restore()
        self.at(START_SECONDS, lambda: self.begin(event, engine))

    def begin(self, claimed: JobClaimed, engine: EngineUrl) -> None:
        card = self.cards[claimed.gpu]
        if engine in card.dead:
            self.tell(self.store.release(claimed.job, claimed.token))
            return
        event = self.store.start(claimed.job, claimed.token)
        if event is None:
            return  # cancelled meanwhile
        assert card.job is None, f"seed {self.seed}: {claimed.job} starts on {claimed.gpu} beside {card.job}"
        card.job, card.token = claimed.job, claimed.token
        self.tell(event)
        self.waits.append(self.now - self.submitted[claimed.job])
        self.compute(card, claimed, engine)

    def compute(self, card: Card, claimed: JobClaimed, engine: EngineUrl) -> None:
        job = self.store.records[claimed.job].job
        load = 0.0
        if card.holds.get(engine) != job.model:
            self.switches += bool(card.holds)
            load = self.workload.load_seconds * self.rng.uniform(0.7, 1.3)
            card.holds = {engine: job.model}
            for other in card.gpu.engines:
                if other.url != engine:
                    self.tell(EngineUnloaded(gpu=claimed.gpu, engine=other.url))
        service = self.rng.expovariate(1 / self.workload.service_seconds)
        if self.goes_wrong(self.faults.attempt_fails_share):
            failure = self.rng.choice(FAILURES)
            self.at(load, lambda: self.fail(card.gpu.id, job.id, claimed.token, failure, load))
            return

        def end() -> None:
            if card.token == claimed.token:
                if load:
                    self.tell(
                        LoadMeasured(gpu=claimed.gpu, model=job.model, seconds=load, service=job.service)
                    )
                self.tell(ServiceMeasured(job=job, gpu=claimed.gpu, seconds=service))
                self.tell(ModelSeen(gpu=claimed.gpu, engine=engine, model=job.model))
            self.finish(claimed.gpu, job.id, claimed.token, JobState.SUCCEEDED, load + service)

        self.at(load + service, end)

    def finish(self, gpu: GpuId, job: JobId, token: Token, state: JobState, used: Seconds) -> None:
        card = self.cards[gpu]
        if card.token != token:
            return  # it ended another way before
        card.job, card.token = None, None
        self.tell(self.store.finish(job, token, state, None, used))

    def fail(self, gpu: GpuId, job: JobId, token: Token, failure: Failure, used: Seconds) -> None:
        card, record = self.cards[gpu], self.store.records[job]
        if card.token != token:
            return
        card.job, card.token = None, None
        key = self.book.class_key(record.job)
        answer = after_failure(
            record.job,
            failure,
            attempts_counted=record.attempts,
            avoid=record.avoid,
            gpu=gpu,
            eligible=frozenset(g for g, facts in self.book.gpus.items() if able_engines(key, facts)),
            policy=self.policy,
            jitter=self.rng.random(),
            engine_kills_before=record.engine_kills,
        )
        if isinstance(answer, Again):
            self.tell(self.store.fail(job, token, failure, answer, used, self.now))
        else:
            self.tell(self.store.finish(job, token, JobState.FAILED, answer.failure, used))

    # -- engines and operators

    def engine_dies(self) -> None:
        if self.now >= self.faults.until_seconds:
            return
        card = self.rng.choice(list(self.cards.values()))
        engine = self.rng.choice(card.gpu.engines).url
        if engine not in card.dead:
            self.fault_count += 1
            card.dead.add(engine)
            running = card.job if card.holds.get(engine) is not None else None
            card.holds.pop(engine, None)
            self.tell(EngineLost(engine=engine, why="simulated"))
            self.tell(GpuOccupied(gpu=card.gpu.id, why="probing"))
            self.at(1.0, lambda: self.tell(GpuFreed(gpu=card.gpu.id)))
            if running is not None and card.token is not None:
                failure = Failure(
                    kind=FailureKind.LOST, code="engine_lost", message="died", killed_engine=True
                )
                self.fail(card.gpu.id, running, card.token, failure, 1.0)
            self.at(
                self.rng.expovariate(1 / self.faults.engine_back_seconds),
                lambda: self.engine_back(card, engine),
            )
        self.at(self.rng.expovariate(1 / self.faults.engine_dies_seconds), self.engine_dies)

    def engine_back(self, card: Card, engine: EngineUrl) -> None:
        card.dead.discard(engine)
        self.tell(EngineReady(engine=engine, offers=None))
        self.tell(ModelSeen(gpu=card.gpu.id, engine=engine, model=NO_MODEL))

    def drain(self) -> None:
        if self.now >= self.faults.until_seconds:
            return
        gpu = self.rng.choice(list(self.cards))
        self.fault_count += 1
        self.tell(self.store.drain(gpu, True))
        self.at(
            self.rng.uniform(1.0, 30.0),
            lambda: self.tell(self.store.drain(gpu, False)),
        )
        self.at(self.rng.expovariate(1 / self.faults.drain_seconds), self.drain)

    def calm(self) -> None:
        """Ends the faults: from here on everything must come to its end."""
        self.restore()

    # -- the end

    def all_ended(self) -> None:
        assert not self.store.open_jobs, f"seed {self.seed}: left over {sorted(self.store.open_jobs)}"
        assert set(self.store.ends) == set(self.submitted), f"seed {self.seed}: jobs without an end"
        assert set(self.store.ends.values()) <= {1}, f"seed {self.seed}: an end was recorded twice"
        assert not self.store.slots, f"seed {self.seed}: a slot leaked"
        assert len(self.book.idle_gpus(self.now + 60.0)) == len(self.cards), (
            f"seed {self.seed}: a gpu is lost"
        )

    def report(self) -> Report:
        states = [record.state.value for record in self.store.records.values()]
        return Report(
            seed=self.seed,
            trace=tuple(self.trace),
            ends=tuple((state, states.count(state)) for state in sorted(set(states))),
            starts=len(self.waits),
            switches=self.switches,
            wait_seconds_mean=sum(self.waits) / max(len(self.waits), 1),
            makespan_seconds=self.now,
            faults=self.fault_count,
        )


def line(event: Event) -> str:
    """Returns the event on one line; sets are sorted, for their order differs between processes."""
    values = ((f.name, getattr(event, f.name)) for f in fields(event))
    shown = (
        f"{name}={sorted(cast('frozenset[str]', value)) if isinstance(value, frozenset) else value!r}"
        for name, value in values
    )
    return f"{type(event).__name__} {' '.join(shown)}"


FAILURES = (
    Failure(kind=FailureKind.NOT_STARTED, code="connect_failed", message="simulated"),
    Failure(kind=FailureKind.ENGINE, code="out_of_memory", message="simulated"),
    Failure(kind=FailureKind.ENGINE, code="node_raised", message="simulated"),
    Failure(kind=FailureKind.CLIENT, code="bad_value", message="simulated"),
    Failure(kind=FailureKind.INTERRUPTED, code="interrupted", message="simulated"),
    Failure(kind=FailureKind.LOST, code="engine_lost", message="simulated"),
)


def run(
    seed: int,
    workload: Workload | None = None,
    faults: Faults | None = None,
    policy: Policy | None = None,
    *,
    check_every: int = 10,
) -> Report:
    """Plays one run to its end; raises AssertionError, naming the seed, where something must not be."""
    simulation = Simulation(
        seed=seed,
        workload=workload or Workload(),
        faults=faults or Faults(),
        policy=policy or Policy(),
        check_every=check_every,
    )
    return simulation.run()
