"""Finds out what listens at an address by asking it, within seconds: ComfyUI, an A1111, something else, or
nothing.

Only cheap reads are sent; an engine that is busy answers them all the same.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec

from gpulane.core.model import EngineUrl, Service
from gpulane.engine.base import REFUSED, UNREACHABLE
from gpulane.engine.control import ControlCalls
from gpulane.errors import EngineError

SECONDS_MAX: Final = 5.0
"""Patience for all questions together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What was found."""

    service: Service | None
    flavor: str = ""
    """`comfyui`, `a1111`, `forge`, `sdnext`; empty when it is no engine."""
    answers: bool = False
    """Whether anything speaks HTTP there."""
    why: str = ""
    """For people, when `service` is None: refused, silent, or what answered instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    target: str
    field: str
    """A field that the answer must have; anybody may answer 200 to any path."""
    service: Service


_QUESTIONS: Final = (
    _Question(target="/system_stats", field="system", service=Service.COMFYUI),
    _Question(target="/queue", field="queue_running", service=Service.COMFYUI),
    _Question(
        target="/sdapi/v1/progress?skip_current_image=true", field="eta_relative", service=Service.A1111
    ),
    _Question(target="/sdapi/v1/options", field="sd_model_checkpoint", service=Service.A1111),
    # A webui started without --api has no /sdapi; it is named so that `check` can say what to add.
    _Question(target="/internal/pending-tasks", field="tasks", service=Service.A1111),
)
_OURSELVES: Final = "/gpulane/healthz"
"""A gateway answers as ComfyUI and A1111 both; as an engine it would hand jobs round in circles."""


async def detect(url: EngineUrl, *, seconds_max: float = SECONDS_MAX) -> Detected:
    """Ask what is there. Never raises for what it finds."""
    try:
        calls = ControlCalls(url, timeout_seconds=seconds_max)
    except ValueError as error:
        return Detected(service=None, why=str(error))
    try:
        return await _ask_all(calls, seconds_max)
    finally:
        await calls.close()


async def _ask_all(calls: ControlCalls, seconds_max: float) -> Detected:
    tasks: list[asyncio.Task[dict[str, object] | EngineError]] = []
    ourselves: asyncio.Task[bool] | None = None
    try:
        async with asyncio.timeout(seconds_max), asyncio.TaskGroup() as group:
            ourselves = group.create_task(_is_gateway(calls))
            tasks = [group.create_task(_ask(calls, question)) for question in _QUESTIONS]
    except TimeoutError:
        # What has been answered by now counts.
        pass
    if ourselves is not None and ourselves.done() and not ourselves.cancelled() and ourselves.result():
        return Detected(service=None, answers=True, why="it is a gpulane itself: name the engines behind it")
    answers = [task.result() if task.done() and not task.cancelled() else None for task in tasks]
    for question, answer in zip(_QUESTIONS, answers, strict=True):
        if isinstance(answer, dict) and question.field in answer:
            return Detected(service=question.service, flavor=_flavor(question, answers), answers=True)
    return _nothing([answer for answer in answers if answer is not None], seconds_max)


async def _is_gateway(calls: ControlCalls) -> bool:
    try:
        status, body = await calls.fetch("GET", _OURSELVES)
    except EngineError:
        return False
    return status == 200 and body == b"ok\n"


async def _ask(calls: ControlCalls, question: _Question) -> dict[str, object] | EngineError:
    """Return the JSON object answered; an empty one for any other answer."""
    try:
        status, body = await calls.fetch("GET", question.target)
    except EngineError as error:
        return error
    try:
        return msgspec.json.decode(body, type=dict[str, object]) if status == 200 else {"status": status}
    except (msgspec.DecodeError, RecursionError):
        return {}


def _flavor(question: _Question, answers: list[dict[str, object] | EngineError | None]) -> str:
    if question.service is Service.COMFYUI:
        return "comfyui"
    keys = {key for answer in answers if isinstance(answer, dict) for key in answer}
    if any(key.startswith("forge_") for key in keys):
        return "forge"
    return "sdnext" if any(key.startswith("diffusers_") for key in keys) else "a1111"


def _nothing(answers: list[dict[str, object] | EngineError], seconds_max: float) -> Detected:
    spoken = [answer for answer in answers if isinstance(answer, dict)]
    if any(answer.get("status") in {401, 403} for answer in spoken):
        why = "it wants a login, and gpulane has none to give: let it listen without one"
        return Detected(service=None, answers=True, why=why)
    if spoken:
        return Detected(service=None, answers=True, why="it speaks HTTP, but answers none of their API paths")
    errors = [answer for answer in answers if isinstance(answer, EngineError)]
    if any(error.code == REFUSED for error in errors):
        return Detected(service=None, why=f"connection refused: {errors[0].message}")
    unreachable = [error for error in errors if error.code == UNREACHABLE]
    if unreachable:
        return Detected(service=None, why=unreachable[0].message)
    broken = [error for error in errors if error.code != "timeout"]
    if broken:
        return Detected(service=None, answers=True, why=f"it speaks no HTTP: {broken[0].message}")
    return Detected(service=None, why=f"no answer within {seconds_max:g} s")
