"""What a machine keeps for itself: who it is, what occupies its gpus, outcomes not recorded yet, what it has
learned.

Lies beside the queue in the same data folder, and is the same whichever store holds the queue. A gpu's record
is durable before the first byte reaches an engine, and goes only when the engine is known idle (P1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from gpulane.core.events import StoreEvent
from gpulane.core.model import (
    Account,
    ClaimId,
    EngineUrl,
    Failure,
    GpuId,
    JobId,
    JobState,
    NodeId,
    Seconds,
    Token,
)
from gpulane.errors import StoreError
from gpulane.store.sqlite.database import FolderLock, told_as_store_error
from gpulane.store.sqlite.files import IN_ROW_BYTES_MAX, PayloadFiles
from gpulane.store.sqlite.node.database import NodeDatabase
from gpulane.store.sqlite.writer import Writer

SPOOL_KEPT_SECONDS: Final = 120.0
"""How long an outcome is remembered after the store recorded it: a store may lose its last second (fleet
9)."""
LEARN_SECONDS: Final = 5.0
"""How long a learned value may wait to be written."""
LEARN_MAX: Final = 500
"""How many may wait."""

FAILURE: Final = msgspec.json.Decoder(Failure)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRecord:
    """What occupies a gpu."""

    gpu: GpuId
    job: JobId
    token: Token
    claim: ClaimId
    """Of the claim, or of the resume under way: noted before it is asked, so that both tokens can be
    tried."""
    engine: EngineUrl
    stage: str
    """How far the attempt is; the dispatcher's word."""
    written_at: float
    meta: bytes = b"{}"
    """What is needed to look for the attempt in its engine again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolEntry:
    """How an attempt ended, kept until the store has recorded it."""

    job: JobId
    token: Token
    state: JobState
    failure: Failure | None
    used_seconds: Seconds
    result: bytes | None
    settled: bool = False
    recorded_state: JobState | None = None
    """What the store made of it: a wanted cancel rules over the outcome."""


class NodeStore:
    """`node.db` in a data folder. `clock` tells wall seconds since 1970."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._path = folder / "node.db"
        self._clock = clock
        self._lock = FolderLock(folder / "node.pid")
        self._files = PayloadFiles(folder / "spool")
        self._database: NodeDatabase | None = None
        self._writer: Writer | None = None
        self._boot: tuple[NodeId, int] | None = None
        self._unwritten: dict[tuple[str, str], bytes] = {}
        """Learned values that wait to be written."""
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open, migrate, and count this start. Raises StoreError like `Store.open`."""
        if self._writer is None:
            self._database, self._boot = await asyncio.to_thread(self._open_here)
            self._writer = Writer("node.db", self._database, tell_nobody)

    async def close(self) -> None:
        """Write what waits and let go. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        if self._flush is not None:
            await asyncio.wait([self._flush])
        writer, database = self._writer, self._database
        if writer is None or database is None:
            return
        try:
            await self._write_learned()
        finally:
            self._writer = self._database = None
            await writer.close()
            await asyncio.to_thread(database.close)
            self._lock.release()

    def boot(self) -> tuple[NodeId, int]:
        """Return this machine's id, random, made once, and the number of this start."""
        if self._boot is None:
            raise StoreError("the store is closed")
        return self._boot

    # -- gpus

    async def put_gpu_record(self, *records: GpuRecord) -> None:
        """Note what occupies a gpu, or several in one transaction. Durable when it returns."""
        rows = [(r.gpu, r.job, r.token, r.claim, r.engine, r.stage, r.written_at, r.meta) for r in records]
        await self._do(lambda disk: disk.change_many("put_gpu_record", rows))

    async def drop_gpu_record(self, gpu: GpuId, token: Token) -> None:
        """Note that a gpu is known idle; nothing happens when another token occupies it."""
        await self._do(lambda disk: disk.change("drop_gpu_record", gpu, token))

    async def gpu_records(self) -> tuple[GpuRecord, ...]:
        rows = await self._do(lambda disk: disk.rows("gpu_records"))
        return tuple(
            GpuRecord(
                gpu=gpu,
                job=job,
                token=token,
                claim=claim,
                engine=engine,
                stage=stage,
                written_at=written_at,
                meta=meta,
            )
            for gpu, job, token, claim, engine, stage, written_at, meta in rows
        )

    # -- the spool

    async def spool_put(self, entry: SpoolEntry) -> None:
        """Keep an outcome, with its result, until it is settled. Durable when it returns; the same twice is
        once.
        """
        result, file = entry.result, None
        if result is not None and len(result) > IN_ROW_BYTES_MAX:
            file = await asyncio.to_thread(self._files.write, entry.job, "spool", result)
            result = None
        failure = None if entry.failure is None else msgspec.json.encode(entry.failure).decode()
        row = (entry.job, entry.token, entry.state, failure, entry.used_seconds, result, file)

        def work(disk: NodeDatabase) -> None:
            self._prune(disk)
            disk.drop_files(old for (old,) in disk.rows("file_of_spool", entry.job, entry.token))
            disk.change("put_spool", *row)

        await self._do(work)

    async def spool_unsettled(self) -> tuple[SpoolEntry, ...]:
        """Return the outcomes that the store has yet to record."""
        rows = await self._do(lambda disk: disk.rows("spool_unsettled"))
        return await asyncio.to_thread(lambda: tuple(self._entry(*row) for row in rows))

    async def spool_settled(self) -> tuple[SpoolEntry, ...]:
        """Return what was recorded lately, for a store that has lost its tail."""
        rows = await self._do(lambda disk: disk.rows("spool_settled"))
        return await asyncio.to_thread(lambda: tuple(self._entry(*row) for row in rows))

    async def spool_settle(self, job: JobId, token: Token, recorded_state: JobState) -> None:
        """Note what the store recorded; the entry goes after SPOOL_KEPT_SECONDS."""

        def work(disk: NodeDatabase) -> None:
            disk.change("settle_spool", recorded_state, self._clock(), job, token)
            self._prune(disk)

        await self._do(work)

    def _prune(self, disk: NodeDatabase) -> None:
        gone = disk.change("prune_spool", self._clock() - SPOOL_KEPT_SECONDS)
        disk.drop_files(file for (file,) in gone if file is not None)

    def _entry(self, *row: Any) -> SpoolEntry:  # noqa: ANN401  columns as SQLite returns them
        job, token, state, failure, used_seconds, result, file, recorded_state, settled_at = row
        return SpoolEntry(
            job=job,
            token=token,
            state=JobState(state),
            failure=None if failure is None else FAILURE.decode(failure),
            used_seconds=used_seconds,
            result=result if file is None else self._files.read(file),
            settled=settled_at is not None,
            recorded_state=None if recorded_state is None else JobState(recorded_state),
        )

    # -- what was learned, and what accounts set

    def learn_put(self, kind: str, key: str, value: bytes) -> None:
        """Remember a value (JSON) before long; a crash may forget the last LEARN_SECONDS."""
        if self._writer is None:
            raise StoreError("the store is closed")
        self._unwritten[kind, key] = value
        if self._timer is None and self._flush is None:
            self._timer = asyncio.get_running_loop().call_later(LEARN_SECONDS, self._begin_flush)
        elif len(self._unwritten) >= LEARN_MAX and self._flush is None:
            self._begin_flush()

    async def learned(self, kind: str) -> dict[str, bytes]:
        """Return all values of a kind by key."""
        await self._write_learned()
        return dict(await self._do(lambda disk: disk.rows("learned", kind)))

    def _begin_flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._flush = asyncio.get_running_loop().create_task(self._flush_learned())

    async def _flush_learned(self) -> None:
        try:
            await self._write_learned()
        except StoreError:
            pass  # what was learned is only worth a better guess; the next value tries again
        finally:
            self._flush = None

    async def _write_learned(self) -> None:
        values = self._unwritten
        if values:
            self._unwritten = {}
            rows = [(kind, key, value) for (kind, key), value in values.items()]
            await self._do(lambda disk: disk.change_many("learn", rows))

    async def account_put(self, account: Account, kind: str, value: bytes) -> None:
        """Keep something that an account set for itself. Durable when it returns."""
        await self._do(lambda disk: disk.change("put_account_value", account, kind, value))

    async def account_get(self, account: Account, kind: str) -> bytes | None:
        rows = await self._do(lambda disk: disk.rows("account_value", account, kind))
        return rows[0][0] if rows else None

    # --

    async def _do(self, work: Callable[[NodeDatabase], T]) -> T:
        writer, database = self._writer, self._database
        if writer is None or database is None:
            raise StoreError("the store is closed")
        return await writer.do(lambda: work(database))

    def _open_here(self) -> tuple[NodeDatabase, tuple[NodeId, int]]:
        folder = self._path.parent
        with told_as_store_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.take()
        try:
            database = NodeDatabase(self._path, self._files)
            return database, database.begin_boot()
        except BaseException:
            self._lock.release()
            raise


def tell_nobody(_events: Sequence[StoreEvent]) -> None:
    """A node's own facts are no events."""
