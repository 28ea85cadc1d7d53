"""What a store should answer, told a second time by other means: an independent oracle for the state machine.

It shares no code with the store. A job is a handful of plain values; each verb is written from the
contract's prose.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Told:
    """A job, as the oracle remembers it."""

    account: str
    state: str = "queued"
    holder: str | None = None
    """The token in force."""
    gpu: str | None = None
    has_started: bool = False
    wanted_gone: bool = False
    lease_end: float = 0.0
    suspect_since: float | None = None
    counted: int = 0
    rests_until: float = 0.0
    past: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Token of an attempt that is over: how (lost, failed), and on which gpu."""
    last: str | None = None
    """Token of the last attempt that is over."""
    handed_back: str | None = None
    over_by: str | None = None
    paid: dict[str, float] = field(default_factory=dict[str, float])
    """Per attempt that may still be corrected: what the account has paid for it."""

    @property
    def is_over(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}

    @property
    def waits(self) -> bool:
        return self.holder is None and not self.is_over


MAX_ATTEMPTS = 3


class Oracle:
    """All jobs and what each verb must answer. `now` is the test's."""

    def __init__(self) -> None:
        self.n = 0
        self.jobs: dict[str, Told] = {}
        self.spent: dict[str, float] = {}
        self.floor = 0.0
        self.drained: set[str] = set()
        self.paused = False

    def holder_of(self, gpu: str) -> Told | None:
        return next((j for j in self.jobs.values() if j.holder is not None and j.gpu == gpu), None)

    def waiting_of(self, account: str) -> int:
        return sum(1 for j in self.jobs.values() if j.waits and j.account == account)

    def enqueue(self, job: str, account: str, most: int) -> str:
        if job in self.jobs:
            return "exists" if self.jobs[job].account == account else "conflict"
        if sum(1 for j in self.jobs.values() if j.waits) >= most:
            return "full"
        mine = self.spent.get(account, 0.0)
        self.spent[account] = mine if self.waiting_of(account) else max(mine, self.floor)
        self.jobs[job] = Told(account=account)
        self.n += 1
        return "ok"

    def claim(
        self, gpu: str, claim: str, jobs: list[str], charge: float, lowest: float, end: float, now: float
    ) -> str:
        held = self.holder_of(gpu)
        if held is not None and str(held.holder).endswith(f".{claim}"):
            return "ok"
        if self.paused:
            return "hold"
        if gpu in self.drained:
            return "draining"
        if held is not None:
            return "busy"
        for name in jobs:
            job = self.jobs.get(name)
            if job is None or not job.waits or job.rests_until > now:
                continue
            self.n += 1
            job.holder, job.gpu, job.has_started = f"{self.n}.{claim}", gpu, False
            job.lease_end, job.suspect_since = end, None
            self.floor = max(self.floor, lowest)
            self.pay(job, job.holder, charge)
            return "ok"
        return "lost"

    def pay(self, job: Told, token: str, amount: float) -> None:
        before = job.paid.get(token, 0.0)
        self.spent[job.account] = self.spent.get(job.account, 0.0) + amount - before
        job.paid[token] = amount

    def start(self, name: str, token: str, now: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.holder != token:
            return "stale"
        if not job.has_started:
            if job.lease_end <= now:
                return "expired"
            self.n += 1
            job.has_started, job.state, job.counted, job.rests_until = True, "running", job.counted + 1, 0.0
        return "ok"

    def give_back(self, job: Told) -> None:
        token = job.holder
        assert token is not None
        self.pay(job, token, 0.0)
        job.holder, job.gpu = None, None

    def release(self, name: str, token: str) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.handed_back == token:
            return "ok"
        if job.holder != token or job.has_started:
            return "stale"
        self.give_back(job)
        job.handed_back = token
        self.n += 1
        return "ok"

    def leave(self, job: Told, how: str) -> None:
        """A started attempt is over."""
        assert job.holder is not None
        assert job.gpu is not None
        job.past[job.holder] = (how, job.gpu)
        job.last, job.holder, job.gpu, job.suspect_since = job.holder, None, None, None

    def end(self, job: Told, state: str, by: str | None) -> None:
        job.state, job.over_by, job.rests_until = state, by, 0.0
        self.n += 1

    def finish(self, name: str, token: str, state: str, used: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.is_over:
            return "ok" if job.over_by == token else "stale"
        if job.holder == token and job.has_started:
            self.pay(job, token, used)
            self.leave(job, "done")
            self.end(job, "cancelled" if job.wanted_gone else state, token)
            return "ok"
        is_free = job.holder is None or not job.has_started
        if token in job.past and state == "succeeded" and is_free:
            if job.holder is not None:
                self.give_back(job)
            self.pay(job, token, used)
            self.end(job, state, token)
            return "ok"
        return "stale"

    def fail(self, name: str, token: str, used: float, refund: bool, rest: float, now: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        how = job.past.get(token, ("", ""))[0]
        if self.went_by(job, token) if job.is_over else how == "failed" and job.holder != token:
            return "ok"
        if job.holder != token or not job.has_started:
            return "stale"
        self.pay(job, token, 0.0 if refund else used)
        self.leave(job, "failed")
        if job.wanted_gone:
            self.end(job, "cancelled", token)
            return "ok"
        job.state, job.rests_until = "waiting_retry", now + rest if rest else 0.0
        self.n += 1
        return "ok"

    def went_by(self, job: Told, token: str) -> bool:
        return job.state == "cancelled" and job.over_by == token

    def cancel(self, name: str) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.is_over:
            return "cancelled" if job.state == "cancelled" and job.over_by is None else "ended"
        if job.holder is not None and job.has_started:
            self.n += not job.wanted_gone
            job.wanted_gone = True
            return "cancelling"
        if job.holder is not None:
            self.give_back(job)
        self.end(job, "cancelled", None)
        return "cancelled"

    def resume(self, name: str, token: str, gpu: str, claim: str, end: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.holder is not None and job.gpu == gpu and job.holder.endswith(f".{claim}"):
            return "ok"
        is_holder = job.holder == token and job.gpu == gpu and job.has_started
        was_lost = job.waits and job.last == token and job.past.get(token) == ("lost", gpu)
        if not (is_holder or was_lost) or job.is_over:
            return "gone"
        if was_lost and self.holder_of(gpu) is not None:
            return "busy"
        self.n += 1
        new = f"{self.n}.{claim}"
        job.paid[new] = job.paid.pop(token, 0.0)
        job.past.pop(token, None)
        job.holder, job.gpu, job.has_started, job.state = new, gpu, True, "running"
        job.lease_end, job.suspect_since, job.rests_until = end, None, 0.0
        return "ok"

    def beat(self, name: str, token: str, end: float, now: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.holder != token:
            return "gone"
        if job.lease_end <= now or job.suspect_since is not None:
            return "expired"
        job.lease_end = end
        return "cancel" if job.wanted_gone else "ok"

    def expire(self, name: str, token: str, now: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.handed_back == token:
            return "ok"
        if job.holder != token:
            return "stale"
        if job.suspect_since is not None:
            return "ok"
        if job.lease_end > now:
            return "not_due"
        if not job.has_started:
            return self.release(name, token)
        job.suspect_since = now
        self.n += 1
        return "ok"

    def rescue(self, name: str, token: str, grace: float, now: float) -> str:
        job = self.jobs.get(name)
        if job is None:
            return "unknown"
        if job.holder != token:
            was_lost = job.past.get(token, ("", ""))[0] == "lost"
            return "ok" if was_lost and (not job.is_over or job.over_by == token) else "stale"
        if job.suspect_since is None or now - job.suspect_since < grace:
            return "not_due"
        self.pay(job, token, 0.0)
        self.leave(job, "lost")
        if job.wanted_gone:
            self.end(job, "cancelled", token)
        elif job.counted >= MAX_ATTEMPTS:
            self.end(job, "failed", token)
        else:
            job.state = "waiting_retry"
            self.n += 1
        return "ok"
