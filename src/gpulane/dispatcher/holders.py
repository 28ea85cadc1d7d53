"""Who holds a flocked file, in words for people. Looks under /proc; where that is silent, so is this.

Nothing is decided by it: the kernel's answer to a flock alone says whether a file is held.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

LOCKS: Final = Path("/proc/locks")
PROCESSES: Final = Path("/proc")
COMMAND_CHARS_MAX: Final = 60
"""As much of a command line as fits a table's cell."""
PROCESSES_MAX: Final = 4_096
FILES_MAX: Final = 4_096
"""Processes looked at, and files of each: a look must stay short on any machine."""
UNKNOWN: Final = "locked by another program"


def describe_holder(file: int) -> str:
    """Name the process that holds the lock on an open file: `locked by pid 12 (python train.py)`."""
    found = os.fstat(file)
    pid = next(_lockers(found), None) or next(_openers(found), None)
    if pid is None:
        return UNKNOWN
    command = _command(pid)
    return f"locked by pid {pid} ({command})" if command else f"locked by pid {pid}"


def _lockers(file: os.stat_result) -> Iterator[int]:
    """Yield the living processes that called flock, by `/proc/locks`; one may have died after a fork."""
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    with contextlib.suppress(OSError):
        for line in LOCKS.read_text(encoding="ascii", errors="replace").splitlines():
            words = line.split()
            # `1: FLOCK ADVISORY WRITE 1234 08:01:131 0 EOF`; who waits has `->` in second place.
            if len(words) < 6 or words[1] != "FLOCK" or not words[4].isdigit():
                continue
            # Where a file system shows other device numbers here, the open files below tell.
            if words[5] == place and (PROCESSES / words[4]).exists():
                yield int(words[4])


def _openers(file: os.stat_result) -> Iterator[int]:
    """Yield processes that have the file open: children inherit a lock from who took it. Not ourselves."""
    with contextlib.suppress(OSError):
        others = (
            each for each in PROCESSES.iterdir() if each.name.isdigit() and int(each.name) != os.getpid()
        )
        for process in islice(others, PROCESSES_MAX):
            if _has_open(process, file):
                yield int(process.name)


def _has_open(process: Path, file: os.stat_result) -> bool:
    """Tell whether a process has this very file open; those of other users cannot be looked into."""
    with contextlib.suppress(OSError):
        for opened in islice((process / "fd").iterdir(), FILES_MAX):
            with contextlib.suppress(OSError):
                found = opened.stat()
                if (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino):
                    return True
    return False


def _command(pid: int) -> str:
    try:
        words = (PROCESSES / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    text = " ".join(word.decode(errors="replace") for word in words if word)
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown if len(shown) <= COMMAND_CHARS_MAX else shown[: COMMAND_CHARS_MAX - 3] + "..."
