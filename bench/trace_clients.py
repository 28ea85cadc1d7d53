"""Drives one client library that nobody here wrote, as a process of its own: started by `trace_run.py`.

    python bench/trace_clients.py CLIENT       setup and asks on stdin, one JSON a line; outcomes on stdout

Each request is a thread that calls the library as its README says, at its time, and then looks into the
pictures it was given. Nothing of the libraries is replaced, and no request is repeated by us.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO
from urllib.parse import urlsplit

from trace_input import IMAGE_STRENGTH, Ask

SEED_IN_INFOTEXT: Final = re.compile(r"\bSeed: (\d+)")
ANSWER_SECONDS_MAX: Final = 500.0
"""Nobody waits longer for a picture."""

Draw = Callable[[Ask], "list[Picture]"]
Picture = dict[str, Any]
"""`name` and `seed` of one received picture."""


def workflow(ask: Ask) -> dict[str, Any]:
    """ComfyUI's default text-to-image graph; all clients of all accounts save under one prefix."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "3": (
            "KSampler",
            {
                "seed": ask.seed, "steps": ask.steps, "cfg": 7.0, "sampler_name": "euler",
                "scheduler": "normal", "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0],
                "negative": ["7", 0], "latent_image": ["5", 0],
            },
        ),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": ask.checkpoint}),
        "5": ("EmptyLatentImage", {"width": ask.width, "height": ask.height, "batch_size": ask.images}),
        "6": ("CLIPTextEncode", {"text": ask.prompt, "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "blurred", "clip": ["4", 1]}),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
        "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
    }  # fmt: skip
    return {
        number: {"class_type": name, "inputs": inputs, "_meta": {"title": name}}
        for number, (name, inputs) in nodes.items()
    }


def of_comfyui(name: str, png: bytes) -> Picture:
    """Read the seed from the graph that ComfyUI writes into its pictures."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        graph = json.loads(image.info["prompt"])
    return {"name": name, "seed": graph["3"]["inputs"]["seed"]}


def webuiapi_draw(url: str, account: str, key: str) -> Draw:
    import webuiapi
    from PIL import Image

    library: Any = webuiapi
    parts = urlsplit(url)
    api = library.WebUIApi(host=parts.hostname, port=parts.port, username=account, password=key)

    def draw(ask: Ask) -> list[Picture]:
        wanted: dict[str, Any] = {
            "prompt": ask.prompt, "seed": ask.seed, "steps": ask.steps, "batch_size": ask.images,
            "width": ask.width, "height": ask.height,
            "override_settings": {"sd_model_checkpoint": ask.checkpoint},
        }  # fmt: skip
        if ask.is_image_to_image:
            start = Image.new("RGB", (64, 64), "gray")
            result = api.img2img(images=[start], denoising_strength=IMAGE_STRENGTH, **wanted)
        else:
            result = api.txt2img(**wanted)
        found = [SEED_IN_INFOTEXT.search(image.info["parameters"]) for image in result.images]
        return [{"name": str(n), "seed": int(seed[1]) if seed else None} for n, seed in enumerate(found)]

    return draw


def comfy_api_simplified_draw(url: str, account: str, key: str) -> Draw:
    from comfy_api_simplified import ComfyApiWrapper

    api: Any = ComfyApiWrapper(url, user=account, password=key)

    def draw(ask: Ask) -> list[Picture]:
        images: dict[str, bytes] = api.queue_and_wait_images(workflow(ask), "SaveImage")
        return [of_comfyui(name, png) for name, png in images.items()]

    return draw


def comfy_commander_draw(url: str, account: str, key: str) -> Draw:
    import comfy_commander

    commander: Any = comfy_commander
    server = commander.ComfyUIServer(base_url=with_key(url, account, key), timeout=60)

    def draw(ask: Ask) -> list[Picture]:
        graph = commander.Workflow(api_json=workflow(ask), gui_json=None)
        result = server.execute(graph, timeout=ANSWER_SECONDS_MAX)
        if result.status != "success":
            raise RuntimeError(result.error_message)
        return [of_comfyui(output.filename, output.data) for output in result.media.images]

    return draw


def comfyapi_draw(url: str, account: str, key: str) -> Draw:
    import comfyapi

    library: Any = comfyapi
    library.ComfyAPIManager().set_base_url(with_key(url, account, key))

    def draw(ask: Ask) -> list[Picture]:
        """It finds the first picture of a batch and no other."""
        own = library.ComfyAPIManager()
        own.workflow = workflow(ask)
        prompt = own.submit_workflow()
        name, output_url = own.wait_for_finish(prompt, poll_interval=1, max_wait_time=ANSWER_SECONDS_MAX)
        with tempfile.TemporaryDirectory() as folder:
            saved = own.download_output(output_url, save_path=folder)
            return [of_comfyui(name, Path(saved).read_bytes())]

    return draw


def with_key(url: str, account: str, key: str) -> str:
    return url.replace("://", f"://{account}:{key}@")


OPENERS: Final[dict[str, Callable[[str, str, str], Draw]]] = {
    "webuiapi": webuiapi_draw,
    "comfy-api-simplified": comfy_api_simplified_draw,
    "comfy-commander": comfy_commander_draw,
    "comfyapi": comfyapi_draw,
}


class Outcomes:
    """Writes one line a request; threads end at the same time."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def tell(self, **fields: object) -> None:
        with self._lock:
            self._out.write(json.dumps(fields) + "\n")
            self._out.flush()


def ask_at(begin: float, ask: Ask, draw: Draw, outcomes: Outcomes) -> None:
    time.sleep(max(0.0, begin + ask.at_seconds - time.monotonic()))
    sent = time.monotonic()
    pictures: list[Picture] = []
    error = None
    try:
        pictures = draw(ask)
    except Exception as caught:  # noqa: BLE001 - foreign libraries raise what they like; all of it is reported
        error = f"{type(caught).__name__}: {caught}"[:500]
    ended = time.monotonic()
    outcomes.tell(
        row=ask.row, late_seconds=sent - begin - ask.at_seconds, seconds=ended - sent, pictures=pictures,
        error=error,
    )  # fmt: skip


def main() -> None:
    # The libraries print; only outcomes may go to our reader.
    outcomes = Outcomes(os.fdopen(os.dup(1), "w"))
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends
    client = sys.argv[1]
    setup = json.loads(sys.stdin.readline())
    keys: dict[str, str] = setup["keys"]
    draws = {account: OPENERS[client](setup["url"], account, key) for account, key in keys.items()}
    asks = [Ask(**record) for record in setup["asks"]]
    outcomes.tell(ready=True)
    begin = json.loads(sys.stdin.readline())["begin"]
    threads = [
        threading.Thread(target=ask_at, args=(begin, ask, draws[ask.account], outcomes), daemon=True)
        for ask in asks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
