"""What is kept of a stored job's end: the result document in the store, its files in the node's data folder.

Files are copied right after the end is recorded, not before: the gpu takes its next job meanwhile. Until a
file is here it is
served from the engine that made it; what a crash left uncopied is copied after the restart (docs/decisions).
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from gpulane.core.model import EngineUrl, JobId
from gpulane.engine.base import RecordedResult
from gpulane.errors import EngineError
from gpulane.wire.client import EngineClient

COPIES_AT_ONCE: Final = 4
"""Copying must not fight the next jobs for the network."""
COPIES_WAITING_MAX: Final = 500
"""Results whose files wait to be copied; further ones stay on their engines until a restart looks again."""
ARTIFACT_BYTES_MAX: Final = 4 * 1024**3
"""One file larger than this stays on its engine."""

_log = structlog.stdlib.get_logger(__name__)
_DECODER: Final = msgspec.json.Decoder(RecordedResult)


def encode_result(result: RecordedResult | None) -> bytes | None:
    """Write a result for the store."""
    return None if result is None else msgspec.json.encode(result)


def decode_result(stored: bytes) -> RecordedResult:
    """Read what `encode_result` wrote."""
    return _DECODER.decode(stored)


class ArtifactFolder:
    """The files of results on this node: FOLDER/ab/<job id>/<number>."""

    def __init__(self, folder: Path, wires: Mapping[EngineUrl, EngineClient]) -> None:
        self._folder = folder
        self._wires = wires
        self._places = asyncio.Semaphore(COPIES_AT_ONCE)
        self._copying: set[JobId] = set()
        """Jobs whose files are being fetched; one that is dropped meanwhile must leave nothing behind."""

    def path(self, job: JobId, number: int) -> Path:
        return self._of(job) / str(number)

    def find(self, job: JobId, number: int) -> Path | None:
        """Tell where a copied file is; None when it is not here."""
        path = self.path(job, number)
        return path if path.is_file() else None

    async def copy(self, job: JobId, result: RecordedResult) -> None:
        """Fetch the files of a result that are not here yet. What cannot be fetched stays on its engine,
        with a log line.
        """
        wire = self._wires.get(EngineUrl(result.engine))
        if wire is None or job in self._copying:
            return
        if len(self._copying) >= COPIES_WAITING_MAX:
            _log.warning("artifacts_left", job=job, why="too many wait to be copied")
            return
        self._copying.add(job)
        try:
            for number, artifact in enumerate(result.artifacts):
                if artifact.target is not None and not self.path(job, number).exists():
                    await self._copy_one(job, number, wire, artifact.target)
        finally:
            self._copying.discard(job)

    async def _copy_one(self, job: JobId, number: int, wire: EngineClient, target: str) -> None:
        async with self._places:
            if job not in self._copying:
                return
            try:
                await self._fetch(wire, target, self.path(job, number))
            except (EngineError, OSError) as error:
                _log.warning("artifact_not_copied", job=job, number=number, why=str(error))
        if job not in self._copying:
            self.drop(job)

    def drop(self, *jobs: JobId) -> None:
        """Remove the files of forgotten jobs. May be called in another thread."""
        for job in jobs:
            self._copying.discard(job)
            shutil.rmtree(self._of(job), ignore_errors=True)

    async def _fetch(self, wire: EngineClient, target: str, path: Path) -> None:
        response = await wire.request("GET", target)
        try:
            if response.status != 200:
                raise EngineError(f"the engine answered {response.status} for {target}")
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            size = 0
            with part.open("wb") as file:
                async for chunk in response.chunks():
                    size += len(chunk)
                    if size > ARTIFACT_BYTES_MAX:
                        raise EngineError(f"{target} is over {ARTIFACT_BYTES_MAX} bytes")
                    file.write(chunk)
            part.replace(path)
        finally:
            with contextlib.suppress(EngineError):
                await response.close()

    def _of(self, job: JobId) -> Path:
        return self._folder / job[:2] / job
