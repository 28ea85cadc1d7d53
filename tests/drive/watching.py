"""Watches engines directly, as an independent witness of what runs on a card. Asks the gateway nothing."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from tests.drive.ground import Client

LOOK_SECONDS = 0.05


@dataclass(slots=True)
class Seen:
    """What was seen of one card."""

    looks: int = 0
    busy_comfyui: int = 0
    busy_a1111: int = 0
    both: list[str] = field(default_factory=list[str])
    """Proofs of two jobs at once."""
    starts: Counter[str] = field(default_factory=Counter[str])
    """How often each prompt was seen to begin running."""
    waiting_behind: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Prompts seen waiting inside the ComfyUI, by the prompt that ran."""

    def verdict(self) -> str:
        assert self.looks, "nobody looked"
        assert not self.both, f"{len(self.both)} overlaps, the first: {self.both[0]}"
        return (
            f"{self.looks} looks, ComfyUI busy in {self.busy_comfyui}, A1111 in {self.busy_a1111}, never both"
        )


@contextlib.asynccontextmanager
async def watching(comfyui: Client | None, a1111: Client | None) -> AsyncIterator[Seen]:
    """Look at both engines of one card again and again."""
    seen = Seen()
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(look_on(comfyui, a1111, seen))
        try:
            yield seen
        finally:
            looking.cancel()


async def look_on(comfyui: Client | None, a1111: Client | None, seen: Seen) -> None:
    before: frozenset[str] = frozenset()
    while True:
        first = await running_in(comfyui, seen)
        busy = await is_painting(a1111)
        # Only a prompt that ran before and after the question to the A1111 surely ran when it was answered.
        throughout = first & await running_in(comfyui, seen) if busy else frozenset[str]()
        if busy and throughout:
            seen.both.append(f"prompt {min(throughout)} while the A1111 painted")
        if len(first) > 1:
            seen.both.append(f"{len(first)} prompts at once")
        seen.starts.update(first - before)
        before = first
        seen.looks += 1
        seen.busy_comfyui += bool(first)
        seen.busy_a1111 += busy
        await asyncio.sleep(LOOK_SECONDS)


async def running_in(comfyui: Client | None, seen: Seen) -> frozenset[str]:
    if comfyui is None:
        return frozenset()
    queue = await asked(comfyui, "/queue")
    running = frozenset(item[1] for item in queue.get("queue_running", ()))
    for prompt_id in running:
        seen.waiting_behind.setdefault(prompt_id, set()).update(i[1] for i in queue["queue_pending"])
    return running


async def is_painting(a1111: Client | None) -> bool:
    if a1111 is None:
        return False
    told = await asked(a1111, "/sdapi/v1/progress?skip_current_image=true")
    return bool(told) and (told["state"]["job_count"] > 0 or told["progress"] > 0)


async def asked(engine: Client, path: str) -> Any:
    return (await engine.get(path)).ok().json
