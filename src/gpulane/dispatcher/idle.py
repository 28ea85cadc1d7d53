"""Unloads the models of a gpu that has had no job for a while: other programs find its memory free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog

from gpulane.core.book import Book
from gpulane.core.model import Seconds, Service

if TYPE_CHECKING:
    from gpulane.dispatcher.gpu import GpuOwner

KEY: Final = "idle unload"
LOOK_SECONDS_MAX: Final = 5.0

_log = structlog.stdlib.get_logger(__name__)


async def unload_when_idle(
    owner: GpuOwner, book: Book, idle_seconds: Seconds, clock: Callable[[], Seconds]
) -> None:
    """Look for ever, until cancelled; unload once per idle time."""
    while True:
        await asyncio.sleep(min(LOOK_SECONDS_MAX, max(0.05, idle_seconds / 4)))
        facts = book.gpus.get(owner.id)
        if facts is None or owner.handoff is None or not facts.is_idle(clock()):
            continue
        holds = any(e.may_hold and e.engine.service is not Service.LOCK for e in facts.engines.values())
        if not holds or clock() - facts.idle_since < idle_seconds:
            continue
        if owner.take_for(KEY, "unloading its models after a while without jobs"):
            try:
                await owner.handoff.unload_idle()
                _log.info("idle_unloaded", gpu=owner.id)
            finally:
                owner.free(KEY)
