"""Fair order as it would be after choices that are only thought of. Reads the book's queues and never
changes them.

Fair order = ascending (F, arrival of the account's oldest job, account). Each class shows its first job; a
choice charges its account, which moves it in every class where it waits.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Self

from gpulane.core.model import Account, GpuId, JobId
from gpulane.core.queues import BandQueue, FairKey, Head, JobKey, WaitingClass, WaitingEntry


class FairOrder:
    """The heads of one band's classes that some free gpu may run, in fair order."""

    __slots__ = ("_band", "_changed", "_f", "_gpus", "_taken", "_woken", "heads")

    def __init__(self, band: BandQueue, woken: Iterable[WaitingEntry], gpus: frozenset[GpuId]) -> None:
        self._band = band
        self._gpus = gpus
        self._f: dict[Account, float] = {}
        """Accounts whose standing may differ from the book's."""
        self._taken: set[JobId] = set()
        self._woken: dict[WaitingClass, dict[Account, list[JobKey]]] = {}
        """Jobs whose rest is over since the book was last written."""
        self._changed: dict[int, Head | None] = {}
        """Heads of classes that differ from the book's."""
        self.heads: list[Head] = [h for h in band.heads if not gpus.isdisjoint(h[4].eligible)]
        for entry in woken:
            self._wake(entry)

    def copy_for(self, gpu: GpuId) -> Self:
        """Returns the order of what this gpu may run, for trying further choices."""
        other = object.__new__(type(self))
        other._band, other._gpus, other._f = self._band, frozenset({gpu}), self._f.copy()
        other._taken, other._woken, other._changed = self._taken.copy(), self._woken, self._changed.copy()
        other.heads = [head for head in self.heads if gpu in head[4].eligible]
        return other

    def job_of(self, head: Head) -> JobId:
        """Returns the first job of the head's account in its class that is not taken."""
        return next(self._jobs(head[4], head[2]))[3]

    def take(self, head: Head, charge: float) -> None:
        """Thinks of the head's job as started, its account as charged."""
        self._remove(head, head[0] + charge)
        self._show_account(head[2])

    def refund(self, account: Account, charge: float) -> None:
        """Takes a charge back whose job turned out to be gone."""
        self._f[account] -= charge
        self._show_account(account)

    def _show_account(self, account: Account) -> None:
        for group in self._band.tabs[account].classes.values():
            self._show(group)
        for group, accounts in self._woken.items():
            if account in accounts:
                self._show(group)

    def skip(self, head: Head) -> None:
        """Thinks of the head's job as gone, at no charge."""
        self._remove(head, head[0])
        self._show(head[4])

    def _remove(self, head: Head, f: float) -> None:
        self._taken.add(self.job_of(head))
        self._f[head[2]] = f

    def _wake(self, entry: WaitingEntry) -> None:
        account = entry.job.account
        keys = self._woken.setdefault(entry.group, {}).setdefault(account, [])
        insort(keys, entry.key)
        self._f.setdefault(account, self._band.tabs[account].rank)
        self._show(entry.group)

    def _jobs(self, group: WaitingClass, account: Account) -> Iterator[JobKey]:
        queue = group.queues.get(account)
        jobs = queue.jobs if queue else []
        woken = self._woken.get(group, {}).get(account)
        if woken:
            jobs = sorted([*jobs, *woken])
        return (key for key in jobs if key[3] not in self._taken)

    def _first(self, group: WaitingClass) -> FairKey | None:
        best = next((key for key in group.order if key[2] not in self._f), None)
        for account, f in self._f.items():
            if account in group.queues or account in self._woken.get(group, {}):
                oldest = min((key[2] for key in self._jobs(group, account)), default=None)
                if oldest is not None and (best is None or (f, oldest, account) < best):
                    best = (f, oldest, account)
        return best

    def _show(self, group: WaitingClass) -> None:
        """Puts the class's head, as it would be, among the heads."""
        if self._gpus.isdisjoint(group.eligible):
            return
        old = self._changed.get(group.seq, group.head)
        if old is not None:
            del self.heads[bisect_left(self.heads, old)]
        first = self._first(group)
        new: Head | None = (*first, group.seq, group) if first else None
        if new is not None:
            insort(self.heads, new)
        self._changed[group.seq] = new
