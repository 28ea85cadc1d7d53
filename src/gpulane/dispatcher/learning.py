"""Keeps what was measured (load and service times) over restarts. Worth a better guess and nothing more:
whatever goes wrong with it is logged and forgotten.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
import structlog

from gpulane.core.learned import Learned, LearnedValues
from gpulane.dispatcher.ports import NodeRecords
from gpulane.errors import StoreError

KEPT_EVERY_SECONDS: Final = 30.0
KIND: Final = "measurements"
KEY: Final = "v1"

_log = structlog.stdlib.get_logger(__name__)


class Learning:
    """One row in the node's own store, bounded as the tables in memory are."""

    def __init__(self, learned: Learned, records: NodeRecords) -> None:
        self._learned = learned
        self._records = records
        self._kept = b""

    async def recall(self) -> None:
        """Take over what an earlier process had learned."""
        try:
            self._kept = (await self._records.learned(KIND)).get(KEY, b"")
            if self._kept:
                self._learned.recall(msgspec.json.decode(self._kept, type=LearnedValues))
        except (StoreError, msgspec.DecodeError) as error:
            _log.warning("measurements_not_recalled", why=str(error))

    async def run(self) -> None:
        """Keep them now and then, until cancelled."""
        while True:
            await asyncio.sleep(KEPT_EVERY_SECONDS)
            self.keep()

    def keep(self) -> None:
        """Write them down if they have changed."""
        values = msgspec.json.encode(self._learned.values())
        if values == self._kept:
            return
        try:
            self._records.learn_put(KIND, KEY, values)
            self._kept = values
        except StoreError as error:
            _log.warning("measurements_not_kept", why=error.message)
