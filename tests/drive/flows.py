"""The flows in their order, what each needs, and how one is run."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from tests.drive import a1111_flows, browser_flows, comfyui_flows, shared_flows
from tests.drive.ground import Ground, Skipped, until
from tests.drive.report import Outcome, Result

SEEN_CHARACTERS_MAX = 1500
FlowFunction = Callable[[Ground], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One thing that must hold, told by what was seen of it."""

    group: str
    function: FlowFunction

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "?").replace("_", " ")

    @property
    def purpose(self) -> str:
        return (self.function.__doc__ or "").strip()

    def lacks(self, ground: Ground, *, with_browser: bool) -> str | None:
        """Say what is missing for it."""
        is_page = self.function.__module__ == browser_flows.__name__
        if is_page and not with_browser:
            return "browser flows are off"
        needs_comfyui = self.group == "ComfyUI" or self.function in (shared_flows.kill, shared_flows.stranger)
        if needs_comfyui and not ground.comfyui:
            return "no ComfyUI given"
        return "no A1111 given" if self.group == "A1111" and not ground.a1111 else None


def flows(group: str, *functions: FlowFunction) -> list[Flow]:
    return [Flow(group=group, function=function) for function in functions]


FLOWS = [
    *flows("gateway", shared_flows.check),
    *flows(
        "ComfyUI",
        comfyui_flows.one_prompt,
        comfyui_flows.spread,
        comfyui_flows.cancel_waiting,
        comfyui_flows.interrupt_own,
        comfyui_flows.invalid_prompts,
        comfyui_flows.partly_valid,
        comfyui_flows.upload,
        comfyui_flows.object_info,
        comfyui_flows.same_prompt_id,
        comfyui_flows.static_files,
        browser_flows.comfyui_page,
    ),
    *flows(
        "A1111",
        a1111_flows.txt2img,
        a1111_flows.img2img,
        a1111_flows.wrong_names,
        a1111_flows.own_options,
        a1111_flows.progress,
        a1111_flows.interrupt,
        a1111_flows.lists,
        a1111_flows.png_info,
        a1111_flows.extras,
        browser_flows.a1111_page,
    ),
    *flows("gateway", shared_flows.native, shared_flows.mixed, shared_flows.stranger, shared_flows.kill),
]


async def run_flow(flow: Flow, ground: Ground, *, with_browser: bool) -> Outcome:
    """Run one, and wait until nothing of it is left, so that it cannot spoil the next."""
    began = time.monotonic()
    result: Result = "pass"
    lack = flow.lacks(ground, with_browser=with_browser)
    if lack is not None:
        result, seen = "skipped", lack
    else:
        try:
            seen = await flow.function(ground)
        except Skipped as missing:
            result, seen = "skipped", str(missing)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the finding
            result, seen = "FAIL", text_of(error)
    seconds = time.monotonic() - began
    try:
        await until(ground.is_quiet)
    except Exception as error:  # noqa: BLE001 - said beside what the flow itself found
        result, seen = "FAIL", f"{seen}; afterwards: {text_of(error)}"
    return Outcome(
        group=flow.group, name=flow.name, purpose=flow.purpose, result=result, seconds=seconds, seen=seen
    )


def text_of(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(text_of(one) for one in cast("BaseExceptionGroup[Exception]", error).exceptions)
    return f"{type(error).__name__}: {error}".removeprefix("AssertionError: ")[:SEEN_CHARACTERS_MAX]
