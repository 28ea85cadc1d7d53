"""A simulated ComfyUI: a real HTTP and WebSocket server that behaves as the recorded 0.27.0 (or 0.3.64) does.

It is held to `../shared/recordings` by the contract tests and shares no code with the gateway.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from aiohttp import web

from gpulane.testing.card import Card, CardUse, Json
from gpulane.testing.comfyui.files import Folders
from gpulane.testing.comfyui.jobs import find_job, list_jobs
from gpulane.testing.comfyui.nodes import CLASSIC_VERSION, MODEL_FOLDERS, MODERN_VERSION, NodeTable
from gpulane.testing.comfyui.queue import PromptQueue, now_ms
from gpulane.testing.comfyui.runner import PromptRunner
from gpulane.testing.comfyui.sockets import SocketHub
from gpulane.testing.comfyui.userdata import UserData, frontend_file
from gpulane.testing.comfyui.validation import validate_prompt
from gpulane.testing.faults import Faults
from gpulane.testing.server import Answerer, SimServer

MAX_UPLOAD_BYTES: Final = 104_857_600

DEFAULT_MODELS: Final[Mapping[str, Sequence[str]]] = {
    "checkpoints": ("sd15.safetensors", "dreamshaper_8.safetensors", "sd_xl_base_1.0.safetensors"),
    "loras": ("detail.safetensors",),
    "vae": ("vae-ft-mse-840000.safetensors",),
    "diffusion_models": ("flux1-dev.safetensors",),
    "text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
}

LOOPBACK_NAMES: Final = frozenset({"127.0.0.1", "localhost", "::1"})

_TROUBLE: Final = "500 Internal Server Error\n\nServer got itself in trouble"


class SimComfyUI:
    """One simulated ComfyUI: `async with SimComfyUI(card=card) as engine: engine.url`."""

    def __init__(
        self,
        *,
        card: Card | None = None,
        port: int = 0,
        version: str = MODERN_VERSION,
        models: Mapping[str, Sequence[str]] = DEFAULT_MODELS,
        checkpoints: Sequence[str] | None = None,
        folder: Path | None = None,
        previews: bool = False,
        plain_pictures: bool = False,
        test_node_prefix: str = "Sim",
        extra_nodes: Mapping[str, Json] | None = None,
        without_nodes: Sequence[str] = (),
        seed: int = 0,
        faults: Faults | None = None,
        exits_on_crash: bool = False,
    ) -> None:
        if version not in (CLASSIC_VERSION, MODERN_VERSION):
            raise ValueError(f"version must be {CLASSIC_VERSION} or {MODERN_VERSION}, not {version}")
        self.version = version
        self.card = card or Card()
        self.server = SimServer(self, port=port, faults=faults, exits_on_crash=exits_on_crash)
        self.faults = self.server.faults
        self.models = {name: list(names) for name, names in models.items()}
        if checkpoints is not None:
            self.models["checkpoints"] = list(checkpoints)
        self.folders = Folders(folder, seed=seed)
        self.nodes = NodeTable(
            version=version,
            models=self.models,
            test_prefix=test_node_prefix,
            extra=extra_nodes,
            without=without_nodes,
        )
        self.hub = SocketHub(faults=self.faults, features=self._features())
        self.queue = PromptQueue()
        self.runner: PromptRunner | None = None
        self._number = 0
        self._previews = previews
        self._plain_pictures = plain_pictures
        self._use: CardUse | None = None
        self._users = UserData()

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.server.stop()
        self.folders.close()

    @property
    def url(self) -> str:
        return self.server.url

    # -- what the server asks of an engine

    def begin_life(self, url: str) -> None:
        self.queue = PromptQueue()
        self.folders.begin_life()
        self._number = 0
        self._use = self.card.attach(url, "comfyui")
        self.runner = PromptRunner(
            queue=self.queue,
            hub=self.hub,
            nodes=self.nodes,
            folders=self.folders,
            card=self._use,
            faults=self.faults,
            previews=self._previews,
            plain_pictures=self._plain_pictures,
            crash=self.server.crash_soon,
            later=lambda work: self.server.spawn(work, name="unload later"),
        )
        self.server.spawn(self.hub.publish(), name="publish")
        self.server.spawn(self.runner.work(), name="run prompts")

    def end_life(self, *, in_order: bool) -> None:
        assert self._use is not None
        if in_order:
            self._use.close()
        else:
            self._use.lost()
            self.hub.forget_all()

    async def drop_sockets(self) -> None:
        await self.hub.close_all()

    def sim_state(self) -> dict[str, Json]:
        runner = self.runner
        assert runner is not None
        return {
            "kind": "comfyui",
            "version": self.version,
            "running": self.queue.running[1] if self.queue.running else None,
            "pending": [item[1] for item in self.queue.heap],
            "runs": runner.runs,
            "runner_dead": runner.is_dead,
            "sockets": len(self.hub),
            "resident": self.card.resident(self.url),
        }

    # -- HTTP

    def add_routes(self, app: web.Application) -> None:
        app.middlewares.append(self._guard)
        modern = self.version == MODERN_VERSION
        for prefix in ("", "/api"):
            for method, path, handler in self._routes():
                if method == "GET":
                    app.router.add_get(prefix + path, handler)  # which answers HEAD too
                else:
                    app.router.add_route(method, prefix + path, handler)
        if modern:
            for prefix in ("/api", "/api/api"):
                app.router.add_get(prefix + "/jobs", self._get_jobs)
                app.router.add_post(prefix + "/jobs/cancel", self._post_jobs_cancel)
                app.router.add_get(prefix + "/jobs/{job_id}", self._get_job)
                app.router.add_post(prefix + "/jobs/{job_id}/cancel", self._post_job_cancel)
            app.router.add_get("/api/assets", self._get_assets)
            for prefix in ("", "/api"):
                app.router.add_get(prefix + "/global_subgraphs", self._empty_object)
                app.router.add_get(prefix + "/node_replacements", self._empty_object)
        app.router.add_get("/{path:.*}", self._get_static)

    def _routes(self) -> list[tuple[str, str, Answerer]]:
        users = self._users
        return [
            ("GET", "/ws", self._get_ws),
            ("GET", "/prompt", self._get_prompt),
            ("POST", "/prompt", self._post_prompt),
            ("GET", "/queue", self._get_queue),
            ("POST", "/queue", self._post_queue),
            ("GET", "/history", self._get_history),
            ("GET", "/history/{prompt_id}", self._get_history),
            ("POST", "/history", self._post_history),
            ("POST", "/interrupt", self._post_interrupt),
            ("POST", "/free", self._post_free),
            ("GET", "/object_info", self._get_object_info),
            ("GET", "/object_info/{class_type}", self._get_object_info),
            ("GET", "/system_stats", self._get_system_stats),
            ("GET", "/features", self._answer(self._features)),
            ("GET", "/embeddings", self._answer(lambda: self.models.get("embeddings", []))),
            ("GET", "/models", self._answer(lambda: MODEL_FOLDERS[self.version])),
            ("GET", "/models/{folder}", self._get_model_folder),
            ("GET", "/extensions", self._answer(list)),
            ("GET", "/experiment/models", self._answer(list)),
            ("GET", "/workflow_templates", self._empty_object),
            ("GET", "/i18n", self._empty_object),
            ("GET", "/view", self._get_view),
            ("GET", "/view_metadata/{folder}", self._not_found),
            ("POST", "/upload/image", self._post_upload_image),
            ("POST", "/upload/mask", self._post_upload_mask),
            ("GET", "/users", self._answer(lambda: {"storage": "server", "migrated": False})),
            ("POST", "/users", users.post_user),
            ("GET", "/settings", users.get_settings),
            ("POST", "/settings", users.post_settings),
            ("GET", "/settings/{id}", users.get_setting),
            ("POST", "/settings/{id}", users.post_setting),
            ("GET", "/userdata", users.list_files),
            ("GET", "/v2/userdata", users.list_files_v2),
            ("GET", "/userdata/{file}", users.get_file),
            ("POST", "/userdata/{file}", users.post_file),
            ("DELETE", "/userdata/{file}", users.delete_file),
        ]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Answerer) -> web.StreamResponse:
        """The original's checks of where a request comes from, and its answer to its own mistakes."""
        if not request.path.startswith("/sim/") and self._is_foreign(request):
            return web.Response(status=403)
        if request.method == "OPTIONS":
            return web.Response(status=200)
        try:
            return await handler(request)
        except (ValueError, TypeError, KeyError, AttributeError):
            return web.Response(status=500, text=_TROUBLE)
        except web.HTTPNotFound:
            return web.Response(status=404)

    def _is_foreign(self, request: web.Request) -> bool:
        if self.version == MODERN_VERSION and request.headers.get("Sec-Fetch-Site") == "cross-site":
            return True
        if "Host" not in request.headers or "Origin" not in request.headers:
            return False
        host, origin = urlsplit("//" + request.headers["Host"]), urlsplit(request.headers["Origin"])
        if host.hostname not in LOOPBACK_NAMES or not origin.hostname:
            return False
        # A port that one side leaves out is not compared.
        ports_differ = origin.port is not None and host.port is not None and origin.port != host.port
        return host.hostname != origin.hostname or ports_differ

    def _answer(self, make: Callable[[], Json]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.json_response(make())

        return answer

    async def _empty_object(self, _request: web.Request) -> web.Response:
        return web.json_response({})

    async def _not_found(self, _request: web.Request) -> web.Response:
        return web.Response(status=404)

    def _features(self) -> Json:
        features: dict[str, Json] = {
            "supports_preview_metadata": True,
            "max_upload_size": MAX_UPLOAD_BYTES,
        }
        if self.version == MODERN_VERSION:
            features |= {
                "extension": {"manager": {"supports_v4": True}},
                "node_replacements": True,
                "assets": False,
            }
        return features

    # -- prompts

    def _exec_info(self) -> Json:
        return {"exec_info": {"queue_remaining": self.queue.remaining}}

    async def _get_prompt(self, _request: web.Request) -> web.Response:
        return web.json_response(self._exec_info())

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body: Json = json.loads(await request.text())  # whatever its content type
        number = self._number_of(body)
        if "prompt" not in body:
            return _refused("no_prompt", "No prompt provided", "No prompt provided")
        prompt: dict[str, Json] = body["prompt"]
        prompt_id = self._id_of(body)
        if prompt_id is None:
            details = (
                "prompt_id must be a UUID string in canonical lowercase hyphenated form; "
                "omit it to let the server generate one"
            )
            return _refused("invalid_prompt_id", "prompt_id must be a valid UUID", details)
        if body["prompt"] == [] and self.version == CLASSIC_VERSION:
            prompt = {}
        prompt.items()  # a list is an AttributeError here, and so a 500
        validated = validate_prompt(
            prompt,
            self.nodes,
            file_exists=lambda name: self.folders.locate(name) is not None,
            targets=body.get("partial_execution_targets"),
        )
        extra_data: Json = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if validated.error is not None:
            answer = {"error": validated.error, "node_errors": validated.node_errors}
            return web.json_response(answer, status=400)
        if self.version == MODERN_VERSION:
            extra_data["create_time"] = now_ms()
        try:
            self.queue.put((number, prompt_id, prompt, extra_data, validated.outputs))
        finally:
            self._send_status()
        return web.json_response(
            {"prompt_id": prompt_id, "number": number, "node_errors": validated.node_errors}
        )

    def _number_of(self, body: Json) -> float:
        if "number" in body:
            return float(body["number"])
        number = self._number
        if "front" in body and body["front"]:  # noqa: RUF019 - it may be a list, without get
            number = -number
        self._number += 1
        return number

    def _id_of(self, body: Json) -> str | None:
        """The prompt's id; None for one that this version refuses."""
        if self.version == CLASSIC_VERSION:
            return str(body.get("prompt_id", uuid4()))
        wanted: Json = body.get("prompt_id")
        if wanted is None:
            return str(uuid4())
        try:
            return wanted if isinstance(wanted, str) and str(UUID(wanted)) == wanted else None
        except ValueError:
            return None

    def _send_status(self) -> None:
        self.hub.send("status", {"status": self._exec_info()}, None)

    async def _get_queue(self, _request: web.Request) -> web.Response:
        return web.json_response(self.queue.as_answer())

    async def _post_queue(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        if body.get("clear"):
            self.queue.heap.clear()
            self._send_status()
        for prompt_id in _ids(body):
            if self.queue.delete(prompt_id):
                self._send_status()
        return web.Response()

    async def _get_history(self, request: web.Request) -> web.Response:
        query = request.query
        max_items = int(query["max_items"]) if "max_items" in query else None
        offset = int(query.get("offset", -1))
        prompt_id = request.match_info.get("prompt_id")
        return web.json_response(self.queue.history_answer(prompt_id, max_items, offset))

    async def _post_history(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        if body.get("clear"):
            self.queue.history.clear()
        for prompt_id in _ids(body):
            self.queue.history.pop(prompt_id, None)
        return web.Response()

    async def _post_interrupt(self, request: web.Request) -> web.Response:
        text = await request.text()
        body: Json = json.loads(text) if text else {}
        prompt_id = body.get("prompt_id")
        assert self.runner is not None
        if not prompt_id or (self.queue.running and self.queue.running[1] == prompt_id):
            self.runner.is_interrupted = True
        return web.Response()

    async def _post_free(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        if self.faults.unload_now() == "hangs":
            await asyncio.Event().wait()
        if body.get("unload_models"):
            self.queue.set_flag("unload_models")
        if body.get("free_memory"):
            self.queue.set_flag("free_memory")
        return web.Response()

    # -- /api/jobs

    async def _get_jobs(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(list_jobs(self.queue, request.query))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)

    async def _get_job(self, request: web.Request) -> web.Response:
        job = find_job(self.queue, request.match_info["job_id"])
        if job is None:
            return web.json_response({"error": "Job not found"}, status=404)
        return web.json_response(job)

    def _cancel(self, job_id: str) -> bool:
        assert self.runner is not None
        if self.queue.running and self.queue.running[1] == job_id:
            self.runner.is_interrupted = True
            return True
        if self.queue.delete(job_id):
            self._send_status()
            return True
        return False

    async def _post_job_cancel(self, request: web.Request) -> web.Response:
        return web.json_response({"cancelled": self._cancel(request.match_info["job_id"])})

    async def _post_jobs_cancel(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        cancelled = [self._cancel(job_id) for job_id in body["job_ids"]]
        return web.json_response({"cancelled": any(cancelled)})

    async def _get_assets(self, _request: web.Request) -> web.Response:
        error: Json = {
            "code": "SERVICE_DISABLED",
            "message": (
                "Assets system is disabled. Start the server with --enable-assets to use this feature."
            ),
            "details": {},
        }
        return web.json_response({"error": error}, status=503)

    # -- the rest

    async def _get_ws(self, request: web.Request) -> web.StreamResponse:
        runner = self.runner
        assert runner is not None
        running = {"client_id": runner.client_id, "node": runner.last_node}
        return await self.hub.serve(request, {"status": self._exec_info()}, running)

    async def _get_object_info(self, request: web.Request) -> web.Response:
        class_type = request.match_info.get("class_type")
        return web.json_response(self.nodes.object_info(self.folders.input_files(), class_type))

    async def _get_system_stats(self, _request: web.Request) -> web.Response:
        is_modern = self.version == MODERN_VERSION
        system: dict[str, Json] = {
            "os": "linux" if is_modern else "posix",
            "ram_total": 64 * 1024**3,
            "ram_free": 48 * 1024**3,
            "comfyui_version": self.version,
            "required_frontend_version": "1.45.20" if is_modern else "1.27.10",
            "installed_templates_version": "0.1.95",
            "required_templates_version": "0.11.1" if is_modern else "0.1.95",
            "python_version": sys.version,
            "pytorch_version": "2.13.0+sim",
            "embedded_python": False,
            "argv": ["main.py", "--port", str(self.server.port)],
        }
        if is_modern:
            system |= {"comfy_package_versions": [], "deploy_environment": "local-git"}
        free = max(0, self.card.bytes_total - self.card.bytes_used())
        mine = sum(self.card.resident(self.url).values())
        device = {
            "name": f"cuda:0 Simulated GPU {self.card.name} : cudaMallocAsync",
            "type": "cuda",
            "index": 0,
            "vram_total": self.card.bytes_total,
            "vram_free": free,
            "torch_vram_total": mine,
            "torch_vram_free": 0,
        }
        return web.json_response({"system": system, "devices": [device]})

    async def _get_model_folder(self, request: web.Request) -> web.Response:
        folder = request.match_info["folder"]
        if folder not in MODEL_FOLDERS[self.version]:
            return web.Response(status=404)
        return web.json_response(self.models.get(folder, []))

    async def _get_view(self, request: web.Request) -> web.StreamResponse:
        spoils = self.faults.truncate_responses > 0 or self.faults.slow_body_bytes_per_second > 0
        return self.folders.view(request, in_memory=spoils and "Range" not in request.headers)

    async def _post_upload_image(self, request: web.Request) -> web.Response:
        return await self.folders.upload(request, is_mask=False)

    async def _post_upload_mask(self, request: web.Request) -> web.Response:
        return await self.folders.upload(request, is_mask=True)

    async def _get_static(self, request: web.Request) -> web.StreamResponse:
        return frontend_file(request.match_info["path"])


def _refused(kind: str, message: str, details: str) -> web.Response:
    error: Json = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return web.json_response({"error": error, "node_errors": {}}, status=400)


def _ids(body: Json) -> list[str]:
    return body.get("delete", ())
