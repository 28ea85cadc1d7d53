"""An account's own ComfyUI jobs: found by the ids that the client knows, listed in pages. Nobody else's are
ever returned.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gpulane.adapters.comfyui.prompt import PromptMeta, read_meta
from gpulane.core.model import ENDED, Account, JobId, JobState, Service
from gpulane.store.base import PAGE_MAX, JobQuery, JobRecord
from gpulane.web.ports import JobsPort

UNENDED: Final = frozenset(JobState) - ENDED
HISTORY_MAX: Final = 10_000
"""ComfyUI keeps as many."""
LIVE_MAX: Final = 100_000
"""More cannot wait: `limits.queued_max`."""


class OwnJobs:
    """Reads the store for one service, always for one account."""

    def __init__(self, jobs: JobsPort) -> None:
        self._jobs = jobs

    async def find(self, account: Account, shown_id: str) -> JobRecord | None:
        """Find a job by the id its client gave, or by ours where the client gave none."""
        record = await self._jobs.record_of_client(account, Service.COMFYUI, shown_id)
        if record is None:
            record = await self._jobs.record(JobId(shown_id))
        if record is None or record.job.account != account or record.job.service is not Service.COMFYUI:
            return None
        return record

    async def unended(self, account: Account, most: int = LIVE_MAX) -> list[JobRecord]:
        """List what waits and runs, oldest first."""
        return await self._list(account, UNENDED, most)

    async def ended(self, account: Account, most: int = HISTORY_MAX) -> list[JobRecord]:
        """List what has ended and left a trace, oldest first, of the newest ones."""
        found = await self._list(account, ENDED, most)
        return [record for record in found if leaves_trace(record)]

    async def _list(self, account: Account, states: frozenset[JobState], most: int) -> list[JobRecord]:
        found: list[JobRecord] = []
        before: int | None = None
        while len(found) < most:
            limit = min(PAGE_MAX, most - len(found))
            query = JobQuery(
                account=account, states=states, service=Service.COMFYUI, limit=limit, before=before
            )
            page = await self._jobs.records(query)
            found += page
            if len(page) < limit:
                break
            before = page[-1].job.arrival
        found.reverse()
        return found


def leaves_trace(record: JobRecord) -> bool:
    """Tell whether an ended job is in the history: a prompt deleted while it waited is not (comfyui.md 5)."""
    return record.state is not JobState.CANCELLED or record.attempts_counted > 0


def is_running(record: JobRecord) -> bool:
    return record.state is JobState.RUNNING


def shown_id(record: JobRecord) -> str:
    """Return the prompt id as the client knows it."""
    return record.client_job_id or record.job.id


def meta_of(record: JobRecord) -> PromptMeta:
    """Read what the front door noted at submission; nothing of it for jobs that came another way."""
    try:
        return read_meta(record.meta)
    except (msgspec.DecodeError, RecursionError):
        return PromptMeta()


def number_of(record: JobRecord) -> float:
    """Return ComfyUI's queue number: the client's own, else the order of arrival, negative for those put to
    the front.
    """
    meta = meta_of(record)
    if meta.number is not None:
        return meta.number
    return -record.job.arrival if meta.priority > 0 else record.job.arrival


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
