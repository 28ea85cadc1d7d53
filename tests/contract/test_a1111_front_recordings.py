"""A1111's front door answers, where it answers itself, in the statuses and shapes of the recorded 1.10.1."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from gpulane.testing.pictures import render_png
from tests.contract.recordings import Json, differences, recording
from tests.integration.web.a1111.ground import EVE, Wanted, ground

pytestmark = pytest.mark.anyio

RECORDED = Wanted(checkpoints=(("tinyA.safetensors", "tinyB.safetensors"),))
OWN = (
    "/sdapi/v1/progress",
    "/sdapi/v1/samplers",
    "/sdapi/v1/schedulers",
    "/sdapi/v1/upscalers",
    "/sdapi/v1/latent-upscale-modes",
    "/sdapi/v1/sd-models",
    "/sdapi/v1/sd-vae",
    "/sdapi/v1/hypernetworks",
    "/sdapi/v1/face-restorers",
    "/sdapi/v1/prompt-styles",
    "/sdapi/v1/embeddings",
    "/sdapi/v1/scripts",
    "/internal/pending-tasks",
    "/internal/ping",
)
ANSWERED_OTHERWISE = {
    "txt2img_unknown_sampler": 422,  # A1111 renders with another one and says nothing
    "txt2img_override_unknown_ckpt": 422,  # likewise
    "txt2img_bad_size": 422,  # A1111 fails inside the model, 500
    "extra-single-badupscaler": 422,
    "interrogate_none": None,  # the engine's own answer; the simulated one knows the model
}
REFUSED = (
    "txt2img_bad_type",
    "txt2img_bad_json",
    "txt2img_unknown_script",
    "txt2img_unknown_alwayson",
    "options_set_unknown_ckpt",
    "options_set_unknown_key",
    "img2img_noinit",
    "internal_progress_unknown",
    "interrupt_idle",
    "skip_idle",
    "unload",
    "reload",
    "refresh-checkpoints",
    "unknown_route",
    "wrong_method",
    "options_set_A",
    *ANSWERED_OTHERWISE,
)


def exchanges() -> list[Json]:
    return [*recording("a1111/basic_get"), *recording("a1111/basic_post")]


async def test_gets(tmp_path: Path) -> None:
    async with ground(tmp_path, RECORDED) as here:
        seen = 0
        for real in recording("a1111/basic_get"):
            if real["method"] == "GET" and real["path"] in OWN:
                told = await here.ask("GET", real["path"], key=EVE)
                found = differences(real["response"], told)
                # The recorded checkpoints have a .yaml beside them.
                assert [each for each in found if not each.startswith("$[0].config:")] == [], real["name"]
                seen += 1
        assert seen >= len(OWN) - 1


async def test_refusals_and_orders(tmp_path: Path) -> None:
    async with ground(tmp_path, RECORDED) as here:
        seen: set[str] = set()
        for real in exchanges():
            if real["name"] not in REFUSED or ANSWERED_OTHERWISE.get(real["name"], 0) is None:
                continue
            seen.add(real["name"])
            status, told = await answered(here.client, real)
            assert status == ANSWERED_OTHERWISE.get(real["name"], real["status"]), (real["name"], told)
            if real["name"] not in ANSWERED_OTHERWISE:
                assert differences(real["response"], without_ours(told, real["response"])) == [], real["name"]
        assert len(seen) >= 12
        assert here.sims[0].runs == 0


async def answered(client: Json, real: Json) -> tuple[int, Json]:
    sent = real["request"]
    headers = {"X-Api-Key": EVE, "Content-Type": "application/json"}
    if isinstance(sent, str):
        arguments: Json = {"data": sent.encode()}
    else:
        arguments = {} if sent is None else {"json": with_pictures(sent)}
    async with client.request(real["method"], real["path"], headers=headers, **arguments) as answer:
        return answer.status, await answer.json()


def with_pictures(sent: dict[str, Json]) -> dict[str, Json]:
    """Put a picture where the recorder cut one."""
    if "image" in sent:
        picture = base64.b64encode(render_png("x", 1, "sim", 8, 8, {}, plain=True)).decode()
        return sent | {"image": picture}
    return sent


def without_ours(told: Json, real: Json) -> Json:
    """Leave out our `code` in errors, and pydantic's `ctx` of a JSON error, which is not imitated."""
    if told and "error" in told:
        told.pop("code", None)
    if told and isinstance(told.get("detail"), list):
        for item in (*real["detail"], *told["detail"]):
            item.pop("ctx", None)
    return told
