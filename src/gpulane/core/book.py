"""All the scheduler knows, as told by events. `apply` records a fact and asserts that it is legal; `check`
holds the book against its own invariants. It decides nothing, reads no clock, and forgets what has ended.

Store events arrive in the order of `n`. One seen before is ignored; a gap raises GapInEvents, and the
shell restores a new snapshot. What the store knows (jobs, F, V, drains) comes with the snapshot; what this
process knows (engines, models, measurements, claims under way) outlives it.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import assert_never

from gpulane.core import standing
from gpulane.core.attempts import ActiveEntry
from gpulane.core.events import (
    AttemptFailed,
    AttemptResumed,
    CancelWanted,
    CardMeasured,
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
    GpuRemoved,
    HandoffMeasured,
    HolderAway,
    JobClaimed,
    JobEnded,
    JobPrioritised,
    JobReleased,
    JobStarted,
    JobSubmitted,
    LeaseExpired,
    LoadMeasured,
    LocalEvent,
    ModelSeen,
    NodeChanged,
    QueuePaused,
    ServiceMeasured,
    Snapshot,
    StoreEvent,
    VramMeasured,
    WaitingJob,
)
from gpulane.core.gpu_events import (
    EngineEvent,
    engine_changed,
    gpu_changed,
    learn,
    new_facts,
)
from gpulane.core.gpus import (
    GpuFacts,
    GpuView,
    Proposal,
    able_engines,
    expected_unloads,
    handoff_plan,
    start_seconds,
    view,
)
from gpulane.core.handoff import HandoffPlan
from gpulane.core.learned import Learned
from gpulane.core.model import (
    AttemptState,
    Band,
    EngineUrl,
    FailureKind,
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
from gpulane.core.queues import ClassKey, Waiting, WaitingClass, WaitingEntry
from gpulane.core.reasons import Reason
from gpulane.core.transitions import JobEvent, move
from gpulane.errors import GpulaneError

AttemptEvent = JobStarted | JobReleased | AttemptFailed | CancelWanted | LeaseExpired
"""Events about a job that has an attempt."""


class GapInEvents(GpulaneError):
    """Store events are missing: restore a new snapshot."""

    code = "gap_in_events"


class Book:
    """The facts, indexed for `decide`."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.learned = Learned(self.policy)
        self.gpus: dict[GpuId, GpuFacts] = {}
        self.waiting = Waiting()
        self.active: dict[JobId, ActiveEntry] = {}
        self.active_by_gpu: dict[GpuId, JobId] = {}
        self.draining: set[GpuId] = set()
        self.absent_nodes: set[NodeId] = set()
        self.paused = False
        self.n = 0
        """Number of the last store event."""
        self.now: Seconds = 0.0
        """Time of the last event."""
        self.version = 0
        """Rises with every change: for caches of readings."""
        self._rankings: dict[Band, tuple[int, list[standing.AccountStanding]]] = {}

    # -- writing

    def apply(self, event: Event, now: Seconds) -> None:
        """Records one fact. An illegal one is an AssertionError, a missing one GapInEvents."""
        if isinstance(event, StoreEvent):
            if event.n <= self.n:
                if isinstance(event, JobClaimed):
                    self._settle_proposal(event.gpu)
                return
            if event.n > self.n + 1:
                raise GapInEvents(f"event {event.n} came after {self.n}")
        self.now = max(self.now, now)
        self.waiting.wake(now)
        if isinstance(event, StoreEvent):
            self._apply_store(event, now)
            self.n = event.n
        else:
            self._apply_local(event, now)
        self.version += 1

    def restore(self, snapshot: Snapshot, now: Seconds) -> None:
        """Starts anew from what the store knows; gpus, engines, models and measurements stay as they are
        known.
        """
        self.now = max(self.now, now)
        self.version += 1
        self.waiting = Waiting()
        self.active, self.active_by_gpu = {}, {}
        self.n, self.paused, self.draining = snapshot.n, snapshot.paused, set(snapshot.draining)
        for band, v in snapshot.band_v:
            self.waiting.bands[band].v = v
        f_of = {(band, account): f for band, account, f in snapshot.account_f}
        for gpu in self.gpus.values():
            gpu.draining = gpu.gpu.id in self.draining
            gpu.forget_job()
        for waiting in sorted(snapshot.waiting, key=lambda w: (-w.job.priority, w.job.arrival)):
            self._open_account(waiting.job, f_of.get((waiting.job.band, waiting.job.account)))
            self._wait(waiting, now)
        for active in snapshot.active:
            self._open_account(active.job, f_of.get((active.job.band, active.job.account)))
            entry = self.active[active.job.id] = ActiveEntry.of_snapshot(active)
            self._occupy(entry, now)
        for facts in self.gpus.values():
            self._propose_again(facts)

    def check(self) -> None:
        """Asserts the book's own invariants; slow, for tests and after a restore."""
        for gpu, job in self.active_by_gpu.items():
            assert self.active[job].gpu == gpu, (gpu, job)
        assert len(self.active) == len(self.active_by_gpu)
        assert not self.active.keys() & self.waiting.entries.keys()
        for gpu, facts in self.gpus.items():
            assert facts.job == self.active_by_gpu.get(gpu), gpu
            assert facts.job is None or facts.proposal is None, gpu
            assert facts.draining == (gpu in self.draining), gpu
        for entry in self.waiting.entries.values():
            rests = any(row[2] == entry.job.id for row in self.waiting.resting)
            assert entry.offered + (entry.claim is not None) + rests == 1, entry
        standing.check_queues(self.waiting)

    # -- reading, for decide

    def idle_gpus(self, now: Seconds) -> list[GpuFacts]:
        return [facts for _, facts in sorted(self.gpus.items()) if facts.is_idle(now)]

    def slack_cap_seconds(self, policy: Policy) -> Seconds:
        """Returns the most slack anybody may have: it grows with the gpus that work."""
        usable = sum(facts.is_serving and not facts.draining for facts in self.gpus.values())
        return policy.slack_cap_seconds_per_gpu * max(usable, 1)

    def load_seconds(self, gpu: GpuId, model: ModelKey, service: Service | None = None) -> Seconds:
        """Returns how long loading the model on the gpu takes, a hand-off left out."""
        return self.learned.load_seconds(gpu, model, service)

    def handoff_plan(
        self,
        gpu: GpuId,
        engine: EngineUrl,
        model: ModelKey,
        *,
        bytes_free: int | None = None,
        unload_all: bool = False,
    ) -> HandoffPlan:
        """Returns what the card must give up before such a job runs there, by what was measured free."""
        return handoff_plan(
            self.gpus[gpu], engine, model, self.learned, bytes_free=bytes_free, unload_all=unload_all
        )

    def service_seconds(self, job: Job, gpu: GpuId) -> Seconds:
        """Returns how long serving the job on the gpu is expected to take, its load left out."""
        facts = self.gpus.get(gpu)
        return self.learned.service_seconds(job, facts.gpu.speed if facts else 1.0)

    def engine_for(self, key: ClassKey, gpu: GpuId) -> EngineUrl | None:
        """Returns the engine of the gpu that such a job would go to: the one that holds its model, else
        the first able.
        """
        facts = self.gpus.get(gpu)
        if facts is None:
            return None
        engines = able_engines(key, facts)
        return next((url for url in engines if facts.holds(url, key.model)), engines[0] if engines else None)

    # -- reading, for people

    def gpu_view(self, gpu: GpuId) -> GpuView | None:
        facts = self.gpus.get(gpu)
        return view(facts) if facts else None

    def gpu_views(self) -> tuple[GpuView, ...]:
        return tuple(view(facts) for _, facts in sorted(self.gpus.items()))

    def job_state(self, job: JobId) -> JobState | None:
        """Returns the state of a job that has not ended; None for all others."""
        if (entry := self.waiting.entries.get(job)) is not None:
            return JobState.WAITING_RETRY if entry.attempts else JobState.QUEUED
        active = self.active.get(job)
        return active.job_state if active else None

    def job_place(self, job: JobId) -> int | None:
        """Returns the job's position in fair order, from 1; None when it does not wait."""
        entry = self.waiting.entries.get(job)
        return standing.place(self.waiting, self._ranking(entry.job.band), entry) if entry else None

    def reason(self, job: JobId, now: Seconds | None = None) -> Reason | None:
        """Returns why the job is not done yet; None for a job that is not known or has ended."""
        return standing.explain(self, job, self.job_place(job), self.now if now is None else now)

    def estimated_start_seconds(
        self, job: JobId, now: Seconds | None = None
    ) -> tuple[Seconds, Seconds] | None:
        """Returns an honest range for the time until the job starts; None when it cannot start as things
        are.
        """
        entry = self.waiting.entries.get(job)
        if entry is None:
            return None
        return standing.estimate(self, self._ranking(entry.job.band), entry, self.now if now is None else now)

    def _ranking(self, band: Band) -> list[standing.AccountStanding]:
        """Returns the accounts of a band in fair order; made once per version of the book."""
        version, ranking = self._rankings.get(band, (-1, []))
        if version != self.version:
            ranking = standing.standings(self.waiting.bands[band], self.learned)
            self._rankings[band] = (self.version, ranking)
        return ranking

    def class_key(self, job: Job, avoid: frozenset[GpuId] = frozenset()) -> ClassKey:
        return ClassKey(job.band, job.service, job.model, job.needs, job.labels, job.engine, avoid)

    # -- store events

    def _apply_store(self, event: StoreEvent, now: Seconds) -> None:
        match event:
            case JobSubmitted():
                job = event.job
                assert self.job_state(job.id) is None, f"illegal: {event!r} for a job that is known"
                self._open_account(job, event.account_f)
                self._wait(WaitingJob(job=job), now)
            case GpuDrained():
                (self.draining.add if event.draining else self.draining.discard)(event.gpu)
                if (facts := self.gpus.get(event.gpu)) is not None:
                    facts.draining = event.draining
                    facts.idle_since = now
                    self._refresh(facts)
            case QueuePaused():
                self.paused = event.paused
            case NodeChanged():
                (self.absent_nodes.discard if event.present else self.absent_nodes.add)(event.node)
                for facts in self.gpus.values():
                    if facts.gpu.node == event.node:
                        facts.present = event.present
                        self._refresh(facts)
            case _:
                self._apply_job(event, now)

    def _apply_job(self, event: JobEvent, now: Seconds) -> None:
        state, attempt = self.job_state(event.job), None
        assert state is not None, f"illegal: {event!r} for a job that is not known"
        if (active := self.active.get(event.job)) is not None:
            attempt = active.state
        move(state, attempt, event)
        match event:
            case JobClaimed():
                self._claimed(event, now)
            case JobStarted():
                self._started(event)
            case JobReleased():
                self._released(event, now)
            case AttemptFailed():
                self._attempt_failed(event, now)
            case JobEnded():
                self._ended(event, now)
            case CancelWanted() | LeaseExpired():
                active = self._active(event)
                active.cancel_wanted |= isinstance(event, CancelWanted)
                active.suspect |= isinstance(event, LeaseExpired)
            case JobPrioritised():
                self._prioritised(event, now)
            case AttemptResumed():
                self._resumed(event, now)
            case _:
                assert_never(event)

    def _claimed(self, event: JobClaimed, now: Seconds) -> None:
        entry = self._stop_waiting(event.job)
        job = entry.job
        assert event.gpu not in self.active_by_gpu, (
            f"illegal: {event!r}: {self.active_by_gpu[event.gpu]} is there"
        )
        self._settle_proposal(event.gpu)
        self.waiting.bands[job.band].v = max(self.waiting.bands[job.band].v, event.band_v)
        self.waiting.set_f(job.band, job.account, event.account_f)
        active = self.active[job.id] = ActiveEntry.of_event(entry, event)
        self._occupy(active, now)

    def _started(self, event: JobStarted) -> None:
        active = self._active(event)
        active.state, active.attempts = AttemptState.STARTED, event.attempts
        if (facts := self.gpus.get(active.gpu)) is not None:
            facts.start()

    def _released(self, event: JobReleased, now: Seconds) -> None:
        active = self._active(event)
        if (facts := self.gpus.get(active.gpu)) is not None:
            facts.unclaim()
        self._free(active, now, proved=True)
        self.waiting.set_f(active.job.band, active.job.account, event.account_f)
        self._wait_again(active, active.avoid, 0.0, now)

    def _attempt_failed(self, event: AttemptFailed, now: Seconds) -> None:
        active = self._active(event)
        facts = self.gpus.get(active.gpu)
        if facts is not None and (event.failure.killed_engine or event.failure.kind is FailureKind.LOST):
            facts.forget_models()
        self._free(active, now, proved=False)
        self.waiting.set_f(active.job.band, active.job.account, event.account_f)
        self._wait_again(active, event.avoid, event.not_before_seconds, now)

    def _ended(self, event: JobEnded, now: Seconds) -> None:
        active = self.active.get(event.job)
        if active is None:
            job = self._stop_waiting(event.job).job
        else:
            job = active.job
            if active.state is AttemptState.CLAIMED and active.gpu in self.gpus:
                self.gpus[active.gpu].unclaim()
            self._free(active, now, proved=event.state is JobState.SUCCEEDED)
        self.waiting.set_f(job.band, job.account, event.account_f)
        self._close_account(job)

    def _prioritised(self, event: JobPrioritised, now: Seconds) -> None:
        entry = self._stop_waiting(event.job)
        self._close_account(entry.job)
        job = replace(entry.job, band=event.band, priority=event.priority)
        self._open_account(job, event.account_f)
        rest = max(entry.not_before - now, 0.0)
        self._wait(
            WaitingJob(job=job, attempts=entry.attempts, avoid=entry.avoid, not_before_seconds=rest), now
        )
        if entry.claim is not None and (facts := self.gpus.get(entry.claim)) is not None:
            self._propose_again(facts)

    def _resumed(self, event: AttemptResumed, now: Seconds) -> None:
        active = self.active.get(event.job)
        if active is None:
            taken = self.active_by_gpu.get(event.gpu)
            assert taken is None, f"illegal: {event!r}: {taken} is there"
            active = ActiveEntry.of_event(self._stop_waiting(event.job), event)
            self.active[event.job] = active
            self._settle_proposal(event.gpu)
            self._occupy(active, now)
            return
        assert active.gpu == event.gpu, f"illegal: {event!r}: it runs on {active.gpu}"
        active.token, active.node, active.suspect = event.token, event.node, False

    # -- local events

    def _apply_local(self, event: LocalEvent, now: Seconds) -> None:
        match event:
            case GpuAdded():
                self._add_gpu(event, now)
            case GpuRemoved():
                if (facts := self.gpus.get(event.gpu)) is not None:
                    self._settle_proposal(event.gpu)
                    del self.gpus[event.gpu]
                    self._refresh(facts)
            case EngineReady() | EngineLost() | EngineLeaking():
                self._engine_changed(event, now)
            case (
                GpuOccupied()
                | GpuFreed()
                | GpuPaused()
                | CardMeasured()
                | ModelSeen()
                | EngineUnloaded()
                | HandoffMeasured()
            ):
                if (facts := self.gpus.get(event.gpu)) is not None:
                    gpu_changed(facts, event, now)
                    learn(self.learned, event, facts.gpu.speed)
            case LoadMeasured() | ServiceMeasured() | VramMeasured():
                facts = self.gpus.get(event.gpu)
                learn(self.learned, event, facts.gpu.speed if facts else 1.0)
            case ClaimProposed():
                self._propose(event)
            case ClaimLost():
                self._claim_lost(event, now)
            case HolderAway():
                if (entry := self.waiting.entries.get(event.job)) is not None:
                    self.waiting.rest(entry, inf if event.away else now, now)
            case _:
                assert_never(event)

    def _add_gpu(self, event: GpuAdded, now: Seconds) -> None:
        gpu = event.gpu
        assert gpu.id not in self.gpus, f"illegal: {event!r}: it is known"
        facts = self.gpus[gpu.id] = new_facts(gpu, self.policy, now)
        facts.draining = gpu.id in self.draining
        facts.present = gpu.node not in self.absent_nodes
        if (job := self.active_by_gpu.get(gpu.id)) is not None:
            facts.job, facts.started = job, self.active[job].state is AttemptState.STARTED
        self._refresh(facts)

    def _engine_changed(self, event: EngineEvent, now: Seconds) -> None:
        """Facts about an engine that is not in the settings any more are old news."""
        for facts in self.gpus.values():
            if event.engine in facts.engines:
                engine_changed(facts, event, now)
                self._refresh(facts)

    # -- claims under way

    def _propose(self, event: ClaimProposed) -> None:
        facts = self.gpus.get(event.gpu)
        assert facts is not None, f"illegal: {event!r}: the gpu is not known"
        assert facts.proposal is None, f"illegal: {event!r}: {facts.proposal} is under way"
        assert facts.job is None, f"illegal: {event!r}: {facts.job} is there"
        facts.proposal = Proposal(jobs=event.jobs)
        self._propose_again(facts)

    def _propose_again(self, facts: GpuFacts) -> None:
        """Takes the first choice of the gpu's claim out of offer, and charges it for the time being."""
        if facts.proposal is None:
            return
        if facts.job is not None:
            facts.proposal = None
            return
        entry = self.waiting.entries.get(facts.proposal.jobs[0])
        if entry is None or entry.claim is not None:
            return
        self.waiting.set_aside(entry)
        entry.claim = facts.gpu.id
        tab = self.waiting.tab(entry.job.band, entry.job.account)
        seconds = self.service_seconds(entry.job, facts.gpu.id)
        engine = self.engine_for(entry.group.key, facts.gpu.id)
        if engine is not None:
            seconds += start_seconds(facts, engine, entry.job.model, entry.job.service, self.learned)
        tab.provisional[facts.gpu.id] = seconds / entry.job.weight
        self.waiting.rerank(entry.job.band, entry.job.account, tab)

    def _settle_proposal(self, gpu: GpuId) -> None:
        """Ends the gpu's claim under way, whatever came of it: nothing of it is pending any more."""
        facts = self.gpus.get(gpu)
        if facts is None or facts.proposal is None:
            return
        first, facts.proposal = facts.proposal.jobs[0], None
        facts.claims_lost = 0
        entry = self.waiting.entries.get(first)
        if entry is not None and entry.claim == gpu:
            entry.claim = None
            self._drop_provisional(entry.job, gpu)
            self.waiting.rest_or_offer(entry, self.now)

    def _drop_provisional(self, job: Job, gpu: GpuId) -> None:
        tab = self.waiting.tab(job.band, job.account)
        if tab.provisional.pop(gpu, None) is not None:
            self.waiting.rerank(job.band, job.account, tab)

    def _claim_lost(self, event: ClaimLost, now: Seconds) -> None:
        facts = self.gpus.get(event.gpu)
        if facts is None:
            return
        lost = facts.claims_lost + 1
        self._settle_proposal(event.gpu)
        facts.claims_lost = lost
        rest = event.rest_seconds
        if lost > 1:
            doubled = self.policy.claim_lost_rest_seconds_base * 2.0 ** min(lost - 2, 16)
            rest = max(rest, min(doubled, self.policy.claim_lost_rest_seconds_max))
        facts.rest_until = max(facts.rest_until, now + rest)

    # -- jobs in and out of the queues

    def _open_account(self, job: Job, f: float | None) -> None:
        if f is not None:
            self.waiting.set_f(job.band, job.account, f)
        tab = self.waiting.tab(job.band, job.account)
        tab.jobs, tab.weight = tab.jobs + 1, job.weight

    def _close_account(self, job: Job) -> None:
        self.waiting.tab(job.band, job.account).jobs -= 1
        self.waiting.forget_tab(job.band, job.account)

    def _wait(self, waiting: WaitingJob, now: Seconds) -> None:
        job = waiting.job
        entry = WaitingEntry(
            job=job,
            attempts=waiting.attempts,
            avoid=waiting.avoid,
            not_before=now + waiting.not_before_seconds,
            key=(0 if waiting.attempts else 1, -job.priority, job.arrival, job.id),
            group=self._group(self.class_key(job, waiting.avoid)),
        )
        self.waiting.add(entry, now)

    def _wait_again(self, active: ActiveEntry, avoid: frozenset[GpuId], rest: Seconds, now: Seconds) -> None:
        self._wait(
            WaitingJob(job=active.job, attempts=active.attempts, avoid=avoid, not_before_seconds=rest), now
        )

    def _stop_waiting(self, job: JobId) -> WaitingEntry:
        entry = self.waiting.remove(job)
        if entry.claim is not None:
            self._drop_provisional(entry.job, entry.claim)
        return entry

    def _group(self, key: ClassKey) -> WaitingClass:
        group = self.waiting.group(key)
        if group is None:
            able = {gpu: able_engines(key, facts) for gpu, facts in self.gpus.items()}
            group = self.waiting.open_group(key, {gpu: engines for gpu, engines in able.items() if engines})
        return group

    def _refresh(self, changed: GpuFacts) -> None:
        """Tells every class anew whether this gpu may run its jobs."""
        gpu = changed.gpu.id
        for band in self.waiting.bands.values():
            for key, group in band.classes.items():
                engines = able_engines(key, changed) if gpu in self.gpus else ()
                if engines == group.able.get(gpu, ()):
                    continue
                if engines:
                    group.able[gpu] = engines
                else:
                    del group.able[gpu]
                group.choose_eligible()

    # -- gpus taken and left

    def _active(self, event: AttemptEvent) -> ActiveEntry:
        """Returns the attempt that the event is about; an event with another token is illegal (fencing)."""
        active = self.active[event.job]
        if isinstance(event, JobStarted | JobReleased | AttemptFailed):
            assert active.token == event.token, f"illegal: {event!r}: its token is {active.token}"
        return active

    def _occupy(self, active: ActiveEntry, now: Seconds) -> None:
        self.active_by_gpu[active.gpu] = active.job.id
        facts = self.gpus.get(active.gpu)
        if facts is None:
            return
        facts.job, facts.started = active.job.id, active.state is AttemptState.STARTED
        engine = self.engine_for(self.class_key(active.job), active.gpu)
        job, service = active.job, self.service_seconds(active.job, active.gpu)
        facts.free_at = now + service
        unloads: tuple[EngineUrl, ...] = ()
        if engine is not None:
            facts.free_at += start_seconds(facts, engine, job.model, job.service, self.learned)
            unloads = expected_unloads(facts, engine, job.model, self.learned)
        facts.claim(engine, job.model, service, unloads)

    def _free(self, active: ActiveEntry, now: Seconds, *, proved: bool) -> None:
        del self.active[active.job.id], self.active_by_gpu[active.gpu]
        if (facts := self.gpus.get(active.gpu)) is not None:
            facts.free(now, proved=proved)
