"""The engines' own pages in a headless Chromium, under the prefixes; pictures go to the drive's folder."""

import contextlib
import shutil
from collections.abc import AsyncIterator

from playwright.async_api import Page, async_playwright

from tests.drive.comfyui_flows import new_seed
from tests.drive.ground import Ground, Skipped

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
LOAD_MS = 90_000

RUN_PROMPT = """async (workflow) => {
    const api = window.comfyAPI?.api?.api ?? window.app.api;
    const seen = [];
    const ended = new Promise((resolve) => {
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
            api.addEventListener(kind, (event) => resolve([kind, event.detail.prompt_id]));
    });
    for (const kind of ["execution_start", "executed"])
        api.addEventListener(kind, () => seen.push(kind));
    await window.app.loadApiJson(structuredClone(workflow), "drive");
    const answer = await api.queuePrompt(0, { output: workflow, workflow: window.app.graph.serialize() });
    const [kind, promptId] = await ended;
    return { kind, same: promptId === answer.prompt_id, seen };
}"""


@contextlib.asynccontextmanager
async def page_at(ground: Ground, url: str) -> AsyncIterator["Seen"]:
    """A page in a browser of its own, with what went wrong in it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise Skipped("chromium is not here")
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            ground.folder / "profile",
            executable_path=chromium,
            args=ARGUMENTS,
            viewport={"width": 1400, "height": 900},
        )
        try:
            page = await context.new_page()
            failed: list[str] = []
            page.on(
                "response",
                lambda answer: (
                    failed.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
                ),
            )
            await page.goto(url, timeout=LOAD_MS)
            yield Seen(page, failed, ground.gateway.url)
        finally:
            await context.close()


class Seen:
    """A page, and the answers with an error status that it got."""

    def __init__(self, page: Page, failed: list[str], url: str) -> None:
        self.page = page
        self._failed = failed
        self._url = url

    def failures(self) -> list[str]:
        """Those of the gateway alone: pages also ask other hosts for fonts."""
        own = [line for line in self._failed if self._url in line and "favicon" not in line]
        return [line.replace(self._url, "") for line in own]


async def comfyui_page(ground: Ground) -> str:
    """ComfyUI's page shows its graph, and runs a prompt through its own API object."""
    async with page_at(ground, f"{ground.gateway.url}/comfy/") as seen:
        await seen.page.wait_for_function("() => window.app?.graph && window.app.canvas", timeout=LOAD_MS)
        await seen.page.wait_for_selector("canvas", state="visible", timeout=LOAD_MS)
        known = await seen.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types).length")
        told = await seen.page.evaluate(RUN_PROMPT, ground.workflows.slow(1, seed=new_seed()))
        await seen.page.keyboard.press("Escape")  # the templates that a first visit shows
        nodes = await seen.page.evaluate("() => window.app.graph.serialize().nodes.length")
        await seen.page.screenshot(path=ground.folder / "comfyui.png")
        failures = seen.failures()
    assert nodes >= 2, "the graph of the workflow is not there"
    assert told["kind"] == "execution_success" and told["same"], told
    assert told["seen"][0] == "execution_start" and "executed" in told["seen"], told
    ran = f"graph of {nodes} nodes shown, {known} node types, prompt ran to {told['kind']}"
    return f"{ran}; {len(failures)} failed requests" + tail(failures)


async def a1111_page(ground: Ground) -> str:
    """A1111's page loads under its prefix, with its tabs and its script."""
    async with page_at(ground, f"{ground.gateway.url}/sd/") as seen:
        await seen.page.wait_for_selector("#txt2img_generate", state="visible", timeout=LOAD_MS)
        await seen.page.wait_for_selector("#txt2img_prompt textarea", state="visible", timeout=LOAD_MS)
        tabs = await seen.page.locator("#tabs > .tab-nav > button").all_inner_texts()
        await seen.page.screenshot(path=ground.folder / "a1111.png")
        failures = seen.failures()
    assert len(tabs) >= 3, tabs
    return f"tabs {', '.join(tab.strip() for tab in tabs)}; {len(failures)} failed requests" + tail(failures)


def tail(failures: list[str]) -> str:
    return f" ({'; '.join(sorted(set(failures))[:4])})" if failures else ""
