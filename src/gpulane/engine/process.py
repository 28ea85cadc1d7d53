"""Looks after the process of one engine: starts it, starts it again when it ends by itself, stops it with its
children.

Two processes of one engine never live at once: one that an earlier gpulane started is taken over, an address
where somebody listens already is left alone. Whether a job runs on the engine is for the caller to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, assert_never
from urllib.parse import urlsplit

import msgspec
import structlog

from gpulane.config import EngineSettings
from gpulane.config.commands import command_words
from gpulane.core.model import EngineUrl, Seconds
from gpulane.engine.os_process import Launch, OsProcess, RunRecord, end_remains, found_again, mark_of
from gpulane.engine.output import OutputLog

LISTENS_SECONDS: Final = 1.0
"""How long a connection may take that shows whether somebody listens already."""
KILLED_SECONDS: Final = 5.0
"""How long a killed process may take to go; a driver can keep one."""
GONE_POLL_SECONDS: Final = 0.05

_log = structlog.stdlib.get_logger(__name__)


class ProcessState(StrEnum):
    """Where the process of an engine is. `EngineProcess` alone moves it."""

    STARTING = "starting"
    """It runs and has not answered a probe yet."""
    READY = "ready"
    """It runs and has answered. Whether it still does is the engine's state, not the process's."""
    STOPPED = "stopped"
    """Not wanted now: before the start, in a restart, during a hand-off, at the end."""
    BACKING_OFF = "backing_off"
    """It ended by itself, could not be started or was not ready in time; it will be started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPace:
    """How long things take. The defaults are for people's machines; tests are in more of a hurry."""

    poll_seconds: Seconds = 0.5
    """How often it is looked at: one that an earlier gpulane started tells nobody of its end."""
    stop_seconds: Seconds = 15.0
    """From SIGTERM to SIGKILL."""
    back_off_seconds: Seconds = 1.0
    """Rest after the first end; doubled with each further one."""
    back_off_seconds_max: Seconds = 60.0
    settled_seconds: Seconds = 600.0
    """A process that lived so long begins with the first rest again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFolders:
    """Where things of processes lie in the data folder."""

    data: Path

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    @property
    def records(self) -> Path:
        return self.data / "engines"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """One engine's process, as shown."""

    state: ProcessState
    why: str
    """What happened last, where that is not plain from the state."""
    pid: int | None
    restarts: int
    """Starts after the first one, since gpulane runs."""
    since: float
    """When it came into this state, seconds since 1970."""
    exit_status: int | None
    """Of the process before; negative: the signal that ended it. None: nothing ended, or nobody knows."""
    is_adopted: bool
    """It was started by an earlier gpulane."""


OnChange = Callable[[ProcessState, str], None]


class EngineProcess:
    """One engine that gpulane starts; `run` is its task."""

    def __init__(
        self,
        settings: EngineSettings,
        url: EngineUrl,
        *,
        folders: ProcessFolders,
        clock: Callable[[], float],
        wall: Callable[[], float],
        on_change: OnChange,
        pace: ProcessPace | None = None,
    ) -> None:
        """`on_change` hears of every state and why, at once. Raises ConfigError for an empty command."""
        assert settings.command is not None, f"{url} has no command"
        self.url = url
        self.state = ProcessState.STOPPED
        self.why = "not started yet"
        self.restarts = 0
        self.exit_status: int | None = None
        self.output = OutputLog(folders.logs / f"{file_name(url)}.log", settings.env)
        self._ready_seconds = settings.ready_seconds
        self._launch = Launch(
            words=command_words(settings.command, setting=f"{url}: command"),
            env=settings.env,
            folder=Path(settings.folder).expanduser() if settings.folder else None,
            mark=mark_of(folders.data, url),
        )
        self._record_file = folders.records / f"{file_name(url)}.json"
        self._clock = clock
        self._wall = wall
        self._on_change = on_change
        self._pace = pace or ProcessPace()
        self._process: OsProcess | None = None
        self._is_adopted = False
        self._has_started = False
        self._since = wall()
        self._begun_at = 0.0
        self._start_at = 0.0
        self._failures = 0
        self._turn = asyncio.Lock()
        self._ready = asyncio.Event()

    # --- what others ask

    def view(self) -> ProcessView:
        """Show it as it is now."""
        return ProcessView(
            state=self.state,
            why=self.why,
            pid=None if self._process is None else self._process.pid,
            restarts=self.restarts,
            since=self._since,
            exit_status=self.exit_status,
            is_adopted=self._is_adopted,
        )

    def note_ready(self) -> None:
        """Hear that the engine answered a probe."""
        if self.state is ProcessState.STARTING:
            self._move(ProcessState.READY, "")

    async def until_ready(self, seconds: Seconds) -> bool:
        """Wait until it is ready; False when it is not in this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ready.wait()
        return self._ready.is_set()

    # --- what others order

    async def run(self) -> None:
        """Take over or start the process, and look after it until cancelled; `stop` ends it."""
        async with self._turn:
            await self._begin()
        while True:
            await asyncio.sleep(self._pace.poll_seconds)
            async with self._turn:
                try:
                    await self._look()
                except OSError as error:  # a full disk; the next look may have room
                    _log.warning("engine_not_looked_after", engine=self.url, why=str(error))

    async def stop(self, why: str = "stopped") -> None:
        """End the process with its children, and start it no more until `start_again`."""
        async with self._turn:
            await self._stop(why)

    async def restart(self, why: str) -> None:
        """Stop it if it runs, and start it at once; ready it is later."""
        async with self._turn:
            await self._stop(why)
            await self._start()

    async def stop_for_handoff(self) -> None:
        """Free the card of this engine for another; the caller holds the card."""
        await self.stop("stopped to free the card")

    async def start_again(self) -> None:
        """Start it after a stop; does nothing when it runs. `until_ready` waits for the rest."""
        async with self._turn:
            if self._process is None:
                await self._start()

    # --- in turn: one at a time touches the process

    async def _begin(self) -> None:
        found = await asyncio.to_thread(found_again, self._launch, self._recorded(), now=self._wall())
        if found is None:
            await asyncio.to_thread(end_remains, self._launch.mark)
            await self._start()
            return
        self._process = found
        self._is_adopted = self._has_started = True
        self._begun_at = self._clock()
        self._keep_record(found.record)
        is_other = found.record.command_digest != self._launch.digest
        why = "runs since before the gateway's start"
        if is_other:
            why += ", with another command than the settings have now: restart it to use theirs"
        _log.info("engine_adopted", engine=self.url, pid=found.pid, is_other_command=is_other)
        self._move(ProcessState.STARTING, why)

    async def _look(self) -> None:
        match self.state:
            case ProcessState.STOPPED:
                pass
            case ProcessState.BACKING_OFF:
                if self._clock() >= self._start_at:
                    await self._start()
            case ProcessState.STARTING | ProcessState.READY:
                await self._look_at_running()
            case _:
                assert_never(self.state)

    async def _look_at_running(self) -> None:
        assert self._process is not None, f"{self.url} is {self.state} without a process"
        if not self._process.is_alive():
            await self._buried()
            self._back_off(f"its process {_ending(self.exit_status)}")
            return
        age = self._clock() - self._begun_at
        if self.state is ProcessState.STARTING and age >= self._ready_seconds:
            await self._end()
            self._back_off(f"it answered no probe within {self._ready_seconds:g} s (ready_seconds)")
            return
        if age >= self._pace.settled_seconds:
            self._failures = 0
        await asyncio.to_thread(self.output.trim)

    async def _start(self) -> None:
        if await self._somebody_listens():
            self._back_off("something listens at its address already; was it started by somebody else?")
            return
        try:
            process = self._spawned()
        except OSError as error:
            self._back_off(f"it cannot be started: {error.strerror or error}")
            return
        self._process, self._is_adopted = process, False
        self._begun_at = self._clock()
        self.restarts += self._has_started
        self._has_started = True
        _log.info("engine_started", engine=self.url, pid=process.pid)
        self._move(ProcessState.STARTING, "started; it has not answered yet")

    def _spawned(self) -> OsProcess:
        """Start it and write down that it runs. Raises OSError."""
        if self._launch.folder is not None and not self._launch.folder.is_dir():
            raise NotADirectoryError(0, f"its folder {self._launch.folder} is not there")
        self.output.note("starting")
        descriptor = self.output.open()
        try:
            process = OsProcess.start(self._launch, descriptor, since=self._wall())
        finally:
            os.close(descriptor)
        # The process runs: nothing may fail from here on. Without its record its mark will find it.
        self._keep_record(process.record)
        return process

    async def _stop(self, why: str) -> None:
        # Said first: no job may come while it ends.
        self._move(ProcessState.STOPPED, why)
        self._failures = 0
        if self._process is not None:
            await self._end()
            _log.info("engine_stopped", engine=self.url, why=why)

    async def _end(self) -> None:
        """Ask the group to end; make it."""
        assert self._process is not None, f"{self.url} has no process"
        for number, seconds in ((signal.SIGTERM, self._pace.stop_seconds), (signal.SIGKILL, KILLED_SECONDS)):
            self._process.signal(number)
            if await self._is_gone(self._process, seconds):
                break
        else:
            _log.error("engine_not_killed", engine=self.url, pid=self._process.pid)
        await self._buried()

    async def _is_gone(self, process: OsProcess, seconds: Seconds) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while process.is_alive():  # noqa: ASYNC110  nothing tells of the end of an adopted process
                    await asyncio.sleep(GONE_POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    async def _buried(self) -> None:
        assert self._process is not None, f"{self.url} has no process"
        self.exit_status = await asyncio.to_thread(self._process.bury)
        self._process = None
        self._is_adopted = False
        with contextlib.suppress(OSError):
            self._record_file.unlink(missing_ok=True)
            self.output.note(f"the process {_ending(self.exit_status)}")

    def _back_off(self, why: str) -> None:
        seconds = min(self._pace.back_off_seconds * 2.0**self._failures, self._pace.back_off_seconds_max)
        self._failures = min(self._failures + 1, 16)
        self._start_at = self._clock() + seconds
        why = f"{why}; started again after {seconds:g} s"
        _log.warning("engine_backs_off", engine=self.url, why=why)
        self._move(ProcessState.BACKING_OFF, why)

    async def _somebody_listens(self) -> bool:
        """Two processes at one port: the second one ends at once, or worse, shares it."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(LISTENS_SECONDS):
                _, writer = await asyncio.open_connection(parts.hostname, port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    def _move(self, state: ProcessState, why: str) -> None:
        if state is not self.state:
            self._since = self._wall()
        self.state, self.why = state, why
        if state is ProcessState.READY:
            self._ready.set()
        else:
            self._ready.clear()
        self._on_change(state, why)

    # --- what the next gpulane has to know

    def _recorded(self) -> RunRecord | None:
        try:
            return msgspec.json.decode(self._record_file.read_bytes(), type=RunRecord)
        except (OSError, msgspec.MsgspecError):
            return None

    def _keep_record(self, record: RunRecord) -> None:
        try:
            self._record_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = self._record_file.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(record))
            part.replace(self._record_file)
        except OSError as error:
            _log.warning("engine_record_not_kept", engine=self.url, why=str(error))


def file_name(url: str) -> str:
    """Name an engine's files: 127.0.0.1-8188; with a digest where that does not say all of the URL."""
    parts = urlsplit(url)
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", f"{parts.hostname}-{parts.port or ''}").strip("-")
    if url == f"http://{parts.hostname}:{parts.port}":
        return plain
    return f"{plain}-{mark_of(Path('/'), url)[:8]}"


def _ending(status: int | None) -> str:
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
