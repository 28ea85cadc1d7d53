"""Which of a page's functions may reach an engine: told from the engine's own /config, kept until its app
changes.

The numbers change with every start of the page's app, so the app's id is asked for before they are trusted.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec
from aiohttp import web

from gpulane.adapters.a1111.gradio import gpu_functions, passing
from gpulane.core.model import EngineUrl
from gpulane.web.a1111.engine_calls import EngineCalls
from gpulane.web.ports import EngineView

CONFIG_BYTES_MAX: Final = 64 * 1024 * 1024
KEPT_SECONDS: Final = 600.0
KEPT_WITHOUT_ID_SECONDS: Final = 5.0
"""For an engine that does not tell its app's id."""
_ID_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """One page's functions, by number."""

    app_id: bytes | None = None
    passing: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    """Take nothing and return nothing, and are not known to use the gpu: only their javascript matters."""
    read_at: float = float("-inf")

    def is_fresh(self, app_id: bytes | None, now: float) -> bool:
        """Tell whether what was read still holds."""
        kept_seconds = KEPT_SECONDS if app_id is not None else KEPT_WITHOUT_ID_SECONDS
        return self.app_id == app_id and now - self.read_at < kept_seconds


class FunctionLists:
    """Reads them, once per engine and app."""

    def __init__(self, calls: EngineCalls) -> None:
        self._calls = calls
        self._kept: dict[EngineUrl, Functions] = {}

    async def of(self, request: web.Request, engine: EngineView) -> Functions:
        """Return the functions of this engine's page now. Raises WireError."""
        app_id = await self._read(request, engine, "/app_id", _ID_BYTES_MAX)
        now = asyncio.get_running_loop().time()
        kept = self._kept.get(engine.url, Functions())
        if kept.is_fresh(app_id, now):
            return kept
        config = await self._read(request, engine, "/config", CONFIG_BYTES_MAX)
        read = read_functions(config or b"{}", app_id=app_id, now=now)
        # With a login the config is told to those who have logged in: no others' answer is kept.
        if read.passing:
            self._kept[engine.url] = read
        return read

    async def _read(
        self, request: web.Request, engine: EngineView, target: str, bytes_max: int
    ) -> bytes | None:
        response = await self._calls.ask(request, engine, "GET", target)
        async with response:
            return await response.read(bytes_max) if response.status == 200 else None


class _Dependency(msgspec.Struct):
    inputs: list[int] = []
    outputs: list[int] = []
    backend_fn: bool = False


class _Config(msgspec.Struct):
    dependencies: list[_Dependency] = []


def read_functions(config: bytes, *, app_id: bytes | None, now: float) -> Functions:
    """Understand a config; one that cannot be read has no function that may pass."""
    try:
        passed = passing(config)
        dependencies = msgspec.json.decode(config, type=_Config).dependencies
        silent = {
            number
            for number, about in enumerate(dependencies)
            if about.backend_fn and not about.inputs and not about.outputs
        }
        return Functions(
            app_id=app_id, passing=passed, silent=frozenset(silent) - gpu_functions(config), read_at=now
        )
    except (msgspec.DecodeError, RecursionError):
        return Functions(app_id=app_id, read_at=now)
