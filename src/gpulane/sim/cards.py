"""The truth about simulated cards: who computes, who holds memory, and the card's own log of both. It knows
nothing of the core, and stops nobody: what must not happen is found in its log afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Seconds = float


@dataclass(slots=True, eq=False)
class Work:
    """Something that computes on a card, from its first byte to its last."""

    who: str
    engine: str
    began: Seconds
    ended: Seconds | None = None
    is_stranger: bool = False
    seen_at: Seconds | None = None
    """When the gateway came to know of a stranger."""
    hung_since: Seconds | None = None
    heeds_interrupt: bool = True


@dataclass(slots=True, eq=False)
class Process:
    """One engine's process."""

    url: str
    is_alive: bool = True
    boot: int = 0
    model: str = ""
    gib: float = 0.0
    """Memory that it holds."""
    keeps: bool = False
    """It gives nothing back, whatever it is told."""
    work: Work | None = None


@dataclass(slots=True, eq=False)
class TrueCard:
    """One card."""

    name: str
    gib_total: float
    processes: dict[str, Process]
    log: list[Work] = field(default_factory=list[Work])
    is_sick_until: Seconds = 0.0
    """Everything fails on it until then."""

    @property
    def gib_free(self) -> float:
        return self.gib_total - sum(p.gib for p in self.processes.values())

    def begin(self, engine: str, who: str, now: Seconds, *, stranger: bool = False) -> Work:
        process = self.processes[engine]
        assert process.is_alive, f"{who} begins on {engine}, which is dead"
        work = process.work = Work(who=who, engine=engine, began=now, is_stranger=stranger)
        self.log.append(work)
        return work

    def end(self, work: Work, now: Seconds) -> None:
        process = self.processes[work.engine]
        if process.work is work:
            process.work = None
        if work.ended is None:
            work.ended = now

    def kill(self, engine: str, now: Seconds) -> None:
        """Ends a process as SIGKILL does: its work and its memory go with it."""
        process = self.processes[engine]
        if process.work is not None:
            self.end(process.work, now)
        process.is_alive, process.model, process.gib, process.keeps = False, "", 0.0, False
        process.boot += 1


# --- what must not have happened


def overlaps(log: Iterable[Work]) -> list[str]:
    """Returns every pair of jobs that computed on a card at the same time, and every job that began beside a
    stranger of whom the gateway knew.
    """
    found: list[str] = []
    jobs = sorted((w for w in log if not w.is_stranger), key=lambda w: w.began)
    last: Work | None = None
    for work in jobs:
        if last is not None and work.began < (last.ended if last.ended is not None else float("inf")):
            found.append(f"{last.who} and {work.who} at {work.began:.3f}")
        if last is None or (work.ended or 0.0) >= (last.ended or 0.0):
            last = work
    for stranger in (w for w in log if w.is_stranger and w.seen_at is not None):
        until = stranger.ended if stranger.ended is not None else float("inf")
        found += [
            f"{work.who} beside a stranger at {work.began:.3f}"
            for work in jobs
            if (stranger.seen_at or 0.0) < work.began < until
        ]
    return found


def unended(log: Iterable[Work]) -> list[str]:
    return [work.who for work in log if work.ended is None]
