"""`webuiapi`, which nobody here wrote, against the front door: its README's calls, and its habits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.integration.web.a1111.ground import ANN, BOB, Ground, Wanted, ground, until

webuiapi: Any = pytest.importorskip("webuiapi")
pytestmark = pytest.mark.anyio


def client(here: Ground, key: str = ANN) -> Any:
    host, _, port = here.url.removeprefix("http://").partition(":")
    api = webuiapi.WebUIApi(host=host, port=int(port), sampler="Euler a", steps=4)
    assert isinstance(api.session, requests.Session)
    api.session.headers["X-Api-Key"] = key
    return api


async def test_pictures(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        api = await asyncio.to_thread(client, here)
        made = await asyncio.to_thread(api.txt2img, prompt="a cat", seed=5, width=64, height=64)
        assert made.image.size == (64, 64) and made.info["sd_model_name"] == "alpha"
        changed = await asyncio.to_thread(
            api.img2img, images=[made.image], prompt="a dog", seed=5, width=64, height=64
        )
        assert changed.image.size == (64, 64)
        bigger = await asyncio.to_thread(
            api.extra_single_image, image=made.image, upscaler_1="Lanczos", upscaling_resize=2
        )
        assert bigger.image.size == (128, 128)
        told = await asyncio.to_thread(api.interrogate, image=made.image)
        assert told.info


async def test_models_are_chosen_per_user(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        api = await asyncio.to_thread(client, here)
        names = await asyncio.to_thread(api.util_get_model_names)
        assert names == ["alpha.safetensors", "beta.safetensors"]
        await asyncio.to_thread(api.util_set_model, "Beta")
        assert await asyncio.to_thread(api.util_get_current_model) == "beta.safetensors"
        made = await asyncio.to_thread(api.txt2img, prompt="a cat", width=64, height=64)
        assert made.info["sd_model_name"] == "beta"
        other = await asyncio.to_thread(client, here, BOB)
        assert await asyncio.to_thread(other.util_get_current_model) == "alpha.safetensors"


async def test_ready_while_others_work(tmp_path: Path) -> None:
    async with ground(tmp_path, Wanted(time_scale=0.2)) as here:
        api, other = await asyncio.gather(
            asyncio.to_thread(client, here), asyncio.to_thread(client, here, BOB)
        )
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(
                asyncio.to_thread(api.txt2img, prompt="long", steps=500, width=512, height=512)
            )
            await until(here.has_steps)
            await asyncio.to_thread(other.util_wait_for_ready, 0.01)
            assert (await asyncio.to_thread(api.get_progress))["state"]["job_count"] == 1
            assert await asyncio.to_thread(other.interrupt) == {}
            assert not call.done()
            assert await asyncio.to_thread(api.interrupt) == {}
        assert len(call.result().images) == 1
        await asyncio.to_thread(api.util_wait_for_ready, 0.01)


async def test_lists(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        api = await asyncio.to_thread(client, here)
        for name in (
            "get_samplers",
            "get_schedulers",
            "get_upscalers",
            "get_latent_upscale_modes",
            "get_loras",
            "get_sd_vae",
            "get_hypernetworks",
            "get_face_restorers",
            "get_realesrgan_models",
            "get_prompt_styles",
            "get_embeddings",
            "get_scripts",
            "get_memory",
            "get_cmd_flags",
            "get_options",
        ):
            told = await asyncio.to_thread(getattr(api, name))
            assert isinstance(told, list | dict), name
        assert await asyncio.to_thread(api.refresh_checkpoints) is None
