"""One simulated card that A1111 and ComfyUI share, with models of 7 GB, behind a whole gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from gpulane.config import parse_settings
from gpulane.service import running
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import SimComfyUI
from tests.integration.gateway.small_fleet import BRISK, Client, picture, until

CHECKPOINT: Final = "sd15.safetensors"
HANDOFF: Final = "unload_seconds: 1, acknowledge_seconds: 0.5"
READY: Final = 2


@dataclass(slots=True, kw_only=True)
class SharedCard:
    """The card, its engines, and a user."""

    card: Card
    a1111: SimA1111
    comfyui: SimComfyUI
    client: Client

    async def prompt(self, seed: int) -> str:
        return await self.client.prompt(checkpoint_workflow(seed))

    async def a_prompt(self, seed: int) -> Any:
        return await self.client.ended(await self.prompt(seed))

    async def a_picture(self, seed: int) -> int:
        return (await self.client.post("/sdapi/v1/txt2img", picture(seed=seed)))[0]

    async def gpu(self) -> Any:
        return (await self.client.get("/gpulane/v1/gpus"))["gpus"][0]

    async def is_idle(self) -> bool:
        return (await self.gpu())["state"] == "idle"

    async def state_of(self, engine: SimA1111 | SimComfyUI) -> str:
        return next(e["state"] for e in (await self.gpu())["engines"] if e["url"] == engine.url)

    def counted(self, event: str, kind: str = "") -> int:
        """How often the card's log says so."""
        lines = self.card.lines()
        return sum(line["event"] == event and line.get("kind", "") == kind for line in lines)

    @property
    def unloads(self) -> int:
        return self.counted("begin", "unload")

    @property
    def ooms(self) -> int:
        return self.counted("oom")

    def holds(self, engine: SimA1111 | SimComfyUI) -> bool:
        return bool(self.card.resident(engine.url))

    async def until_asked(self, engine: SimA1111 | SimComfyUI, fault: str) -> None:
        """Wait until the engine is told to unload, while it does so badly."""

        async def is_asked() -> bool:
            return engine.faults.struck[f"unload {fault}"] > 0

        await until(is_asked)


def checkpoint_workflow(seed: int) -> dict[str, object]:
    sampler = {
        "model": ["1", 0],
        "positive": ["2", 0],
        "negative": ["2", 0],
        "latent_image": ["3", 0],
        "seed": seed,
        "steps": 2,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "KSampler", "inputs": sampler},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "h"}},
    }


@contextlib.asynccontextmanager
async def shared_card(
    folder: Path,
    *,
    vram_gib: float = 12.0,
    handoff: str = HANDOFF,
    more: str = "",
    engine: str = "",
    gpu: str = "",
) -> AsyncIterator[SharedCard]:
    """Start it all. `engine`: settings of both engines, `gpu`: of the gpu, `more`: lines of the top."""
    options = CardOptions(
        vram_gib=vram_gib,
        time_scale=0.02,
        model_gib={CHECKPOINT: 7.0},
        load_seconds={CHECKPOINT: 1.0},
    )
    async with contextlib.AsyncExitStack() as stack:
        card = stack.enter_context(Card(folder / "card.jsonl", options))
        a1111 = SimA1111(card=card, checkpoints=[CHECKPOINT], plain_pictures=True, skip_load=True)
        comfyui = SimComfyUI(card=card, checkpoints=[CHECKPOINT], plain_pictures=True)
        await stack.enter_async_context(a1111)
        await stack.enter_async_context(comfyui)
        engines = ", ".join(
            f"{{url: '{url}', service: {service}{engine}}}"
            for url, service in ((a1111.url, "a1111"), (comfyui.url, "comfyui"))
        )
        settings = f"""
data: {folder / "data"}
listen: 127.0.0.1:0
name: box
{BRISK}
handoff: {{{handoff}}}
{more}
gpus:
  gpu0: {{engines: [{engines}]{gpu}}}
"""
        service = await stack.enter_async_context(running(parse_settings(settings)))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        client = Client(service, http, service.addresses["main"])

        async def is_ready() -> bool:
            return await client.engines_ready() == READY

        await until(is_ready)
        async with asyncio.timeout(90):
            yield SharedCard(card=card, a1111=a1111, comfyui=comfyui, client=client)
