"""Orders to a ComfyUI: stop a job, forget it, prove that it can still compute, give the memory back."""

from __future__ import annotations

import asyncio
import time
import uuid

from gpulane.adapters.comfyui.result import Verdict, read_entry
from gpulane.core.model import JobId
from gpulane.engine.base import BUSY, CANNOT_UNLOAD
from gpulane.engine.comfyui.api import EngineApi
from gpulane.engine.control import StatusError, named
from gpulane.errors import EngineError

ERASE_TRIES = 5
ERASE_REST_SECONDS = 0.05
CANARY_POLL_SECONDS = 0.05
FREE = b'{"unload_models":true,"free_memory":true}'


async def interrupt(api: EngineApi, job: JobId) -> None:
    """Stop exactly this job, waiting or running. The engine's word that it stopped comes later. Raises
    EngineError.
    """
    answer = await api.ask("POST", f"/api/jobs/{job}/cancel")
    if answer.status == 200:
        return
    # Before 0.27 there is no such route. Never without the id: that would stop whatever runs.
    for target, value in (("/queue", {"delete": [job]}), ("/interrupt", {"prompt_id": job})):
        answer = await api.order(target, value)
        if answer.status != 200:
            raise EngineError(f"{api.name} answered {answer.status} to POST {target}")


async def unload(api: EngineApi, *, seconds: float) -> None:
    """Have all models and the cache of node outputs dropped. Raises EngineError.

    Both are named: an empty body is answered 200 and does nothing, and unloading models alone would leave
    what the cache holds. Acknowledged at once; an idle engine obeys within moments.
    """
    queue = await api.queue(fresh=True)
    if not queue.is_empty:
        raise named(EngineError(f"{api.name} is at work: it is not unloaded now", sent=False), BUSY)
    answer = await api.ask("POST", "/free", body=FREE, seconds=seconds)
    if answer.status in {404, 405}:
        raise named(EngineError(f"{api.name} has no /free: it cannot be told to unload"), CANNOT_UNLOAD)
    if answer.status != 200:
        raise StatusError(f"{api.name} answered {answer.status} to POST /free", status=answer.status)


async def erase(api: EngineApi, job: str) -> None:
    """Delete an id from the history and see it gone. Raises EngineError."""
    for attempt in range(ERASE_TRIES):
        if await api.entry(job) is None:
            return
        if attempt:
            await asyncio.sleep(ERASE_REST_SECONDS * attempt)
        await api.order("/history", {"delete": [job]})
    if await api.entry(job) is not None:
        raise EngineError(f"{api.name} does not forget {job}")


class Canary:
    """Proves that the engine's executing thread lives: a prompt of two nodes that takes some milliseconds."""

    def __init__(self, api: EngineApi, *, seconds: float) -> None:
        self._api = api
        self._seconds = seconds
        self.ids: set[str] = set()
        """Prompts of ours that may be in the engine now."""

    async def sing(self, client_id: str) -> bool:
        """Tell whether the engine computes; True as well when it is busy with something or cannot do this
        prompt.
        """
        queue = await self._api.queue()
        if queue.running:
            return True
        if queue.waiting:
            await asyncio.sleep(1)
            return bool(
                (after := await self._api.queue()).running or set(after.waiting) != set(queue.waiting)
            )
        name = str(uuid.uuid4())
        self.ids.add(name)
        try:
            return await self._try(name, client_id)
        finally:
            self.ids.discard(name)

    async def _try(self, name: str, client_id: str) -> bool:
        answer = await self._api.order("/prompt", _canary(name, client_id))
        if answer.status != 200:
            return True  # these two nodes are missing here: no proof either way
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            entry = await self._api.entry(name)
            if entry is not None:
                await self._api.order("/history", {"delete": [name]})
                return read_entry(entry).verdict is Verdict.SUCCESS
            await asyncio.sleep(CANARY_POLL_SECONDS)
        await self._api.order("/queue", {"delete": [name]})
        return await self._api.entry(name) is not None


def _canary(name: str, client_id: str) -> object:
    color = int(name[:6], 16)  # never the same twice: nothing of it is cached
    size = {"width": 16, "height": 16, "batch_size": 1, "color": color}
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    return {"prompt": prompt, "prompt_id": name, "client_id": client_id, "extra_data": {}}
