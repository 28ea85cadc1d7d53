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
LEAK_KEY: Final = "leak"
LEAK_LOOK_SECONDS: Final = 15.0
"""How often leaking engines are tried again, where no job may begin beside them."""

_log = structlog.stdlib.get_logger(__name__)


async def unload_when_idle(
    owner: GpuOwner, book: Book, idle_seconds: Seconds, clock: Callable[[], Seconds]
) -> None:
    """Look for ever, until cancelled; unload once per idle time."""
    unloaded_since: Seconds | None = None
    while True:
        await asyncio.sleep(min(LOOK_SECONDS_MAX, max(0.05, idle_seconds / 4)))
        facts = book.gpus.get(owner.id)
        if facts is None or owner.handoff is None or not facts.is_idle(clock()):
            continue
        holds = any(e.may_hold and e.engine.service is not Service.LOCK for e in facts.engines.values())
        if not holds or clock() - facts.idle_since < idle_seconds:
            continue
        is_done = unloaded_since is not None and facts.idle_since <= unloaded_since
        if not is_done and owner.take_for(KEY, "unloading its models after a while without jobs"):
            try:
                await owner.handoff.unload_idle()
                _log.info("idle_unloaded", gpu=owner.id)
            except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
                _log.exception("idle_unload_broke", gpu=owner.id)
            finally:
                owner.free(KEY)
            # Whatever came of it: what an engine does not obey is not said again until it had a job.
            unloaded_since = facts.idle_since


async def look_at_leaks(owner: GpuOwner) -> None:
    """Look for ever, until cancelled, whether leaking engines that keep a gpu from all jobs have let go."""
    while True:
        await asyncio.sleep(LEAK_LOOK_SECONDS)
        handoff = owner.handoff
        if handoff is None or not handoff.is_leaking or not owner.take_for(LEAK_KEY, "measuring its memory"):
            continue
        try:
            await handoff.look_at_leaks()
        except Exception:  # noqa: BLE001  a fault in here must not end what goes on beside it
            _log.exception("leak_look_broke", gpu=owner.id)
        finally:
            owner.free(LEAK_KEY)
