"""Where a waiting job stands: its position, the reason it waits, and when it may start. Readings for people.

They are computed on demand from the book's parts, in time proportional to accounts, classes and gpus;
`decide` never uses them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import ceil, inf
from typing import Final, NamedTuple, Protocol

from gpulane.core.attempts import ActiveEntry
from gpulane.core.gpus import GpuFacts, obstacle
from gpulane.core.learned import Learned
from gpulane.core.model import NO_MODEL, Account, AttemptState, EngineState, GpuId, JobId, Seconds
from gpulane.core.policy import Policy
from gpulane.core.queues import BandQueue, ClassKey, Waiting, WaitingClass, WaitingEntry
from gpulane.core.reasons import Reason, reason

GPUS_NAMED_MAX: Final = 8
"""Gpus that one reason tells about."""


class Facts(Protocol):
    """What is read of the book."""

    @property
    def waiting(self) -> Waiting: ...
    @property
    def active(self) -> Mapping[JobId, ActiveEntry]: ...
    @property
    def gpus(self) -> Mapping[GpuId, GpuFacts]: ...
    @property
    def learned(self) -> Learned: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def paused(self) -> bool: ...


# --- position


class AccountStanding(NamedTuple):
    """One account with jobs on offer in a band."""

    f: float
    oldest: int
    account: Account
    jobs: int
    step: Seconds
    """How much F grows with each of its jobs, as a rule."""


def standings(band: BandQueue, learned: Learned) -> list[AccountStanding]:
    """Returns the accounts of a band that have jobs on offer, in fair order."""
    found: list[AccountStanding] = []
    for account, tab in band.tabs.items():
        if not tab.classes:
            continue
        groups = tab.classes.values()
        jobs = sum(len(group.queues[account].jobs) for group in groups)
        first = min(group.queues[account].arrivals[0] for group in groups)
        step = learned.typical_seconds(next(iter(groups)).key.service) / tab.weight
        found.append(AccountStanding(tab.rank, first, account, jobs, step))
    return sorted(found)


def place(waiting: Waiting, ranking: list[AccountStanding], entry: WaitingEntry) -> int:
    """Returns the position, from 1: jobs of higher bands, own earlier ones, and those of others whose turn
    comes before.

    An account's i-th job is taken to come when its F has grown by i typical jobs: what fair order does
    when nothing is warm.
    """
    band, account = waiting.bands[entry.group.key.band], entry.job.account
    own = own_ahead(band, entry)
    mine = next((s for s in ranking if s.account == account), None)
    step = mine.step if mine else 0.0
    turn = band.tabs[account].rank + own * step
    since = min(mine.oldest if mine else entry.job.arrival, entry.job.arrival)
    ahead = 0
    for other in ranking:
        if other.f > turn:
            break
        if other.account != account:
            ahead += jobs_before(other, turn, since)
    above = sum(
        group.members
        for number, higher in waiting.bands.items()
        if number < entry.job.band
        for group in higher.classes.values()
    )
    return above + own + ahead + 1


def own_ahead(band: BandQueue, entry: WaitingEntry) -> int:
    """Returns how many jobs on offer of the same account come before this one, over all its classes."""
    account = entry.job.account
    groups = band.tabs[account].classes.values()
    return sum(bisect_left(group.queues[account].jobs, entry.key) for group in groups)


def jobs_before(other: AccountStanding, turn: float, since: int) -> int:
    """Returns how many jobs of another account come before a turn; equal turns go by the oldest job."""
    steps = (turn - other.f) / other.step
    whole = round(steps)
    count = whole + (other.oldest < since) if abs(steps - whole) < 1e-9 else ceil(steps)
    return min(other.jobs, count)


# --- why it waits


def explain(facts: Facts, job: JobId, position: int | None, now: Seconds) -> Reason | None:
    """Returns the first of these that holds: running, starting, paused, resting, being claimed, no gpu,
    its turn.
    """
    if (active := facts.active.get(job)) is not None:
        return reason("running" if active.state is AttemptState.STARTED else "starting", gpu=active.gpu)
    entry = facts.waiting.entries.get(job)
    if entry is None:
        return None
    if facts.paused:
        return reason("queue_paused")
    if entry.not_before == inf:
        return reason("client_away")
    if entry.not_before > now:
        return reason("resting_after_failure", attempts=entry.attempts, seconds=ceil(entry.not_before - now))
    if entry.claim is not None:
        return reason("claiming", gpu=entry.claim)
    if not entry.group.eligible:
        return explain_no_gpu(facts, entry.group.key)
    return explain_busy(facts, entry.group, now) or explain_turn(facts, entry, position or 1)


def explain_no_gpu(facts: Facts, key: ClassKey) -> Reason:
    """Tells, gpu by gpu, what keeps a job from ever starting as things are."""
    if not any(e.engine.service is key.service for gpu in facts.gpus.values() for e in gpu.engines.values()):
        return reason("no_gpu_of_service", service=key.service.value)
    per_gpu = [gpu_obstacle(key, gpu) for _, gpu in sorted(facts.gpus.items())]
    text = " ".join(r.text for r in per_gpu[:GPUS_NAMED_MAX])
    codes = {r.code for r in per_gpu}
    never = {"no_engine_of_service", "engine_elsewhere", "labels_missing", "needs_not_offered"}
    if codes <= never:
        return reason("impossible_now", gpus=text)
    if codes <= never | {"gpu_draining"}:
        return reason("all_draining", gpus=text)
    return reason("no_gpu_ready", gpus=text)


def gpu_obstacle(key: ClassKey, facts: GpuFacts) -> Reason:
    """Returns what keeps such a job off a gpu that is not able to take it now."""
    gpu = facts.gpu.id
    if (never := obstacle(key, facts)) is not None:
        return never
    if facts.draining:
        return reason("gpu_draining", gpu=gpu)
    if facts.skip_leaking and facts.leaking is not None:
        return reason("engine_leaking", gpu=gpu, engine=facts.leaking)
    down = next(
        e for url, e in facts.engines.items() if e.engine.service is key.service and key.engine in {None, url}
    )
    state = down.state.value if facts.present else EngineState.LOST.value
    return reason("engine_not_ready", gpu=gpu, engine=down.engine.url, state=state)


def explain_busy(facts: Facts, group: WaitingClass, now: Seconds) -> Reason | None:
    """Tells what keeps every gpu that could run it from any work; None where one works."""
    gpus = [facts.gpus[gpu] for gpu in sorted(group.eligible)]
    per_gpu = [why for gpu in gpus if (why := kept_from_work(gpu, now)) is not None]
    if len(per_gpu) < len(gpus):
        return None
    text = " ".join(why.text for why in per_gpu[:GPUS_NAMED_MAX])
    paused = all(why.code == "gpu_paused" for why in per_gpu)
    return reason("gpus_paused" if paused else "gpus_occupied", gpus=text)


def kept_from_work(facts: GpuFacts, now: Seconds) -> Reason | None:
    gpu = facts.gpu.id
    if facts.occupied is not None:
        return reason("gpu_occupied", gpu=gpu, why=facts.occupied)
    if facts.paused_until > now and facts.job is None:
        seconds = ceil(facts.paused_until - now)
        return reason("gpu_paused", gpu=gpu, seconds=seconds, failures=facts.failures)
    return None


def explain_turn(facts: Facts, entry: WaitingEntry, position: int) -> Reason:
    """Tells what a job that could run waits for."""
    group = entry.group
    gpus = [facts.gpus[gpu] for gpu in sorted(group.eligible)]
    model = group.key.model
    if position == 1 and model != NO_MODEL and not holders(facts, group):
        load = facts.learned.load_seconds(gpus[0].gpu.id, model, group.key.service)
        return reason("waiting_for_model", model=model, slack_seconds=round(facts.policy.slack_loads * load))
    return reason("waiting_turn", position=position)


def holders(facts: Facts, group: WaitingClass) -> list[GpuId]:
    """Returns the gpus, idle or not, on which the class's jobs would be warm."""
    return [
        gpu
        for gpu, engines in sorted(group.eligible.items())
        if any(facts.gpus[gpu].holds(url, group.key.model) for url in engines)
    ]


# --- when it may start


def estimate(
    facts: Facts, ranking: list[AccountStanding], entry: WaitingEntry, now: Seconds
) -> tuple[Seconds, Seconds] | None:
    """Returns the range of a fluid estimate: own work before it, others' work whose turn comes first, over
    the gpus.

    Measured on the trace: within a factor of two under a minute, up to three times too low above, because
    lighter accounts that arrive later rightly go first.
    """
    gpus = [facts.gpus[gpu] for gpu in entry.group.eligible]
    if not gpus or facts.paused or entry.not_before == inf:
        return None
    band = facts.waiting.bands[entry.group.key.band]
    seconds = facts.learned.typical_seconds(entry.job.service)
    own = own_ahead(band, entry) * seconds
    turn = band.tabs[entry.job.account].rank + own / entry.job.weight
    ahead = own
    for other in ranking:
        if other.f >= turn:
            break
        if other.account != entry.job.account:
            ahead += min(other.jobs, (turn - other.f) / other.step) * seconds
    remaining = [max(gpu.free_at - now, 0.0) if gpu.job is not None else 0.0 for gpu in gpus]
    rest = max(entry.not_before - now, 0.0)
    if ahead == 0.0:
        about = max(rest, min(remaining))
    else:
        about = max(rest, (ahead * (1 + facts.policy.load_share) + sum(remaining)) / len(gpus))
    if not holders(facts, entry.group) and entry.job.model != NO_MODEL:
        about += facts.learned.load_seconds(gpus[0].gpu.id, entry.job.model, entry.job.service)
    return honest_range(about)


def honest_range(about: Seconds) -> tuple[Seconds, Seconds]:
    """Returns how far off such an estimate was, measured."""
    if about < 10:
        return (max(0.0, about - 6), about + 6)
    return (about / 2, about * 2) if about <= 60 else (about, about * 3)


# --- invariants


def check_queues(waiting: Waiting) -> None:
    """Asserts that every index of the queues says the same."""
    for number, band in waiting.bands.items():
        shown: list[tuple[float, int, Account, int]] = []
        for key, group in band.classes.items():
            assert key == group.key, key
            assert group.members > 0, key
            entries = [e for e in waiting.entries.values() if e.group is group]
            assert len(entries) == group.members, key
            offered = sorted(e.key for e in entries if e.offered)
            assert offered == sorted(k for queue in group.queues.values() for k in queue.jobs), key
            order = sorted(
                (band.tabs[account].rank, min(queue.arrivals), account)
                for account, queue in group.queues.items()
            )
            assert order == group.order, (order, group.order)
            for account, queue in group.queues.items():
                assert queue.jobs == sorted(queue.jobs), (key, account)
                assert queue.arrivals == sorted(k[2] for k in queue.jobs), (key, account)
                assert band.tabs[account].classes[group.seq] is group, (key, account)
            if order:
                shown.append((*order[0], group.seq))
        assert [head[:4] for head in band.heads] == sorted(shown), number
        for account, tab in band.tabs.items():
            assert tab.jobs > 0 or tab.provisional, (number, account)
