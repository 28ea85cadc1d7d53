"""Has a generic server give its VRAM back, as the settings say or as the server itself is known to want it.

It only commands. Whether the memory came free is measured elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import assert_never

import msgspec

from gpulane.adapters.http.unloading import (
    LLAMA_SWAP,
    LLAMA_SWAP_BEFORE,
    LOADED,
    RUNNING,
    VERSION,
    detected,
    loaded_models,
    ollama_unload,
)
from gpulane.config.unloading import KnownUnload, Unload, UnloadCommand, UnloadRequest
from gpulane.engine.base import CANNOT_UNLOAD
from gpulane.engine.commands import run_command
from gpulane.engine.control import ControlCalls, StatusError, named
from gpulane.errors import EngineError


class Unloading:
    """How one server is unloaded."""

    def __init__(self, calls: ControlCalls, how: Unload | None, *, acknowledge_seconds: float) -> None:
        """`how`: as the settings say; None: found by asking, once something was found."""
        self._calls = calls
        self._how = how
        self._seconds = acknowledge_seconds

    async def unload(self) -> None:
        """Command it; returns when all of it is acknowledged. Raises EngineError."""
        try:
            async with asyncio.timeout(self._seconds):
                if self._how is None:
                    self._how = await self._detected()
                await self._command(self._how)
        except TimeoutError:
            message = f"{self._calls.url} did not acknowledge an unload within {self._seconds:g} s"
            raise named(EngineError(message), "timeout") from None

    async def _command(self, how: Unload) -> None:
        match how:
            case KnownUnload.OLLAMA:
                await self._unload_ollama()
            case KnownUnload.LLAMA_SWAP:
                await self._unload_llama_swap()
            case UnloadRequest():
                await self._send(how)
            case UnloadCommand():
                await run_command(how.argv, seconds=self._seconds, env=dict(how.env), folder=how.folder)
            case _:
                assert_never(how)

    async def _detected(self) -> KnownUnload:
        found = detected(await self._document(RUNNING), await self._document(VERSION))
        if found is None:
            message = f"{self._calls.url} cannot be told to unload: say how with the engine's `unload`"
            raise named(EngineError(message, sent=False), CANNOT_UNLOAD)
        return found

    async def _document(self, target: str) -> bytes | None:
        status, body = await self._calls.fetch("GET", target)
        return body if status == 200 else None

    async def _unload_ollama(self) -> None:
        """Unload each model; one that refuses does not keep the others."""
        status, body = await self._calls.fetch("GET", LOADED)
        if status != 200:
            raise StatusError(f"{self._calls.url} answered {status} to {LOADED}", status=status)
        try:
            models = loaded_models(body)
        except (msgspec.DecodeError, RecursionError) as error:
            message = f"{self._calls.url} answered {LOADED} as no Ollama does: {error}"
            raise named(EngineError(message), "bad_answer") from error
        refused: EngineError | None = None
        for model in models:
            try:
                await self._send(ollama_unload(model))
            except EngineError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    async def _unload_llama_swap(self) -> None:
        try:
            await self._send(LLAMA_SWAP)
        except StatusError as error:
            if error.status not in {404, 405}:
                raise
            await self._send(LLAMA_SWAP_BEFORE)

    async def _send(self, request: UnloadRequest) -> None:
        status, _ = await self._calls.fetch(
            request.method, request.target, request.body, seconds=self._seconds
        )
        if not 200 <= status < 300:
            message = f"{self._calls.url} answered {status} to {request.method} {request.target}"
            raise StatusError(message, status=status)
