"""One chaos run: users, a gateway and engines in virtual time around the real book, decide, handoff, retry,
breaker and watchdog, with every fault of `dice`. Faults end after the last job came; then every job must end
and every card fall idle.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import partial

from gpulane.core.book import Book
from gpulane.core.breaker import Breaker, BreakerLimits
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    CardMeasured,
    ClaimLost,
    ClaimProposed,
    EngineReady,
    GpuAdded,
    GpuPaused,
    JobClaimed,
    LoadMeasured,
    ModelSeen,
    ServiceMeasured,
    VramMeasured,
)
from gpulane.core.gpus import HANDOFF, able_engines
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
)
from gpulane.core.policy import Policy
from gpulane.core.retry import Again, after_failure, is_out_of_memory
from gpulane.core.scheduler import decide
from gpulane.core.watchdog import Patience, WatchStep, limit_seconds, look_again_at, step
from gpulane.sim.cards import Process, TrueCard, Work, overlaps, unended
from gpulane.sim.chaos_handoff import Handoffs, WhenLeaking, stranger_on
from gpulane.sim.chaos_world import ACTIONS_PER_JOB_MAX, GIB, NOTICE_SECONDS, Desk, Run, World
from gpulane.sim.dice import Fault

NODE = NodeId("node")
STORE_SECONDS = 0.003
START_SECONDS = 0.02
INTERRUPT_SECONDS = 0.4
RECOVERY_SECONDS = 2.0
"""A gateway that was killed is back, and asks its engines, for so long."""
ARRIVAL_SECONDS = 2.6
"""Mean gap between jobs, per gpu 4 times that: the queue stays short."""
SERVICE_SECONDS = 4.0
LOAD_SECONDS = 1.5
LOCK_SECONDS_MAX = 12.0
GPUS = 4
GIBS_OF_CARDS = (12.0, 12.0, 16.0, 24.0)
SERVICE_WEIGHTS = (9, 8, 2, 2)
"""How often jobs ask for each service, in the order of `Service`; the last are locks."""
MODELS = {Service.COMFYUI: (3.0, 7.0, 9.0), Service.A1111: (2.0, 5.0, 7.0), Service.HTTP: (4.0,)}
"""What jobs of each model need at their peak, in GiB."""
PATIENCE = Patience(hung_factor=6.0, hung_seconds_min=30.0, hung_interrupt_seconds=5.0)
LIMITS = BreakerLimits(failures_pause=4, pause_seconds=10.0, pause_seconds_max=120.0)
CANCEL_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosReport:
    """What came of one run."""

    seed: int
    ends: tuple[tuple[str, int], ...]
    fired: dict[Fault, int]
    overlaps: tuple[str, ...]
    leaked_slots: int
    open_jobs: int
    lost_gpus: int
    handoffs: int
    seconds: Seconds
    digest: int

    @property
    def is_clean(self) -> bool:
        return not (self.overlaps or self.leaked_slots or self.open_jobs or self.lost_gpus)


@dataclass(slots=True, eq=False)
class Chaos:
    """The state of one run beside its world."""

    world: World
    jobs: int
    when_leaking: WhenLeaking
    gibs: tuple[float, ...] = GIBS_OF_CARDS
    services: tuple[int, ...] = SERVICE_WEIGHTS
    handoffs: Handoffs = field(init=False)
    unload_all: set[JobId] = field(default_factory=set[JobId])
    memory_on: dict[JobId, tuple[GpuId, ...]] = field(default_factory=dict[JobId, tuple[GpuId, ...]])
    submitted: int = 0
    shown: int = -1
    """Version of the book at the last decide: nothing new, nothing to decide."""
    wake_at: Seconds = float("inf")

    def __post_init__(self) -> None:
        self.handoffs = Handoffs(
            world=self.world,
            when_leaking=self.when_leaking,
            unload_all=self.unload_all,
            ready=self.start,
            give_back=self.give_back,
        )

    # -- the loop

    def run(self) -> ChaosReport:
        world = self.world
        self.set_up()
        done = 0
        while world.actions:
            world.now, _, action = heapq.heappop(world.actions)
            action()
            if world.book.version != self.shown:
                self.propose()
            done += 1
            assert done < ACTIONS_PER_JOB_MAX * self.jobs, f"seed {world.seed}: does not end"
            if done % 2000 == 0:
                world.book.check()
        world.book.check()
        return self.report()

    def set_up(self) -> None:
        world = self.world
        for number in range(GPUS):
            services = (Service.COMFYUI, Service.A1111, Service.HTTP, Service.LOCK)
            engines = tuple(
                Engine(url=EngineUrl(f"http://{service.value}:{number}"), service=service)
                for service in services
            )
            gpu = Gpu(
                id=GpuId(f"node/gpu{number}"),
                node=NODE,
                name=f"gpu{number}",
                uuid=str(number),
                engines=engines,
            )
            processes = {str(e.url): Process(url=e.url) for e in engines}
            gib = self.gibs[number % len(self.gibs)]
            world.cards[gpu.id] = TrueCard(name=gpu.name, gib_total=gib, processes=processes)
            world.desks[gpu.id] = Desk(gpu=gpu, breaker=Breaker(world.limits))
        self.introduce()
        self.at_next_job()

    def introduce(self) -> None:
        """Tells a new book of all cards and of the engines that answer."""
        world = self.world
        for gpu, desk in world.desks.items():
            world.tell(GpuAdded(gpu=desk.gpu))
            card = world.cards[gpu]
            world.tell(CardMeasured(gpu=gpu, bytes_total=int(card.gib_total * GIB)))
            for engine in desk.gpu.engines:
                if card.processes[engine.url].is_alive:
                    world.tell(EngineReady(engine=engine.url, offers=None))

    # -- users

    def at_next_job(self) -> None:
        gap = self.world.rng.expovariate(1.0 / ARRIVAL_SECONDS)
        self.world.at(gap, self.submit)

    def submit(self) -> None:
        world, rng = self.world, self.world.rng
        service = rng.choices(list(Service), weights=self.services)[0]
        model = NO_MODEL
        if service is not Service.LOCK:
            model = ModelKey(f"{service.value}-{rng.randrange(len(MODELS[service]))}")
        job = Job(
            id=JobId(f"job{self.submitted:06}"),
            account=Account(f"account{rng.randrange(8)}"),
            service=service,
            kind="simulated",
            model=model,
            arrival=world.store.n + 1,
        )
        self.submitted += 1
        world.tell(world.store.enqueue(job))
        if world.dice.on and rng.random() < CANCEL_SHARE:
            world.at(rng.uniform(0.0, 25.0), partial(self.cancel, job.id))
        if self.submitted < self.jobs:
            self.at_next_job()
        else:
            world.at(20.0, self.calm)

    def calm(self) -> None:
        """Ends the faults: from here on everything must come to its end."""
        self.world.dice.on = False
        for card in self.world.cards.values():
            card.is_sick_until = 0.0
        self.world.restore()

    def cancel(self, job: JobId) -> None:
        world = self.world
        record = world.store.open_jobs.get(job)
        if record is None:
            return
        run = world.desks[record.gpu].run if record.gpu is not None else None
        if record.started:
            world.dice.count(Fault.CANCELLED_RUNNING)
        world.tell(world.store.cancel(job))
        if run is not None and run.work is not None:
            work = run.work
            world.at(INTERRUPT_SECONDS, lambda: self.interrupt(run, work))

    def interrupt(self, run: Run, work: Work) -> None:
        """Tells the engine to stop; one that hangs deaf does not."""
        if work.ended is None and work.heeds_interrupt:
            self.over(run.gpu, work, None if run.interrupted_at is None else HUNG)
        elif work.ended is None and run.interrupted_at is None:
            run.interrupted_at = self.world.now
            self.watch(run)

    # -- claims

    def propose(self) -> None:
        world = self.world
        for decision in decide(world.book, world.policy, world.now):
            if isinstance(decision, StartAttempt):
                jobs = tuple(c.job for c in decision.candidates)
                world.tell(ClaimProposed(gpu=decision.gpu, jobs=jobs))
                world.at(STORE_SECONDS, partial(self.answer, decision, world.book))
            elif decision.at < self.wake_at:
                self.wake_at = decision.at
                world.at(decision.at - world.now, self.wake)
        self.shown = world.book.version

    def wake(self) -> None:
        self.wake_at, self.shown = float("inf"), -1

    def answer(self, start: StartAttempt, asked_by: Book) -> None:
        world = self.world
        if world.book is not asked_by:
            return  # the gateway that asked is dead
        if world.dice.strikes(Fault.CLAIM_LOST):
            world.tell(ClaimLost(gpu=start.gpu, rest_seconds=0.2))
            return
        candidates = tuple((c.job, c.charge) for c in start.candidates)
        event = world.store.claim(start.gpu, NODE, candidates, start.lowest_f, world.now)
        if event is None:
            world.tell(ClaimLost(gpu=start.gpu))
            return
        engine = next(c.engine for c in start.candidates if c.job == event.job)
        world.tell(event)
        if world.book.n < event.n:  # the reply carries n: an event lost on the way shows at once
            world.restore()
        run = self.follow(event, engine)
        world.at(START_SECONDS, lambda: self.handoffs.begin(run))
        if world.dice.roll(Fault.DRAINED):
            world.at(world.rng.uniform(0.0, 4.0), partial(self.drain, start.gpu, True))
        if world.dice.roll(Fault.GATEWAY_DIES):
            world.at(world.rng.uniform(0.0, 3.0), partial(self.gateway_dies, start.gpu))
        if world.dice.strikes(Fault.SICK):
            world.cards[start.gpu].is_sick_until = world.now + 90.0

    def follow(self, claimed: JobClaimed, engine: EngineUrl) -> Run:
        job = self.world.store.open_jobs[claimed.job].job
        run = Run(job=job, gpu=claimed.gpu, engine=engine, token=claimed.token)
        self.world.desks[claimed.gpu].run = run
        return run

    def give_back(self, run: Run) -> None:
        """Nothing of the job was sent: the claim goes back, its place with it."""
        world = self.world
        world.desks[run.gpu].run = None
        world.tell(world.store.release(run.job.id, run.token))
        world.vacate(run.gpu, HANDOFF)

    # -- a job on its engine

    def start(self, run: Run) -> None:
        world = self.world
        event = world.store.start(run.job.id, run.token)
        assert event is not None, f"seed {world.seed}: {run.job.id} cannot start"
        world.tell(event)
        run.started, run.progress_at, run.used_from = True, world.now, world.now
        self.unload_all.discard(run.job.id)
        world.vacate(run.gpu, HANDOFF)
        card = world.cards[run.gpu]
        process = card.processes[run.engine]
        if process.work is not None:  # a stranger whom nobody has seen yet is in the engine's own queue
            self.failed(run, Failure(kind=FailureKind.NOT_STARTED, code="busy", message="simulated"))
            return
        run.work = card.begin(run.engine, run.job.id, world.now)
        if run.job.service is Service.LOCK:
            self.hold_lock(run, run.work, process)
        else:
            self.load_model(run, run.work, process)
        self.watch(run)

    def hold_lock(self, run: Run, work: Work, process: Process) -> None:
        dice, rng = self.world.dice, self.world.rng
        process.gib = 1.0
        if dice.strikes(Fault.LOCK_KILLED):
            seconds, failure = rng.uniform(0.0, 5.0), LOCK_KILLED
        elif dice.strikes(Fault.LOCK_OVERDUE):
            seconds, failure = LOCK_SECONDS_MAX, LOCK_OVERDUE
        else:
            seconds, failure = rng.uniform(0.5, LOCK_SECONDS_MAX), None

        def ends() -> None:
            process.gib = 0.0
            self.over(run.gpu, work, failure)

        self.world.at(seconds, ends)

    def load_model(self, run: Run, work: Work, process: Process) -> None:
        world, dice, rng = self.world, self.world.dice, self.world.rng
        load = 0.0 if process.model == run.job.model else LOAD_SECONDS * rng.uniform(0.7, 1.3)
        need = peak_gib(run.job)
        process.model, process.gib = run.job.model, need
        end = partial(self.over, run.gpu, work)
        if world.cards[run.gpu].gib_free < 0:
            dice.count(Fault.OUT_OF_MEMORY)
            process.model, process.gib = "", 1.0
            world.at(load + 0.5, partial(end, MEMORY))
        elif world.cards[run.gpu].is_sick_until > world.now:
            world.at(load + 0.5, partial(end, SICK))
        elif dice.roll(Fault.DIES_LOADING):
            world.at(load * rng.random(), partial(self.dies, run, work, Fault.DIES_LOADING))
        elif dice.strikes(Fault.CLIENT_FAULT):
            world.at(0.1, partial(end, CONTENT))
        else:
            self.compute(run, work, load)

    def compute(self, run: Run, work: Work, load: Seconds) -> None:
        world, dice, rng = self.world, self.world.dice, self.world.rng
        service = min(rng.expovariate(1 / SERVICE_SECONDS), 4 * SERVICE_SECONDS)
        if dice.roll(Fault.STRANGER_BESIDE):
            world.at(rng.uniform(0.0, service), partial(self.stranger_beside, run, work))
        if dice.roll(Fault.DIES_RUNNING):
            world.at(load + service * rng.random(), partial(self.dies, run, work, Fault.DIES_RUNNING))
        elif dice.strikes(Fault.HANGS):
            work.hung_since = world.now + load
        elif dice.strikes(Fault.HANGS_DEAF):
            work.hung_since, work.heeds_interrupt = world.now + load, False
        else:
            world.at(load + service, partial(self.succeeds, run, work, load, service))

    def succeeds(self, run: Run, work: Work, load: Seconds, service: Seconds) -> None:
        if work.ended is not None:
            return
        world, job = self.world, run.job
        if load:
            world.tell(LoadMeasured(gpu=run.gpu, model=job.model, seconds=load, service=job.service))
        world.tell(ServiceMeasured(job=job, gpu=run.gpu, seconds=service))
        peak = int(peak_gib(job) * GIB)
        world.tell(VramMeasured(gpu=run.gpu, service=job.service, model=job.model, bytes_peak=peak))
        world.tell(ModelSeen(gpu=run.gpu, engine=run.engine, model=job.model))
        self.over(run.gpu, work, None)

    def stranger_beside(self, run: Run, work: Work) -> None:
        card = self.world.cards[run.gpu]
        idle = [
            p.url
            for p in card.processes.values()
            if p.is_alive and p.work is None and p.url != run.engine and "lock" not in p.url
        ]
        if work.ended is None and idle:
            self.world.dice.count(Fault.STRANGER_BESIDE)
            self.handoffs.stranger(run.gpu, EngineUrl(self.world.rng.choice(idle)))

    def dies(self, run: Run, work: Work, fault: Fault) -> None:
        """The engine dies under its job; until a probe shows it, the gateway holds the card for occupied."""
        if work.ended is not None:
            return
        self.world.dice.count(fault)
        self.world.lose(run.gpu, run.engine)
        self.world.at(NOTICE_SECONDS + 0.1, partial(self.lost, run.gpu, work))

    def lost(self, gpu: GpuId, work: Work) -> None:
        run = self.world.desks[gpu].run
        if run is not None and run.work is work:
            self.ended(run, LOST)

    def over(self, gpu: GpuId, work: Work, failure: Failure | None) -> None:
        """The engine is done with it, one way or another; whichever gateway lives hears of it."""
        if work.ended is not None:
            return
        self.world.cards[gpu].end(work, self.world.now)
        run = self.world.desks[gpu].run
        assert run is not None, f"seed {self.world.seed}: nobody follows {work.who}"
        assert run.work is work, f"seed {self.world.seed}: another than {work.who} is followed"
        self.ended(run, failure)

    def ended(self, run: Run, failure: Failure | None) -> None:
        if failure is not None:
            self.failed(run, failure)
            return
        world = self.world
        world.desks[run.gpu].run = None
        world.desks[run.gpu].breaker.after(None)
        used = world.now - run.used_from
        world.tell(world.store.finish(run.job.id, run.token, JobState.SUCCEEDED, None, used))

    def failed(self, run: Run, failure: Failure) -> None:
        world, job = self.world, run.job
        world.desks[run.gpu].run = None
        record, used = world.store.open_jobs[job.id], world.now - run.used_from
        before = self.memory_on.get(job.id, ())
        if is_out_of_memory(failure):
            self.memory_on[job.id] = (*before, run.gpu)
        key = world.book.class_key(job)
        answer = after_failure(
            job,
            failure,
            attempts_counted=record.attempts,
            avoid=record.avoid,
            gpu=run.gpu,
            eligible=frozenset(g for g, facts in world.book.gpus.items() if able_engines(key, facts)),
            policy=world.policy,
            jitter=world.rng.random(),
            engine_kills_before=record.engine_kills,
            out_of_memory_on=before,
        )
        if isinstance(answer, Again):
            if answer.unload_all:
                self.unload_all.add(job.id)
            world.tell(world.store.fail(job.id, run.token, failure, answer, used, world.now))
        else:
            world.tell(world.store.finish(job.id, run.token, JobState.FAILED, answer.failure, used))
        pause = world.desks[run.gpu].breaker.after(failure)
        if pause is not None:
            world.dice.count(Fault.PAUSED)
            world.tell(GpuPaused(gpu=run.gpu, seconds=pause.seconds, failures=pause.failures))

    # -- the watchdog

    def watch(self, run: Run) -> None:
        world, work = self.world, run.work
        limit = limit_seconds(world.book.learned, run.job, run.gpu, PATIENCE)
        if work is None or work.ended is not None or world.desks[run.gpu].run is not run:
            return
        run.progress_at = world.now if work.hung_since is None else min(work.hung_since, world.now)
        now = step(
            now=world.now,
            progress_at=run.progress_at,
            interrupted_at=run.interrupted_at,
            limit=limit,
            patience=PATIENCE,
        )
        match now:
            case WatchStep.INTERRUPT:
                run.interrupted_at = world.now
                world.at(INTERRUPT_SECONDS, partial(self.interrupt, run, work))
            case WatchStep.GIVE_UP:
                world.lose(run.gpu, run.engine)
                self.ended(run, HUNG)
                return
            case WatchStep.WAIT:
                pass
        at = look_again_at(
            progress_at=run.progress_at,
            interrupted_at=run.interrupted_at,
            limit=limit,
            patience=PATIENCE,
        )
        if at is not None:
            world.at(max(at - world.now, 0.01), partial(self.watch, run))

    # -- operators, and the gateway's own death

    def drain(self, gpu: GpuId, draining: bool) -> None:
        self.world.tell(self.world.store.drain(gpu, draining))
        if draining:
            if self.world.desks[gpu].run is not None:
                self.world.dice.count(Fault.DRAINED)
            self.world.at(self.world.rng.uniform(1.0, 15.0), partial(self.drain, gpu, False))

    def gateway_dies(self, gpu: GpuId) -> None:
        """All that it knew beside the store is gone. Claims that were not started go back; what runs is found
        again in its engine; strangers are seen anew.
        """
        world = self.world
        if world.desks[gpu].run is not None:
            world.dice.count(Fault.GATEWAY_DIES)
        learned = world.book.learned.values()
        book = world.book = Book(world.policy)
        book.learned.recall(learned)
        self.shown, self.wake_at = -1, float("inf")
        self.unload_all.clear()
        self.memory_on.clear()
        world.restore()
        for desk in world.desks.values():
            desk.breaker.reset()
            run = desk.run
            if run is not None and not run.started:
                world.store.release(run.job.id, run.token)
                desk.run = None
            desk.reasons.clear()
        world.restore()
        self.introduce()
        for name, desk in world.desks.items():
            for process in world.cards[name].processes.values():
                if process.work is not None and process.work.is_stranger:
                    process.work.seen_at = process.work.seen_at or world.now
                    world.occupy(name, stranger_on(process.url))
            world.occupy(name, "recovering")
            world.at(RECOVERY_SECONDS, partial(world.vacate, name, "recovering"))
            if desk.run is not None:
                world.at(RECOVERY_SECONDS, partial(self.watch, desk.run))

    # -- the end

    def report(self) -> ChaosReport:
        world = self.world
        states = [record.state.value for record in world.store.records.values()]
        later = world.now + 2 * LIMITS.pause_seconds_max
        found = [row for card in world.cards.values() for row in overlaps(card.log)]
        left = [row for card in world.cards.values() for row in unended(card.log)]
        return ChaosReport(
            seed=world.seed,
            ends=tuple((state, states.count(state)) for state in sorted(set(states))),
            fired=dict(world.dice.fired),
            overlaps=tuple(found),
            leaked_slots=len(world.store.slots) + len(left),
            open_jobs=len(world.store.open_jobs)
            + sum(1 for job in world.store.records if world.store.ends.get(job) != 1),
            lost_gpus=len(world.cards) - len(world.book.idle_gpus(later)),
            handoffs=self.handoffs.done_count,
            seconds=world.now,
            digest=world.crc,
        )


def peak_gib(job: Job) -> float:
    return MODELS[job.service][int(job.model.rpartition("-")[2])]


def failure(kind: FailureKind, code: str, *, killed: bool = False) -> Failure:
    return Failure(kind=kind, code=code, message="simulated", killed_engine=killed)


MEMORY = failure(FailureKind.ENGINE, "out_of_memory")
SICK = failure(FailureKind.ENGINE, "node_raised")
CONTENT = failure(FailureKind.CLIENT, "bad_value")
LOST = failure(FailureKind.LOST, "engine_lost", killed=True)
HUNG = failure(FailureKind.ENGINE, "hung", killed=True)
LOCK_KILLED = failure(FailureKind.CLIENT, "lock_killed")
LOCK_OVERDUE = failure(FailureKind.CLIENT, "lock_overdue")


def run_chaos(
    seed: int,
    jobs: int,
    when_leaking: WhenLeaking = "run",
    *,
    faults: bool = True,
    gibs: tuple[float, ...] = GIBS_OF_CARDS,
    services: tuple[int, ...] = SERVICE_WEIGHTS,
) -> ChaosReport:
    """Plays one run to its end. The same seed gives the same digest."""
    policy = Policy(skip_leaking=when_leaking == "skip", service_seconds_unknown=SERVICE_SECONDS)
    world = World(seed=seed, policy=policy, limits=LIMITS)
    world.dice.on = faults
    chaos = Chaos(world=world, jobs=jobs, when_leaking=when_leaking, gibs=gibs, services=services)
    return chaos.run()
