"""What only a store with a disk can get wrong: kill -9, migrations, damaged files, large bodies, no room."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpulane.core.events import StoreEvent
from gpulane.core.model import JobState
from gpulane.errors import BadRequest, StoreError
from gpulane.store.base import Code, JobQuery, NewJob, QueueLimits
from gpulane.store.sqlite import SqliteStore
from gpulane.store.sqlite.database import migrate, migrations, queries
from gpulane.store.sqlite.queue.database import PACKAGE
from tests.contract.store.ground import (
    ANN,
    BOB,
    BROKEN,
    GPU,
    GPU2,
    LEASE,
    LIMITS,
    NODE,
    Clock,
    Ground,
    new_job,
)

pytestmark = pytest.mark.anyio

LARGE = 64 * 1024 + 1


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    clock = Clock()
    folder = tmp_path / "data"
    made = Ground(store=SqliteStore(folder, clock), clock=clock, folder=folder)
    await made.open()
    yield made
    await made.store.close()


def payload_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "payloads").rglob("*") if path.is_file()]


# -- crashes

ENQUEUE_FOREVER = """
import asyncio, itertools, pathlib, sys, time
from tests.contract.store.ground import LIMITS, new_job
from gpulane.store.base import NewJob
from gpulane.store.sqlite import SqliteStore

async def caller(store, numbers):
    for number in numbers:
        body = b"x" * (100_000 if number % 50 == 0 else 4096)
        await store.enqueue(NewJob(job=new_job(number), body=body), LIMITS)
        print(number, flush=True)

async def main():
    store = SqliteStore(pathlib.Path(sys.argv[1]), time.time)
    await store.open()
    numbers = itertools.count()
    await asyncio.gather(*(caller(store, numbers) for _ in range(16)))

asyncio.run(main())
"""


async def test_kill_9_loses_nothing_acknowledged(root: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220  killed below, and read to its end
        [sys.executable, "-c", ENQUEUE_FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}"},
        text=True,
    )
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(500)]
    process.kill()
    told += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()

    store = SqliteStore(tmp_path, Clock())
    await store.open()
    snapshot = await store.snapshot()
    kept = {waiting.job.id for waiting in snapshot.waiting}
    acknowledged = {new_job(int(line)).id for line in told if line.strip().isdigit()}
    assert len(acknowledged) >= 500
    assert acknowledged <= kept
    assert snapshot.n == len(kept), "numbers are dense, nothing is half there"
    for number in (0, 1, 50):
        body = await store.body(new_job(number).id)
        assert body is not None
        assert len(body) == (4096 if number % 50 else 100_000)
    assert len(payload_files(tmp_path)) == sum(int(job[-12:]) % 50 == 0 for job in kept)
    await store.close()


async def test_reopening_tells_the_same(ground: Ground) -> None:
    assert ground.folder is not None
    waiting, running, rescued = [await ground.enqueue(weight=3.0) for _ in range(3)]
    await ground.rescued(rescued)
    token = await ground.started(running)
    await ground.store.prioritise(waiting, new_job(1).band, 4)
    await ground.store.cancel(running)
    await ground.store.drain(GPU, draining=True)
    await ground.store.pause(True)
    before = await ground.store.snapshot(), await ground.store.jobs(JobQuery())
    await ground.store.close()
    again = SqliteStore(ground.folder, ground.clock)
    await again.open()
    assert (await again.snapshot(), await again.jobs(JobQuery())) == before
    reply = await again.finish(
        running, token, state=JobState.SUCCEEDED, failure=None, used_seconds=1.0, result=b"r"
    )
    assert reply.state is JobState.CANCELLED
    await again.close()


async def test_lease_renewed_by_a_beat_survives(ground: Ground) -> None:
    assert ground.folder is not None
    job = await ground.enqueue()
    token = await ground.claimed(job)
    ground.clock.pass_seconds(LEASE - 1)
    await ground.store.beat(NODE, 1, 30.0, LEASE, ((job, token),))
    await ground.store.close()
    ground.clock.pass_seconds(LEASE - 1)
    again = SqliteStore(ground.folder, ground.clock)
    await again.open()
    assert (await again.start(job, token)).code is Code.OK
    await again.close()


# -- large bodies


async def test_large_bodies_are_files_until_they_are_forgotten(ground: Ground) -> None:
    assert ground.folder is not None
    job = await ground.enqueue(body=b"b" * LARGE)
    await ground.finish(job, await ground.started(job), result=b"r" * LARGE)
    assert len(payload_files(ground.folder)) == 2
    await ground.store.forget(job)
    assert payload_files(ground.folder) == []


async def test_refused_submissions_leave_no_file(ground: Ground) -> None:
    assert ground.folder is not None
    new = NewJob(job=new_job(1), body=b"b" * LARGE, digest="d")
    codes = [
        (await ground.store.enqueue(new, LIMITS)).code,
        (await ground.store.enqueue(new, LIMITS)).code,
        (await ground.store.enqueue(NewJob(job=new_job(2), body=new.body), QueueLimits(queued_max=1))).code,
    ]
    assert codes == [Code.OK, Code.EXISTS, Code.FULL]
    assert len(payload_files(ground.folder)) == 1
    assert await ground.store.body(new.job.id) == new.body


async def test_result_of_a_cancelled_job_leaves_no_file(ground: Ground) -> None:
    assert ground.folder is not None
    job = await ground.enqueue()
    token = await ground.started(job)
    await ground.store.cancel(job)
    await ground.finish(job, token, result=b"r" * LARGE)
    assert payload_files(ground.folder) == []


async def test_orphan_files_are_swept_when_opening(ground: Ground) -> None:
    assert ground.folder is not None
    job = await ground.enqueue(body=b"b" * LARGE)
    await ground.store.close()
    [kept] = payload_files(ground.folder)
    for name in ("stray.body.00000000", "stray.body.11111111.part"):
        (kept.parent / name).write_bytes(b"half")
    again = SqliteStore(ground.folder, ground.clock)
    await again.open()
    assert payload_files(ground.folder) == [kept]
    assert await again.body(job) == b"b" * LARGE
    await again.close()


# -- one call does not spoil the others


async def test_call_that_fails_spoils_no_other(ground: Ground) -> None:
    """A weight of zero cannot be charged: a fault in the middle of a batch."""
    good, bad = await ground.enqueue(), await ground.enqueue(weight=0.0)
    other = await ground.enqueue()
    n = ground.events[-1].n
    results = await asyncio.gather(
        ground.store.prioritise(good, new_job(1).band, 1),
        ground.claim(bad, claim="x"),
        ground.store.cancel(other),
        return_exceptions=True,
    )
    assert isinstance(results[1], ZeroDivisionError)
    assert [r.code for r in results[::2] if not isinstance(r, BaseException)] == [Code.OK, Code.CANCELLED]
    assert [e.n for e in ground.events if e.n > n] == [n + 1, n + 2]
    snapshot = await ground.store.snapshot()
    assert snapshot.active == ()
    assert [w.job.id for w in snapshot.waiting] == [good, bad]


async def test_text_that_is_none_is_the_clients_fault(ground: Ground) -> None:
    with pytest.raises(BadRequest):
        await ground.store.enqueue(NewJob(job=new_job(1), idempotency_key="\udcff"), LIMITS)
    assert (await ground.store.snapshot()).waiting == ()


async def enqueue_many(ground: Ground) -> None:
    for number in range(100, 200):
        await ground.store.enqueue(NewJob(job=new_job(number), body=b"x" * 60_000), LIMITS)


async def test_full_disk_is_told_and_loses_nothing(ground: Ground) -> None:
    """SQLite's own limit of pages stands for the disk's end: the same error, from the same place."""
    job = await ground.enqueue()
    token = await ground.started(job)
    n = ground.events[-1].n
    database = database_of(ground)
    [pages] = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full") as caught:
        await enqueue_many(ground)
    assert "make room" in str(caught.value.hint)
    database.execute("PRAGMA max_page_count = 1000000")
    assert (await ground.finish(job, token)).code is Code.OK
    numbers = [e.n for e in ground.events if e.n > n]
    assert numbers == list(range(n + 1, n + 1 + len(numbers))), "nobody was told what was not kept"
    assert (await ground.store.snapshot()).n == numbers[-1]


def database_of(ground: Ground) -> sqlite3.Connection:
    assert isinstance(ground.store, SqliteStore)
    assert ground.store._database is not None
    return ground.store._database._connection


# -- other people's files


async def test_second_process_is_told_who_holds_the_folder(ground: Ground) -> None:
    assert ground.folder is not None
    with pytest.raises(StoreError, match=rf"in use by another gpulane \(process {os.getpid()}\)"):
        await SqliteStore(ground.folder, ground.clock).open()


async def test_newer_database_is_refused(ground: Ground) -> None:
    assert ground.folder is not None
    await ground.store.close()
    with sqlite3.connect(ground.folder / "queue.db") as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(StoreError, match=r"written by a newer gpulane \(format 7, this one knows 1\)") as e:
        await SqliteStore(ground.folder, ground.clock).open()
    assert e.value.hint == "use that version or another --data folder"


@pytest.mark.parametrize("damage", ["not a database", "torn"])
async def test_damaged_file_is_told(ground: Ground, damage: str) -> None:
    assert ground.folder is not None
    for _ in range(50):
        await ground.enqueue(body=b"x" * 4096)
    await ground.store.close()
    path = ground.folder / "queue.db"
    content = path.read_bytes()
    torn = content[:4096] + b"\xff" * (len(content) - 4096)
    path.write_bytes(b"something else entirely" * 500 if damage == "not a database" else torn)
    with pytest.raises(StoreError, match=r"queue\.db") as caught:
        await SqliteStore(ground.folder, ground.clock).open()
    assert "damaged" in str(caught.value.hint)


async def test_unusable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        await SqliteStore(tmp_path / "file" / "data", Clock()).open()
    assert "--data" in str(caught.value.hint)


async def test_unwritable_folder_is_told(tmp_path: Path) -> None:
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path / "data"  # root may write everywhere else
    if folder != Path("/proc"):
        folder.mkdir(mode=0o500)
    with pytest.raises(StoreError) as caught:
        await SqliteStore(folder, Clock()).open()
    assert str(folder) in caught.value.message
    assert "--data" in str(caught.value.hint)


async def test_closed_store_says_so(ground: Ground) -> None:
    await ground.store.close()
    await ground.store.close()
    with pytest.raises(StoreError, match="closed"):
        await ground.store.snapshot()


async def test_what_was_asked_before_the_close_is_done(ground: Ground) -> None:
    assert ground.folder is not None
    asked = [
        asyncio.create_task(ground.store.enqueue(NewJob(job=new_job(i)), LIMITS)) for i in range(100, 120)
    ]
    await asyncio.sleep(0)
    await ground.store.close()
    assert {(await task).code for task in asked} == {Code.OK}
    told: list[StoreEvent] = []
    again = SqliteStore(ground.folder, ground.clock)
    again.listen(told.extend)
    await again.open()
    assert len((await again.snapshot()).waiting) == 20
    assert told == []
    await again.close()


# -- migrations and plans


async def test_queue_of_format_1_is_read(root: Path, tmp_path: Path) -> None:
    """Kept as it was written then: whatever later versions change, they start from this."""
    connection = sqlite3.connect(tmp_path / "queue.db")
    connection.executescript((root / "tests" / "data" / "store" / "queue-v1.sql").read_text())
    connection.close()
    ground = Ground(store=SqliteStore(tmp_path, Clock()), clock=Clock(), folder=tmp_path)
    await ground.store.open()
    waiting, running, ended = [await ground.record(new_job(number).id) for number in (1, 2, 3)]
    assert (waiting.state, waiting.meta, waiting.client_job_id) == (JobState.QUEUED, b'{"a":1}', "mine")
    assert (waiting.job.weight, waiting.job.needs) == (2.0, {"node:KSampler"})
    assert await ground.store.body(new_job(1).id) == b"body"
    assert (running.state, running.job.account, running.gpu) == (JobState.RUNNING, BOB, GPU2)
    assert [a.failure for a in running.attempts] == [BROKEN, None]
    assert (ended.state, ended.token) == (JobState.SUCCEEDED, None)
    assert await ground.store.result(new_job(3).id) == b"done"
    assert running.token is not None
    assert (await ground.finish(running.job.id, running.token)).code is Code.OK
    snapshot = await ground.store.snapshot()
    assert (snapshot.draining, len(snapshot.waiting)) == ({GPU}, 1)
    assert {a: f for _, a, f in snapshot.account_f} == {ANN: 10.0, BOB: 20.0}
    await ground.store.close()


async def test_older_file_is_migrated_with_its_jobs(ground: Ground, tmp_path: Path) -> None:
    """A file of format 1 keeps its rows through later steps, each once."""
    assert ground.folder is not None
    job = await ground.enqueue(ANN)
    await ground.store.close()
    path = ground.folder / "queue.db"
    connection = sqlite3.connect(path, isolation_level=None)
    later = (
        *migrations(PACKAGE)[:1],
        "ALTER TABLE jobs ADD COLUMN note TEXT;",
        "UPDATE jobs SET note = 'migrated';",
    )
    for _ in range(2):
        migrate(connection, path, later)
    assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    assert connection.execute("SELECT id, note FROM jobs").fetchall() == [(job, "migrated")]
    with pytest.raises(sqlite3.Error):
        migrate(connection, path, (*later, "UPDATE jobs SET note = 'half'; UPDATE nowhere SET x = 1;"))
    connection.execute("ROLLBACK")
    assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    assert connection.execute("SELECT note FROM jobs").fetchall() == [("migrated",)]
    connection.close()


SCANS_ALLOWED = {
    # Small by nature, and read once when opening.
    "all_accounts": "accounts",
    "all_bands": "bands",
    "all_nodes": "nodes",
    "all_draining": "draining",
    # Walks an index that holds nothing but what is asked for.
    "live_jobs": "jobs USING INDEX jobs_live",
    "ended_totals": "jobs USING COVERING INDEX jobs_ended",
    "oldest_ended": "jobs USING INDEX jobs_ended",
    "all_files": "USING COVERING INDEX",
}


@pytest.mark.parametrize("name", sorted(queries(PACKAGE)))
async def test_no_statement_scans_the_jobs(ground: Ground, name: str) -> None:
    statement = queries(PACKAGE)[name]
    numbered = max((n for n in range(1, 6) if f"?{n}" in statement), default=0)
    parameters = [1] * (numbered or statement.count("?"))
    plan = [row[3] for row in database_of(ground).execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    scans = [
        step
        for step in plan
        if step.startswith("SCAN") and not step.startswith(("SCAN CONSTANT", "SCAN json_each"))
    ]
    assert all(name in SCANS_ALLOWED and SCANS_ALLOWED[name] in step for step in scans), plan
    assert not any("TEMP B-TREE" in step for step in plan), plan


async def test_durable_as_promised(ground: Ground) -> None:
    database = database_of(ground)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)


async def test_job_is_found_by_people_too(ground: Ground) -> None:
    """The columns are plain: an operator reads the file with any SQLite."""
    job = await ground.enqueue()
    read = "SELECT state, json_extract(job, '$.account') FROM jobs WHERE id = ?"
    assert database_of(ground).execute(read, (job,)).fetchall() == [("queued", "ann")]
