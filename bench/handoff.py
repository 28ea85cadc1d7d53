"""What a hand-off costs: A1111 and ComfyUI jobs in turn on one simulated card.

    python bench/handoff.py [--jobs 20] [--vram-gib 12] [--model-gib 7]

With 12 GB and models of 7 GB every job needs the card for itself: no OOM, and the time between two jobs is
the engines' own unload and load time and little more. With `--vram-gib 24` both fit: no unload once both are
known. The gateway is a process of its own; the engines are simulated, in this process, over real sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import aiohttp
from gap import gateway, until_ready

from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import SimComfyUI

CHECKPOINT = "sd15.safetensors"
LOAD_SECONDS = 1.0
UNLOAD_SECONDS = 0.3


def workflow(seed: int) -> dict[str, object]:
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0],
                "seed": seed, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "h"}},
    }  # fmt: skip


async def measure(folder: Path, jobs: int, vram_gib: float, model_gib: float) -> None:
    options = CardOptions(
        vram_gib=vram_gib,
        load_seconds={CHECKPOINT: LOAD_SECONDS},
        model_gib={CHECKPOINT: model_gib},
        unload_seconds=UNLOAD_SECONDS,
    )
    file = folder / "card"
    async with contextlib.AsyncExitStack() as stack:
        card = stack.enter_context(Card(file, options))
        a1111 = await stack.enter_async_context(
            SimA1111(card=card, checkpoints=[CHECKPOINT], plain_pictures=True, skip_load=True)
        )
        comfyui = await stack.enter_async_context(
            SimComfyUI(card=card, checkpoints=[CHECKPOINT], plain_pictures=True)
        )
        joined = f"{a1111.server.url}+{comfyui.server.url}"
        url, _, _ = await stack.enter_async_context(gateway(folder, [joined]))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await until_ready(http, url)
        for number in range(jobs):
            await (a_picture(http, url, number) if number % 2 else a_prompt(http, url, number))
    report([json.loads(line) for line in file.read_text().splitlines()], jobs)


async def a_picture(http: aiohttp.ClientSession, url: str, seed: int) -> None:
    body = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "seed": seed}
    async with http.post(f"{url}/sdapi/v1/txt2img", json=body) as answer:
        assert answer.status == 200, await answer.text()


async def a_prompt(http: aiohttp.ClientSession, url: str, seed: int) -> None:
    async with http.post(f"{url}/prompt", json={"prompt": workflow(seed)}) as answer:
        assert answer.status == 200, await answer.text()
        prompt_id = (await answer.json())["prompt_id"]
    while True:
        async with http.get(f"{url}/history/{prompt_id}") as answer:
            if await answer.json():
                return
        await asyncio.sleep(0.005)


def report(lines: list[dict[str, object]], jobs: int) -> None:
    """Count what the card saw; the overhead is the time between two jobs that no load or unload fills."""
    ooms = sum(line["event"] == "oom" for line in lines)
    begins = {line["interval"]: line for line in lines if line["event"] == "begin"}
    spans = sorted(
        (
            float(str(begins[line["interval"]]["mono"])),
            float(str(line["mono"])),
            str(begins[line["interval"]]["kind"]),
        )
        for line in lines
        if line["event"] == "end" and line["interval"] in begins
    )
    unloads = sum(kind == "unload" for _, _, kind in spans)
    computes = [(begin, end) for begin, end, kind in spans if kind == "compute"]
    overheads = [
        after[0]
        - before[1]
        - sum(min(e, after[0]) - b for b, e, k in spans if k != "compute" and before[1] <= b < after[0])
        for before, after in itertools.pairwise(computes)
    ]
    print(
        f"{jobs} jobs in turn: {ooms} OOM, {unloads} unloads; between two jobs, loads and unloads left out: "
        f"p50 {1000 * statistics.median(overheads):.0f} ms, max {1000 * max(overheads):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--vram-gib", type=float, default=12.0)
    parser.add_argument("--model-gib", type=float, default=7.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(measure(Path(name), options.jobs, options.vram_gib, options.model_gib))


if __name__ == "__main__":
    main()
