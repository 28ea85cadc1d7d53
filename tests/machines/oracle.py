"""An independent picture of the world: who waits, who runs where, which engines live. It shares no code
with the book.

Its fair order is the prose of docs/scheduling.md read literally, over plain lists, as slowly as that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gpulane.core.model import NO_MODEL, Job

Pair = tuple[str, str]


@dataclass
class WorldEngine:
    url: str
    service: str
    alive: bool = False
    offers: frozenset[str] | None = None
    holds: str = NO_MODEL


@dataclass
class WorldGpu:
    id: str
    engines: dict[str, WorldEngine]
    labels: frozenset[str]
    speed: float
    draining: bool = False
    occupied: bool = False
    job: str | None = None
    claiming: bool = False
    last_engine: str | None = None
    before: str | None = None
    """Last engine before the current claim."""
    paused_until: float = 0.0

    def usable(self, now: float) -> bool:
        return (
            self.paused_until <= now
            and any(e.alive for e in self.engines.values())
            and not self.draining
            and not self.occupied
            and self.job is None
            and not self.claiming
        )


@dataclass
class WorldJob:
    job: Job
    state: str = "waiting"
    """waiting, claimed, started"""
    attempts: int = 0
    avoid: frozenset[str] = frozenset()
    not_before: float = 0.0
    gpu: str | None = None
    engine: str | None = None
    token: str | None = None
    cancel_wanted: bool = False
    claiming: str | None = None
    """The gpu whose claim under way has it as first choice."""
    charge: float = 0.0
    away: bool = False
    """Its client left: it is not offered meanwhile."""


@dataclass
class World:
    gpus: dict[str, WorldGpu] = field(default_factory=dict[str, WorldGpu])
    jobs: dict[str, WorldJob] = field(default_factory=dict[str, WorldJob])
    f: dict[tuple[int, str], float] = field(default_factory=dict[tuple[int, str], float])
    v: dict[int, float] = field(default_factory=dict[int, float])
    paused: bool = False
    provisional: dict[str, tuple[int, str, float]] = field(default_factory=dict[str, tuple[int, str, float]])
    """Charges of claims under way, by gpu."""

    # -- who may run where

    def able(self, job: Job, gpu: WorldGpu) -> list[str]:
        if gpu.draining or not job.labels <= gpu.labels:
            return []
        return [
            e.url
            for e in gpu.engines.values()
            if e.alive
            and e.service == job.service
            and job.engine in {None, e.url}
            and (e.offers is None or job.needs <= e.offers)
        ]

    def eligible(self, entry: WorldJob) -> dict[str, list[str]]:
        able = {g.id: engines for g in self.gpus.values() if (engines := self.able(entry.job, g))}
        wanted = {gpu: engines for gpu, engines in able.items() if gpu not in entry.avoid}
        return wanted or able

    def warm(self, job: Job, gpu: WorldGpu, engines: list[str]) -> bool:
        if job.model == NO_MODEL:
            return gpu.last_engine in engines
        return any(gpu.engines[url].holds == job.model for url in engines)

    # -- fair order, from the prose

    def rank(self, job: Job) -> float:
        charges = sum(c for band, account, c in self.provisional.values() if (band, account) == key_of(job))
        return self.f[key_of(job)] + charges

    def offered(self, now: float) -> list[WorldJob]:
        return [
            w
            for w in self.jobs.values()
            if w.state == "waiting" and w.claiming is None and w.not_before <= now and not w.away
        ]


def key_of(job: Job) -> tuple[int, str]:
    return (int(job.band), job.account)


def alike(a: WorldJob, b: WorldJob) -> bool:
    """Whether two jobs stand in the same queue: same model, same demands."""
    x, y = a.job, b.job
    return (x.band, x.service, x.model, x.needs, x.labels, x.engine, a.avoid) == (
        y.band,
        y.service,
        y.model,
        y.needs,
        y.labels,
        y.engine,
        b.avoid,
    )


def own_order(entry: WorldJob) -> tuple[bool, int, int]:
    """Inside an account and model: what was attempted before, then priority, then arrival."""
    return (entry.attempts == 0, -entry.job.priority, entry.job.arrival)


def fair_heads(
    waiting: list[WorldJob], rank: Callable[[Job], float]
) -> list[tuple[float, int, str, WorldJob]]:
    """The first job of each queue, in fair order: lowest F, then the account whose oldest job there came
    first."""
    heads: list[tuple[float, int, str, WorldJob]] = []
    left = list(waiting)
    while left:
        queue = [w for w in left if alike(w, left[0])]
        left = [w for w in left if not alike(w, left[0])]
        rows: list[tuple[float, int, str, WorldJob]] = []
        for account in {w.job.account for w in queue}:
            own = [w for w in queue if w.job.account == account]
            first = min(own, key=own_order)
            rows.append((rank(first.job), min(w.job.arrival for w in own), account, first))
        heads.append(min(rows, key=lambda r: r[:3]))
    return sorted(heads, key=lambda r: r[:3])


@dataclass
class Naive:
    """Rules 1, 2 over plain lists, with choices that were thought of taken off."""

    world: World
    now: float
    slack: Callable[[str, Job], float]
    """Slack for a job on a gpu that holds its model."""
    taken: set[str] = field(default_factory=set[str])
    charged: dict[tuple[int, str], float] = field(default_factory=dict[tuple[int, str], float])

    def rank(self, job: Job) -> float:
        return self.world.rank(job) + self.charged.get(key_of(job), 0.0)

    def choose(self, band: int, free: list[str]) -> tuple[WorldJob, set[str], str] | None:
        """Returns (job, gpus it may be given to by rules 1 and 2, rule)."""
        waiting = [
            w for w in self.world.offered(self.now) if w.job.band == band and w.job.id not in self.taken
        ]
        first: WorldJob | None = None
        low = 0.0
        for rank, _, _, head in fair_heads(waiting, self.rank):
            gpus = {g: e for g, e in self.world.eligible(head).items() if g in free}
            warm = {
                g for g, engines in gpus.items() if self.world.warm(head.job, self.world.gpus[g], engines)
            }
            if not gpus:
                continue
            if first is None:
                if warm:
                    return head, fastest(self.world, warm), "1"
                first, low = head, rank
            elif warm and rank <= low + max(self.slack(g, head.job) for g in fastest(self.world, warm)):
                return head, fastest(self.world, warm), "1"
        if first is None:
            return None
        return first, {g for g in self.world.eligible(first) if g in free}, "2"

    def take(self, entry: WorldJob, charge: float) -> None:
        self.taken.add(entry.job.id)
        key = key_of(entry.job)
        self.charged[key] = self.charged.get(key, 0.0) + charge / entry.job.weight


def fastest(world: World, gpus: set[str]) -> set[str]:
    best = max(world.gpus[g].speed for g in gpus)
    return {min(g for g in gpus if world.gpus[g].speed == best)}
