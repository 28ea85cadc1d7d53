"""A tiny engine like an LLM server: chat completions (also streamed), Ollama's generate, a list of models,
and the ways in which Ollama and llama-swap tell what is loaded and unload it.

It stands for any `http` service: it computes on the card and has no queue of its own, so two requests at once
overlap.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Final, Literal, Self
from uuid import uuid4

from aiohttp import web

from gpulane.testing.card import Card, CardUse, Died, Json, OutOfMemory
from gpulane.testing.faults import Faults
from gpulane.testing.server import SimServer

DEFAULT_MODELS: Final = ("tiny-llm",)
DEFAULT_TOKENS: Final = 16
Flavor = Literal["plain", "ollama", "llama-swap", "llama-swap-old"]
"""Whose API for unloading it has; the old llama-swap knows GET /unload alone. All have `POST /api/unload`,
which stands for a server of one's own."""
SECONDS_PER_TOKEN: Final = 0.02
WORDS: Final = "the card computes one token after another and says so here".split()  # noqa: SIM905


class SimHttpEngine:
    """One simulated LLM server: `async with SimHttpEngine(card=card) as engine: engine.url`."""

    def __init__(
        self,
        *,
        card: Card | None = None,
        port: int = 0,
        models: Sequence[str] = DEFAULT_MODELS,
        flavor: Flavor = "plain",
        faults: Faults | None = None,
        exits_on_crash: bool = False,
    ) -> None:
        self.card = card or Card()
        self.server = SimServer(self, port=port, faults=faults, exits_on_crash=exits_on_crash)
        self.faults = self.server.faults
        self.models = tuple(models)
        self.flavor: Flavor = flavor
        self.unloads = 0
        """Requests to unload, whatever became of them."""
        self.runs = 0
        self._active: set[str] = set()
        self._use: CardUse | None = None

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.server.stop()

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def card_use(self) -> CardUse:
        assert self._use is not None, "the engine is not started"
        return self._use

    # -- what the server asks of an engine

    def begin_life(self, url: str) -> None:
        self._active.clear()
        self.runs = 0
        self._use = self.card.attach(url, "http")

    def end_life(self, *, in_order: bool) -> None:
        if in_order:
            self.card_use.close()
        else:
            self.card_use.lost()

    async def drop_sockets(self) -> None:
        """It has none."""

    def sim_state(self) -> dict[str, Json]:
        return {
            "kind": "http",
            "running": sorted(self._active),
            "runs": self.runs,
            "unloads": self.unloads,
            "resident": self.card.resident(self.url),
        }

    # -- HTTP

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/models", self._get_models)
        app.router.add_post("/v1/chat/completions", self._post_chat)
        app.router.add_post("/api/generate", self._post_generate)
        app.router.add_post("/api/unload", self._post_unload)
        app.router.add_get("/health", self._get_health)
        match self.flavor:
            case "ollama":
                app.router.add_get("/api/version", self._get_version)
                app.router.add_get("/api/ps", self._get_loaded)
            case "llama-swap" | "llama-swap-old":
                app.router.add_get("/running", self._get_running)
                app.router.add_get("/unload", self._get_unload)
                if self.flavor == "llama-swap":
                    app.router.add_get("/api/version", self._get_version)
                    app.router.add_post("/api/models/unload", self._post_unload)
            case "plain":
                pass

    async def _get_health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _get_models(self, _request: web.Request) -> web.Response:
        models = [{"id": name, "object": "model", "owned_by": "sim"} for name in self.models]
        return web.json_response({"object": "list", "data": models})

    async def _get_version(self, _request: web.Request) -> web.Response:
        told = {"version": "0.12.6"} if self.flavor == "ollama" else {"version": "216", "commit": "0046040"}
        return web.json_response(told)

    async def _get_loaded(self, _request: web.Request) -> web.Response:
        """Ollama's list of what lies in memory."""
        resident = self.card.resident(self.url).items()
        models = [{"name": m, "model": m, "size": size, "size_vram": size} for m, size in resident]
        return web.json_response({"models": models})

    async def _get_running(self, _request: web.Request) -> web.Response:
        """llama-swap's list of the processes that it has started."""
        resident = self.card.resident(self.url)
        return web.json_response({"running": [{"model": m, "state": "ready"} for m in resident]})

    async def _get_unload(self, _request: web.Request) -> web.Response:
        await self._unload(None)
        return web.Response(text="OK")

    async def _post_unload(self, _request: web.Request) -> web.Response:
        await self._unload(None)
        return web.json_response({"msg": "ok"})

    async def _unload(self, model: str | None) -> None:
        """Give one model's memory back, or that of all, as the faults allow."""
        self.unloads += 1
        match self.faults.unload_now():
            case "lies":
                pass
            case "hangs":
                await asyncio.Event().wait()
            case "late":
                self.server.spawn(self._unload_later(model), name="unload later")
            case "ok":
                await self.card_use.unload(model=model)

    async def _unload_later(self, model: str | None) -> None:
        await asyncio.sleep(self.faults.unload_seconds)
        await self.card_use.unload(model=model)

    async def _post_chat(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        model, tokens = self._model(body), int(body.get("max_tokens") or DEFAULT_TOKENS)
        answer_id = _job_id(request)
        if not body.get("stream"):
            text = "".join([word async for word in self._tokens(answer_id, model, tokens)])
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
            usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
            answer = {"id": answer_id, "object": "chat.completion", "model": model, "choices": [choice]}
            return web.json_response(answer | {"usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for word in self._tokens(answer_id, model, tokens):
            delta = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            chunk = {
                "id": answer_id,
                "object": "chat.completion.chunk",
                "model": model,
                "choices": [delta],
            }
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _post_generate(self, request: web.Request) -> web.StreamResponse:
        """Ollama's way: lines of JSON, streamed unless told otherwise."""
        body = await _body(request)
        options: Json = body.get("options") or {}
        model, tokens = self._model(body), int(options.get("num_predict") or DEFAULT_TOKENS)
        job_id = _job_id(request)
        if not body.get("prompt") and body.get("keep_alive") == 0:
            await self._unload(model)
            return web.json_response({"model": model, "response": "", "done": True, "done_reason": "unload"})
        if body.get("stream") is False:
            text = "".join([word async for word in self._tokens(job_id, model, tokens)])
            return web.json_response({"model": model, "response": text, "done": True})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for word in self._tokens(job_id, model, tokens):
            line = {"model": model, "response": word, "done": False}
            await response.write(json.dumps(line).encode() + b"\n")
        await response.write(json.dumps({"model": model, "response": "", "done": True}).encode() + b"\n")
        return response

    def _model(self, body: dict[str, Json]) -> str:
        model = str(body.get("model") or self.models[0])
        if model not in self.models:
            error = {
                "error": {"message": f"The model `{model}` does not exist", "type": "invalid_request_error"}
            }
            raise web.HTTPNotFound(text=json.dumps(error), content_type="application/json")
        return model

    async def _tokens(self, job_id: str, model: str, tokens: int) -> AsyncIterator[str]:
        """Load, then one token after another; a client that leaves stops nothing."""
        if self.faults.zombie:
            self.faults.struck["zombie"] += 1
            await asyncio.Event().wait()
        is_dying, hangs = self.faults.strike("crash_mid_jobs"), self.faults.strike("hang_jobs")
        is_failing, is_oom = self.faults.strike("error_jobs"), self.faults.strike("oom_jobs")
        self._active.add(job_id)
        try:
            with self.card_use.interval("compute", job_id, model):
                if is_oom:
                    self.card_use.raise_oom(job_id, model, 1)
                await self.card_use.load(model, job_id, keep_others=True)
                for number in range(tokens):
                    await self.card_use.sleep(SECONDS_PER_TOKEN / self.card.options.speed)
                    if number * 2 >= tokens - 1:
                        await self._strike(is_dying=is_dying, hangs=hangs, is_failing=is_failing)
                    yield WORDS[number % len(WORDS)] + " "
            self.card_use.job_over(job_id, "ok", computed=True)
        except Died:
            self.server.crash_soon()
            await asyncio.Event().wait()
        except (OutOfMemory, RuntimeError) as error:
            self.card_use.job_over(job_id, "error", computed=True)
            text = json.dumps({"error": {"message": str(error), "type": "server_error"}})
            raise web.HTTPInternalServerError(text=text, content_type="application/json") from error
        finally:
            self._active.discard(job_id)
            self.runs += 1

    async def _strike(self, *, is_dying: bool, hangs: bool, is_failing: bool) -> None:
        if is_dying:
            raise Died
        if hangs:
            await asyncio.Event().wait()
        if is_failing:
            raise RuntimeError("simulated failure")


def _job_id(request: web.Request) -> str:
    """Whatever the caller calls the request, or an id of our own: it goes into the card's log."""
    return request.headers.get("X-Request-Id") or f"chatcmpl-{uuid4()}"


async def _body(request: web.Request) -> dict[str, Json]:
    try:
        body: Json = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(
            text='{"error":{"message":"not JSON"}}', content_type="application/json"
        ) from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(
            text='{"error":{"message":"not an object"}}', content_type="application/json"
        )
    return body  # pyright: ignore[reportUnknownVariableType]
