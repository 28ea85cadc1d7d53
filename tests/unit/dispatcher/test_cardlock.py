"""NAME.lock of a gpu: whoever holds it, however its file is treated, is seen; and nobody else's is ours."""

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpulane.core.model import Account, Job, JobId, Service
from gpulane.dispatcher.cardlock import CardLock
from gpulane.dispatcher.holders import describe_holder

pytestmark = pytest.mark.anyio  # of those that are async

NOBODY = 65534
JOB = Job(id=JobId("j1"), account=Account("ann"), service=Service.COMFYUI, kind="prompt")
LOCK_JOB = Job(id=JobId("j2"), account=Account("ann"), service=Service.LOCK, kind="lock")


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[CardLock]:
    with contextlib.closing(CardLock(tmp_path / "gpu0.lock", takes_part=True)) as made:
        yield made


@contextlib.contextmanager
def flocked(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    finally:
        os.close(file)


def is_held(path: Path) -> bool:
    try:
        with flocked(path):
            return False
    except BlockingIOError:
        return True


async def test_a_job_holds_it_and_lets_go(lock: CardLock) -> None:
    assert lock.held_by() is None
    assert lock.path.stat().st_mode & 0o777 == 0o666, "whoever may enter the folder may take part"
    assert await lock.acquire(JOB) is None
    assert lock.is_ours and is_held(lock.path)
    assert lock.held_by() is None, "nobody else"
    assert lock.path.read_text() == f"{os.getpid()} j1\n"
    lock.release()
    lock.release()
    assert not lock.is_ours and not is_held(lock.path)
    assert lock.path.read_text() == ""
    assert await lock.acquire(JOB) is None


async def test_somebody_elses_lock_is_described_and_waited_for(lock: CardLock) -> None:
    with flocked(lock.path):
        held_by = await lock.acquire(JOB, patience_seconds=0.05)
        assert held_by is not None and held_by.startswith(f"locked by pid {os.getpid()} (")
        assert lock.held_by() == held_by and not lock.is_ours
    assert await lock.acquire(JOB) is None


async def test_lock_jobs_and_gateways_that_do_not_take_part_only_look(tmp_path: Path, lock: CardLock) -> None:
    assert await lock.acquire(LOCK_JOB) is None
    assert not is_held(lock.path)
    with contextlib.closing(CardLock(tmp_path / "gpu1.lock", takes_part=False)) as other:
        assert await other.acquire(JOB) is None
        assert not is_held(other.path)
        with flocked(other.path):
            assert await other.acquire(JOB, patience_seconds=0) is not None


async def test_a_file_deleted_while_a_stranger_holds_it_counts_on(lock: CardLock) -> None:
    assert lock.held_by() is None
    with flocked(lock.path):
        lock.path.unlink()
        assert lock.held_by() is not None
        assert lock.path.exists()
        with flocked(lock.path):
            assert lock.held_by() is not None
        assert lock.held_by() is not None
    assert lock.held_by() is None


async def test_a_file_deleted_under_our_job_is_made_and_locked_anew(lock: CardLock) -> None:
    assert await lock.acquire(JOB) is None
    lock.path.unlink()
    assert lock.held_by() is None
    assert is_held(lock.path)
    assert lock.path.read_text() == f"{os.getpid()} j1\n"
    lock.release()
    assert not is_held(lock.path)
    assert lock.held_by() is None


async def test_a_stranger_on_a_replaced_file_is_seen_beside_our_job(lock: CardLock) -> None:
    assert await lock.acquire(JOB) is None
    lock.path.unlink()
    with flocked(lock.path):
        assert lock.held_by() is not None
    assert lock.held_by() is None
    lock.release()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
async def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "gpu0.lock"
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            (tmp_path / "precious").write_text("precious")
            path.symlink_to(tmp_path / "precious")
        case _:
            os.mkfifo(path)
    with contextlib.closing(CardLock(path, takes_part=True)) as lock:
        why = await lock.acquire(JOB, patience_seconds=0)
        assert why is not None and "cannot be opened" in why and str(path) in why
        assert lock.unusable() == why
    if kind == "link":
        assert (tmp_path / "precious").read_text() == "precious"


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.needs("root")
async def test_another_users_file_is_locked_though_not_written_or_said_to_be_unusable() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "gpu0.lock"
        path.write_text("theirs\n")
        path.chmod(0o644)
        with as_nobody(), contextlib.closing(CardLock(path, takes_part=True)) as lock:
            assert await lock.acquire(JOB) is None
        assert path.read_text() == "theirs\n"
        path.chmod(0o600)
        with as_nobody(), contextlib.closing(CardLock(path, takes_part=True)) as lock:
            why = lock.held_by()
            assert why is not None and "Permission denied" in why
        path.unlink()
        with as_nobody(), contextlib.closing(CardLock(path, takes_part=True)) as lock:
            assert "Permission denied" in (lock.held_by() or ""), "nor can it be made"


def test_a_forked_child_is_named_when_its_parent_is_dead(lock: CardLock) -> None:
    assert lock.held_by() is None
    script = (
        "import fcntl, os, sys, time\n"
        f"file = os.open({str(lock.path)!r}, os.O_RDWR)\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "else: time.sleep(60)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    child = int(done.stdout.readline())
    try:
        done.wait(10)
        assert (lock.held_by() or "").startswith(f"locked by pid {child} (")
    finally:
        os.kill(child, 9)
        done.stdout.close()
    with lock.path.open() as file:
        assert describe_holder(file.fileno())


def test_files_are_closed(tmp_path: Path) -> None:
    before = open_files()
    lock = CardLock(tmp_path / "gpu0.lock", takes_part=True)
    for _ in range(5):
        assert lock.held_by() is None
        lock.path.unlink()
    lock.close()
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
