"""The processes of this node's engines: those that gpulane starts, and the commands that restart others.

What is done to a process is told to the engine's watch first, so that no job meets it half-way. It restarts
nothing of its own accord but what ended by itself; whether a job may be lost by it is decided by who asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, assert_never

import structlog

from gpulane.config import EngineSettings, Settings
from gpulane.config.commands import command_words
from gpulane.core.model import EngineUrl, GpuId, Seconds
from gpulane.dispatcher.gpu import GpuOwner
from gpulane.engine.commands import run_command
from gpulane.engine.probe import EngineWatch
from gpulane.engine.process import EngineProcess, ProcessFolders, ProcessPace, ProcessState, ProcessView
from gpulane.errors import ConfigError, Conflict, EngineError, NotFound, Unavailable

RESTART_SECONDS: Final = 60.0
"""How long a `restart` command may take."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class _Engine:
    """One engine with all that can be done to its process."""

    settings: EngineSettings
    owner: GpuOwner
    watch: EngineWatch
    process: EngineProcess | None = None
    is_handed_off: bool = False
    """Stopped to free the card: started again for its next job, and so not lost."""


class Supervision:
    """One per process. Raises ConfigError for a folder that is not there."""

    def __init__(
        self,
        settings: Settings,
        owners: Mapping[GpuId, GpuOwner],
        *,
        data_folder: Path,
        clock: Callable[[], float],
        wall: Callable[[], float],
        pace: ProcessPace | None = None,
    ) -> None:
        folders = ProcessFolders(data=data_folder)
        said = _said(settings)
        self._engines: dict[EngineUrl, _Engine] = {}
        self._restarting: set[EngineUrl] = set()
        for owner in owners.values():
            for url, watch in owner.watches.items():
                if url not in said:
                    continue
                engine = _Engine(settings=said[url], owner=owner, watch=watch)
                self._engines[url] = engine
                if engine.settings.command is not None:
                    _folder_is_there(engine.settings)
                    engine.process = EngineProcess(
                        engine.settings,
                        url,
                        folders=folders,
                        clock=clock,
                        wall=wall,
                        on_change=partial(_changed, engine),
                        pace=pace,
                    )
                    watch.on_answer = engine.process.note_ready

    # --- life

    def begin(self) -> Iterator[Coroutine[object, object, None]]:
        """Give the tasks that look after processes; no engine of them counts as lost before its time."""
        for engine in self._engines.values():
            if engine.process is not None:
                engine.watch.started("not started yet", patience_seconds=engine.settings.ready_seconds)
                yield engine.process.run()

    async def stop(self) -> None:
        """End every process that gpulane has started, all at one time."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self._engines.values():
                if engine.process is not None:
                    tasks.create_task(engine.process.stop("gpulane was stopped"))

    # --- what is shown

    def process(self, url: EngineUrl) -> ProcessView | None:
        """Show an engine's process; None when somebody else starts it."""
        process = self._engine(url).process
        return None if process is None else process.view()

    def can_restart(self, url: EngineUrl) -> bool:
        """Tell whether there is a way to restart it."""
        engine = self._engines.get(url)
        return engine is not None and (engine.process is not None or engine.settings.restart is not None)

    async def last_lines(self, url: EngineUrl, lines: int) -> list[str]:
        """Read the end of an engine's output. Raises NotFound where gpulane does not start it."""
        process = self._engine(url).process
        if process is None:
            raise NotFound(
                f"gpulane does not start {url}, so it has no output of it.",
                hint="Look where that engine is started, or give it a command in the settings.",
                code="no_process",
            )
        return await asyncio.to_thread(process.output.tail, lines)

    # --- what is ordered

    async def restart(self, url: EngineUrl, why: str, *, force: bool = False) -> None:
        """Restart an engine by its command or its `restart`; on return it was started, and is not ready yet.

        The gpu takes no job meanwhile. Raises NotFound; Conflict for an engine in use (unless `force`: its
        job is lost), being restarted already, or without a way; Unavailable when its `restart` failed.
        """
        engine = self._engine(url)
        if not self.can_restart(url):
            raise Conflict(
                f"There is no way to restart {url}.",
                hint="Give it a command, or a restart command, in the settings.",
                code="cannot_restart",
            )
        if url in self._restarting:
            raise Conflict(f"{url} is being restarted.", code="restarting")
        if not force and engine.owner.is_used(url):
            raise Conflict(
                f"A job runs on {url}, or is about to.",
                hint="Wait for its end, or force it: the job is lost, and tried again if it may be.",
                code="engine_in_use",
            )
        key = f"restart {url}"
        self._restarting.add(url)
        engine.owner.occupy(key, f"{url} is being restarted")
        try:
            _log.info("engine_restart", engine=url, why=why)
            await self._restart(engine, why)
        finally:
            self._restarting.discard(url)
            engine.owner.free(key)

    async def stop_for_handoff(self, url: EngineUrl) -> None:
        """End the process of a `stop_to_unload` engine; the caller holds the card.

        It stays a place for jobs: whoever runs one starts it again first.
        """
        engine, process = self._stoppable(url)
        engine.is_handed_off = True
        await process.stop_for_handoff()

    async def start_again(self, url: EngineUrl, *, seconds: Seconds | None = None) -> bool:
        """Start such an engine and wait until it answers; False when it does not within `ready_seconds`.

        Jobs may begin when its watch has found it ready too, which is at once after.
        """
        engine, process = self._stoppable(url)
        await process.start_again()
        engine.is_handed_off = False
        return await process.until_ready(engine.settings.ready_seconds if seconds is None else seconds)

    async def _restart(self, engine: _Engine, why: str) -> None:
        if engine.process is not None:
            engine.is_handed_off = False
            await engine.process.restart(why)
            return
        assert engine.settings.restart is not None, "asked above"
        words = command_words(engine.settings.restart)
        engine.watch.stopped(why)
        try:
            await run_command(
                words, seconds=RESTART_SECONDS, env=engine.settings.env, folder=engine.settings.folder
            )
        except EngineError as error:
            _log.warning("engine_restart_failed", engine=engine.watch.client.url, why=error.message)
            engine.watch.started("its restart command failed", patience_seconds=0.0)
            raise Unavailable(f"It was not restarted: {error.message}", code="restart_failed") from error
        except asyncio.CancelledError:
            engine.watch.started("its restart was broken off", patience_seconds=0.0)
            raise
        engine.watch.started(
            "restarted; it has not answered yet", patience_seconds=engine.settings.ready_seconds
        )

    def _engine(self, url: EngineUrl) -> _Engine:
        engine = self._engines.get(url)
        if engine is None:
            raise NotFound(f"No engine {url[:200]!r}.", code="no_such_engine")
        return engine

    def _stoppable(self, url: EngineUrl) -> tuple[_Engine, EngineProcess]:
        engine = self._engine(url)
        assert engine.process is not None, f"{url} has no command; the settings are checked"
        return engine, engine.process


def _changed(engine: _Engine, state: ProcessState, why: str) -> None:
    """Tell an engine's watch what became of the process."""
    match state:
        case ProcessState.STARTING:
            engine.watch.started(why, patience_seconds=engine.settings.ready_seconds)
        case ProcessState.READY:
            pass  # the watch said so
        case ProcessState.STOPPED:
            engine.watch.stopped(why, comes_back=engine.is_handed_off)
        case ProcessState.BACKING_OFF:
            engine.watch.ended(why)
        case _:
            assert_never(state)


def _said(settings: Settings) -> dict[EngineUrl, EngineSettings]:
    return {
        EngineUrl(engine.url): engine
        for gpu in settings.gpus.values()
        for engine in gpu.engines
        if isinstance(engine, EngineSettings)
    }


def _folder_is_there(engine: EngineSettings) -> None:
    if engine.folder is not None and not Path(engine.folder).expanduser().is_dir():
        raise ConfigError(f"{engine.url}: folder {engine.folder} is not there, or is no folder")
