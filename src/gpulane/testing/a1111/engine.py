"""A simulated AUTOMATIC1111 webui 1.10.1, or Forge: a real HTTP server with the one lock and the traps of the
original.

It is held to `../shared/recordings` by the contract tests and shares no code with the gateway. The Gradio
queue (`/queue/join`) is not here: its page needs the real webui.
"""

import asyncio
import random
import string
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Literal, Self
from uuid import uuid4

from aiohttp import web

from gpulane.testing.a1111.checkpoints import Checkpoints
from gpulane.testing.a1111.extras import (
    extras_html,
    face_restorers,
    png_info,
    queue_status,
    script_info,
    upscaled,
)
from gpulane.testing.a1111.render import (
    HttpError,
    Rendering,
    Trouble,
    answer_of,
    decode_image,
    encoded,
    error_body,
    render,
)
from gpulane.testing.a1111.state import State, TaskTable
from gpulane.testing.a1111.tables import (
    FORGE_OPTIONS,
    LATENT_UPSCALE_MODES,
    SCRIPTS,
    Invalid,
    decoded,
    recorded,
    samplers,
    schedulers,
    upscalers,
    with_defaults,
)
from gpulane.testing.card import Card, CardUse, Died, Json, OutOfMemory
from gpulane.testing.faults import Faults
from gpulane.testing.server import Answerer, SimServer

THREADS: Final = 40
"""All synchronous handlers share so many threads: with more jobs held, even progress must wait."""

DEFAULT_CHECKPOINTS: Final = ("sd15.safetensors", "dreamshaper_8.safetensors", "sd_xl_base_1.0.safetensors")
EXTRAS_SECONDS: Final = 0.5
INTERROGATE_SECONDS: Final = 2.0
MAX_BODY_BYTES: Final = 1024**3

LOCKED_OPTIONS: Final = (
    "sd_vae",
    "cross_attention_optimization",
    "fp8_storage",
    "cache_fp16_weight",
)
"""Options beside the checkpoint whose change waits for the lock."""

WORDED_ERRORS: Final = (
    HttpError,
    OutOfMemory,
    RuntimeError,
    KeyError,
    ValueError,
    AssertionError,
    TypeError,
)
"""What the middleware of the original turns into its error shape."""

PAGE: Final = (
    "<!doctype html><html><head><title>Stable Diffusion</title></head><body>Simulated webui</body></html>"
)


class SimA1111:
    """One simulated webui: `async with SimA1111(card=card) as engine: engine.url`."""

    def __init__(
        self,
        *,
        card: Card | None = None,
        port: int = 0,
        checkpoints: Sequence[str] | None = None,
        forge: bool = False,
        nowebui: bool = False,
        hashing: bool = False,
        skip_load: bool = False,
        strict_unload: bool = True,
        tells_memory: bool = True,
        plain_pictures: bool = False,
        faults: Faults | None = None,
        exits_on_crash: bool = False,
    ) -> None:
        """`strict_unload`: generating between unload-checkpoint and reload-checkpoint fails, as on CUDA.
        `tells_memory`: /sdapi/v1/memory tells of the card; else it says what it says without CUDA.
        """
        self.card = card or Card()
        self.server = SimServer(
            self, port=port, faults=faults, max_body_bytes=MAX_BODY_BYTES, exits_on_crash=exits_on_crash
        )
        self.faults = self.server.faults
        self.is_forge = forge
        self._files = tuple(checkpoints or DEFAULT_CHECKPOINTS)
        self._hashing = hashing
        self._nowebui = nowebui
        self._skip_load = skip_load
        self._strict_unload = strict_unload and not forge
        self._plain_pictures = plain_pictures
        self._tells_memory = tells_memory
        self._use: CardUse | None = None
        self._new_process()

    def _new_process(self) -> None:
        self.runs = 0
        self.checkpoints = Checkpoints(self._files, hashing=self._hashing)
        self.options: dict[str, Json] = dict(recorded()["options"])
        if self.is_forge:
            self.options |= FORGE_OPTIONS
        self.options["sd_model_checkpoint"] = self.checkpoints.files[0]
        self.saved_options = {"sd_model_checkpoint"}
        self.state = State(clock=time.monotonic)
        self.tasks = TaskTable()
        self._lock = asyncio.Lock()
        self._threads = asyncio.Semaphore(THREADS)

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
        self._new_process()
        self._use = self.card.attach(url, "a1111")
        if not self._skip_load:
            self._hold_first()

    def _hold_first(self) -> None:
        """The first checkpoint is loaded before the server answers, and is not anybody's job."""
        first = self.checkpoints.files[0]
        size = self.card.model_bytes(first)
        with self.card.change(self.url) as memory:
            fits = memory.bytes_free >= size
            if fits:
                memory.resident[first] = size
        if fits:
            self.checkpoints.hold(first)

    def end_life(self, *, in_order: bool) -> None:
        if in_order:
            self.card_use.close()
        else:
            self.card_use.lost()

    async def drop_sockets(self) -> None:
        """It has none."""

    def sim_state(self) -> dict[str, Json]:
        return {
            "kind": "forge" if self.is_forge else "a1111",
            "running": self.tasks.current if self.state.job else None,
            "pending": list(self.tasks.pending),
            "runs": self.runs,
            "loaded": self.checkpoints.loaded,
            "on_gpu": self.checkpoints.is_on_gpu,
            "resident": self.card.resident(self.url),
        }

    # -- HTTP

    def add_routes(self, app: web.Application) -> None:
        app.middlewares.append(self._guard)
        for method, path, handler in self._api_routes():
            app.router.add_route(method, "/sdapi/v1" + path, self._in_thread(handler))
        app.router.add_get("/openapi.json", self._answer(lambda: recorded()["openapi"]))
        app.router.add_get("/docs", self._get_page)
        if self._nowebui:
            return
        app.router.add_post("/internal/progress", self._in_thread(self._post_internal_progress))
        app.router.add_get("/internal/pending-tasks", self._in_thread(self._get_pending_tasks))
        app.router.add_get("/internal/ping", self._in_thread(self._answer(dict)))
        app.router.add_get("/internal/sysinfo", self._in_thread(self._get_sysinfo))
        app.router.add_get("/config", self._answer(lambda: recorded()["config"]))
        app.router.add_get("/queue/status", self._answer(queue_status))
        app.router.add_get("/", self._get_page)

    def _api_routes(self) -> list[tuple[str, str, Answerer]]:
        answer = self._answer
        vae = "/sd-modules" if self.is_forge else "/sd-vae"
        return [
            ("POST", "/txt2img", self._post_txt2img),
            ("POST", "/img2img", self._post_img2img),
            ("POST", "/extra-single-image", self._post_extra_single),
            ("POST", "/extra-batch-images", self._post_extra_batch),
            ("POST", "/interrogate", self._post_interrogate),
            ("POST", "/png-info", self._post_png_info),
            ("GET", "/progress", self._get_progress),
            ("POST", "/interrupt", self._post_interrupt),
            ("POST", "/skip", self._post_skip),
            ("GET", "/options", answer(lambda: self.options)),
            ("POST", "/options", self._post_options),
            ("GET", "/cmd-flags", answer(self._cmd_flags)),
            ("GET", "/samplers", answer(samplers)),
            ("GET", "/schedulers", answer(schedulers)),
            ("GET", "/upscalers", answer(upscalers)),
            ("GET", "/latent-upscale-modes", answer(lambda: [{"name": n} for n in LATENT_UPSCALE_MODES])),
            ("GET", "/sd-models", answer(self._models)),
            ("GET", vae, answer(list)),
            ("GET", "/hypernetworks", answer(list)),
            ("GET", "/face-restorers", answer(face_restorers)),
            ("GET", "/realesrgan-models", answer(list)),
            ("GET", "/prompt-styles", answer(list)),
            ("GET", "/embeddings", answer(lambda: {"loaded": {}, "skipped": {}})),
            ("GET", "/loras", answer(list)),
            ("GET", "/extensions", answer(list)),
            ("GET", "/scripts", answer(lambda: SCRIPTS)),
            ("GET", "/script-info", answer(script_info)),
            ("GET", "/memory", answer(self._memory)),
            ("POST", "/refresh-checkpoints", self._post_refresh),
            ("POST", "/refresh-vae", self._post_refresh),
            ("POST", "/refresh-embeddings", self._post_refresh),
            ("POST", "/refresh-loras", self._post_refresh),
            ("POST", "/unload-checkpoint", self._post_unload),
            ("POST", "/reload-checkpoint", self._post_reload),
        ]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Answerer) -> web.StreamResponse:
        """Errors in the two shapes of the original."""
        started = time.monotonic()
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = web.json_response({"detail": error.reason}, status=error.status)
        except Invalid as error:
            response = web.json_response({"detail": error.details}, status=422)
        except Died:
            self.server.crash_soon()
            await asyncio.Event().wait()
            raise
        except (
            HttpError,
            OutOfMemory,
            RuntimeError,
            KeyError,
            ValueError,
            AssertionError,
            TypeError,
        ) as error:
            status, body = error_body(error)
            response = web.json_response(body, status=status)
        if not response.prepared:
            response.headers["x-process-time"] = f"{time.monotonic() - started:.4f}"
        return response

    def _in_thread(self, handler: Answerer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A synchronous handler: it holds one of the few threads while it works or waits.

        A client that leaves changes nothing: aiohttp lets the handler run on, as a thread would.
        """

        async def held(request: web.Request) -> web.StreamResponse:
            await request.read()
            async with self._threads:
                return await handler(request)

        return held

    def _answer(self, make: Callable[[], Json]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(_request: web.Request) -> web.StreamResponse:
            return web.json_response(make())

        return answer

    async def _get_page(self, _request: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html")

    async def _get_sysinfo(self, _request: web.Request) -> web.Response:
        return web.Response(text="simulated webui")

    # -- jobs

    async def _post_txt2img(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, "txt2img")

    async def _post_img2img(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, "img2img")

    async def _generate(
        self, request: web.Request, kind: Literal["txt2img", "img2img"]
    ) -> web.StreamResponse:
        values = with_defaults(decoded(await request.text()), recorded()[kind])
        task_id: str = values.get("force_task_id") or _new_task_id(kind)
        if kind == "img2img" and not values.get("init_images"):
            raise HttpError(404, "Init image not found")
        _check_scripts(values, kind)
        if kind == "img2img" and values.get("denoising_strength") is None:
            values["denoising_strength"] = 0.75
        if self.faults.strike("lose_jobs"):
            return self._cut(request)
        job = Rendering(
            kind=kind,
            task_id=task_id,
            values=values,
            trouble=None,
            is_strict_about_unload=self._strict_unload,
            plain_pictures=self._plain_pictures,
        )
        self.tasks.add(task_id, time.monotonic())
        await self._turn_to_zombie()
        async with self._lock:
            sources: list[str] = values.get("init_images") or []
            for source in sources:
                decode_image(source)  # a bad one leaves the task pending for ever, as in the original
            job.trouble = self._trouble()
            self.state.begin(f"scripts_{kind}")
            try:
                self.tasks.start(task_id)
                info = await self._process(job)
                self.tasks.finish(task_id)
            finally:
                self.state.end()
                self.runs += 1
        return web.json_response(answer_of(job, info))

    def _cut(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    async def _turn_to_zombie(self) -> None:
        if self.faults.zombie:
            self.faults.struck["zombie"] += 1
            await asyncio.Event().wait()

    def _trouble(self) -> Trouble | None:
        faults = self.faults
        if faults.strike("crash_mid_jobs"):
            return "crash"
        if faults.strike("hang_jobs"):
            return "hang"
        if faults.strike("oom_jobs"):
            return "oom"
        return "error" if faults.strike("error_jobs") else None

    async def _process(self, job: Rendering) -> Json:
        """Overrides on, render, overrides off. What was loaded stays loaded."""
        overrides: dict[str, Json] = dict(job.values.get("override_settings") or {})
        checkpoint = overrides.get("sd_model_checkpoint")
        if checkpoint is not None and self.checkpoints.find(checkpoint) is None:
            del overrides["sd_model_checkpoint"]  # silently: the current one it is
        before = {name: self.options[name] for name in overrides}  # an unknown one is a KeyError
        # What nobody ever saved stays as the job sets it (modules/processing.py: `if k in opts.data`).
        stored = {name: value for name, value in before.items() if name in self.saved_options}
        self.saved_options.update(overrides)
        outcome = "error"
        try:
            self.options.update(overrides)
            self._retitle()
            info = await render(
                job,
                checkpoints=self.checkpoints,
                wanted=self._selected(),
                state=self.state,
                card=self.card_use,
            )
            outcome = "interrupted" if self.state.interrupted else "ok"
            self._retitle()
        except OutOfMemory:
            outcome = "oom"
            raise
        except (Died, asyncio.CancelledError):
            outcome = ""
            raise
        finally:
            if outcome:
                self.card_use.job_over(job.task_id, outcome, computed=True)
            if job.values.get("override_settings_restore_afterwards", True):
                self.options.update(stored)
        return info

    def _selected(self) -> str:
        """The file that the option names; without it the first."""
        return self.checkpoints.find(self.options["sd_model_checkpoint"]) or self.checkpoints.files[0]

    def _retitle(self) -> None:
        """After a load the option says the full title."""
        self.options["sd_model_checkpoint"] = self.checkpoints.title(self._selected())

    async def _gpu_work(self, name: str, seconds: float) -> None:
        """A short job that takes the lock and the card."""
        job_id = _new_task_id(name)
        await self._turn_to_zombie()
        async with self._lock:
            with self.card_use.interval("compute", job_id, None):
                await self.card_use.sleep(seconds / self.card.options.speed)
            self.card_use.job_over(job_id, "ok", computed=True)

    async def _post_extra_single(self, request: web.Request) -> web.Response:
        body = decoded(await request.text())
        image = upscaled(body, decode_image(str(body.get("image", ""))), self.card.name)
        await self._gpu_work("extras", EXTRAS_SECONDS)
        return web.json_response({"html_info": extras_html(body), "image": image})

    async def _post_extra_batch(self, request: web.Request) -> web.Response:
        body = decoded(await request.text())
        images = [
            upscaled(body, decode_image(entry["data"]), self.card.name) for entry in body.get("imageList", [])
        ]
        await self._gpu_work("extras", EXTRAS_SECONDS * len(images))
        return web.json_response({"html_info": extras_html(body), "images": images})

    async def _post_interrogate(self, request: web.Request) -> web.Response:
        body = decoded(await request.text())
        if not body.get("image"):
            raise HttpError(404, "Image not found")
        decode_image(body["image"])
        model = body.get("model", "clip")
        if model not in ("clip", "deepdanbooru"):
            raise HttpError(404, "Model not found")
        await self._gpu_work("interrogate", INTERROGATE_SECONDS)
        return web.json_response({"caption": "a simulated picture"})

    async def _post_png_info(self, request: web.Request) -> web.Response:
        body = decoded(await request.text())
        return web.json_response(png_info(decode_image(str(body.get("image", "")))))

    # -- who runs, and stop

    async def _get_progress(self, request: web.Request) -> web.Response:
        skips = request.query.get("skip_current_image", "false").lower() in ("true", "1")
        return web.json_response(self.state.progress(None if skips else encoded))

    async def _post_internal_progress(self, request: web.Request) -> web.Response:
        body = decoded(await request.text())
        return web.json_response(self.tasks.progress(body, self.state, encoded))

    async def _get_pending_tasks(self, _request: web.Request) -> web.Response:
        return web.json_response({"size": len(self.tasks.pending), "tasks": list(self.tasks.pending)})

    async def _post_interrupt(self, _request: web.Request) -> web.Response:
        self.state.interrupted = True
        return web.json_response({})

    async def _post_skip(self, _request: web.Request) -> web.Response:
        self.state.skipped = True
        return web.json_response(None)

    # -- options and checkpoints

    async def _post_options(self, request: web.Request) -> web.Response:
        body = decoded(await request.text())
        checkpoint = body.get("sd_model_checkpoint")
        if checkpoint is not None and self.checkpoints.find(checkpoint) is None:
            raise RuntimeError(f"model {checkpoint!r} not found")
        for name, value in body.items():
            is_known = self.options[name] == value  # an unknown one is a KeyError
            self.saved_options.add(name)
            if is_known:
                continue
            self.options[name] = value  # at once, whoever runs
            if name == "sd_model_checkpoint" and not self.is_forge:
                await self._load_selected()
            elif name in LOCKED_OPTIONS and not self.is_forge:
                async with self._lock:
                    pass
        return web.json_response(None)

    async def _load_selected(self) -> None:
        await self._turn_to_zombie()
        async with self._lock:
            if self.checkpoints.loaded != self._selected() or not self._strict_unload:
                await self.checkpoints.load(self._selected(), self.card_use, f"options({uuid4().hex[:8]})")
            self._retitle()

    async def _post_refresh(self, _request: web.Request) -> web.Response:
        async with self._lock:
            return web.json_response(None)

    async def _post_unload(self, _request: web.Request) -> web.Response:
        """No lock, even while a job runs. With nothing loaded it loads first, as the original does."""
        match self.faults.unload_now():
            case "lies":
                return web.json_response({})
            case "hangs":
                await asyncio.Event().wait()
            case "late":
                self.server.spawn(self._unload_after(self.faults.unload_seconds), name="unload later")
                return web.json_response({})
            case "ok":
                pass
        await self._unload()
        return web.json_response({})

    async def _unload_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._unload()

    async def _unload(self) -> None:
        if self.checkpoints.loaded is None and not self.is_forge:
            await self.checkpoints.load(self._selected(), self.card_use, f"unload({uuid4().hex[:8]})")
        await self.card_use.unload()
        self.checkpoints.is_on_gpu = False

    async def _post_reload(self, _request: web.Request) -> web.Response:
        if not self.is_forge:
            file = self.checkpoints.loaded or self._selected()
            await self.checkpoints.load(file, self.card_use, f"reload({uuid4().hex[:8]})")
        return web.json_response({})

    # -- facts

    def _cmd_flags(self) -> Json:
        mine: dict[str, Json] = {
            "port": str(self.server.port),
            "nowebui": self._nowebui,
            "skip_load_model_at_start": self._skip_load,
            "use_cpu": [],
        }
        return recorded()["cmd_flags"] | mine

    def _models(self) -> Json:
        return self.checkpoints.as_list()

    def _memory(self) -> Json:
        ram = {"free": 48e9, "used": 16e9, "total": 64e9}
        if not self._tells_memory:
            return {"ram": ram, "cuda": {"error": "unavailable"}}
        total, used = self.card.bytes_total, self.card.bytes_used()
        mine = sum(self.card.resident(self.url).values())
        counts = {"current": mine, "peak": mine}
        system = {"free": max(0, total - used), "used": used, "total": total}
        return {
            "ram": ram,
            "cuda": {
                "system": system,
                "active": counts,
                "allocated": counts,
                "reserved": counts,
                "inactive": {"current": 0, "peak": 0},
                "events": {"retries": 0, "oom": 0},
            },
        }


def _new_task_id(kind: str) -> str:
    letters = "".join(random.choice(string.ascii_uppercase + string.digits) for _ in range(7))
    return f"task({kind}-{letters})"


def _check_scripts(values: dict[str, Json], kind: str) -> None:
    names: list[str | None] = [values.get("script_name"), *(values.get("alwayson_scripts") or ())]
    for name in names:
        if name and name.lower() not in SCRIPTS[kind]:
            raise HttpError(422, f"Script '{name}' not found")
