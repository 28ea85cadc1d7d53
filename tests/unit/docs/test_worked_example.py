"""The worked example of docs/scheduling.md, computed by the book and `decide` themselves."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from pathlib import Path

from gpulane.core.book import Book
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    ClaimProposed,
    EngineReady,
    GpuAdded,
    JobClaimed,
    LoadMeasured,
    ModelSeen,
    ServiceMeasured,
)
from gpulane.core.model import (
    Account,
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
)
from gpulane.core.policy import Policy
from gpulane.core.scheduler import decide
from gpulane.sim.store import ToyStore

NODE = NodeId("node")
LOAD_SECONDS, SERVICE_SECONDS = 6.0, 10.0
ARRIVALS = (
    (0.0, "j1", "ann", "A"),
    (0.0, "j2", "hog", "B"),
    (0.5, "j3", "hog", "B"),
    (0.5, "j4", "hog", "B"),
    (0.5, "j5", "hog", "B"),
    (1.0, "j6", "ann", "A"),
    (2.0, "j7", "bob", "A"),
    (12.0, "j8", "cyd", "C"),
    (13.0, "j9", "ann", "A"),
    (14.0, "j10", "bob", "C"),
)


@dataclass
class Example:
    """Two gpus and a store in virtual time; claims take none."""

    book: Book = field(default_factory=lambda: Book(Policy()))
    store: ToyStore = field(default_factory=ToyStore)
    ends: list[tuple[float, int, JobClaimed]] = field(default_factory=list[tuple[float, int, JobClaimed]])
    holds: dict[GpuId, str] = field(default_factory=dict[GpuId, str])
    rows: list[str] = field(default_factory=list[str])

    def run(self) -> list[str]:
        self.set_up()
        arrivals = list(ARRIVALS)
        while arrivals or self.ends:
            now = min([arrivals[0][0] if arrivals else 1e9, self.ends[0][0] if self.ends else 1e9])
            while self.ends and self.ends[0][0] == now:
                self.end(heapq.heappop(self.ends)[2], now)
            while arrivals and arrivals[0][0] == now:
                _, job, account, model = arrivals.pop(0)
                self.book.apply(self.store.enqueue(self.job(job, account, model)), now)
            for decision in decide(self.book, Policy(), now):
                if isinstance(decision, StartAttempt):
                    self.start(decision, now)
        return self.rows

    def set_up(self) -> None:
        for number in range(2):
            url, gpu = EngineUrl(f"http://127.0.0.1:{7860 + number}"), GpuId(f"gpu{number}")
            engine = Engine(url=url, service=Service.A1111)
            added = GpuAdded(gpu=Gpu(id=gpu, node=NODE, name=gpu, uuid=gpu, engines=(engine,)))
            self.book.apply(added, 0.0)
            self.book.apply(EngineReady(engine=url, offers=None), 0.0)
            self.book.apply(
                ServiceMeasured(job=self.job("j0", "ann", "A"), gpu=gpu, seconds=SERVICE_SECONDS), 0.0
            )
            for model in "ABC":
                measured = LoadMeasured(gpu=gpu, model=ModelKey(model), seconds=LOAD_SECONDS)
                self.book.apply(measured, 0.0)

    def job(self, name: str, account: str, model: str) -> Job:
        return Job(
            id=JobId(name),
            account=Account(account),
            service=Service.A1111,
            kind="txt2img",
            model=ModelKey(model),
            arrival=self.store.n + 1,
        )

    def start(self, decision: StartAttempt, now: float) -> None:
        first = decision.candidates[0]
        job = self.book.waiting.entries[first.job].job
        waiting = {entry.job.account for entry in self.book.waiting.entries.values()}
        before = {account: self.store.f[job.band, account] for account in sorted(waiting)}
        self.book.apply(ClaimProposed(gpu=decision.gpu, jobs=tuple(c.job for c in decision.candidates)), now)
        candidates = tuple((c.job, c.charge) for c in decision.candidates)
        claimed = self.store.claim(decision.gpu, NODE, candidates, decision.lowest_f, now)
        assert claimed is not None and claimed.job == first.job
        self.book.apply(claimed, now)
        started = self.store.start(claimed.job, claimed.token)
        assert started is not None
        self.book.apply(started, now)
        how = "warm" if first.charge.load_seconds == 0 else "load"
        f = ", ".join(f"{account} {value:.0f}" for account, value in before.items())
        self.rows.append(
            f"| {now:g} | {job.id} {job.account} {job.model} | {decision.gpu}, {how} | {first.rule} | {f} |"
        )
        seconds = first.charge.total
        heapq.heappush(self.ends, (now + seconds, len(self.rows), claimed))
        self.holds[decision.gpu] = job.model

    def end(self, claimed: JobClaimed, now: float) -> None:
        record = self.store.records[claimed.job]
        engine = self.book.gpus[claimed.gpu].gpu.engines[0].url
        seen = ModelSeen(gpu=claimed.gpu, engine=engine, model=ModelKey(self.holds[claimed.gpu]))
        self.book.apply(seen, now)
        ended = self.store.finish(claimed.job, claimed.token, JobState.SUCCEEDED, None, record.charged)
        assert ended is not None
        self.book.apply(ended, now)


def test_the_worked_example_is_what_decide_does(root: Path) -> None:
    rows = Example().run()
    text = (root / "docs/scheduling.md").read_text()
    table = text.partition("| t | start | on | rule | F before |\n|---|---|---|---|---|\n")[2].split("\n\n")[
        0
    ]
    assert table.splitlines() == rows, "\n".join(rows)
