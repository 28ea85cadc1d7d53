"""One gpu's NAME.lock: the file with which other programs take part (`flock NAME.lock python train.py`).

A flock is the kernel's word: it goes with its last holder, even by SIGKILL, and a forked child keeps it.
We never delete the file. Where somebody else deletes or replaces it, both the old and the new file count: a
gpu is free when nobody holds any of them. For lock jobs we never hold it, their programs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Final

import structlog

from gpulane.core.model import Job, Seconds, Service
from gpulane.dispatcher.holders import describe_holder

POLL_SECONDS: Final = 0.25
"""How often a lock that somebody else has is tried."""
PATIENCE_SECONDS: Final = 1.0
"""How long `acquire` tries: who has the file will hardly let go at once, and the job had better wait in the
queue."""
FILE_MODE: Final = 0o666
"""Other users' programs must be able to take part; the folder's own mode says who."""
DESCRIBE_SECONDS: Final = 2.0
"""How long what was found out of a holder is repeated."""

_log = structlog.stdlib.get_logger(__name__)


class CardLock:
    """The lock file of one gpu. Every call but `acquire` returns at once."""

    def __init__(self, path: Path, *, takes_part: bool) -> None:
        """`takes_part`: whether jobs hold it too (`lock_dir` is set). Else it is only looked at."""
        self._path = path
        self._takes_part = takes_part
        self._file: int | None = None
        self._older: list[int] = []
        self._ours: set[int] = set()
        self._note = b""
        self._told = ""
        self._described: dict[int, tuple[Seconds, str]] = {}

    @property
    def path(self) -> Path:
        return self._path

    @property
    def is_ours(self) -> bool:
        """Whether a job of ours holds it."""
        return bool(self._ours)

    async def acquire(self, job: Job, *, patience_seconds: Seconds = PATIENCE_SECONDS) -> str | None:
        """Take the file for a job; returns None, or who has it. Where jobs do not take part (and for lock
        jobs, whose programs take it) None says that nobody has it.

        Call it once the gpu is held for the job and before the first byte; `release` when the engine is known
        idle.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + patience_seconds
        while (held_by := self._try(job)) is not None:
            left = ends - loop.time()
            if left <= 0:
                return held_by
            await asyncio.sleep(min(POLL_SECONDS, left))
        return None

    def release(self) -> None:
        """Let go of it; the file stays. May be called at any time."""
        for file in self._ours:
            with contextlib.suppress(OSError):  # a file of somebody else's cannot be written
                os.ftruncate(file, 0)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
        self._ours.clear()
        self._note = b""

    def unusable(self) -> str | None:
        """Tell why the file cannot be opened; None: it can."""
        try:
            self._look_at_path()
        except OSError as error:
            return f"lock file {self._path} cannot be opened: {error.strerror or error}"
        return None

    def held_by(self) -> str | None:
        """Tell who else holds it, in words; None: nobody else does. A file that cannot be opened counts as
        held.
        """
        why = self.unusable()
        if why is not None:
            self._tell_unusable(why)
            return why
        self._told = ""
        for file in (*self._older, *self._current()):
            if file not in self._ours and not self._is_free(file):
                return self._describe(file)
        self._described.clear()
        self._forget_older()
        return None

    def close(self) -> None:
        """Let go, and close the file."""
        self.release()
        for file in (*self._older, *self._current()):
            os.close(file)
        self._older.clear()
        self._file = None

    def _try(self, job: Job) -> str | None:
        """Look, and take in the same step."""
        held_by = self.held_by()
        if held_by is not None or not self._takes_part or job.service is Service.LOCK:
            return held_by
        self._note = f"{os.getpid()} {job.id}\n".encode()
        return next((self._describe(file) for file in self._current() if not self._take(file)), None)

    def _take(self, file: int) -> bool:
        if not _flocked(file):
            return False
        self._ours.add(file)
        with contextlib.suppress(OSError):  # a file of somebody else's, which we may lock and not write
            os.ftruncate(file, 0)
            os.pwrite(file, self._note, 0)
        return True

    def _is_free(self, file: int) -> bool:
        if not _flocked(file):
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        return True

    def _current(self) -> tuple[int, ...]:
        return () if self._file is None else (self._file,)

    def _look_at_path(self) -> None:
        """See that the open file is the one at the path; make it when there is none. Raises OSError."""
        if self._file is not None and _is_at(self._path, self._file):
            return
        file = _open(self._path)
        if self._file is not None:
            _log.warning("lock_file_replaced", path=str(self._path), held=self.is_ours)
            self._older.append(self._file)
        self._file = file
        if self._ours and not self._take(file):
            # A stranger was quicker: two programs on one card, until one of them ends.
            _log.error("lock_file_taken", path=str(self._path), by=self._describe(file))

    def _describe(self, file: int) -> str:
        """Name the holder; looked up now and then only, since a look goes through all processes at worst."""
        now = time.monotonic()
        at, text = self._described.get(file, (float("-inf"), ""))
        if now - at >= DESCRIBE_SECONDS:
            at, text = now, describe_holder(file)
            self._described[file] = (at, text)
        return text

    def _forget_older(self) -> None:
        """Close deleted files that nobody holds any more."""
        for file in [file for file in self._older if file not in self._ours]:
            self._older.remove(file)
            os.close(file)

    def _tell_unusable(self, why: str) -> None:
        if self._told != why:
            self._told = why
            _log.error("lock_file_unusable", path=str(self._path), why=why)


def _open(path: Path) -> int:
    """Open the lock file, or make it.

    The kernel refuses O_CREAT on other people's files in folders that all may write to
    (fs.protected_regular), so it is opened first and made only where there is none. A lock needs no right to
    write.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = _open_there(path, flags)
    except FileNotFoundError:
        try:
            file = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE)
        except FileExistsError:
            file = _open_there(path, flags)  # somebody made it in between
        else:
            os.fchmod(file, FILE_MODE)  # past the umask: the folder says who may
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no plain file")
    return file


def _open_there(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_RDWR)
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)


def _is_at(path: Path, file: int) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    opened = os.fstat(file)
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _flocked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
