"""Entries of the queue and the history, read from the store and written once: pages ask for the same ones all
the time.

Ended jobs never change, so what was written of them is kept, up to a number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import msgspec

from gpulane.core.model import JobId
from gpulane.store.base import JobRecord
from gpulane.web.comfyui import entries
from gpulane.web.comfyui.entries import Entry, JobEntry
from gpulane.web.comfyui.lists import Lists
from gpulane.web.ports import JobsPort

CACHE_BYTES_MAX: Final = 32 * 1024 * 1024
ENTRY_BYTES: Final = 512
"""What an entry costs beside its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An ended job in both forms."""

    history: bytes
    job: JobEntry


class Archive:
    """Reads one job at a time; scoping by account is done by whoever has the record."""

    def __init__(self, jobs: JobsPort, lists: Lists) -> None:
        self._jobs = jobs
        self._lists = lists
        self._written: OrderedDict[JobId, Written] = OrderedDict()
        self._items: OrderedDict[JobId, list[msgspec.Raw]] = OrderedDict()
        self._bytes = 0

    async def queue_item(self, record: JobRecord) -> list[msgspec.Raw]:
        """Return the queue item of a job that has not ended."""
        job = record.job.id
        if job not in self._items:
            stored = await self._jobs.body(job)
            item = entries.queue_item(record, stored, self._lists.output_classes())
            self._items[job] = item
            self._bytes += _size_of_item(item)
            self._trim()
        self._items.move_to_end(job)
        return self._items[job]

    async def written(self, record: JobRecord) -> Written:
        """Return an ended job's entries."""
        job = record.job.id
        if job not in self._written:
            self._forget_item(job)
            entry = await self.entry(record)
            written = Written(history=msgspec.json.encode(entry), job=entries.ended_entry(record, entry))
            self._written[job] = written
            self._bytes += len(written.history) + ENTRY_BYTES
            self._trim()
        self._written.move_to_end(job)
        return self._written[job]

    async def entry(self, record: JobRecord) -> Entry:
        """Read an ended job's history entry."""
        result = await self._jobs.result(record.job.id)
        stored = None if result is not None else await self._jobs.body(record.job.id)
        entry = entries.history_entry(record, result, stored, self._lists.output_classes())
        if result is not None and bytes(entry.prompt[2]) == bytes(entries.NO_PROMPT):
            stored = await self._jobs.body(record.job.id)
            entry.prompt = entries.queue_item(record, stored, self._lists.output_classes())
        return entry

    def forget(self, job: JobId) -> None:
        """Drop what is kept of a job that is removed."""
        self._forget_item(job)
        written = self._written.pop(job, None)
        if written is not None:
            self._bytes -= len(written.history) + ENTRY_BYTES

    def _forget_item(self, job: JobId) -> None:
        item = self._items.pop(job, None)
        if item is not None:
            self._bytes -= _size_of_item(item)

    def _trim(self) -> None:
        """Make room, but never for the last one: it is being asked for."""
        while self._bytes > CACHE_BYTES_MAX and len(self._written) > 1:
            self.forget(next(iter(self._written)))
        while self._bytes > CACHE_BYTES_MAX and len(self._items) > 1:
            self._forget_item(next(iter(self._items)))


def _size_of_item(item: list[msgspec.Raw]) -> int:
    return sum(map(len, map(memoryview, item))) + ENTRY_BYTES
