"""What the parts of a chaos run share: virtual time, the true cards, the toy store, and the book with what
this gateway knows beside it (lost when the gateway dies).
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from gpulane.core.book import Book, GapInEvents
from gpulane.core.breaker import Breaker, BreakerLimits
from gpulane.core.events import EngineLost, EngineReady, Event, GpuFreed, GpuOccupied, StoreEvent
from gpulane.core.handoff import HandoffPlan
from gpulane.core.model import EngineUrl, Gpu, GpuId, Job, Seconds, Token
from gpulane.core.policy import Policy
from gpulane.sim.cards import TrueCard, Work
from gpulane.sim.dice import Dice, Fault
from gpulane.sim.store import ToyStore

GIB = 1 << 30
NOTICE_SECONDS = 0.5
"""Until a probe shows what happened to an engine."""
BACK_SECONDS = 6.0
"""Until a dead engine answers again."""
ACTIONS_PER_JOB_MAX = 600
"""More is a loop that does not end."""


@dataclass(slots=True, eq=False)
class Run:
    """One claim as the gateway follows it, hand-off and job."""

    job: Job
    gpu: GpuId
    engine: EngineUrl
    token: Token
    plan: HandoffPlan | None = None
    handoff_at: Seconds = 0.0
    tries: int = 0
    started: bool = False
    work: Work | None = None
    progress_at: Seconds = 0.0
    interrupted_at: Seconds | None = None
    used_from: Seconds = 0.0


@dataclass(slots=True, eq=False)
class Desk:
    """What the gateway knows of one card beside the book."""

    gpu: Gpu
    breaker: Breaker
    run: Run | None = None
    reasons: set[str] = field(default_factory=set[str])
    """Why it is occupied beside its claim."""


@dataclass(slots=True, eq=False)
class World:
    """The state of one run. `actions` is a heap of what will happen."""

    seed: int
    policy: Policy
    limits: BreakerLimits
    rng: random.Random = field(init=False)
    dice: Dice = field(init=False)
    book: Book = field(init=False)
    store: ToyStore = field(default_factory=ToyStore)
    cards: dict[GpuId, TrueCard] = field(default_factory=dict[GpuId, TrueCard])
    desks: dict[GpuId, Desk] = field(default_factory=dict[GpuId, Desk])
    now: Seconds = 0.0
    made: int = 0
    actions: list[tuple[Seconds, int, Callable[[], None]]] = field(
        default_factory=list[tuple[Seconds, int, Callable[[], None]]]
    )
    crc: int = 0
    """Digest of all that was told: the same seed gives the same."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.dice = Dice(self.rng)
        self.book = Book(self.policy)

    def at(self, seconds: Seconds, action: Callable[[], None]) -> None:
        """Lets something happen in so many seconds."""
        self.made += 1
        heapq.heappush(self.actions, (self.now + seconds, self.made, action))

    # -- the book

    def tell(self, event: Event | None) -> None:
        """Gives the book an event, unless it is lost on the way; then the next store event shows the gap."""
        if event is None:
            return
        self.crc = zlib.crc32(f"{self.now:.6f} {type(event).__name__} {self.book.n}".encode(), self.crc)
        if isinstance(event, StoreEvent) and self.dice.strikes(Fault.EVENT_LOST):
            return
        try:
            self.book.apply(event, self.now)
        except GapInEvents:
            self.restore()

    def restore(self) -> None:
        self.book.restore(self.store.snapshot(self.now), self.now)

    def occupy(self, gpu: GpuId, why: str) -> None:
        self.desks[gpu].reasons.add(why)
        self.tell(GpuOccupied(gpu=gpu, why=why))

    def vacate(self, gpu: GpuId, why: str) -> None:
        """Takes one reason away; the gpu is free when none is left."""
        reasons = self.desks[gpu].reasons
        reasons.discard(why)
        self.tell(GpuOccupied(gpu=gpu, why=min(reasons)) if reasons else GpuFreed(gpu=gpu))

    def is_current(self, run: Run) -> bool:
        """Whether this gateway still follows it, and the store still grants it."""
        record = self.store.open_jobs.get(run.job.id)
        return self.desks[run.gpu].run is run and record is not None and record.token == run.token

    # -- engines

    def lose(self, gpu: GpuId, engine: EngineUrl) -> None:
        """Kills an engine's process; the gateway notices a little later."""
        card = self.cards[gpu]
        card.kill(engine, self.now)
        boot = card.processes[engine].boot
        self.at(NOTICE_SECONDS, lambda: self.notice_loss(gpu, engine, boot))
        self.at(BACK_SECONDS * self.rng.uniform(0.5, 2.0), lambda: self.come_back(gpu, engine, boot))

    def notice_loss(self, gpu: GpuId, engine: EngineUrl, boot: int) -> None:
        process = self.cards[gpu].processes[engine]
        if process.boot == boot and not process.is_alive:
            self.tell(EngineLost(engine=engine, why="simulated"))

    def come_back(self, gpu: GpuId, engine: EngineUrl, boot: int) -> None:
        process = self.cards[gpu].processes[engine]
        if process.boot == boot:
            process.is_alive = True
            self.tell(EngineReady(engine=engine, offers=None))
