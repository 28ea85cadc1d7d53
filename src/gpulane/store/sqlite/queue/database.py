"""The writer thread's side of `queue.db`: live jobs as tables in memory, every change written before it is
told.

Only the writer thread calls anything here. The tables may be ahead of the disk only between two commits;
`undo` reads them from the disk again.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpulane.core.events import StoreEvent
from gpulane.core.model import ENDED, Account, Band, GpuId, JobId, NodeId, Service
from gpulane.store.base import PAGE_MAX, PRUNE_MAX, Code, JobQuery, JobRecord, NewJob, Reply, Retention
from gpulane.store.records import Node, Row, matches, record_of
from gpulane.store.sqlite.database import open_database, queries, told_as_store_error
from gpulane.store.sqlite.files import PayloadFiles
from gpulane.store.sqlite.rows import GPUS, encode, row_of, story_of
from gpulane.store.tables import Tables

PACKAGE: Final = "gpulane.store.sqlite.queue"
ARRIVAL_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """A body or a result: in its row, or the name of its file."""

    content: bytes | None
    file: str | None = None


class QueueDatabase:
    """Tables, and the disk under them."""

    def __init__(self, path: Path, payloads: PayloadFiles) -> None:
        self._path = path
        self._payloads = payloads
        self._sql = queries(PACKAGE)
        self._connection = open_database(path, PACKAGE)
        self._loaded: Tables | None = None
        self._events: list[StoreEvent] = []
        self._fresh: dict[JobId, Row] = {}
        """Ended since the last flush: the disk does not know yet."""
        self._new: dict[JobId, tuple[bytes, Payload | None]] = {}
        """Metas and bodies of jobs not flushed yet."""
        self._results: dict[JobId, Payload] = {}
        self._ranked: set[JobId] = set()
        self._dead_files: list[str] = []
        """To be removed after the commit."""
        self._ended_count = 0
        self._ended_bytes = 0

    # -- opening and closing

    def load(self) -> None:
        """Read what lives, and remove files that nobody names."""
        self._load()
        self._payloads.sweep({file for (file,) in self._rows("all_files")})

    def close(self) -> None:
        self._connection.close()

    @property
    def tables(self) -> Tables:
        """The live jobs; read from the disk again if they were lost."""
        return self._loaded or self._load()

    def _load(self) -> Tables:
        tables = Tables(self)
        with gc_paused():
            [(tables.n, paused)] = self._rows("queue")
            tables.paused = bool(paused)
            tables.draining = {GpuId(gpu) for (gpu,) in self._rows("all_draining")}
            tables.f = {(Band(b), Account(a)): f for b, a, f in self._rows("all_accounts")}
            tables.v = {Band(b): v for b, v in self._rows("all_bands")}
            for node, boot, name, present, gpus in self._rows("all_nodes"):
                tables.nodes[NodeId(node)] = Node(
                    id=NodeId(node), boot=boot, name=name, present=bool(present), gpus=GPUS.decode(gpus)
                )
            with told_as_store_error(self._path):
                for columns in self._connection.execute(self._sql["live_jobs"]):
                    tables.add(row_of(columns))
        [(self._ended_count, self._ended_bytes)] = self._rows("ended_totals")
        self._loaded = tables
        return tables

    # -- the archive of the tables

    def find(self, job: JobId) -> Row | None:
        return self._fresh.get(job) or self._first("job_by_id", job)

    def find_client(self, account: Account, service: Service, client_job_id: str) -> Row | None:
        for row in self._fresh.values():
            if (row.job.account, row.job.service, row.client_job_id) == (account, service, client_job_id):
                return row
        return self._first("job_by_client", account, service, client_job_id)

    def find_key(self, account: Account, idempotency_key: str) -> Row | None:
        for row in self._fresh.values():
            if (row.job.account, row.idempotency_key) == (account, idempotency_key):
                return row
        return self._first("job_by_key", account, idempotency_key)

    def keep(self, row: Row) -> None:
        self._fresh[row.job.id] = row

    # -- what verbs leave for the next flush

    def add(self, new: NewJob, body: Payload | None) -> None:
        self._new[new.job.id] = (new.meta, body)

    def add_result(self, job: JobId, result: Payload) -> None:
        self._results[job] = result

    def add_rank(self, job: JobId) -> None:
        """Note that a job's band or priority changed."""
        self._ranked.add(job)

    # -- reading

    def record(self, row: Row | None) -> JobRecord | None:
        if row is None:
            return None
        if row.job.id in self._new:
            return record_of(row, self._new[row.job.id][0])
        [(meta,)] = self._rows("meta", row.job.arrival)
        return record_of(row, meta)

    def page(self, query: JobQuery) -> tuple[JobRecord, ...]:
        """Return the newest of what lives and of what has ended."""
        limit = min(query.limit, PAGE_MAX)
        self.flush()
        records: list[JobRecord] = []
        if not query.states or query.states - ENDED:
            records += self._live_page(query, limit)
        if not query.states or query.states & ENDED:
            records += self._ended_page(query, limit)
        return tuple(sorted(records, key=lambda record: -record.job.arrival)[:limit])

    def _live_page(self, query: JobQuery, limit: int) -> Iterator[JobRecord]:
        for row in reversed(self.tables.live.values()):
            if limit <= 0:
                return
            if matches(row, query) and (record := self.record(row)) is not None:
                limit -= 1
                yield record

    def _ended_page(self, query: JobQuery, limit: int) -> Iterator[JobRecord]:
        states = sorted(query.states & ENDED)
        before = ARRIVAL_MAX if query.before is None else query.before
        asked = (before, query.service, json.dumps(states) if states else None, limit)
        if query.account is not None:
            found = self._rows("ended_page_of_account", *asked, query.account)
        elif len(states) == 1:
            found = self._rows("ended_page_of_state", *asked, states[0])
        else:
            found = self._rows("ended_page", *asked)
        return (record_of(row_of(columns), columns[10]) for columns in found)

    def payload(self, kind: str, job: JobId) -> Payload | None:
        """Return the `body` or `result` of a job."""
        self.flush()
        for content, file in self._rows(kind, job):
            return Payload(content=content, file=file)
        return None

    # -- forgetting

    def forget(self, job: JobId) -> Reply:
        self.flush()
        row = self.tables.find(job)
        if row is None or row.state not in ENDED:
            return Reply(code=Code.BUSY if row else Code.UNKNOWN, n=self.tables.n, job=job)
        self._drop([(row.job.arrival, row.size)])
        return Reply(code=Code.OK, n=self.tables.n, job=job)

    def prune(self, retention: Retention, now: float) -> tuple[JobId, ...]:
        self.flush()
        count, size = self._ended_count, self._ended_bytes
        gone: list[tuple[JobId, int, int]] = []
        for arrival, job, finished_at, job_size in self._rows("oldest_ended", PRUNE_MAX):
            is_old = finished_at <= now - retention.ended_seconds
            if not (is_old or count > retention.ended_jobs_max or size > retention.result_bytes_max):
                break
            gone.append((JobId(job), arrival, job_size))
            count, size = count - 1, size - job_size
        self._drop([(arrival, job_size) for _, arrival, job_size in gone])
        self.tables.prune_accounts()
        return tuple(job for job, _, _ in gone)

    def _drop(self, jobs: list[tuple[int, int]]) -> None:
        if not jobs:
            return
        arrivals = [(arrival,) for arrival, _ in jobs]
        for (arrival,) in arrivals:
            self._dead_files += [file for (file,) in self._rows("files_of", arrival)]
        self._begin()
        for name in ("drop_body", "drop_result", "drop_job"):
            self._write(name, arrivals)
        self._ended_count -= len(jobs)
        self._ended_bytes -= sum(size for _, size in jobs)

    # -- writing

    def commit(self) -> Sequence[StoreEvent]:
        self.flush()
        if self._connection.in_transaction:
            with told_as_store_error(self._path):
                self._connection.execute("COMMIT")
        events, self._events = self._events, []
        dead, self._dead_files = self._dead_files, []
        self._payloads.remove(dead)
        return events

    def undo(self) -> None:
        """Go back to what the disk holds; who was seen lately is remembered."""
        seen = {node.id: node.seen_until for node in self._loaded.nodes.values()} if self._loaded else {}
        self._loaded = None
        for pending in (self._events, self._fresh, self._new, self._results, self._ranked, self._dead_files):
            pending.clear()
        with told_as_store_error(self._path):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        for node in self._load().nodes.values():
            node.seen_until = seen.get(node.id, 0.0)

    def flush(self) -> None:
        """Write what changed, in a transaction that `commit` ends."""
        tables = self.tables
        changes = tables.take_changes()
        if changes.rows:
            self._begin()
            self._flush_jobs(changes.rows.values())
        if changes.accounts or changes.bands or changes.nodes or changes.gpus or changes.paused:
            self._begin()
            shares = [(key, tables.f.get(key)) for key in changes.accounts]
            self._write("set_account", [(*key, f) for key, f in shares if f is not None])
            self._write("drop_account", [key for key, f in shares if f is None])
            self._write("set_band", [(band, tables.v[band]) for band in changes.bands])
            self._write("set_node", [node_columns(tables.nodes[node]) for node in changes.nodes])
            self._write("set_draining", [(gpu,) for gpu in changes.gpus & tables.draining])
            self._write("drop_draining", [(gpu,) for gpu in changes.gpus - tables.draining])
        if changes.events:
            self._events += changes.events
            self._write("set_queue", [(tables.n, tables.paused)])

    def _flush_jobs(self, rows: Iterable[Row]) -> None:
        inserts: list[tuple[Any, ...]] = []
        moves: list[tuple[Any, ...]] = []
        ends: list[tuple[Any, ...]] = []
        for row in rows:
            arrival = row.job.arrival
            if row.finished_at is not None:
                self._ended_count += 1
                self._ended_bytes += row.size
            if row.job.id in self._new:
                inserts.append(job_columns(row, self._new[row.job.id][0]))
            elif row.finished_at is not None:
                ends.append((row.state, row.v, story_of(row), row.finished_at, row.size, arrival))
            else:
                moves.append((row.state, row.v, story_of(row), arrival))
        arrivals = {row.job.id: row.job.arrival for row in rows}
        bodies = ((arrivals[job], body) for job, (_, body) in self._new.items())
        ranked = ((row.job, row.job.arrival) for row in rows if row.job.id in self._ranked)
        self._write("insert_job", inserts)
        self._write("insert_body", [(a, body.content, body.file) for a, body in bodies if body is not None])
        self._write("move_job", moves)
        self._write("change_job", [(encode(job), arrival) for job, arrival in ranked])
        self._write("end_job", ends)
        results = ((arrivals[job], result) for job, result in self._results.items())
        self._write("insert_result", [(a, result.content, result.file) for a, result in results])
        for pending in (self._new, self._results, self._ranked, self._fresh):
            pending.clear()

    def _begin(self) -> None:
        if not self._connection.in_transaction:
            with told_as_store_error(self._path):
                self._connection.execute("BEGIN IMMEDIATE")

    def _write(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            with told_as_store_error(self._path):
                self._connection.executemany(self._sql[name], rows)

    def _rows(self, name: str, *parameters: object) -> list[tuple[Any, ...]]:
        with told_as_store_error(self._path):
            return self._connection.execute(self._sql[name], parameters).fetchall()

    def _first(self, name: str, *parameters: object) -> Row | None:
        found = self._rows(name, *parameters)
        return row_of(found[0]) if found else None


def job_columns(row: Row, meta: bytes) -> tuple[Any, ...]:
    job = row.job
    return (
        job.arrival,
        job.id,
        job.account,
        job.service,
        row.state,
        row.v,
        row.finished_at,
        row.size,
        row.digest,
        row.client_job_id,
        row.idempotency_key,
        encode(job),
        meta,
        story_of(row) if row.v != job.arrival else None,
    )


def node_columns(node: Node) -> tuple[Any, ...]:
    return (node.id, node.boot, node.name, node.present, encode(node.gpus))


@contextmanager
def gc_paused() -> Iterator[None]:
    """A hundred thousand new objects would be searched for garbage again and again, and hold none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
