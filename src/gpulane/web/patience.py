"""Lets what has begun end although its client, and with it the code that answered, has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

T = TypeVar("T")

GRACE_SECONDS: Final = 60.0
"""How long what was begun may go on after its client has left."""


async def finished(work: Coroutine[Any, Any, T], *, grace_seconds: float = GRACE_SECONDS) -> T:
    """Await `work`; when cancelled meanwhile, give it time to end first, and raise the cancellation then."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait({task}, timeout=grace_seconds)
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        raise
