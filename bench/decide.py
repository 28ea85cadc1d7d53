"""How long `decide` and `apply` take beside how much waits: prints medians and p99 in milliseconds.

    python bench/decide.py [--jobs 10000 100000] [--rounds 400]

2,000 accounts (20,000 at 100,000 jobs), 87 models, 30 gpus. Each round ends one job, decides, and claims
what was decided: the steady state of a full queue.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gpulane.core.book import Book
from gpulane.core.decisions import StartAttempt
from gpulane.core.events import (
    ClaimProposed,
    EngineReady,
    GpuAdded,
    JobClaimed,
    JobEnded,
    JobStarted,
    JobSubmitted,
    ModelSeen,
    Snapshot,
    WaitingJob,
)
from gpulane.core.model import (
    Account,
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
MODELS = 87
GPUS = 30


@dataclass
class Bench:
    """One filled book, and the times of what was done with it."""

    jobs: int
    accounts: int
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    policy: Policy = field(default_factory=Policy)
    book: Book = field(default_factory=Book)
    times: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    now: float = 0.0
    arrivals: int = 0

    def timed(self, name: str, work: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = work()
        self.times.setdefault(name, []).append((time.perf_counter() - started) * 1e3)
        return result

    def job(self) -> Job:
        self.arrivals += 1
        account = min(int(self.rng.paretovariate(0.6)), self.accounts) if self.rng.random() < 0.5 else 0
        return Job(
            id=JobId(f"j{self.arrivals:07}"),
            account=Account(f"a{account or self.rng.randrange(self.accounts)}"),
            service=Service.A1111,
            kind="txt2img",
            model=ModelKey(f"m{min(int(self.rng.paretovariate(0.7)), MODELS)}"),
            arrival=self.arrivals,
        )

    def fill(self) -> None:
        for i in range(GPUS):
            url = EngineUrl(f"http://127.0.0.1:{7000 + i}")
            gpu = GpuId(f"node/gpu{i:02}")
            engine = Engine(url=url, service=Service.A1111)
            self.book.apply(
                GpuAdded(gpu=Gpu(id=gpu, node=NODE, name=f"gpu{i}", uuid=str(i), engines=(engine,))), 0.0
            )
            self.book.apply(EngineReady(engine=url, offers=None), 0.0)
            self.book.apply(ModelSeen(gpu=gpu, engine=url, model=ModelKey(f"m{i % MODELS}")), 0.0)
        waiting = tuple(WaitingJob(job=self.job()) for _ in range(self.jobs))
        accounts = {w.job.account for w in waiting}
        f = tuple((waiting[0].job.band, account, self.rng.uniform(0, 100)) for account in sorted(accounts))
        snapshot = Snapshot(
            n=self.arrivals,
            waiting=waiting,
            active=(),
            account_f=f,
            band_v=(),
            draining=frozenset(),
            paused=False,
        )
        self.timed("restore", lambda: self.book.restore(snapshot, 0.0))

    def round(self) -> None:
        decisions = decide(self.book, self.policy, self.now)
        self.timed("decide", lambda: decide(self.book, self.policy, self.now))
        for decision in decisions:
            if isinstance(decision, StartAttempt):
                self.claim(decision)
        self.timed("decide, no gpu idle", lambda: decide(self.book, self.policy, self.now))
        self.now += 0.5
        running = sorted(self.book.active)
        ended = self.book.active[JobId(self.rng.choice(running))]
        f = self.book.waiting.bands[ended.job.band].tabs[ended.job.account].f
        event = JobEnded(n=self.book.n + 1, job=ended.job.id, state=JobState.SUCCEEDED, account_f=f + 1.0)
        self.timed("apply JobEnded", lambda: self.book.apply(event, self.now))
        job = self.job()
        self.arrivals = self.book.n + 1
        tab = self.book.waiting.bands[job.band].tabs.get(job.account)
        submitted = JobSubmitted(n=self.book.n + 1, job=job, account_f=tab.f if tab else 50.0)
        self.timed("apply JobSubmitted", lambda: self.book.apply(submitted, self.now))

    def claim(self, start: StartAttempt) -> None:
        first = start.candidates[0]
        job = self.book.waiting.entries[first.job].job
        f = self.book.waiting.bands[job.band].tabs[job.account].f + first.charge.total
        proposed = ClaimProposed(gpu=start.gpu, jobs=tuple(c.job for c in start.candidates))
        self.timed("apply ClaimProposed", lambda: self.book.apply(proposed, self.now))
        claimed = JobClaimed(
            n=self.book.n + 1,
            job=job.id,
            gpu=start.gpu,
            node=NODE,
            token=Token("t"),
            claim=ClaimId("c"),
            account_f=f,
            band_v=dict(start.lowest_f).get(job.band, 0.0),
        )
        self.timed("apply JobClaimed", lambda: self.book.apply(claimed, self.now))
        started = JobStarted(n=self.book.n + 1, job=job.id, token=Token("t"), attempts=1)
        self.timed("apply JobStarted", lambda: self.book.apply(started, self.now))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    for jobs in args.jobs:
        bench = Bench(jobs=jobs, accounts=max(jobs // 5, 1))
        bench.fill()
        for _ in range(args.rounds):
            bench.round()
        classes = sum(len(band.classes) for band in bench.book.waiting.bands.values())
        accounts = sum(len(band.tabs) for band in bench.book.waiting.bands.values())
        print(f"{jobs} jobs, {accounts} accounts, {classes} classes, {GPUS} gpus")
        for name, times in bench.times.items():
            ranked = sorted(times)
            p99 = ranked[int(len(ranked) * 0.99) - (len(ranked) > 1)]
            print(
                f"  {name:22} median {statistics.median(ranked):8.3f}  p99 {p99:8.3f}  max {ranked[-1]:8.3f}"
            )


if __name__ == "__main__":
    main()
