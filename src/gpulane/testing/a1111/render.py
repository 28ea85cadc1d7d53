"""How a simulated webui renders: what its `process_images` does, in simulated time."""

import asyncio
import base64
import binascii
import json
import random
from dataclasses import dataclass, field
from typing import Final, Literal

from gpulane.testing.a1111.checkpoints import NOT_ON_GPU, Checkpoints
from gpulane.testing.a1111.state import State
from gpulane.testing.a1111.tables import VERSION, sampler_named
from gpulane.testing.card import CardUse, Died, Json, OutOfMemory
from gpulane.testing.pictures import SIGNATURE, render_png

MEGAPIXEL: Final = 1024 * 1024
MAX_SEED: Final = 2**32 - 1

Trouble = Literal["crash", "hang", "oom", "error"]


class HttpError(Exception):
    """FastAPI's HTTPException: a status and a detail."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(slots=True, kw_only=True)
class Rendering:
    """One txt2img or img2img request under way."""

    kind: Literal["txt2img", "img2img"]
    task_id: str
    values: dict[str, Json]
    trouble: Trouble | None
    is_strict_about_unload: bool
    plain_pictures: bool
    images: list[bytes] = field(default_factory=list[bytes])
    infotexts: list[str] = field(default_factory=list[str])

    def number(self, name: str, default: int) -> int:
        value = self.values.get(name)
        return default if value is None else int(value)

    @property
    def width(self) -> int:
        return self.number("width", 512)

    @property
    def height(self) -> int:
        return self.number("height", 512)

    @property
    def batch_size(self) -> int:
        return max(1, self.number("batch_size", 1))

    @property
    def n_iter(self) -> int:
        return max(1, self.number("n_iter", 1))

    @property
    def passes(self) -> list[tuple[int, float]]:
        """(steps, megapixels) of each sampling pass."""
        steps = self.number("steps", 50)
        megapixels = self.width * self.height / MEGAPIXEL
        if self.kind == "img2img":
            strength = self.values.get("denoising_strength")
            return [(min(int((0.75 if strength is None else strength) * steps) + 1, steps), megapixels)]
        if not self.values.get("enable_hr"):
            return [(steps, megapixels)]
        scale = float(self.values.get("hr_scale") or 2.0)
        return [(steps, megapixels), (self.number("hr_second_pass_steps", 0) or steps, megapixels * scale**2)]


def encoded(png: bytes) -> str:
    return base64.b64encode(png).decode()


def decode_image(text: str) -> bytes:
    """The bytes of an image as requests carry it, or the webui's words for one it cannot read."""
    if text.startswith(("http://", "https://")):
        raise HttpError(500, "Request to local resource not allowed")
    if text.startswith("data:image/"):
        text = text.partition(",")[2]
    try:
        body = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HttpError(500, "Invalid encoded image") from error
    if not body.startswith((SIGNATURE, b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")):
        raise HttpError(500, "Invalid encoded image")
    return body


async def render(
    job: Rendering, *, checkpoints: Checkpoints, wanted: str, state: State, card: CardUse
) -> Json:
    """Load what is wanted, sample, and answer the `info` object."""
    if job.width < 8 or job.height < 8:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({job.height // 8 + 2} x {job.width // 8 + 2}). "
            "Kernel size: (3 x 3). Kernel size can't be greater than actual input size"
        )
    with card.interval("compute", job.task_id, wanted) as interval:
        # The same file again is not looked at, wherever its weights are (sd_models.py: reload_model_weights).
        if checkpoints.loaded != wanted or not job.is_strict_about_unload:
            await checkpoints.load(wanted, card, job.task_id)
        if not checkpoints.is_on_gpu:
            raise RuntimeError(NOT_ON_GPU)
        info = await _sample(job, checkpoints=checkpoints, state=state, card=card)
        if state.interrupted:
            interval.outcome = "interrupted"
        return info


async def _sample(job: Rendering, *, checkpoints: Checkpoints, state: State, card: CardUse) -> Json:
    seed = job.number("seed", -1)
    seed = random.randrange(MAX_SEED) if seed == -1 else seed
    info = _Info.make(job, seed, checkpoints)
    state.job_count = job.n_iter
    model = checkpoints.loaded
    largest = max(megapixels for _steps, megapixels in job.passes)
    with card.working(job.task_id, model, largest, job.batch_size):
        for iteration in range(job.n_iter):
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            for steps, megapixels in job.passes:
                seconds = card.card.step_seconds(megapixels, job.batch_size)
                await _steps(job, steps, seconds, checkpoints=checkpoints, state=state, card=card)
            for index in range(job.batch_size):
                image_seed = seed + iteration * job.batch_size + index
                text = info.infotext(image_seed)
                job.infotexts.append(text)
                job.images.append(
                    render_png(
                        info.prompt,
                        image_seed,
                        card.card.name,
                        job.width,
                        job.height,
                        {"parameters": text},
                        plain=job.plain_pictures,
                    )
                )
            state.next_job()
    return info.as_dict(job, state.job_timestamp)


async def _steps(
    job: Rendering, steps: int, seconds: float, *, checkpoints: Checkpoints, state: State, card: CardUse
) -> None:
    state.sampling_steps, state.sampling_step = steps, 0
    for step in range(1, steps + 1):
        if state.interrupted or state.skipped:
            return
        await card.sleep(seconds)
        if not checkpoints.is_on_gpu and job.is_strict_about_unload:
            raise RuntimeError(NOT_ON_GPU)  # unloaded under the sampler
        state.sampling_step = min(step, steps - 1)
        if step * 2 >= steps:
            await _strike(job, card)


async def _strike(job: Rendering, card: CardUse) -> None:
    """Half-way: what was to go wrong goes wrong, once."""
    trouble, job.trouble = job.trouble, None
    match trouble:
        case "crash":
            raise Died
        case "hang":
            await asyncio.Event().wait()
        case "oom":
            card.raise_oom(job.task_id, None, 1)
        case "error":
            raise RuntimeError("simulated failure")
        case None:
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Info:
    """What infotexts and the `info` object say."""

    prompt: str
    negative_prompt: str
    seed: int
    subseed: int
    sampler: str
    schedule: str
    steps: int
    cfg_scale: float
    size: str
    model: str
    model_hash: str | None

    @classmethod
    def make(cls, job: Rendering, seed: int, checkpoints: Checkpoints) -> "_Info":
        name = job.values.get("sampler_name") or job.values.get("sampler_index")
        sampler, schedule = sampler_named(name)
        asked = job.values.get("scheduler")
        model, model_hash = checkpoints.info()
        return cls(
            prompt=job.values.get("prompt") or "",
            negative_prompt=job.values.get("negative_prompt") or "",
            seed=seed,
            subseed=random.randrange(MAX_SEED),
            sampler=sampler,
            schedule=str(asked).capitalize() if asked else schedule,
            steps=job.number("steps", 50),
            cfg_scale=float(job.values.get("cfg_scale") or 7.0),
            size=f"{job.width}x{job.height}",
            model=model,
            model_hash=model_hash,
        )

    def infotext(self, seed: int) -> str:
        negative = f"Negative prompt: {self.negative_prompt}\n" if self.negative_prompt else ""
        model_hash = f"Model hash: {self.model_hash}, " if self.model_hash else ""
        return (
            f"{self.prompt}\n{negative}Steps: {self.steps}, Sampler: {self.sampler}, "
            f"Schedule type: {self.schedule}, CFG scale: {self.cfg_scale}, Seed: {seed}, Size: {self.size}, "
            f"{model_hash}Model: {self.model}, Version: {VERSION}"
        )

    def as_dict(self, job: Rendering, job_timestamp: str) -> Json:
        total = job.n_iter * job.batch_size
        strength = job.values.get("denoising_strength")
        return {
            "prompt": self.prompt,
            "all_prompts": [self.prompt] * total,
            "negative_prompt": self.negative_prompt,
            "all_negative_prompts": [self.negative_prompt] * total,
            "seed": self.seed,
            "all_seeds": [self.seed + index for index in range(total)],
            "subseed": self.subseed,
            "all_subseeds": [self.subseed + index for index in range(total)],
            "subseed_strength": job.values.get("subseed_strength") or 0,
            "width": job.width,
            "height": job.height,
            "sampler_name": self.sampler,
            "cfg_scale": self.cfg_scale,
            "steps": self.steps,
            "batch_size": job.batch_size,
            "restore_faces": bool(job.values.get("restore_faces")),
            "face_restoration_model": None,
            "sd_model_name": self.model,
            "sd_model_hash": self.model_hash,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": strength,
            "extra_generation_params": {},
            "index_of_first_image": 0,
            "infotexts": list(job.infotexts),
            "styles": [],
            "job_timestamp": job_timestamp,
            "clip_skip": 1,
            "is_using_inpainting_conditioning": False,
            "version": VERSION,
        }


def answer_of(job: Rendering, info: Json) -> Json:
    """The body of a txt2img or img2img answer; `info` is a string in it."""
    parameters = dict(job.values)
    if job.kind == "img2img" and not parameters.get("include_init_images"):
        parameters["init_images"] = parameters["mask"] = None
    sends = parameters.get("send_images", True)
    images = [encoded(png) for png in job.images] if sends else []
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def error_body(error: Exception) -> tuple[int, Json]:
    """Status and body for an exception, as the webui's middleware words it."""
    if isinstance(error, HttpError):
        return error.status, {"error": "HTTPException", "detail": error.detail, "body": "", "errors": ""}
    name = "OutOfMemoryError" if isinstance(error, OutOfMemory) else type(error).__name__
    return 500, {"error": name, "detail": "", "body": "", "errors": str(error)}
