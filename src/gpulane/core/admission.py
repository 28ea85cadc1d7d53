"""May this job enter? Refuses what no gpu can ever run, saying why per gpu, and what is over a limit
(promise P5).

A gpu's answer is a definite no only in its engine's own words: an engine that has not told yet may offer
anything.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final

from gpulane.core.book import Book
from gpulane.core.gpus import obstacle
from gpulane.core.model import Job, Service
from gpulane.core.queues import ClassKey
from gpulane.core.reasons import Reason, reason
from gpulane.core.standing import GPUS_NAMED_MAX

NEAREST_MAX: Final = 3
"""Names offered instead of one that nobody has."""
NAMES_COMPARED_MAX: Final = 2000
"""Names looked at for that; comparing is slow, and the first thousands will do."""
NEED: Final = re.compile(r"(?P<family>[^:=]+[:=])(?P<name>.*)", re.DOTALL)
"""`kind:name` or `Class.input=value`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may wait."""

    queued_max: int = 100_000
    queued_per_account_max: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The job may wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The job may not, and why. Codes queue_full and account_full pass with time, all others with other
    settings.
    """

    reason: Reason
    per_gpu: tuple[Reason, ...] = ()
    nearest: tuple[str, ...] = ()
    """Names that engines do offer, closest first."""

    @property
    def is_temporary(self) -> bool:
        return self.reason.code in {"queue_full", "account_full"}


def admit(book: Book, job: Job, limits: Limits | None = None) -> Admitted | Refused:
    """Returns whether the job may be enqueued."""
    limits = limits or Limits()
    return refuse_impossible(book, job) or refuse_too_many(book, job, limits) or Admitted()


def refuse_impossible(book: Book, job: Job) -> Refused | None:
    if not any(e.engine.service is job.service for gpu in book.gpus.values() for e in gpu.engines.values()):
        return Refused(reason=reason("no_gpu_of_service", service=job.service.value))
    key = book.class_key(job)
    per_gpu = [obstacle(key, facts) for _, facts in sorted(book.gpus.items())]
    definite = tuple(answer for answer in per_gpu if answer is not None)
    if len(definite) < len(per_gpu):
        return None
    names = nearest_names(book, key)
    told = [r for r in definite if r.code != "no_engine_of_service"] or list(definite)
    text = " ".join(r.text for r in told[:GPUS_NAMED_MAX])
    near = f" Nearest: {', '.join(names)}." if names else ""
    return Refused(reason=reason("impossible", gpus=text, nearest=near), per_gpu=definite, nearest=names)


def refuse_too_many(book: Book, job: Job, limits: Limits) -> Refused | None:
    waiting = len(book.waiting.entries)
    if waiting >= limits.queued_max:
        return Refused(reason=reason("queue_full", waiting=waiting))
    tabs = (band.tabs.get(job.account) for band in book.waiting.bands.values())
    running = sum(active.job.account == job.account for active in book.active.values())
    own = sum(tab.jobs for tab in tabs if tab is not None) - running
    if own >= limits.queued_per_account_max:
        return Refused(reason=reason("account_full", waiting=own))
    return None


def nearest_names(book: Book, key: ClassKey) -> tuple[str, ...]:
    """Returns the closest names of the same family for each need that no engine of the service offers."""
    offered = offers_of(book, key.service)
    found: list[str] = []
    for need in sorted(key.needs - offered):
        parts = NEED.fullmatch(need)
        if parts is None:
            continue
        family = parts["family"]
        names = sorted(o.removeprefix(family) for o in offered if o.startswith(family))[:NAMES_COMPARED_MAX]
        found += closest(parts["name"], names)
    return tuple(dict.fromkeys(found))[: NEAREST_MAX * 2]


def closest(name: str, names: list[str]) -> list[str]:
    """Compares without case and file ending: `Euler A` is near `euler a`, one `.safetensors` not to all."""
    by_stem = {stem(other): other for other in names}
    return [by_stem[near] for near in difflib.get_close_matches(stem(name), by_stem, NEAREST_MAX)]


def stem(name: str) -> str:
    return name.casefold().rpartition(".")[0] or name.casefold()


def offers_of(book: Book, service: Service) -> frozenset[str]:
    engines = (e for gpu in book.gpus.values() for e in gpu.engines.values())
    return frozenset[str]().union(*(e.offers or () for e in engines if e.engine.service is service))
