"""Interrupt and skip: global orders in A1111, here about the caller's own jobs and nobody else's."""

from __future__ import annotations

from http import HTTPStatus

from gpulane.core.model import Account
from gpulane.errors import EngineError
from gpulane.store.base import JobRecord
from gpulane.web.a1111.own import OwnJobs
from gpulane.web.ports import EnginesPort, JobsPort
from gpulane.wire import Timeouts

SKIP_TIMEOUTS = Timeouts(first_byte_seconds=5.0)
"""The engine answers at once unless all its threads are taken."""


class Stopping:
    """Carries out both."""

    def __init__(self, jobs: JobsPort, engines: EnginesPort, own: OwnJobs) -> None:
        self._jobs = jobs
        self._engines = engines
        self._own = own

    async def interrupt(self, account: Account) -> None:
        """Cancel what runs of the account; when nothing does, its waiting calls.

        Stored jobs that wait (of the native API) are left alone: A1111 has none.
        """
        running = await self._own.running(account)
        chosen = running or [record for record in await self._own.waiting(account) if record.job.held]
        for record in chosen:
            await self._jobs.cancel(record.job.id)

    async def skip(self, account: Account) -> None:
        """End the current picture of the account's running jobs, on the engines that run them."""
        for record in await self._own.running(account):
            if record.engine is not None and self._still_runs(record):
                try:
                    await self._post(record)
                except EngineError:
                    continue  # it is a wish; the job goes on

    def _still_runs(self, record: JobRecord) -> bool:
        """Look once more, without waiting: an order that comes late would hit somebody else's job."""
        return any(gpu.job == record.job.id for gpu in self._jobs.gpus())

    async def _post(self, record: JobRecord) -> None:
        assert record.engine is not None
        client = self._engines.wire(record.engine)
        response = await client.request("POST", "/sdapi/v1/skip", body=b"", timeouts=SKIP_TIMEOUTS)
        async with response:
            if response.status == HTTPStatus.OK:
                await response.read(1024)
