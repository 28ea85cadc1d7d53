"""The demo's workload: some people, each with an address (so an account) and habits of their own, who use the
gateway as A1111 and ComfyUI clients do. It never ends by itself.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, replace
from typing import Final, Literal
from uuid import uuid4

import aiohttp

ANSWER_SECONDS: Final = 300.0
LOOK_SECONDS: Final = 0.4
"""How often a ComfyUI client looks whether its prompt is in the history."""
REST_SECONDS: Final = 1.0
"""After an answer that was none."""
PROMPTS: Final = ("a fox in the snow", "an old harbor at dawn", "a glass city", "a teapot, studio light")


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody who uses the gateway."""

    name: str
    address: str
    """Where the requests come from: without keys each address is an account."""
    service: Literal["a1111", "comfyui"]
    model: str
    at_once: int
    """Jobs waiting or running at one time."""
    pause_seconds: float
    """Between a job and the next one."""
    size: int = 512
    steps: int = 20


PEOPLE: Final = (
    Person(name="anna", address="127.0.0.2", service="a1111", model="sd15", at_once=1, pause_seconds=1.5),
    Person(
        name="ben",
        address="127.0.0.3",
        service="comfyui",
        model="dreamshaper_8",
        at_once=4,
        pause_seconds=1.0,
    ),
    Person(
        name="chloe",
        address="127.0.0.4",
        service="a1111",
        model="dreamshaper_8",
        at_once=2,
        pause_seconds=2.0,
        size=640,
    ),
    Person(
        name="dev team",
        address="127.0.0.5",
        service="comfyui",
        model="sd15",
        at_once=5,
        pause_seconds=0.5,
        steps=12,
    ),
    Person(
        name="emil",
        address="127.0.0.6",
        service="comfyui",
        model="sd_xl_base_1.0",
        at_once=1,
        pause_seconds=4.0,
        size=768,
        steps=16,
    ),
)


async def live(url: str, stop: asyncio.Event, *, gpus: int) -> None:
    """Let them all work until `stop` is set, with more at one time for more gpus."""
    chance = random.Random(1)
    async with asyncio.TaskGroup() as group:
        for person in PEOPLE:
            at_once = person.at_once * max(1, round(gpus / 2))
            group.create_task(_work(url, replace(person, at_once=at_once), chance, stop))


async def _work(url: str, person: Person, chance: random.Random, stop: asyncio.Event) -> None:
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with (
        aiohttp.ClientSession(url, connector=await _connector(person.address), timeout=timeout) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(person.at_once):
            group.create_task(_one_after_another(http, person, chance, stop))


async def _connector(address: str) -> aiohttp.TCPConnector:
    """Bind to the person's own address, where the system has all of 127.0.0.0/8 (Linux has)."""
    try:
        server = await asyncio.start_server(lambda _, writer: writer.close(), address, 0)
    except OSError:
        return aiohttp.TCPConnector()
    server.close()
    return aiohttp.TCPConnector(local_addr=(address, 0))


async def _one_after_another(
    http: aiohttp.ClientSession, person: Person, chance: random.Random, stop: asyncio.Event
) -> None:
    await asyncio.sleep(chance.uniform(0, person.pause_seconds / 2))
    while not stop.is_set():
        seed = chance.randrange(2**31)
        prompt = chance.choice(PROMPTS)
        try:
            match person.service:
                case "a1111":
                    await _txt2img(http, person, prompt, seed)
                case "comfyui":
                    await _prompt(http, person, prompt, seed)
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
            await asyncio.sleep(REST_SECONDS)
        await asyncio.sleep(person.pause_seconds * chance.uniform(0.5, 1.5))


async def _txt2img(http: aiohttp.ClientSession, person: Person, prompt: str, seed: int) -> None:
    """Ask as A1111 clients do: the answer comes when the picture is done."""
    body = {
        "prompt": prompt,
        "seed": seed,
        "steps": person.steps,
        "width": person.size,
        "height": person.size,
        "override_settings": {"sd_model_checkpoint": f"{person.model}.safetensors"},
    }
    async with http.post("/sdapi/v1/txt2img", json=body) as answer:
        await answer.read()
        answer.raise_for_status()


async def _prompt(http: aiohttp.ClientSession, person: Person, prompt: str, seed: int) -> None:
    """Ask as ComfyUI clients do: queue the prompt, then look for it in the history."""
    body = {"prompt": workflow(person, prompt, seed), "client_id": person.name, "prompt_id": str(uuid4())}
    async with http.post("/prompt", json=body) as answer:
        answer.raise_for_status()
        job = str((await answer.json())["prompt_id"])
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        async with http.get(f"/history/{job}") as answer:
            answer.raise_for_status()
            if job in await answer.json():
                return


def workflow(person: Person, prompt: str, seed: int) -> dict[str, object]:
    """Return ComfyUI's default workflow in API format."""

    def node(kind: str, **inputs: object) -> dict[str, object]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "3": node(
            "KSampler",
            seed=seed,
            steps=person.steps,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
            model=["4", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name=f"{person.model}.safetensors"),
        "5": node("EmptyLatentImage", width=person.size, height=person.size, batch_size=1),
        "6": node("CLIPTextEncode", text=prompt, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="demo"),
    }
