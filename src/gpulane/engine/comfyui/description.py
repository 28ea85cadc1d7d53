"""What a ComfyUI says of itself: nodes, models, version, memory."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from urllib.parse import quote

import msgspec

from gpulane.adapters.comfyui.catalog import as_dict, as_list, read_catalog
from gpulane.core.model import Service
from gpulane.engine.base import Description, Vram
from gpulane.engine.comfyui.api import EngineApi
from gpulane.errors import EngineError

FOLDERS_MAX = 200
AT_ONCE_MAX = 4
"""Documents asked for at one time: /object_info alone blocks the engine's loop for 200 ms."""
CARDS = frozenset({"cuda", "xpu", "npu", "mlu"})
"""Types of devices whose numbers are a driver's. ROCm calls itself cuda; of a cpu and mps they are the RAM's,
and DirectML's are made up (comfy/model_management.py, get_free_memory)."""


async def describe(api: EngineApi) -> Description:
    """Fetch all of it. Raises EngineError; what only some versions have may be missing."""
    documents = {"object_info": await api.get("/object_info"), "system_stats": await api.get("/system_stats")}
    try:
        catalog = await asyncio.to_thread(read_catalog, documents["object_info"])
        system = as_dict(as_dict(msgspec.json.decode(documents["system_stats"])).get("system"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"{api.name} is no ComfyUI: {error}") from error
    for name in ("features", "embeddings", "models"):
        documents |= await _optional(api, name)
    documents |= await _model_lists(api, documents.get("models", b"[]"))
    version = system.get("comfyui_version")
    text = "\n".join([str(version), documents.get("features", b"").decode(), *sorted(catalog.offers)])
    return Description(
        service=Service.COMFYUI,
        flavor="comfyui",
        version=version if isinstance(version, str) else "",
        offers=catalog.offers,
        documents=documents,
        digest=sha256(text.encode()).hexdigest(),
    )


async def _optional(api: EngineApi, name: str) -> dict[str, bytes]:
    answer = await api.ask("GET", f"/{name}")
    return {name: answer.body} if answer.status == 200 else {}


async def _model_lists(api: EngineApi, models: bytes) -> dict[str, bytes]:
    """Fetch /models/{folder} for each folder, as `models/NAME`."""
    try:
        folders = [name for name in as_list(msgspec.json.decode(models)) if isinstance(name, str)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    limit = asyncio.Semaphore(AT_ONCE_MAX)
    lists: dict[str, bytes] = {}

    async def fetch(folder: str) -> None:
        async with limit:
            answer = await api.ask("GET", f"/models/{quote(folder, safe='')}")
        if answer.status == 200:
            lists[f"models/{folder}"] = answer.body

    try:
        async with asyncio.TaskGroup() as tasks:
            for folder in folders[:FOLDERS_MAX]:
                tasks.create_task(fetch(folder))
    except* EngineError as group:
        raise group.exceptions[0] from None
    return dict(sorted(lists.items()))


def read_vram(system_stats: bytes) -> Vram:
    """Read the first device of /system_stats; the engine tells of its current one only.

    Its `vram_free` counts as free what torch keeps cached inside the engine, which no other program can use;
    what the driver calls free is without it.
    """
    try:
        devices = as_list(as_dict(msgspec.json.decode(system_stats)).get("devices"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        devices = []
    device = as_dict(devices[0]) if devices else {}
    total, free, cached = (device.get(name) for name in ("vram_total", "vram_free", "torch_vram_free"))
    if device.get("type") not in CARDS or not isinstance(total, int) or total <= 0:
        return Vram()
    if not isinstance(free, int):
        return Vram(bytes_total=total)
    kept = cached if isinstance(cached, int) else 0
    return Vram(bytes_free=max(0, free - kept), bytes_total=total)
