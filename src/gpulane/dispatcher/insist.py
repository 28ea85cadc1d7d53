"""Asks the store until it answers. Every verb may be sent twice (store.base, rule 2), so asking again is
always safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from gpulane.errors import StoreError

RETRY_SECONDS_MIN: Final = 0.05
RETRY_SECONDS_MAX: Final = 5.0
"""The slowest that a store is asked that does not take it."""

T = TypeVar("T")
_log = structlog.stdlib.get_logger(__name__)


async def insist(ask: Callable[[], Awaitable[T]], what: str) -> T:
    """Ask until it is answered, for what nothing else can take the place of."""
    pause = RETRY_SECONDS_MIN
    while True:
        try:
            return await ask()
        except StoreError as error:
            _log.error("store_failed", what=what, why=error.message)
        await asyncio.sleep(pause)
        pause = min(pause * 2, RETRY_SECONDS_MAX)


async def try_for(seconds: float, ask: Callable[[], Awaitable[T]], what: str) -> T | None:
    """Ask for so long; None when it was not answered. It may have been done all the same."""
    try:
        async with asyncio.timeout(seconds):
            return await insist(ask, what)
    except TimeoutError:
        return None
