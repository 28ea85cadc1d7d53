"""The listener over real sockets: who gets a request, identity, errors in each one's shape, open paths."""

from __future__ import annotations

import asyncio
import hashlib

import aiohttp
import pytest
from aiohttp import web

from gpulane.config import KeySettings, Settings
from gpulane.core.model import GpuId, Service
from gpulane.errors import Throttled
from gpulane.web.app import build_app
from gpulane.web.ports import Identity
from tests.integration.web.conftest import BOUND_SECONDS, Door, Doors, Echo
from tests.integration.web.standin import StandIn

pytestmark = pytest.mark.anyio

KEY = "gl_secret"
KEYED = Settings(keys=(KeySettings(account="ann", sha256=hashlib.sha256(KEY.encode()).hexdigest()),))


async def raw(url: str, text: str) -> str:
    """Say something and return all that is answered until the other side closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(text.encode())
        async with asyncio.timeout(BOUND_SECONDS):
            return (await reader.read()).decode()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/comfy/view?filename=%61%2Fb%20c.png", "/view?filename=%61%2Fb%20c.png"),
        ("/sd/file=/a//b/%2e%2E/c", "/file=/a//b/%2e%2E/c"),
        ("http://any/prompt?x=%7E", "/prompt?x=%7E"),
    ],
)
async def test_targets_reach_fronts_as_they_came(door: Door, target: str, expected: str) -> None:
    said = await raw(door.url, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert said.startswith("HTTP/1.1 200")
    assert f'"target": "{expected}"' in said
    assert '"role": "admin"' in said


async def test_redirects_and_unknown_paths(door: Door) -> None:
    for path, location in (("/comfy?a=b", "/comfy/?a=b"), ("/sd", "/sd/"), ("/", "/gpulane/")):
        async with door.client.get(path, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (307, location)
    assert (await door.json("GET", "/nothing", status=404))["error"]["code"] == "not_found"
    assert (await door.json("GET", "/internal/logs", status=403))["error"]["code"] == "closed"
    assert (await door.json("GET", "/gpulane/v1/nothing", status=404))["error"]["hint"]


async def test_only_service_is_the_root(doors: Doors, door: Door) -> None:
    async def never(_: web.Request) -> web.Response:
        return web.Response()

    await doors.engine(door, never, service=Service.COMFYUI, gpu=GpuId("box/gpu0"))
    assert (await door.json("GET", "/"))["service"] == "comfyui"
    assert (await door.json("GET", "/assets/x.js"))["service"] == "comfyui"
    assert (await door.json("GET", "/gpulane/v1/queue"))["waiting"] == 1


async def test_listener_of_a_service_has_nothing_else(doors: Doors) -> None:
    door = await doors.open(root=Service.A1111)
    for path in ("/", "/gpulane/v1/jobs", "/prompt", "/metrics", "/comfy/"):
        told = await door.json("GET", path)
        assert (told["service"], told["target"]) == ("a1111", path)


async def test_keys_are_asked_for_in_the_services_shape(doors: Doors) -> None:
    door = await doors.open(KEYED)
    own = await door.json("GET", "/gpulane/v1/jobs", status=401)
    assert own["error"]["code"] == "not_authenticated" and "Bearer" in own["error"]["hint"]
    comfyui = await door.json("GET", "/queue", status=401)
    assert comfyui["error"]["type"] == "not_authenticated" and comfyui["node_errors"] == {}
    a1111 = await door.json("GET", "/sdapi/v1/options", status=401)
    assert "A key is needed." in a1111["detail"]
    async with door.client.get("/queue") as answer:
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    told = await door.json("GET", "/queue", headers={"X-Api-Key": KEY})
    assert (told["account"], told["role"]) == ("ann", "user")


async def test_health_needs_no_key_and_readiness_tells(doors: Doors) -> None:
    door = await doors.open(KEYED)
    for path in ("/gpulane/healthz", "/gpulane/readyz"):
        async with door.client.get(path) as answer:
            assert answer.status == 200
    door.gateway.is_ready = False
    async with door.client.get("/gpulane/readyz") as answer:
        assert answer.status == 503
    async with door.client.get("/gpulane/healthz") as answer:
        assert answer.status == 200
    async with door.client.get("/metrics") as answer:
        assert answer.status == 401


async def test_other_sites_pages_are_refused(door: Door) -> None:
    refused = await door.json("POST", "/prompt", status=403, headers={"Origin": "http://evil.example"})
    assert refused["error"]["type"] == "cross_site"
    refused = await door.json("GET", "/gpulane/v1/jobs", status=403, headers={"Host": "evil.example"})
    assert refused["error"]["code"] == "foreign_host"


class Failing(Echo):
    """A front in which everything goes wrong."""

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        if target == "/throttled":
            raise Throttled("The queue is full.", retry_after_seconds=1.2)
        if target == "/late":
            response = web.StreamResponse(headers={"Content-Length": "100"})
            await response.prepare(request)
            await response.write(b"half")
        raise ValueError("a secret detail")


async def test_errors_have_shapes_and_tell_no_secrets(doors: Doors, door: Door) -> None:
    context = await StandIn(door.gateway.folder).open()
    app = build_app(context, {Service.COMFYUI: Failing(Service.COMFYUI)}, root=Service.COMFYUI)
    url = await doors.serve(app)
    async with aiohttp.ClientSession(url) as client:
        async with client.get("/throttled") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "2")
            assert (await answer.json())["error"]["type"] == "queue_full"
        async with client.get("/broken") as answer:
            assert answer.status == 500
            assert "secret" not in await answer.text()
        with pytest.raises(aiohttp.ClientError):
            async with client.get("/late") as answer:
                await answer.read()


async def test_metrics_count(door: Door) -> None:
    await door.json("GET", "/queue")
    async with door.client.get("/metrics") as answer:
        text = await answer.text()
    assert 'gpulane_requests_total{method="GET",owner="comfyui",status="200"} 1.0' in text
    assert 'gpulane_queue_depth{service="comfyui"} 1.0' in text
    assert "gpulane_ready 1.0" in text


async def test_page_brings_everything_itself(door: Door) -> None:
    for path, kind in (
        ("/gpulane/", "html"),
        ("/gpulane/page.js", "javascript"),
        ("/gpulane/page.css", "css"),
    ):
        async with door.client.get(path) as answer:
            text = await answer.text()
            assert answer.status == 200
            assert kind in answer.headers["Content-Type"]
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert "http://" not in text and "https://" not in text
            assert "innerHTML" not in text
