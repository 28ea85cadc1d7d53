"""Bad input through the whole gateway: refused in the service's own shape, nothing stored or half-done."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateway.small_fleet import Client, Fleet, picture, slow, small_fleet, until

pytestmark = pytest.mark.anyio

PROMPT, TXT2IMG, JOBS = "/prompt", "/sdapi/v1/txt2img", "/gpulane/v1/jobs"
LIMITED = "limits: {body_mib: 0.02, workflow_mib: 0.01}"
OVER = 32 * 1024
DEEP = b"[" * 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """One request that must be refused, and what the refusal says."""

    path: str
    body: bytes
    status: int
    says: str = ""


def prompt_body(workflow: object) -> bytes:
    return json.dumps({"prompt": workflow}).encode()


def native_body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def call_body(**fields: object) -> bytes:
    return json.dumps(picture() | fields).encode()


WORKFLOW = slow(steps=1)
UNKNOWN_NODE: dict[str, Any] = {"1": {"class_type": "NoSuchNode", "inputs": {}}}
SAMPLED: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "nobody-has-this.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
}
NATIVE_WORKFLOW: dict[str, Any] = {"service": "comfyui", "workflow": WORKFLOW}
NATIVE_CALL: dict[str, Any] = {"service": "a1111", "endpoint": "txt2img", "payload": picture()}

BAD = [
    # Broken, strange and deep JSON.
    Bad(path=PROMPT, body=b"", status=400),
    Bad(path=PROMPT, body=b"{", status=400),
    Bad(path=PROMPT, body=b"\xff\xfe{}", status=400),
    Bad(path=PROMPT, body=b"null", status=400),
    Bad(path=PROMPT, body=b"[]", status=400),
    Bad(path=PROMPT, body=b'{"prompt":' + DEEP, status=400, says="nested deeper"),
    Bad(path=PROMPT, body=b'{"prompt":{"1":{"class_type":"SimSlow","inputs":{"steps":NaN}}}}', status=400),
    Bad(path=PROMPT, body=b"{}", status=400, says="prompt"),
    Bad(path=TXT2IMG, body=b"{", status=422),
    Bad(path=TXT2IMG, body=b"\xff\xfe{}", status=422),
    Bad(path=TXT2IMG, body=b"null", status=422),
    Bad(path=TXT2IMG, body=b"[]", status=422),
    Bad(path=TXT2IMG, body=b'{"alwayson_scripts":' + DEEP, status=422),
    Bad(path=TXT2IMG, body=b'{"prompt":"a","cfg_scale":NaN}', status=422),
    Bad(path=JOBS, body=b"", status=400),
    Bad(path=JOBS, body=b"{", status=400),
    Bad(path=JOBS, body=b"\xff\xfe{}", status=400),
    Bad(path=JOBS, body=b"null", status=400),
    Bad(path=JOBS, body=b'{"service":"comfyui","workflow":' + DEEP, status=400),
    Bad(path=JOBS, body=b'{"service":"comfyui","workflow":{"1":{"inputs":{"a":NaN}}}}', status=400),
    # Wrong types.
    Bad(path=PROMPT, body=prompt_body([]), status=400),
    Bad(path=PROMPT, body=prompt_body({"1": 5}), status=400),
    Bad(path=PROMPT, body=prompt_body({"1": {"class_type": 5, "inputs": {}}}), status=400),
    Bad(path=PROMPT, body=prompt_body({"1": {"class_type": "SimSlow", "inputs": []}}), status=400),
    Bad(path=PROMPT, body=b'{"prompt":{},"prompt_id":[1]}', status=400),
    Bad(path=TXT2IMG, body=call_body(steps="many"), status=422, says="steps"),
    Bad(path=TXT2IMG, body=call_body(width=-64), status=422, says="width"),
    Bad(path=TXT2IMG, body=call_body(override_settings=[]), status=422, says="override_settings"),
    Bad(path=JOBS, body=native_body(service="paint"), status=400, says="service"),
    Bad(path=JOBS, body=native_body(service="comfyui", workflow=[]), status=400),
    Bad(path=JOBS, body=native_body(**NATIVE_CALL, priority=[]), status=400, says="priority"),
    # Names that nobody knows, with the nearest ones.
    Bad(
        path=TXT2IMG,
        body=call_body(override_settings={"sd_model_checkpoint": "DREAMSHAPR"}),
        status=422,
        says="dreamshaper_8.safetensors",
    ),
    Bad(path=TXT2IMG, body=call_body(sampler_name="Eulr a"), status=422, says="Euler a"),
    Bad(path=TXT2IMG, body=call_body(scheduler="Karas"), status=422, says="Karras"),
    Bad(
        path=JOBS,
        body=native_body(**(NATIVE_CALL | {"payload": picture() | {"sampler_name": "Eulr a"}})),
        status=422,
        says="Euler a",
    ),
    # What no engine can run, with the reason for each gpu.
    Bad(path=PROMPT, body=prompt_body(UNKNOWN_NODE), status=400, says="NoSuchNode"),
    Bad(path=PROMPT, body=prompt_body(UNKNOWN_NODE), status=400, says="box/gpu0"),
    Bad(path=PROMPT, body=prompt_body(SAMPLED), status=400, says="nobody-has-this"),
    Bad(path=JOBS, body=native_body(service="comfyui", workflow=UNKNOWN_NODE), status=422, says="box/gpu0"),
    Bad(
        path=JOBS,
        body=native_body(**NATIVE_WORKFLOW, labels=["gold"]),
        status=422,
        says="gold",
    ),
]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with small_fleet(tmp_path) as fleet:
        yield fleet


async def ask(client: Client, path: str, data: object) -> tuple[int, dict[str, str], Any]:
    headers = {"Content-Type": "application/json"}
    async with client.http.post(client.url + path, data=data, headers=headers) as answer:
        text = await answer.text()
        is_json = answer.content_type == "application/json"
        return answer.status, dict(answer.headers), json.loads(text) if is_json else text


def is_in_shape(path: str, told: Any) -> bool:
    """Tell whether a refusal looks as the clients of that service expect."""
    if path == PROMPT:
        return {"type", "message", "details", "extra_info"} <= set(told["error"]) and "node_errors" in told
    if path == TXT2IMG:
        fields = isinstance(told.get("detail"), list) and {"loc", "msg", "type"} <= set(told["detail"][0])
        return fields or {"error", "detail", "body", "errors"} <= set(told)
    return {"code", "message", "hint"} == set(told["error"])


async def assert_untouched(client: Client, fleet: Fleet) -> None:
    """Nothing is stored, nothing was computed, and both services still work."""
    assert (await client.get(JOBS))["jobs"] == []
    assert (await client.get("/queue")) == {"queue_running": [], "queue_pending": []}
    assert fleet.computed() == {}
    assert (await client.ended(await client.prompt(WORKFLOW)))["state"] == "succeeded"
    assert (await client.post(TXT2IMG, picture()))[0] == 200


async def test_every_refusal_is_in_shape_and_leaves_nothing(fleet: Fleet) -> None:
    wrong: list[str] = []
    async with fleet.gateway() as client:
        for bad in BAD:
            status, _, told = await ask(client, bad.path, bad.body)
            seen = f"{bad.path} {bad.body[:80]!r}: {status} {str(told)[:300]}"
            if status != bad.status or bad.says not in str(told) or not is_in_shape(bad.path, told):
                wrong.append(seen)
        assert wrong == [], "\n".join(wrong)
        await assert_untouched(client, fleet)


@pytest.mark.parametrize("path", [PROMPT, TXT2IMG, JOBS])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_over_the_limit(fleet: Fleet, path: str, framing: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(OVER // 1024):
            yield b" " * 1024

    async with fleet.gateway(LIMITED) as client:
        data = io.BytesIO(b" " * OVER) if framing == "length" else pieces()
        status, _, told = await ask(client, path, data)
        assert status == 413
        # ComfyUI's own server says it in plain text.
        assert (
            str(told).startswith("Maximum request body size") if path == PROMPT else is_in_shape(path, told)
        )
        await assert_untouched(client, fleet)


async def test_a_full_queue(fleet: Fleet) -> None:
    async with fleet.gateway("limits: {queued_max: 1}") as client:
        running = await client.prompt(slow(steps=500, seed=1))
        await until(lambda: client.is_running(running))
        waiting = await client.prompt(slow(steps=1, seed=2))
        for path, body in (
            (PROMPT, prompt_body(slow(seed=3))),
            (TXT2IMG, call_body(seed=3)),
            (JOBS, native_body(**NATIVE_WORKFLOW)),
            (JOBS, native_body(**NATIVE_CALL)),
        ):
            status, headers, told = await ask(client, path, body)
            assert status == 429 and int(headers["Retry-After"]) >= 1, (path, told)
            assert is_in_shape(path, told), told
        assert {job["id"] for job in (await client.get(JOBS))["jobs"]} == {running, waiting}
        async with client.http.post(f"{client.url}/interrupt"):
            pass
        assert (await client.ended(waiting))["state"] == "succeeded"


async def test_engines_that_went_away(fleet: Fleet) -> None:
    """What only an engine can answer is a 503 in shape; jobs wait for it, and run when it is back."""
    async with fleet.gateway() as client:
        gpu = fleet.gpus[0]
        await gpu.comfyui.server.stop()
        await gpu.a1111.server.stop()

        async def are_lost() -> bool:
            return await client.engines_ready() == 0

        await until(are_lost)
        for path in ("/internal/sysinfo", "/sdapi/v1/memory", "/sd/file=x.png", "/comfy/extensions/x.js"):
            async with client.http.get(client.url + path) as answer:
                text = await answer.text()
                assert answer.status in {403, 404, 502, 503}, (path, answer.status, text)
                assert "Traceback" not in text and "Errno" not in text
        async with client.http.get(client.url + "/sdapi/v1/memory") as answer:
            assert answer.status == 503 and {"error", "detail"} <= set(await answer.json())
        job = await client.prompt(slow(steps=1, seed=1))
        shown = await client.job(job)
        assert shown["state"] == "queued" and shown["reason"]["text"]
        await gpu.comfyui.server.start()
        await gpu.a1111.server.start()
        assert (await client.ended(job))["state"] == "succeeded"


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        # ComfyUI itself stumbles over an order that is no object, and says so in plain text.
        ("/queue", 500, "Server got itself in trouble"),
        ("/history", 500, "Server got itself in trouble"),
        ("/internal/progress", 422, "detail"),
        ("/sdapi/v1/options", 422, "detail"),
        ("/gpulane/v1/gpus/nobody/drain", 404, "hint"),
    ],
)
async def test_orders_without_sense(fleet: Fleet, path: str, status: int, says: str) -> None:
    async with fleet.gateway() as client:
        for body in (b"{", b"[]", DEEP):
            seen, _, told = await ask(client, path, body)
            assert (seen, "internal" in told) == (status, False) and says in str(told), (body[:20], told)
        await assert_untouched(client, fleet)
