"""Proposes which waiting job goes to which idle gpu: `decide(book, policy, now)`. It changes nothing.

The decision tree; the numbers are those of docs/scheduling.md and stand in `Candidate.rule`:

  0  Paused, or no gpu idle: nothing. Bands are served one after the other, highest first; what no job of a
     band may use goes on to the next.
  1  The first job in fair order is warm: take it. Otherwise the first warm job whose account is at most
     `slack` ahead of the lowest F among jobs that some idle gpu may run.
  2  Otherwise the first job in fair order, though it is cold.
     2a, 2b, 3, 4 (soon, no needless copy, fairness beats thrift, overdue) come between; not in force yet.
  5  Which gpu: `placement`.
  6  Nothing to propose: ask again when a job or a gpu has rested.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from gpulane.core.book import Book
from gpulane.core.decisions import AskAgain, Candidate, Decision, StartAttempt
from gpulane.core.fairness import FairOrder
from gpulane.core.gpus import GpuFacts
from gpulane.core.model import NO_MODEL, Band, Charge, EngineUrl, JobId, Seconds
from gpulane.core.placement import FreeGpus, charge, fastest, victim
from gpulane.core.policy import Policy
from gpulane.core.queues import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One job for one gpu, and the rule that chose it."""

    head: Head
    facts: GpuFacts
    job: JobId
    engine: EngineUrl
    charge: Charge
    cost: float
    """How much its account's F grows."""
    order: FairOrder
    rule: str

    @property
    def candidate(self) -> Candidate:
        return Candidate(
            job=self.job,
            engine=self.engine,
            charge=self.charge,
            rule=self.rule,
            despite_avoid=self.facts.gpu.id in self.head[4].key.avoid,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds throughout one call of `decide`."""

    book: Book
    policy: Policy
    slack_cap_seconds: Seconds


def decide(book: Book, policy: Policy, now: Seconds) -> list[Decision]:
    """Returns one StartAttempt per idle gpu that some waiting job may use, and when to ask again."""
    if book.paused or not book.waiting.entries:  # rule 0
        return []
    idle = book.idle_gpus(now)
    starts = propose(book, policy, idle, now) if idle else []
    return [*starts, *ask_again(book, policy, now, all_taken=len(starts) == len(idle))]


def propose(book: Book, policy: Policy, idle: list[GpuFacts], now: Seconds) -> list[StartAttempt]:
    terms = Terms(book=book, policy=policy, slack_cap_seconds=book.slack_cap_seconds(policy))
    free = FreeGpus(idle)
    orders: list[FairOrder] = []
    choices: list[Choice] = []
    for band, queue in book.waiting.bands.items():
        if not free.gpus:
            break
        woken = [entry for entry in book.waiting.due(now) if entry.job.band == band]
        order = FairOrder(queue, woken, frozenset(facts.gpu.id for facts in idle))
        orders.append(order)
        while free.gpus:
            choice = choose(terms, order, free)
            if choice is None:
                break
            choices.append(choice)
            order.take(choice.head, choice.cost)
            free.remove(choice.facts)
    if not choices:
        return []
    lowest = lowest_f(book)
    return [
        StartAttempt(
            gpu=choice.facts.gpu.id,
            candidates=(choice.candidate, *further(terms, orders, choice)),
            lowest_f=lowest,
        )
        for choice in choices
    ]


def choose(terms: Terms, order: FairOrder, free: FreeGpus) -> Choice | None:
    """Returns the next choice by rules 1 to 5, or None when no free gpu may run any job of the band."""
    first: Head | None = None
    low = 0.0
    for head in order.heads:  # fair order
        warm = free.warm_for(head[4]) if head[4].resident in free.holders else ()
        if first is None:
            if not warm and not free.cold_for(head[4]):
                continue  # all gpus that may run it have been given away
            if warm:
                return chosen(terms, order, head, fastest(warm), "1")
            first, low = head, head[0]
        elif warm and head[0] <= low + slack(terms, head, fastest(warm)):  # rule 1
            return chosen(terms, order, head, fastest(warm), "1")
        elif head[0] > low + terms.slack_cap_seconds:
            break
    if first is None:
        return None  # rule 6
    # Rules 2a and 2b will hold back cold heads in the loop above; rules 3 and 4 will replace `first` here.
    return chosen(terms, order, first, victim(free.cold_for(first[4]), free, first[4], terms.policy), "2")


def slack(terms: Terms, head: Head, facts: GpuFacts) -> Seconds:
    """Returns how far ahead (GPU-seconds of F) an account may go because its model is loaded."""
    key = head[4].key
    if key.model == NO_MODEL:
        c = terms.book.learned.handoff_seconds(facts.gpu.id)
    else:
        c = terms.book.load_seconds(facts.gpu.id, key.model, key.service)
    return min(terms.policy.slack_loads * c, terms.slack_cap_seconds)


def chosen(terms: Terms, order: FairOrder, head: Head, facts: GpuFacts, rule: str) -> Choice:
    job = terms.book.waiting.entries[order.job_of(head)].job
    engine, cost = charge(terms.book, job, head[4], facts)
    return Choice(
        head=head,
        facts=facts,
        job=job.id,
        engine=engine,
        charge=cost,
        cost=cost.total / job.weight,
        order=order,
        rule=rule,
    )


def further(terms: Terms, orders: list[FairOrder], choice: Choice) -> list[Candidate]:
    """Returns what the gpu would be given if its choice, and each further one, turned out to be gone."""
    found: list[Candidate] = []
    for order in orders:
        alone, free = order.copy_for(choice.facts.gpu.id), FreeGpus([choice.facts])
        if order is choice.order:
            alone.refund(choice.head[2], choice.cost)
        while len(found) < terms.policy.candidates_max - 1:
            other = choose(terms, alone, free)
            if other is None:
                break
            found.append(other.candidate)
            alone.skip(other.head)
    return found


def lowest_f(book: Book) -> tuple[tuple[Band, float], ...]:
    """Returns, per band, the lowest F among accounts with a job that some gpu may run (M2).

    A job that no gpu may run now must not hold V down: newcomers would be lifted to that old level only.
    """
    found: list[tuple[Band, float]] = []
    for band, queue in book.waiting.bands.items():
        lowest = next((head[0] for head in queue.heads if head[4].eligible), None)
        if lowest is None:
            continue
        # Claims under way may yet be lost, so their charges do not count here.
        uncharged = (
            [tab.f for tab in queue.tabs.values() if tab.provisional and tab.classes]
            if any_claim(book)
            else []
        )
        found.append((band, min([lowest, *uncharged])))
    return tuple(found)


def any_claim(book: Book) -> bool:
    return any(facts.proposal is not None for facts in book.gpus.values())


def ask_again(book: Book, policy: Policy, now: Seconds, *, all_taken: bool) -> list[AskAgain]:
    """Returns when something that rests will have rested, if that could start a job (rule 6)."""
    rests = (max(facts.rest_until, facts.paused_until) for facts in book.gpus.values())
    times = [until for until in rests if until > now]
    if not all_taken:
        times += [row[0] for row in book.waiting.resting if now < row[0] < inf][:1]
    if not times:
        return []
    at = max(min(times), now + policy.ask_again_seconds_min)
    return [AskAgain(at=min(at, now + policy.ask_again_seconds_max))]
