"""One process group of the operating system that outlives us: started, recognized again after a restart,
ended with all of its children.

Nothing ties its life to ours: a render goes on when the gateway crashes. What makes it ours is its start time
in a file, and a mark in its environment that also finds it when we died before the file was written. Never
signals a process that does not carry the one or the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

MARK: Final = "GPULANE_ENGINE"
"""The variable that all processes of a supervised engine inherit; its value names the engine."""
PROC: Final = Path("/proc")
BOOT_ID: Final = PROC / "sys/kernel/random/boot_id"
STATE, GROUP, STARTED = 0, 2, 19
"""Places in /proc/PID/stat after the name in parentheses, as proc_pid_stat(5) counts them (3, 5, 22)."""
ENDED_STATES: Final = frozenset({"Z", "X", "x"})


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a file keeps of a running process, so that the next gpulane knows it again."""

    pid: int
    started_ticks: int
    """Since the machine's boot: with the pid, and the boot, it names a process for good."""
    boot_id: str
    command_digest: str
    since: float
    """When it was started, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is started, and as whose engine it is marked."""

    words: tuple[str, ...]
    env: Mapping[str, str]
    folder: Path | None
    mark: str

    @property
    def digest(self) -> str:
        """Tells one command from another without showing either."""
        parts = [*self.words, "", *(f"{k}={v}" for k, v in sorted(self.env.items())), "", str(self.folder)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def mark_of(data_folder: Path, url: str) -> str:
    """Name an engine of this data folder: another gpulane's engines are never ours."""
    return hashlib.sha256(f"{data_folder.resolve()}\0{url}".encode()).hexdigest()[:32]


class OsProcess:
    """The leader of a session and of all that it has started."""

    def __init__(self, record: RunRecord, mark: str, child: subprocess.Popen[bytes] | None = None) -> None:
        """`child` is None for a process that an earlier gpulane started."""
        self.record = record
        self._mark = mark
        self._child = child

    @classmethod
    def start(cls, launch: Launch, output: int, *, since: float) -> OsProcess:
        """Start it in a session of its own, so that no terminal's Ctrl-C reaches it. Raises OSError."""
        # Ours are secrets of the gateway, and no business of an engine.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPULANE_")}
        child = subprocess.Popen(
            launch.words,
            env={**inherited, **launch.env, MARK: launch.mark},
            cwd=launch.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        ticks = _started_ticks(child.pid)
        record = RunRecord(
            pid=child.pid,
            started_ticks=-1 if ticks is None else ticks,
            boot_id=boot_id(),
            command_digest=launch.digest,
            since=since,
        )
        return cls(record, launch.mark, child)

    @property
    def pid(self) -> int:
        return self.record.pid

    def is_alive(self) -> bool:
        """Tell whether the leader runs: it, not another process that got its number."""
        return lives(self.record)

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group. The leader must be alive, or a child of ours that nobody has waited for."""
        is_unburied = self._child is not None and self._child.returncode is None
        if is_unburied or self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def bury(self) -> int | None:
        """After the leader's end: kill what it left behind; returns its exit status where that is known."""
        # As long as nobody has waited for a child, its number, and so its group, cannot be anybody else's.
        self.signal(signal.SIGKILL)
        end_remains(self._mark)
        return None if self._child is None else self._child.poll()


def lives(record: RunRecord) -> bool:
    """Tell whether exactly this process runs (a zombie does not)."""
    stat = _stat(record.pid)
    return (
        stat is not None
        and stat[STATE] not in ENDED_STATES
        and int(stat[STARTED]) == record.started_ticks
        and record.boot_id == boot_id()
    )


def found_again(launch: Launch, known: RunRecord | None, *, now: float) -> OsProcess | None:
    """Find the process of an earlier gpulane, by its record, or by its mark when it has none."""
    if known is not None and lives(known):
        return OsProcess(known, launch.mark)
    for pid in marked(launch.mark):
        stat = _stat(pid)
        # The leader of the session is what we started; anything else is its child.
        if stat is not None and stat[STATE] not in ENDED_STATES and int(stat[GROUP]) == pid:
            # Died between start and record: the command has hardly been changed since.
            record = RunRecord(
                pid=pid,
                started_ticks=int(stat[STARTED]),
                boot_id=boot_id(),
                command_digest=launch.digest,
                since=now,
            )
            return OsProcess(record, launch.mark)
    return None


def end_remains(mark: str) -> None:
    """Kill all that carries the mark: what outlived its leader would keep the card, perhaps the port."""
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> Sequence[int]:
    """List the processes that carry the mark."""
    wanted = f"{MARK}={mark}".encode()
    found: list[int] = []
    for folder in PROC.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        if wanted in variables:
            found.append(int(folder.name))
    return found


def boot_id() -> str:
    """Name the machine's present boot; empty where the system does not tell."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _started_ticks(pid: int) -> int | None:
    stat = _stat(pid)
    return None if stat is None else int(stat[STARTED])


def _stat(pid: int) -> list[str] | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name may hold spaces and parentheses: what counts stands after the last one.
    return text.rpartition(")")[2].split()
