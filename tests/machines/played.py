"""Store, dispatcher, engines and users as rules of a state machine: each tells the book and the oracle alike.

What must hold after every step stands in test_scheduling.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gpulane.core.book import Book, GapInEvents
from gpulane.core.decisions import Candidate, StartAttempt
from gpulane.core.events import (
    ActiveJob,
    AttemptFailed,
    AttemptResumed,
    CancelWanted,
    ClaimLost,
    ClaimProposed,
    EngineLeaking,
    EngineLost,
    EngineReady,
    EngineUnloaded,
    Event,
    GpuAdded,
    GpuDrained,
    GpuFreed,
    GpuOccupied,
    GpuPaused,
    HolderAway,
    JobClaimed,
    JobEnded,
    JobPrioritised,
    JobReleased,
    JobStarted,
    JobSubmitted,
    LeaseExpired,
    LoadMeasured,
    ModelSeen,
    QueuePaused,
    ServiceMeasured,
    Snapshot,
    WaitingJob,
)
from gpulane.core.model import (
    NO_MODEL,
    Account,
    Band,
    ClaimId,
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
    Service,
    Token,
)
from gpulane.core.policy import Policy
from gpulane.core.scheduler import decide
from tests.machines.oracle import World, WorldEngine, WorldGpu, WorldJob, key_of

NODE = NodeId("node")
COMFY, A1111 = Service.COMFYUI, Service.A1111
GPUS = {
    "node/g0": ({"http://a:1": COMFY, "http://a:2": A1111}, frozenset[str](), 1.0),
    "node/g1": ({"http://b:2": A1111}, frozenset({"big"}), 1.0),
    "node/g2": ({"http://c:1": COMFY, "http://c:2": A1111}, frozenset({"big"}), 2.0),
}
OFFERS = [None, frozenset[str](), frozenset({"node:X"}), frozenset({"node:X", "node:Y"})]
accounts = st.sampled_from(["ann", "bob", "cyd"])
seeds = st.integers(0, 10**6)
outcomes = st.lists(st.sampled_from(["ok", "ok", "again"]), min_size=3, max_size=3)
corrections = st.sampled_from([-8.0, 0.0, 5.0, 40.0, 150.0])
seldom = st.sampled_from([False, False, False, True])
Wish = tuple[str, Service, str, Band, int, str]
wishes = st.tuples(
    accounts,
    st.sampled_from([COMFY, A1111, A1111]),
    st.sampled_from([NO_MODEL, "A", "B", "C"]),
    st.sampled_from([Band.NORMAL, Band.NORMAL, Band.NORMAL, Band.INTERACTIVE, Band.BATCH]),
    st.sampled_from([0, 0, 1]),
    st.sampled_from(["", "", "", "", "needs X", "needs Y", "big", "pinned"]),
)


class Played(RuleBasedStateMachine):
    """Plays all that surrounds the core."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.policy = Policy(load_seconds_unknown=4.0, service_seconds_unknown=10.0)
        self.book = Book(self.policy)
        self.now = 100.0
        self.n = 0
        self.proposals: dict[str, StartAttempt] = {}

    # -- telling the book

    def tell(self, event: Event) -> None:
        self.book.apply(event, self.now)

    def next_n(self) -> int:
        self.n += 1
        return self.n

    def tell_models(self, gpu: str) -> None:
        for engine in self.world.gpus[gpu].engines.values():
            self.tell(ModelSeen(gpu=GpuId(gpu), engine=EngineUrl(engine.url), model=ModelKey(engine.holds)))

    def pick(self, seed: int, wanted: Callable[[WorldJob], bool]) -> WorldJob | None:
        found = [w for w in self.world.jobs.values() if wanted(w)]
        return found[seed % len(found)] if found else None

    @initialize(
        ready=st.lists(st.sampled_from([True, True, True, False]), min_size=5, max_size=5),
        wishes=st.lists(wishes, max_size=12),
    )
    def settings_and_probes(self, ready: list[bool], wishes: list[Wish]) -> None:
        alive = iter(ready)
        for id_, (engines, labels, speed) in GPUS.items():
            urls = [Engine(url=EngineUrl(url), service=service) for url, service in engines.items()]
            gpu = Gpu(
                id=GpuId(id_),
                node=NODE,
                name=id_[-2:],
                uuid=id_,
                engines=tuple(urls),
                labels=labels,
                speed=speed,
            )
            self.tell(GpuAdded(gpu=gpu))
            known = {e.url: WorldEngine(e.url, e.service) for e in urls}
            self.world.gpus[id_] = WorldGpu(id_, cast("dict[str, WorldEngine]", known), labels, speed)
            for engine in urls:
                if next(alive):
                    self.tell(EngineReady(engine=engine.url, offers=None))
                    known[engine.url].alive = True

        for wish in wishes:
            self.submit(wish)

    # -- users

    @rule(wishes=st.lists(wishes, min_size=1, max_size=5))
    def several_submit(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            self.submit(wish)

    def submit(self, wish: Wish) -> None:
        account, service, model, band, priority, extras = wish
        n = self.next_n()
        pinned = EngineUrl("http://c:1" if service is COMFY else "http://c:2")
        job = Job(
            id=JobId(f"job{n:04}"),
            account=Account(account),
            service=service,
            kind="k",
            model=ModelKey(model),
            needs=frozenset({f"node:{extras[-1]}"}) if extras.startswith("needs") else frozenset(),
            labels=frozenset({"big"}) if extras == "big" else frozenset(),
            engine=pinned if extras == "pinned" else None,
            band=band,
            priority=priority,
            weight=2.0 if account == "cyd" else 1.0,
            arrival=n,
        )
        key = key_of(job)
        waits = any(key_of(w.job) == key and w.state == "waiting" for w in self.world.jobs.values())
        if not waits:
            self.world.f[key] = max(self.world.f.get(key, 0.0), self.world.v.get(key[0], 0.0))
        self.world.jobs[job.id] = WorldJob(job)
        self.tell(JobSubmitted(n=n, job=job, account_f=self.world.f[key]))

    @rule(seed=seeds)
    def cancel(self, seed: int) -> None:
        entry = self.pick(seed, lambda w: not w.cancel_wanted)
        if entry is None:
            return
        if entry.state == "started":
            entry.cancel_wanted = True
            self.tell(CancelWanted(n=self.next_n(), job=entry.job.id))
            return
        self.refund(entry)
        self.leave_gpu(entry, undone=True)
        self.end(entry, JobState.CANCELLED)

    @rule(seed=seeds, band=st.sampled_from(list(Band)), priority=st.integers(-1, 2))
    def prioritise(self, seed: int, band: Band, priority: int) -> None:
        entry = self.pick(seed, lambda w: w.state == "waiting")
        if entry is None:
            return None
        if entry.claiming is not None and entry.job.band != band:
            del self.world.provisional[entry.claiming]
            entry.claiming = None  # the claim under way has another band in mind; it goes on
            return self.settle_now(entry, band, priority)
        return self.settle_now(entry, band, priority)

    def settle_now(self, entry: WorldJob, band: Band, priority: int) -> None:
        entry.job = replace(entry.job, band=band, priority=priority)
        key = key_of(entry.job)
        self.world.f[key] = max(self.world.f.get(key, 0.0), self.world.v.get(key[0], 0.0))
        self.tell(
            JobPrioritised(
                n=self.next_n(),
                job=entry.job.id,
                band=band,
                priority=priority,
                account_f=self.world.f[key],
            )
        )
        self.sync_claims()

    @rule(seed=seeds, away=st.booleans())
    def client_leaves_or_comes_back(self, seed: int, away: bool) -> None:
        entry = self.pick(
            seed, lambda w: w.state == "waiting" and w.away != away and w.not_before <= self.now
        )
        if entry is None:
            return
        entry.away = away
        self.tell(HolderAway(job=entry.job.id, away=away))
        self.sync_claims()

    # -- the dispatcher

    @rule(answers=st.lists(st.sampled_from(["claim", "claim", "later", "lost"]), min_size=3, max_size=3))
    def carry_out(self, answers: list[str]) -> None:
        for decision, answer in zip(self.proposed(), answers, strict=False):
            jobs = tuple(c.job for c in decision.candidates)
            self.tell(ClaimProposed(gpu=decision.gpu, jobs=jobs))
            self.proposals[decision.gpu] = decision
            self.world.gpus[decision.gpu].claiming = True
            self.sync_claims()
            if answer != "later":
                self.answer(decision.gpu, refuse=answer == "lost")

    @rule(seed=seeds, refuse=st.sampled_from([False, False, True]))
    @precondition(lambda self: bool(self.proposals))
    def answer_later(self, seed: int, refuse: bool) -> None:
        gpus = sorted(self.proposals)
        self.answer(gpus[seed % len(gpus)], refuse=refuse)

    def answer(self, gpu: str, *, refuse: bool) -> None:
        """The store: the first candidate that still waits and has rested, unless it is told to refuse."""
        decision = self.proposals.pop(gpu)
        facts = self.world.gpus[gpu]
        facts.claiming = False
        self.world.provisional.pop(gpu, None)
        for entry in self.world.jobs.values():
            if entry.claiming == gpu:
                entry.claiming = None
        found = next((c for c in decision.candidates if self.can_be_had(c.job)), None)
        if refuse or found is None or facts.draining or self.world.paused:
            self.tell(ClaimLost(gpu=decision.gpu, rest_seconds=0.0))
            self.sync_claims()
            return
        self.claim(decision, found)

    def can_be_had(self, job: str) -> bool:
        entry = self.world.jobs.get(job)
        return entry is not None and entry.state == "waiting" and entry.not_before <= self.now

    def claim(self, decision: StartAttempt, found: Candidate) -> None:
        entry, gpu = self.world.jobs[found.job], self.world.gpus[decision.gpu]
        n, key = self.next_n(), key_of(entry.job)
        if entry.claiming is not None:
            self.world.provisional.pop(entry.claiming, None)
        entry.state, entry.gpu, entry.engine, entry.claiming = "claimed", gpu.id, found.engine, None
        entry.away = False
        entry.token, entry.charge = f"{n}.c", found.charge.total / entry.job.weight
        gpu.job, gpu.before, gpu.last_engine = entry.job.id, gpu.last_engine, found.engine
        lowest = dict(decision.lowest_f).get(entry.job.band, 0.0)
        self.world.v[key[0]] = max(self.world.v.get(key[0], 0.0), lowest)
        self.world.f[key] += entry.charge
        self.tell(
            JobClaimed(
                n=n,
                job=found.job,
                gpu=decision.gpu,
                node=NODE,
                token=Token(entry.token),
                claim=ClaimId("c"),
                account_f=self.world.f[key],
                band_v=self.world.v[key[0]],
            )
        )
        self.sync_claims()

    def sync_claims(self) -> None:
        """Claims under way keep their first choice out of offer while it waits."""
        self.world.provisional.clear()
        for gpu, decision in self.proposals.items():
            first = decision.candidates[0]
            entry = self.world.jobs.get(first.job)
            if entry is None or entry.state != "waiting" or entry.claiming not in {None, gpu}:
                continue
            entry.claiming = gpu
            tab = self.book.waiting.bands[entry.job.band].tabs[entry.job.account]
            self.world.provisional[gpu] = (*key_of(entry.job), tab.provisional[GpuId(gpu)])

    @rule()
    def start_all(self) -> None:
        for entry in self.world.jobs.values():
            if entry.state == "claimed":
                entry.state, entry.attempts = "started", entry.attempts + 1
                token = Token(entry.token or "")
                event = JobStarted(n=self.next_n(), job=entry.job.id, token=token, attempts=entry.attempts)
                self.tell(event)

    @rule(
        correction=corrections,
        outcomes=st.lists(st.sampled_from(["ok", "ok", "again"]), min_size=3, max_size=3),
    )
    def a_round_of_work(self, correction: float, outcomes: list[str]) -> None:
        """Claims, starts and ends in one go: machines of single steps hardly ever get far."""
        self.carry_out(["claim"] * 3)
        self.start_all()
        for outcome in outcomes:
            if outcome == "ok":
                self.finish(0, correction, "ok")
            else:
                self.fail_again(0, 3.0, FailureKind.LOST)

    @rule(seed=seeds)
    def release(self, seed: int) -> None:
        entry = self.pick(seed, lambda w: w.state == "claimed")
        if entry is None:
            return
        self.refund(entry)
        self.leave_gpu(entry, undone=True)
        entry.state = "waiting"
        f, token = self.world.f[key_of(entry.job)], Token(entry.token or "")
        self.tell(JobReleased(n=self.next_n(), job=entry.job.id, token=token, account_f=f, why="test"))
        self.tell_models(entry.gpu or "")

    @rule(seed=seeds, correction=corrections, state=st.sampled_from(["ok", "bad"]))
    def finish(self, seed: int, correction: float, state: str) -> None:
        entry = self.pick(seed, lambda w: w.state == "started")
        if entry is None:
            return
        key = key_of(entry.job)
        self.world.f[key] = max(self.world.f[key] + correction, 0.0)
        self.leave_gpu(entry, undone=False, loaded=state == "ok")
        end = JobState.SUCCEEDED if state == "ok" else JobState.FAILED
        self.end(entry, JobState.CANCELLED if entry.cancel_wanted else end)

    @rule(seed=seeds, rest=st.sampled_from([0.0, 3.0]), kind=st.sampled_from(list(FailureKind)))
    def fail_again(self, seed: int, rest: float, kind: FailureKind) -> None:
        entry = self.pick(seed, lambda w: w.state == "started" and not w.cancel_wanted)
        if entry is None or entry.gpu is None:
            return
        self.refund(entry)
        self.leave_gpu(entry, undone=False, loaded=False)
        entry.state, entry.avoid = "waiting", entry.avoid | {entry.gpu}
        entry.not_before = self.now + rest
        self.tell(
            AttemptFailed(
                n=self.next_n(),
                job=entry.job.id,
                token=Token(entry.token or ""),
                failure=Failure(kind=kind, code="test", message="test", killed_engine=False),
                avoid=cast("frozenset[GpuId]", entry.avoid),
                not_before_seconds=rest,
                account_f=self.world.f[key_of(entry.job)],
            )
        )
        self.tell_models(entry.gpu)

    @rule(seed=seeds)
    def lease_expires(self, seed: int) -> None:
        entry = self.pick(seed, lambda w: w.state == "started")
        if entry is not None:
            self.tell(LeaseExpired(n=self.next_n(), job=entry.job.id))

    @rule(seed=seeds)
    def resume(self, seed: int) -> None:
        entry = self.pick(seed, lambda w: w.state == "started")
        if entry is None:
            return
        n, old = self.next_n(), Token(entry.token or "")
        entry.token = f"{n}.r"
        gpu = GpuId(entry.gpu or "")
        self.tell(AttemptResumed(n=n, job=entry.job.id, gpu=gpu, node=NODE, token=Token(entry.token)))
        with pytest.raises(AssertionError, match="illegal"):
            self.tell(JobStarted(n=self.n + 1, job=entry.job.id, token=old, attempts=9))
        assert self.book.active[entry.job.id].token == entry.token

    def refund(self, entry: WorldJob) -> None:
        if entry.state != "waiting":
            self.world.f[key_of(entry.job)] -= entry.charge

    def leave_gpu(self, entry: WorldJob, *, undone: bool, loaded: bool = False) -> None:
        gpu = self.world.gpus.get(entry.gpu or "") if entry.state != "waiting" else None
        if gpu is None:
            return
        gpu.job = None
        if undone:
            handed_over = gpu.before not in {None, gpu.last_engine}
            gpu.last_engine = gpu.before
            if handed_over:
                for engine in gpu.engines.values():
                    engine.holds = NO_MODEL
            return
        for url, engine in gpu.engines.items():
            engine.holds = entry.job.model if url == entry.engine and loaded and engine.alive else NO_MODEL

    def end(self, entry: WorldJob, state: JobState) -> None:
        del self.world.jobs[entry.job.id]
        f = self.world.f[key_of(entry.job)]
        self.tell(JobEnded(n=self.next_n(), job=entry.job.id, state=state, account_f=f))
        if entry.gpu is not None and entry.state != "waiting":
            self.tell_models(entry.gpu)
        self.sync_claims()

    # -- engines, gpus, operators, time

    def engine(self, seed: int) -> tuple[WorldGpu, WorldEngine]:
        rows = [(g, e) for g in self.world.gpus.values() for e in g.engines.values()]
        return rows[seed % len(rows)]

    @rule(seed=seeds)
    def engine_lost(self, seed: int) -> None:
        gpu, engine = self.engine(seed)
        engine.alive, engine.holds = False, NO_MODEL
        if gpu.last_engine == engine.url:
            gpu.last_engine = None
        self.tell(EngineLost(engine=EngineUrl(engine.url), why="test"))

    @rule(seed=seeds, offers=st.sampled_from(OFFERS))
    def engine_ready(self, seed: int, offers: frozenset[str] | None) -> None:
        gpu, _ = self.engine(seed)
        for engine in gpu.engines.values():
            engine.alive, engine.offers = True, offers
            self.tell(EngineReady(engine=EngineUrl(engine.url), offers=offers))

    @rule(seed=seeds)
    def engine_unloaded(self, seed: int) -> None:
        """Nothing is told to unload while a job has the card."""
        gpu, engine = self.engine(seed)
        if gpu.job is None and engine.alive:
            engine.holds = NO_MODEL
            self.tell(EngineUnloaded(gpu=GpuId(gpu.id), engine=EngineUrl(engine.url)))

    @rule(seed=seeds, leaking=seldom)
    def engine_leaks(self, seed: int, leaking: bool) -> None:
        """It is shown, and works on: this policy skips none."""
        _, engine = self.engine(seed)
        self.tell(EngineLeaking(engine=EngineUrl(engine.url), leaking=leaking))

    @rule(gpu=st.sampled_from(sorted(GPUS)), seconds=st.sampled_from([0.0, 0.0, 2.0]))
    def gpu_paused(self, gpu: str, seconds: float) -> None:
        self.world.gpus[gpu].paused_until = self.now + seconds
        self.tell(GpuPaused(gpu=GpuId(gpu), seconds=seconds, failures=5))

    @rule(gpu=st.sampled_from(sorted(GPUS)), occupied=seldom)
    def stranger(self, gpu: str, occupied: bool) -> None:
        self.world.gpus[gpu].occupied = occupied
        id_ = GpuId(gpu)
        self.tell(GpuOccupied(gpu=id_, why="stranger") if occupied else GpuFreed(gpu=id_))

    @rule(gpu=st.sampled_from(sorted(GPUS)), draining=seldom)
    def drain(self, gpu: str, draining: bool) -> None:
        self.world.gpus[gpu].draining = draining
        self.tell(GpuDrained(n=self.next_n(), gpu=GpuId(gpu), draining=draining))

    @rule(paused=seldom)
    def pause(self, paused: bool) -> None:
        self.world.paused = paused
        self.tell(QueuePaused(n=self.next_n(), paused=paused))

    @rule(seconds=st.sampled_from([0.001, 0.5, 3.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        gpu=st.sampled_from(sorted(GPUS)), model=st.sampled_from("ABC"), seconds=st.sampled_from([1.0, 6.0])
    )
    def load_measured(self, gpu: str, model: str, seconds: float) -> None:
        self.tell(LoadMeasured(gpu=GpuId(gpu), model=ModelKey(model), seconds=seconds))

    @rule(seed=seeds)
    def service_measured(self, seed: int) -> None:
        entry = self.pick(seed, lambda _: True)
        if entry is not None:
            self.tell(ServiceMeasured(job=entry.job, gpu=GpuId("node/g2"), seconds=4.0))

    # -- a store that repeats, skips or is restored; writers with old tokens

    @rule(back=st.integers(0, 3))
    def told_twice(self, back: int) -> None:
        before = pickle.dumps(self.book)
        self.tell(QueuePaused(n=max(self.n - back, 0), paused=True))
        assert pickle.dumps(self.book) == before

    @rule()
    def gap(self) -> None:
        with pytest.raises(GapInEvents):
            self.tell(QueuePaused(n=self.n + 2, paused=True))

    @rule(seed=seeds)
    def old_token(self, seed: int) -> None:
        entry = self.pick(seed, lambda w: w.state == "claimed")
        if entry is not None:
            with pytest.raises(AssertionError, match="token"):
                self.tell(JobStarted(n=self.n + 1, job=entry.job.id, token=Token("0.old"), attempts=1))

    @rule()
    def restored(self) -> None:
        """The store does not know whose client is away: the shell tells again."""
        jobs = self.world.jobs.values()
        waiting = tuple(
            WaitingJob(
                job=w.job,
                attempts=w.attempts,
                avoid=cast("frozenset[GpuId]", w.avoid),
                not_before_seconds=max(w.not_before - self.now, 0.0),
            )
            for w in jobs
            if w.state == "waiting"
        )
        active = tuple(
            ActiveJob(
                job=w.job,
                gpu=GpuId(w.gpu or ""),
                node=NODE,
                token=Token(w.token or ""),
                started=w.state == "started",
                cancel_wanted=w.cancel_wanted,
                attempts=w.attempts,
                avoid=cast("frozenset[GpuId]", w.avoid),
            )
            for w in jobs
            if w.state != "waiting"
        )
        self.book.restore(
            Snapshot(
                n=self.n,
                waiting=waiting,
                active=active,
                account_f=tuple((Band(b), Account(a), f) for (b, a), f in self.world.f.items()),
                band_v=tuple((Band(b), v) for b, v in self.world.v.items()),
                draining=frozenset(GpuId(g.id) for g in self.world.gpus.values() if g.draining),
                paused=self.world.paused,
            ),
            self.now,
        )
        for gpu in self.world.gpus.values():
            if gpu.job is not None:
                gpu.before = gpu.last_engine
        for entry in self.world.jobs.values():
            if entry.away:
                self.tell(HolderAway(job=entry.job.id, away=True))
        self.sync_claims()

    # -- what the core wants

    def proposed(self) -> list[StartAttempt]:
        return [d for d in decide(self.book, self.policy, self.now) if isinstance(d, StartAttempt)]
