"""Work of a chosen length for servers of any speed, measured on them first. Needs no model in ComfyUI."""

import asyncio
import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.drive.ground import Client

Workflow = dict[str, Any]

UNITS_MAX = 400
UNIT_SECONDS_MIN = 0.001
MEASURED_UNITS = 5
MEASURE_SECONDS = 120.0
STEPS_MAX = 120
FEW_STEPS, MANY_STEPS = 5, 35
IMAGES_MAX = 40
SLOW_NODES = ("SlowSteps", "SimSlow")
"""Test nodes that report progress; without one a chain of blurs takes time, too."""


@dataclass(slots=True, kw_only=True)
class Workflows:
    """ComfyUI workflows in API format."""

    slow_node: str | None = None
    pace: float = 1.0
    """Everything takes so much of the time it is meant to take."""
    unit_seconds: float = 0.1
    """How long the fastest engine takes for one unit: a step of the test node, or one blur."""

    @classmethod
    async def measured(cls, engines: "list[Client]", pace: float) -> "Workflows":
        """Choose what all engines know, and time it on each."""
        known: list[set[str]] = [set((await engine.get("/object_info")).ok().json) for engine in engines]
        shared = known[0].intersection(*known) if known else set[str]()
        made = cls(slow_node=next((name for name in SLOW_NODES if name in shared), None), pace=pace)
        if engines:
            timings = await asyncio.gather(*(made._time_on(engine) for engine in engines))
            made.unit_seconds = max(UNIT_SECONDS_MIN, min(timings))
        return made

    async def _time_on(self, engine: "Client") -> float:
        prompt_id = await engine.prompt(self.units(MEASURED_UNITS, seed=uuid.uuid4().int % 0xFFFFFF))
        async with asyncio.timeout(MEASURE_SECONDS):
            while not (entry := (await engine.get(f"/history/{prompt_id}")).ok().json.get(prompt_id)):
                await asyncio.sleep(0.02)
        stamps = {name: data["timestamp"] for name, data in entry["status"]["messages"]}
        return (stamps["execution_success"] - stamps["execution_start"]) / 1000 / MEASURED_UNITS

    @property
    def tells_steps(self) -> bool:
        return self.slow_node is not None

    def slow(self, seconds: float, seed: int) -> Workflow:
        """A workflow that takes about so long; another seed is another picture, so nothing is cached."""
        return self.units(min(UNITS_MAX, max(1, math.ceil(seconds * self.pace / self.unit_seconds))), seed)

    def units(self, count: int, seed: int) -> Workflow:
        nodes: Workflow = {"1": empty(512 if self.slow_node is None else 64, seed)}
        match self.slow_node:
            case "SlowSteps":
                values = {"image": ["1", 0], "steps": count, "delay": 0.1, "preview": True, "seed": seed}
                nodes["2"] = {"class_type": "SlowSteps", "inputs": values}
            case "SimSlow":
                values = {"steps": count, "delay": 1.0, "preview": True, "seed": seed}
                nodes["2"] = {"class_type": "SimSlow", "inputs": values}
            case _:
                for number in range(count):
                    values = {"image": [str(number + 1), 0], "blur_radius": 15, "sigma": 5.0}
                    nodes[str(number + 2)] = {"class_type": "ImageBlur", "inputs": values}
        last = "2" if self.slow_node else str(count + 1)
        nodes["save"] = save(last, f"drive/slow{seed}")
        return nodes

    def quick(self, seed: int, prefix: str = "drive/quick") -> Workflow:
        return {"1": empty(64, seed), "2": inverted("1"), "save": save("2", f"{prefix}{seed}")}

    def from_file(self, name: str) -> Workflow:
        return {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": inverted("1"),
            "save": save("2", "drive/upload"),
        }


def empty(size: int, seed: int) -> Workflow:
    values = {"width": size, "height": size, "batch_size": 1, "color": seed % 0xFFFFFF}
    return {"class_type": "EmptyImage", "inputs": values}


def inverted(source: str) -> Workflow:
    return {"class_type": "ImageInvert", "inputs": {"image": [source, 0]}}


def save(source: str, prefix: str) -> Workflow:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix}}


@dataclass(slots=True, kw_only=True)
class Pictures:
    """A1111 requests: small pictures with the checkpoint that is there."""

    pace: float = 1.0
    step_seconds: float = 0.05
    sampler: str = "Euler"

    @classmethod
    async def measured(cls, engines: "list[Client]", pace: float) -> "Pictures":
        """Time the steps of a small picture on each engine; the first one loads the model."""
        made = cls(pace=pace)
        timings = [await made._time_on(engine) for engine in engines]
        if timings:
            made.step_seconds = max(UNIT_SECONDS_MIN, min(timings))
        return made

    async def _time_on(self, engine: "Client") -> float:
        loop = asyncio.get_running_loop()
        took: list[float] = []
        for steps in (1, FEW_STEPS, MANY_STEPS):
            began = loop.time()
            (await engine.post("/sdapi/v1/txt2img", self.small(seed=steps, steps=steps))).ok()
            took.append(loop.time() - began)
        return (took[2] - took[1]) / (MANY_STEPS - FEW_STEPS)

    def small(self, *, seed: int, steps: int = 2, **more: object) -> Workflow:
        request = {"prompt": "a picture", "steps": steps, "width": 64, "height": 64, "seed": seed}
        return {**request, "sampler_name": self.sampler, **more}

    def slow(self, seconds: float, *, seed: int, **more: object) -> Workflow:
        """A request that takes about so long."""
        steps = max(1, math.ceil(seconds * self.pace / self.step_seconds))
        images = min(IMAGES_MAX, math.ceil(steps / STEPS_MAX))
        return self.small(seed=seed, steps=min(STEPS_MAX, steps), n_iter=images, **more)
