"""The page and its calls, against a little app that speaks Gradio 3.41's protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gpulane.core.model import EngineState, EngineUrl, ModelKey, Service
from gpulane.views import EngineView
from gpulane.web.a1111.gradio import REFUSAL
from gpulane.wire import EngineClient
from tests.integration.web.a1111.ground import ANN, BOUND_SECONDS, Ground, Wanted, ground
from tests.integration.web.standin import GPU

pytestmark = pytest.mark.anyio

LOAD, SWAP, GENERATE, ODD, RESIZE, SILENT = range(6)
"""The functions of the page, by number."""
COMPONENTS = [
    {"id": 1, "props": {"elem_id": "txt2img_subseed_show"}},
    {"id": 2, "props": {"elem_id": "txt2img_generate"}},
    {"id": 3, "props": {"elem_id": "somebodys_extension"}},
]
DEPENDENCIES = [
    {"targets": [], "inputs": [], "outputs": [1], "backend_fn": True, "js": None},
    {"targets": [1], "inputs": [1], "outputs": [1], "backend_fn": True, "js": None},
    {"targets": [2], "inputs": [1], "outputs": [1], "backend_fn": True, "js": "submit"},
    {"targets": [3], "inputs": [1], "outputs": [1], "backend_fn": True, "js": None},
    {"targets": [0], "inputs": [], "outputs": [], "backend_fn": True, "js": "setupAllResizeHandles"},
    {"targets": [3], "inputs": [], "outputs": [], "backend_fn": True, "js": "somebodysScript"},
]


@dataclass
class Page:
    """The engine's side."""

    app_id: int = 1
    dependencies: list[dict[str, Any]] = field(default_factory=lambda: list(DEPENDENCIES))
    ran: list[int] = field(default_factory=list[int])
    cookies: list[str | None] = field(default_factory=list[str | None])
    configs: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/", self.page)
        app.router.add_get("/config", self.config)
        app.router.add_get("/app_id", self.tell_id)
        app.router.add_get("/queue/join", self.join)
        app.router.add_post("/run/predict", self.predict)
        app.router.add_get("/file={path:.*}", self.file)
        return app

    def _config(self) -> str:
        told = {"version": "3.41.2", "components": COMPONENTS, "dependencies": self.dependencies, "root": ""}
        return json.dumps(told, separators=(",", ":"))

    async def page(self, request: web.Request) -> web.Response:
        self.cookies.append(request.headers.get("Cookie"))
        text = f"<script>window.gradio_config = {self._config()};</script>"
        response = web.Response(text=text, content_type="text/html")
        response.enable_compression()
        return response

    async def config(self, request: web.Request) -> web.Response:
        self.configs += 1
        return web.Response(text=self._config(), content_type="application/json")

    async def tell_id(self, request: web.Request) -> web.Response:
        return web.json_response({"app_id": self.app_id})

    async def file(self, request: web.Request) -> web.Response:
        return web.json_response({"path": request.raw_path})

    async def predict(self, request: web.Request) -> web.Response:
        self.ran.append((await request.json())["fn_index"])
        return web.json_response({"data": ["done"]})

    async def join(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"msg": "send_hash"})
        called = await socket.receive_json()
        await socket.send_json({"msg": "estimation", "rank": 0, "queue_size": 1})
        await socket.send_json({"msg": "send_data"})
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            # As Gradio does: what runs is what the last message names.
            self.ran.append(json.loads(message.data)["fn_index"])
            await socket.send_json({"msg": "process_starts"})
            output = {"data": [called["session_hash"]], "is_generating": False}
            await socket.send_json({"msg": "process_completed", "output": output, "success": True})
        await socket.close()
        return socket


@asynccontextmanager
async def pages(folder: Path) -> AsyncIterator[tuple[Ground, Page]]:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(ground(folder, Wanted(checkpoints=())))
        page = Page()
        runner = web.AppRunner(page.app(), access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = EngineUrl(f"http://127.0.0.1:{runner.addresses[0][1]}")
        view = EngineView(
            url=url,
            service=Service.A1111,
            name="",
            gpu=GPU,
            state=EngineState.READY,
            why="",
            model=ModelKey(""),
            description=None,
        )
        here.gateway.add_engine(view, client=EngineClient(url))
        yield here, page


async def called(here: Ground, number: int, *, data_number: int | None = None) -> list[dict[str, Any]]:
    """Make one call as a page does; returns what came."""
    came: list[dict[str, Any]] = []
    async with asyncio.timeout(BOUND_SECONDS):
        socket = await here.client.ws_connect("/sd/queue/join", headers={"X-Api-Key": ANN})
        async with socket:
            async for message in socket:
                told = json.loads(message.data)
                came.append(told)
                if told["msg"] == "send_hash":
                    await socket.send_json({"fn_index": number, "session_hash": "abc"})
                if told["msg"] == "send_data":
                    data = {"data": ["task(page)", "a cat"], "event_data": None, "session_hash": "abc"}
                    await socket.send_json(
                        data | {"fn_index": number if data_number is None else data_number}
                    )
            came.append({"msg": "closed", "code": socket.close_code})
    return came


async def test_harmless_functions_pass(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        came = await called(here, SWAP)
        assert [told["msg"] for told in came] == [
            "send_hash",
            "estimation",
            "send_data",
            "process_starts",
            "process_completed",
            "closed",
        ]
        assert came[4]["output"]["data"] == ["abc"] and came[-1]["code"] == 1000
        await called(here, LOAD)
        assert page.ran == [SWAP, LOAD] and page.configs == 1


@pytest.mark.parametrize("number", [GENERATE, ODD, 999])
async def test_gpu_and_unknown_functions_end_here(tmp_path: Path, number: int) -> None:
    async with pages(tmp_path) as (here, page):
        came = await called(here, number)
        assert came[-2] == {"msg": "process_completed", "output": {"error": REFUSAL}, "success": False}
        assert came[-1]["code"] == 1000 and page.ran == []
        task = await here.ask("POST", "/sd/internal/progress", body={"id_task": "task(page)"})
        assert task["completed"] and not task["queued"]


async def test_functions_without_anything_to_compute_just_end(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        came = await called(here, SILENT)
        assert came[-2]["success"] and came[-2]["output"]["data"] == [] and page.ran == []
        await called(here, RESIZE)
        assert page.ran == [RESIZE]


async def test_the_data_must_be_of_the_function_that_was_judged(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        came = await called(here, SWAP, data_number=GENERATE)
        assert "process_completed" not in [told["msg"] for told in came] and page.ran == []


async def test_numbers_are_read_again_when_the_app_was_restarted(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        await called(here, SWAP)
        page.app_id = 2
        page.dependencies[SWAP], page.dependencies[GENERATE] = DEPENDENCIES[GENERATE], DEPENDENCIES[SWAP]
        came = await called(here, SWAP)
        assert not came[-2]["success"]
        assert page.ran == [SWAP] and page.configs == 2


async def test_predict_is_judged_alike(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        for path in ("/sd/run/predict", "/sd/run/predict/", "/sd/api/predict"):
            call: dict[str, Any] = {"data": [], "fn_index": GENERATE, "session_hash": "abc"}
            told = await here.ask("POST", path, body=call, status=500)
            assert told == {"error": REFUSAL}
            assert await here.ask("POST", path, body={"data": []}, status=500)
        told = await here.ask("POST", "/sd/run/predict", body={"data": [], "fn_index": SWAP})
        assert told == {"data": ["done"]} and page.ran == [SWAP]
        # Gradio 4's queue.
        told = await here.ask("POST", "/sd/queue/join", body={"fn_index": GENERATE}, status=422)
        assert told == {"detail": REFUSAL}
        await here.ask("POST", "/sd/call/txt2img", body={"data": []}, status=403)


async def test_the_root_is_rewritten_under_the_prefix_only(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        headers = {"X-Api-Key": ANN, "Cookie": "access-token-unsecure=x", "Accept-Encoding": "gzip"}
        async with here.client.get("/sd/", headers=headers) as answer:
            text = await answer.text()
            assert answer.status == 200 and answer.content_type == "text/html"
        assert '"root":"/sd"' in text and page.cookies[-1] == "access-token-unsecure=x"
        assert (await here.ask("GET", "/sd/config"))["root"] == "/sd"
        odd = "/file=/srv/a b%2Fc=d//e.png"
        assert (await here.ask("GET", f"/sd{odd.replace(' ', '%20')}"))["path"].startswith("/file=/srv/")


async def test_a_page_that_says_nothing_is_closed(tmp_path: Path) -> None:
    async with pages(tmp_path) as (here, page):
        async with here.client.ws_connect("/sd/queue/join", headers={"X-Api-Key": ANN}) as socket:
            assert (await socket.receive_json())["msg"] == "send_hash"
            await socket.send_str("{nope")
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert page.ran == []
