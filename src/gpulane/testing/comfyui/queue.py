"""ComfyUI's prompt queue and history, with the traps of the original left in.

The heap compares whole items, so two with the same number and id end in comparing dicts: a TypeError here, as
there.
"""

import asyncio
import heapq
import time
from typing import Final

from gpulane.testing.card import Json

MAX_HISTORY: Final = 10_000

Item = tuple[float, str, dict[str, Json], Json, list[str]]
"""number, prompt id, prompt, extra_data, outputs to execute"""


def now_ms() -> int:
    """The wall clock in milliseconds, as ComfyUI stamps things."""
    return time.time_ns() // 1_000_000


class PromptQueue:
    """What waits, what runs and what was."""

    def __init__(self) -> None:
        self.heap: list[Item] = []
        self.running: Item | None = None
        self.history: dict[str, Json] = {}
        self.flags: set[str] = set()
        self.something = asyncio.Event()
        """Set when there is something for the worker: a prompt, or a flag of /free."""

    @property
    def remaining(self) -> int:
        return len(self.heap) + (self.running is not None)

    def put(self, item: Item) -> None:
        self.something.set()
        heapq.heappush(self.heap, item)  # appends before it compares: an item refused by a TypeError is in

    def take(self) -> Item:
        self.running = heapq.heappop(self.heap)
        return self.running

    def task_done(self, record: Json) -> None:
        """File the running prompt under its id; the same id again overwrites."""
        assert self.running is not None
        if len(self.history) >= MAX_HISTORY:
            del self.history[next(iter(self.history))]
        self.history[self.running[1]] = record
        self.running = None

    def delete(self, prompt_id: str) -> bool:
        """Remove a waiting prompt."""
        for index, item in enumerate(self.heap):
            if item[1] == prompt_id:
                del self.heap[index]
                heapq.heapify(self.heap)
                return True
        return False

    def set_flag(self, name: str) -> None:
        self.flags.add(name)
        self.something.set()

    def as_answer(self) -> Json:
        """GET /queue: pending is the raw heap."""
        return {
            "queue_running": [list(self.running)] if self.running else [],
            "queue_pending": [list(item) for item in self.heap],
        }

    def history_answer(self, prompt_id: str | None, max_items: int | None, offset: int) -> dict[str, Json]:
        if prompt_id is not None:
            return {prompt_id: self.history[prompt_id]} if prompt_id in self.history else {}
        records = list(self.history.items())
        if offset < 0 and max_items is not None:
            offset = max(0, len(records) - max_items)
        start = max(0, offset)
        return dict(records[start : start + max_items] if max_items is not None else records[start:])
