"""An account's own A1111 jobs, found by state or by the ids its clients know. Never anybody else's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from gpulane.core.events import JobEnded, JobStarted, StoreEvent
from gpulane.core.model import WAITING, Account, JobId, JobState, Service
from gpulane.store.base import JobQuery, JobRecord
from gpulane.web.ports import JobsPort

LISTED_MAX: Final = 500
"""Waiting jobs of one account that are looked at; more are not shown one by one."""
NAMES_MAX: Final = 10_000
"""Task ids of held calls that are remembered; the oldest goes first."""
STARTS_MAX: Final = 10_000
"""Running jobs whose start is remembered: far above any number of gpus."""


class OwnJobs:
    """Reads the store for one service, always for one account."""

    def __init__(self, jobs: JobsPort) -> None:
        self._jobs = jobs
        self._names: OrderedDict[tuple[Account, str], JobId] = OrderedDict()

    async def running(self, account: Account) -> list[JobRecord]:
        """List what an engine works on, the longest first."""
        return await self._list(account, frozenset({JobState.RUNNING}))

    async def waiting(self, account: Account) -> list[JobRecord]:
        """List what waits, oldest first."""
        return await self._list(account, WAITING)

    async def find(self, account: Account, task: str) -> JobRecord | None:
        """Find a job by its client's id for it (`force_task_id`), or by ours."""
        job = self._names.get((account, task))
        record = await self._jobs.record(job) if job is not None else None
        if record is None:
            record = await self._jobs.record_of_client(account, Service.A1111, task)
        if record is None:
            record = await self._jobs.record(JobId(task))
        if record is None or record.job.account != account or record.job.service is not Service.A1111:
            return None
        return record

    def name(self, account: Account, task: str, job: JobId) -> None:
        """Remember which job a client's id means now: the newest that was called so, as in A1111."""
        self._names[account, task] = job
        self._names.move_to_end((account, task))
        while len(self._names) > NAMES_MAX:
            self._names.popitem(last=False)

    async def _list(self, account: Account, states: frozenset[JobState]) -> list[JobRecord]:
        query = JobQuery(account=account, states=states, service=Service.A1111, limit=LISTED_MAX)
        return sorted(await self._jobs.records(query), key=lambda record: record.job.arrival)


def shown_id(record: JobRecord) -> str:
    """Return the task id as its client knows it."""
    return record.client_job_id or record.job.id


class Starts:
    """When each running job was started, on the event loop's clock: estimates need no more than that."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._starts: OrderedDict[JobId, float] = OrderedDict()

    def hear(self, events: tuple[StoreEvent, ...]) -> None:
        """Note starts, forget ends."""
        for event in events:
            match event:
                case JobStarted():
                    self._starts[event.job] = self._clock()
                    while len(self._starts) > STARTS_MAX:
                        self._starts.popitem(last=False)
                case JobEnded():
                    self._starts.pop(event.job, None)
                case _:
                    pass

    def seconds(self, job: JobId) -> float | None:
        """Return how long a job has been running; None when it was started before us."""
        started = self._starts.get(job)
        return None if started is None else self._clock() - started
