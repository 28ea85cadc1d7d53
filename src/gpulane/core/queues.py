"""The waiting jobs, indexed so that the next one in fair order is at hand. It knows order, nothing of
gpus' states.

Band -> class of jobs that any gpu treats alike -> account -> job. Each class shows its first job in fair
order; each band keeps these heads sorted. Lists stay sorted by bisection: a memmove of some KB costs less
than a cleverer structure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gpulane.core.model import Account, Band, EngineUrl, GpuId, Job, JobId, ModelKey, Seconds, Service

JobKey = tuple[int, int, int, JobId]
"""(0 if it was attempted before else 1, -priority, arrival, id): order inside an account and class."""
FairKey = tuple[float, int, Account]
"""(F, arrival of the account's oldest job here, account): order of accounts inside a class."""


class ClassKey(NamedTuple):
    """What makes jobs alike to every gpu, and what makes them compete: one queue each."""

    band: Band
    service: Service
    model: ModelKey
    needs: frozenset[str]
    labels: frozenset[str]
    engine: EngineUrl | None
    avoid: frozenset[GpuId]


def resident(service: Service, model: ModelKey) -> str:
    return f"{service.value} {model}"


@dataclass(slots=True, eq=False)
class AccountQueue:
    """One account's jobs of one class, first to last."""

    jobs: list[JobKey] = field(default_factory=list[JobKey])
    arrivals: list[int] = field(default_factory=list[int])

    def add(self, key: JobKey) -> None:
        insort(self.jobs, key)
        insort(self.arrivals, key[2])

    def remove(self, key: JobKey) -> None:
        del self.jobs[bisect_left(self.jobs, key)]
        del self.arrivals[bisect_left(self.arrivals, key[2])]


@dataclass(slots=True, eq=False)
class WaitingClass:
    """Jobs that every gpu treats alike, with the gpus that may run them."""

    key: ClassKey
    seq: int
    able: dict[GpuId, tuple[EngineUrl, ...]]
    """Gpus (with engines) that are ready, not draining, and offer what is needed."""
    eligible: dict[GpuId, tuple[EngineUrl, ...]] = field(default_factory=dict[GpuId, tuple[EngineUrl, ...]])
    """`able` without the avoided ones, unless none would be left."""
    queues: dict[Account, AccountQueue] = field(default_factory=dict[Account, AccountQueue])
    order: list[FairKey] = field(default_factory=list[FairKey])
    places: dict[Account, FairKey] = field(default_factory=dict[Account, FairKey])
    head: Head | None = None
    resident: str = ""
    """What must be resident for its jobs to be warm; a string, because its hash is kept."""
    members: int = 0
    """Jobs of this class, those that rest or are being claimed included."""

    def __post_init__(self) -> None:
        self.resident = resident(self.key.service, self.key.model)
        self.choose_eligible()

    def choose_eligible(self) -> None:
        kept = {gpu: engines for gpu, engines in self.able.items() if gpu not in self.key.avoid}
        self.eligible = kept or self.able

    def first_job(self) -> JobId:
        return self.queues[self.order[0][2]].jobs[0][3]


Head = tuple[float, int, Account, int, WaitingClass]
"""A class's first FairKey, with its number and itself. The number is unique, so classes are never
compared."""


@dataclass(slots=True, eq=False)
class AccountTab:
    """One account in one band: what it has used, and where it waits."""

    f: float
    provisional: dict[GpuId, float] = field(default_factory=dict[GpuId, float])
    """Charges of claims under way, per gpu: without them a burst would start n jobs at the old F."""
    classes: dict[int, WaitingClass] = field(default_factory=dict[int, WaitingClass])
    weight: float = 1.0
    """The account's share, as its last job told."""
    jobs: int = 0
    """Jobs of this account in this band that the book knows, running ones included."""

    @property
    def rank(self) -> float:
        return self.f + sum(self.provisional.values()) if self.provisional else self.f


@dataclass(slots=True, eq=False)
class BandQueue:
    """All that waits in one priority band."""

    classes: dict[ClassKey, WaitingClass] = field(default_factory=dict[ClassKey, WaitingClass])
    heads: list[Head] = field(default_factory=list[Head])
    tabs: dict[Account, AccountTab] = field(default_factory=dict[Account, AccountTab])
    v: float = 0.0


@dataclass(slots=True, eq=False)
class WaitingEntry:
    """One waiting job and what the book keeps beside it."""

    job: Job
    attempts: int
    avoid: frozenset[GpuId]
    not_before: Seconds
    key: JobKey
    group: WaitingClass
    offered: bool = False
    """In its class's order: rested, and no claim under way."""
    claim: GpuId | None = None
    """The gpu whose claim under way has it as first choice."""


@dataclass(slots=True, eq=False)
class Waiting:
    """Everything that waits."""

    bands: dict[Band, BandQueue] = field(default_factory=lambda: {band: BandQueue() for band in Band})
    entries: dict[JobId, WaitingEntry] = field(default_factory=dict[JobId, WaitingEntry])
    resting: list[tuple[Seconds, int, JobId]] = field(default_factory=list[tuple[Seconds, int, JobId]])
    next_seq: int = 0

    # -- accounts

    def tab(self, band: Band, account: Account) -> AccountTab:
        tabs = self.bands[band].tabs
        found = tabs.get(account)
        if found is None:
            found = tabs[account] = AccountTab(f=self.bands[band].v)
        return found

    def forget_tab(self, band: Band, account: Account) -> None:
        """Drops an account that has no job left: the store keeps its F, and tells it with its next job."""
        tab = self.bands[band].tabs.get(account)
        if tab is not None and tab.jobs == 0 and not tab.provisional:
            del self.bands[band].tabs[account]

    def set_f(self, band: Band, account: Account, f: float) -> None:
        tab = self.tab(band, account)
        if tab.f != f:
            tab.f = f
            self.rerank(band, account, tab)

    def rerank(self, band: Band, account: Account, tab: AccountTab) -> None:
        """Sorts the account anew in every class it waits in."""
        for group in tuple(tab.classes.values()):
            self._place(self.bands[band], group, account, tab)

    # -- jobs

    def group(self, key: ClassKey) -> WaitingClass | None:
        return self.bands[key.band].classes.get(key)

    def open_group(self, key: ClassKey, able: dict[GpuId, tuple[EngineUrl, ...]]) -> WaitingClass:
        group = WaitingClass(key, self.next_seq, able)
        self.next_seq += 1
        self.bands[key.band].classes[key] = group
        return group

    def add(self, entry: WaitingEntry, now: Seconds) -> None:
        """Takes a job in; it is offered at once unless it still rests."""
        self.entries[entry.job.id] = entry
        entry.group.members += 1
        self.rest_or_offer(entry, now)

    def rest_or_offer(self, entry: WaitingEntry, now: Seconds) -> None:
        if entry.not_before > now:
            insort(self.resting, (entry.not_before, entry.job.arrival, entry.job.id))
        else:
            self.offer(entry)

    def rest(self, entry: WaitingEntry, until: Seconds, now: Seconds) -> None:
        """Moves the time from which a job is offered; one being claimed keeps to it if the claim is lost."""
        self.set_aside(entry)
        entry.not_before = until
        if entry.claim is None:
            self.rest_or_offer(entry, now)

    def set_aside(self, entry: WaitingEntry) -> None:
        """Takes a job out of offer or rest; one being claimed is in neither."""
        if entry.offered:
            self.withdraw(entry)
        else:
            self._stop_resting(entry)

    def remove(self, job: JobId) -> WaitingEntry:
        entry = self.entries.pop(job)
        self.set_aside(entry)
        entry.group.members -= 1
        if entry.group.members == 0:
            del self.bands[entry.group.key.band].classes[entry.group.key]
        return entry

    def wake(self, now: Seconds) -> None:
        """Offers every job whose rest is over."""
        while self.resting and self.resting[0][0] <= now:
            entry = self.entries[self.resting.pop(0)[2]]
            if entry.claim is None:
                self.offer(entry)

    def due(self, now: Seconds) -> Iterator[WaitingEntry]:
        """Yields the jobs whose rest is over though nobody has woken them yet."""
        for not_before, _arrival, job in self.resting:
            if not_before > now:
                return
            entry = self.entries[job]
            if entry.claim is None:
                yield entry

    def offer(self, entry: WaitingEntry) -> None:
        group, account = entry.group, entry.job.account
        entry.offered = True
        group.queues.setdefault(account, AccountQueue()).add(entry.key)
        band = self.bands[group.key.band]
        tab = self.tab(group.key.band, account)
        tab.classes[group.seq] = group
        self._place(band, group, account, tab)

    def withdraw(self, entry: WaitingEntry) -> None:
        group, account = entry.group, entry.job.account
        entry.offered = False
        queue = group.queues[account]
        queue.remove(entry.key)
        band = self.bands[group.key.band]
        tab = self.tab(group.key.band, account)
        if not queue.jobs:
            del group.queues[account], tab.classes[group.seq]
        self._place(band, group, account, tab)

    def _stop_resting(self, entry: WaitingEntry) -> None:
        row = (entry.not_before, entry.job.arrival, entry.job.id)
        at = bisect_left(self.resting, row)
        if at < len(self.resting) and self.resting[at] == row:
            del self.resting[at]

    def _place(self, band: BandQueue, group: WaitingClass, account: Account, tab: AccountTab) -> None:
        """Puts the account where it belongs in the class's order, and the class's head among the band's."""
        queue = group.queues.get(account)
        new: FairKey | None = (tab.rank, queue.arrivals[0], account) if queue else None
        old = group.places.get(account)
        if new == old:
            return
        if old is not None:
            del group.order[bisect_left(group.order, old)]
            del group.places[account]
        if new is not None:
            insort(group.order, new)
            group.places[account] = new
        self._show_head(band, group)

    @staticmethod
    def _show_head(band: BandQueue, group: WaitingClass) -> None:
        head: Head | None = (*group.order[0], group.seq, group) if group.order else None
        if head is not None and group.head is not None and head[:3] == group.head[:3]:
            return
        if group.head is not None:
            del band.heads[bisect_left(band.heads, group.head)]
        if head is not None:
            insort(band.heads, head)
        group.head = head
