"""Which gpu and engine a job goes to (rule 5), and what its start costs there. Reads facts, changes none.

Warm: the fastest idle gpu that holds the model. Cold: an empty gpu; else one whose models are also idle
elsewhere; else the one least recently used, where a gpu last used by the same service counts as older (its
card changes no hands).
"""

from __future__ import annotations

from collections.abc import Sequence

from gpulane.core.book import Book
from gpulane.core.gpus import GpuFacts, start_seconds
from gpulane.core.model import NO_MODEL, Charge, EngineUrl, Job, Seconds
from gpulane.core.policy import Policy
from gpulane.core.queues import WaitingClass, resident


class FreeGpus:
    """The gpus a job may still be given to, and what they hold."""

    def __init__(self, gpus: list[GpuFacts]) -> None:
        self.gpus = {facts.gpu.id: facts for facts in gpus}
        self.holders: dict[str, list[GpuFacts]] = {}
        for facts in gpus:
            for held in residents(facts):
                self.holders.setdefault(held, []).append(facts)

    def remove(self, facts: GpuFacts) -> None:
        del self.gpus[facts.gpu.id]
        for held in residents(facts):
            self.holders[held].remove(facts)

    def warm_for(self, group: WaitingClass) -> list[GpuFacts]:
        """Returns the free gpus on which a job of the class starts without a load."""
        holding = self.holders.get(group.resident)
        if not holding:
            return []
        return [facts for facts in holding if warm_engine(group, facts) is not None]

    def cold_for(self, group: WaitingClass) -> list[GpuFacts]:
        return [facts for gpu, facts in self.gpus.items() if gpu in group.eligible]


def residents(facts: GpuFacts) -> list[str]:
    """Returns what would be warm on the gpu. Without a model, a job is warm where its engine was used
    last.
    """
    found = models(facts)
    return found if facts.last_service is None else [*found, resident(facts.last_service, NO_MODEL)]


def models(facts: GpuFacts) -> list[str]:
    held = (e for e in facts.engines.values() if e.resident != NO_MODEL)
    return list(dict.fromkeys(resident(e.engine.service, e.resident) for e in held))


def warm_engine(group: WaitingClass, facts: GpuFacts) -> EngineUrl | None:
    engines = group.eligible.get(facts.gpu.id, ())
    return next((url for url in engines if facts.holds(url, group.key.model)), None)


def fastest(gpus: Sequence[GpuFacts]) -> GpuFacts:
    return min(gpus, key=lambda facts: (-facts.gpu.speed, facts.gpu.id))


def victim(gpus: list[GpuFacts], free: FreeGpus, group: WaitingClass, policy: Policy) -> GpuFacts:
    """Returns the gpu that loses its model."""

    def rank(facts: GpuFacts) -> tuple[bool, bool, Seconds, str]:
        unique = any(len(free.holders[held]) < 2 for held in models(facts))
        same = facts.last_service is group.key.service
        older = policy.handoff_age_factor * policy.handoff_seconds if same else 0.0
        return (not facts.is_empty, unique, facts.idle_since - older, facts.gpu.id)

    return min(gpus, key=rank)


def charge(book: Book, job: Job, group: WaitingClass, facts: GpuFacts) -> tuple[EngineUrl, Charge]:
    """Returns the engine a job would go to on this gpu, and what its start costs."""
    service = book.service_seconds(job, facts.gpu.id)
    engine = warm_engine(group, facts) or group.eligible[facts.gpu.id][0]
    c = start_seconds(facts, engine, group.key.model, group.key.service, book.learned)
    return engine, Charge(service_seconds=service, load_seconds=c)
