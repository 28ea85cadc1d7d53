"""A small book to try things on: gpus with engines, jobs, and a store that only counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict, Unpack, cast

from gpulane.core.book import Book
from gpulane.core.decisions import AskAgain, StartAttempt
from gpulane.core.events import (
    EngineReady,
    Event,
    GpuAdded,
    JobClaimed,
    JobEnded,
    JobStarted,
    JobSubmitted,
)
from gpulane.core.model import (
    Account,
    Band,
    ClaimId,
    Engine,
    EngineUrl,
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

NODE = NodeId("node")


class Wishes(TypedDict, total=False):
    """What a job may differ in."""

    service: Service
    needs: frozenset[str]
    labels: frozenset[str]
    band: Band
    priority: int
    weight: float
    max_attempts: int
    rerun_lost: bool
    kind: str


def job(
    id_: str, account: str = "ann", model: str = "A", *, arrival: int = 1, **wishes: Unpack[Wishes]
) -> Job:
    plain: Wishes = {"service": Service.A1111, "kind": "txt2img"}
    return Job(
        id=JobId(id_),
        account=Account(account),
        model=ModelKey(model),
        arrival=arrival,
        **cast("Wishes", {**plain, **wishes}),
    )


def gpu(name: str, *services: Service, labels: frozenset[str] = frozenset(), speed: float = 1.0) -> Gpu:
    engines = tuple(
        Engine(url=EngineUrl(f"http://{name}:{service.value}"), service=service)
        for service in services or (Service.A1111,)
    )
    return Gpu(
        id=GpuId(f"node/{name}"),
        node=NODE,
        name=name,
        uuid=name,
        engines=engines,
        labels=labels,
        speed=speed,
    )


@dataclass
class Desk:
    """One book with a counting store beside it."""

    policy: Policy = field(default_factory=Policy)
    now: float = 0.0
    f: dict[tuple[Band, str], float] = field(default_factory=dict[tuple[Band, str], float])
    v: dict[Band, float] = field(default_factory=dict[Band, float])
    book: Book = field(init=False)

    def __post_init__(self) -> None:
        self.book = Book(self.policy)

    @property
    def next_n(self) -> int:
        return self.book.n + 1

    def tell(self, event: Event) -> None:
        self.book.apply(event, self.now)
        self.book.check()

    def add(self, *gpus: Gpu, offers: frozenset[str] | None = None, ready: bool = True) -> None:
        for one in gpus:
            self.tell(GpuAdded(gpu=one))
            for engine in one.engines:
                if ready:
                    self.tell(EngineReady(engine=engine.url, offers=offers))

    def submit(self, id_: str, account: str = "ann", model: str = "A", **wishes: Unpack[Wishes]) -> Job:
        made = job(id_, account, model, arrival=self.next_n, **wishes)
        waits = any(
            w.job.account == account and w.job.band == made.band for w in self.book.waiting.entries.values()
        )
        key = (made.band, account)
        if not waits:
            self.f[key] = max(self.f.get(key, 0.0), self.v.get(made.band, 0.0))
        self.tell(JobSubmitted(n=self.next_n, job=made, account_f=self.f[key]))
        return made

    def starts(self) -> list[StartAttempt]:
        found = decide(self.book, self.policy, self.now)
        return [d for d in found if isinstance(d, StartAttempt)]

    def timers(self) -> list[float]:
        return [d.at for d in decide(self.book, self.policy, self.now) if isinstance(d, AskAgain)]

    def claim(self, start: StartAttempt, *, begin: bool = True) -> Job:
        """Lets the store accept the first choice."""
        first = start.candidates[0]
        made = self.book.waiting.entries[first.job].job
        key = (made.band, made.account)
        self.v[made.band] = max(self.v.get(made.band, 0.0), dict(start.lowest_f).get(made.band, 0.0))
        self.f[key] += first.charge.total / made.weight
        token = Token(f"{self.next_n}.c")
        self.tell(
            JobClaimed(
                n=self.next_n,
                job=made.id,
                gpu=start.gpu,
                node=NODE,
                token=token,
                claim=ClaimId("c"),
                account_f=self.f[key],
                band_v=self.v[made.band],
            )
        )
        if begin:
            self.tell(JobStarted(n=self.next_n, job=made.id, token=token, attempts=1))
        return made

    def end(self, id_: str, state: JobState = JobState.SUCCEEDED, correction: float = 0.0) -> None:
        active = self.book.active[JobId(id_)].job
        key = (active.band, active.account)
        self.f[key] += correction
        self.tell(JobEnded(n=self.next_n, job=active.id, state=state, account_f=self.f[key]))
