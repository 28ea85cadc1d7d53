"""The one worker of a simulated ComfyUI: takes prompts in order, computes on the card, says what it does.

The order of messages is the recorded one; `../shared/recordings` and the contract tests hold it.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from gpulane.testing.card import CardUse, Died, Json, OutOfMemory
from gpulane.testing.comfyui.files import Folders
from gpulane.testing.comfyui.graph import ExecutionList, is_link, signatures
from gpulane.testing.comfyui.nodes import NodeTable
from gpulane.testing.comfyui.queue import Item, PromptQueue, now_ms
from gpulane.testing.comfyui.sockets import SocketHub
from gpulane.testing.faults import Faults

MEGAPIXEL: Final = 1024 * 1024

Trouble = Literal["crash", "hang", "oom", "error", "lose"]


class Interrupted(Exception):
    """Somebody asked for an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What goes along a graph's links, as far as times and pictures need it."""

    model: str | None = None
    text: str = ""
    width: int = 0
    height: int = 0
    images: int = 0
    seed: int = 0

    @property
    def megapixels(self) -> float:
        return self.width * self.height / MEGAPIXEL


@dataclass(slots=True, kw_only=True)
class NodeState:
    """A node's place in `progress_state`."""

    value: float = 0.0
    max: float = 1.0
    state: str = "running"
    _text: str | None = None

    def as_text(self, node_id: str, run: "Run") -> str:
        """Its JSON, kept once the node is finished."""
        if self._text is not None:
            return self._text
        text = json.dumps(
            {
                "value": self.value,
                "max": self.max,
                "state": self.state,
                "node_id": node_id,
                "prompt_id": run.prompt_id,
                "display_node_id": node_id,
                "parent_node_id": None,
                "real_node_id": node_id,
            }
        )
        if self.state == "finished":
            self._text = text
        return text


@dataclass(slots=True, kw_only=True)
class Run:
    """One prompt under way."""

    prompt_id: str
    prompt: dict[str, Json]
    extra_data: dict[str, Json]
    signatures: dict[str, str]
    client_id: str | None
    trouble: Trouble | None
    flows: dict[str, Flow] = field(default_factory=dict[str, Flow])
    progress: dict[str, NodeState] = field(default_factory=dict[str, NodeState])
    executed: list[str] = field(default_factory=list[str])
    outputs: dict[str, Json] = field(default_factory=dict[str, Json])
    meta: dict[str, Json] = field(default_factory=dict[str, Json])
    messages: list[Json] = field(default_factory=list[Json])
    interval: str | None = None
    """The card's open interval, from the first node that uses the card."""


class PromptRunner:
    """Runs prompts one by one."""

    def __init__(
        self,
        *,
        queue: PromptQueue,
        hub: SocketHub,
        nodes: NodeTable,
        folders: Folders,
        card: CardUse,
        faults: Faults,
        previews: bool,
        plain_pictures: bool,
        crash: Callable[[], None],
        later: Callable[[Coroutine[Json, Json, None]], object],
    ) -> None:
        self.is_dead = False
        self.is_interrupted = False
        self.client_id: str | None = None
        """Of the prompt that runs or ran last, as in the original."""
        self.last_node: str | None = None
        self.runs = 0
        self._queue = queue
        self._hub = hub
        self._nodes = nodes
        self._folders = folders
        self._card = card
        self._faults = faults
        self._previews = previews
        self._plain_pictures = plain_pictures
        self._crash = crash
        self._later = later
        self._cache: dict[str, tuple[Flow, Json]] = {}

    async def work(self) -> None:
        """The loop of the worker thread. A TypeError ends it for good: the original has no try round it."""
        while True:
            await self._queue.something.wait()
            if self._faults.zombie or (not self._queue.heap and not self._queue.flags):
                self._queue.something.clear()
                if self._faults.zombie:
                    self._faults.struck["zombie"] += 1
                    self.is_dead = True
                    return
                continue
            try:
                if self._queue.heap:
                    await self._run_next()
                await self._obey_flags()
            except TypeError:
                self.is_dead = True
                return
            except Died:
                self._crash()
                return
            # A prompt that takes no time must not keep the loop from everybody else.
            await asyncio.sleep(0)

    # -- one prompt

    async def _run_next(self) -> None:
        item = self._queue.take()
        trouble = self._trouble()
        if trouble == "lose":
            self._queue.running = None
            return
        self._send_status()
        extra_data = item[3]
        # Not .get: what is null here is a TypeError, which kills the worker of old versions.
        client_id: str | None = extra_data["client_id"] if "client_id" in extra_data else None  # noqa: SIM401
        run = Run(
            prompt_id=item[1],
            prompt=item[2],
            extra_data=extra_data,
            signatures=signatures(item[2], self._folders.digest_of),
            client_id=client_id,
            trouble=trouble,
        )
        self.client_id, self.last_node, self.is_interrupted = client_id, None, False
        outcome = await self._execute(run, item[4])
        self.runs += 1
        if run.interval is not None:
            self._card.end(run.interval, outcome)
        self._card.job_over(run.prompt_id, outcome, computed=run.interval is not None)
        self._queue.task_done(_record(item, run, outcome))
        self._send_status()
        if client_id is not None:
            self._hub.send("executing", {"node": None, "prompt_id": run.prompt_id}, client_id)
        self.last_node = None

    def _trouble(self) -> Trouble | None:
        faults = self._faults
        if faults.strike("lose_jobs"):
            return "lose"
        if faults.strike("crash_mid_jobs"):
            return "crash"
        if faults.strike("hang_jobs"):
            return "hang"
        if faults.strike("oom_jobs"):
            return "oom"
        return "error" if faults.strike("error_jobs") else None

    async def _execute(self, run: Run, outputs: list[str]) -> str:
        """Run all nodes; answers ok, error, oom or interrupted."""
        self._say(run, "execution_start", {"prompt_id": run.prompt_id})
        kept = set(run.signatures.values())
        self._cache = {signature: result for signature, result in self._cache.items() if signature in kept}
        cached = [node_id for node_id in run.prompt if run.signatures[node_id] in self._cache]
        self._say(run, "execution_cached", {"nodes": cached, "prompt_id": run.prompt_id})
        todo = ExecutionList(
            run.prompt, self._nodes, is_cached=lambda node: run.signatures[node] in self._cache
        )
        for node_id in outputs:
            todo.add(node_id)
        node_id = todo.pick()
        try:
            while node_id is not None:
                await self._node(run, node_id)
                todo.done(node_id)
                node_id = todo.pick()
            await self._strike(run)
        except Interrupted:
            self._fail(run, "execution_interrupted", node_id, {}, broadcast=True)
            return "interrupted"
        except OutOfMemory as error:
            with self._card.card.change(self._card.engine) as memory:
                memory.resident.clear()  # the original unloads all models then
            self._fail(run, "execution_error", node_id, _exception(run, error, "torch.OutOfMemoryError"))
            return "oom"
        except (ValueError, RuntimeError) as error:
            self._fail(run, "execution_error", node_id, _exception(run, error, type(error).__name__))
            return "error"
        self._say(run, "execution_success", {"prompt_id": run.prompt_id})
        return "ok"

    def _fail(
        self, run: Run, event: str, node_id: str | None, details: dict[str, Json], *, broadcast: bool = False
    ) -> None:
        at = node_id or next(iter(run.prompt))
        data = {
            "prompt_id": run.prompt_id,
            "node_id": at,
            "node_type": run.prompt[at]["class_type"],
            "executed": list(run.executed),
        }
        self._say(run, event, data | details, broadcast=broadcast)

    async def _node(self, run: Run, node_id: str) -> None:
        if self.is_interrupted:
            raise Interrupted
        signature = run.signatures[node_id]
        if signature in self._cache:
            _flow, ui = self._cache[signature]
            if ui is not None:
                self._executed(run, node_id, ui)
            run.progress[node_id] = NodeState(value=1, max=1, state="finished")
            self._send_progress_state(run)
            return
        run.progress[node_id] = NodeState()
        self._send_progress_state(run)
        self.last_node = node_id
        if run.client_id is not None:
            data = {"node": node_id, "display_node": node_id, "prompt_id": run.prompt_id}
            self._hub.send("executing", data, run.client_id)
        flow, ui = await self._compute(run, node_id)
        run.flows[node_id] = flow
        if ui is not None:
            self._executed(run, node_id, ui)
        state = run.progress[node_id]
        state.value, state.state = state.max, "finished"
        self._send_progress_state(run)
        run.executed.append(node_id)
        self._cache[signature] = (flow, ui)

    def _executed(self, run: Run, node_id: str, ui: Json) -> None:
        run.outputs[node_id] = ui
        run.meta[node_id] = {
            "node_id": node_id,
            "display_node": node_id,
            "parent_node": None,
            "real_node_id": node_id,
        }
        if run.client_id is not None:
            data = {"node": node_id, "display_node": node_id, "output": ui, "prompt_id": run.prompt_id}
            self._hub.send("executed", data, run.client_id)

    # -- what the nodes do

    async def _compute(self, run: Run, node_id: str) -> tuple[Flow, Json]:
        """A node's outcome and its `ui`."""
        node = run.prompt[node_id]
        inputs: dict[str, Json] = node["inputs"]
        flow = self._upstream(run, node)
        match self._nodes.behavior(node["class_type"]):
            case "CheckpointLoaderSimple" | "UNETLoader":
                flow = replace(flow, model=str(inputs.get("ckpt_name") or inputs.get("unet_name")))
                await self._load(run, flow)
            case "CLIPTextEncode":
                flow = replace(flow, text=str(inputs.get("text", "")))
            case "EmptyLatentImage" | "EmptySD3LatentImage" | "EmptyImage":
                flow = replace(
                    flow, width=inputs["width"], height=inputs["height"], images=inputs.get("batch_size", 1)
                )
            case "ImageScale" | "LatentUpscale":
                flow = replace(flow, width=inputs["width"], height=inputs["height"])
            case "LoadImage" | "LoadImageMask":
                width, height = self._folders.size_of(inputs["image"])
                flow = replace(flow, width=width, height=height, images=1)
            case "KSampler" | "KSamplerAdvanced":
                flow = await self._sample(run, node_id, flow)
            case "VAEDecode" | "VAEEncode" | "ImageUpscaleWithModel":
                self._occupy(run, flow.model)
                await self._card.sleep(self._card.card.step_seconds(flow.megapixels, max(1, flow.images)))
            case "SaveImage" | "PreviewImage" as kind:
                return flow, {"images": self._save(run, node_id, flow, to_temp=kind == "PreviewImage")}
            case "PreviewAny":
                return flow, {"text": [f"{flow.width}"]}
            case "GetImageSize":
                self._send_text(
                    node_id, f"width: {flow.width}, height: {flow.height}\n batch size: {flow.images}"
                )
            case behavior if behavior.startswith("test:"):
                return await self._test_node(run, node_id, behavior.removeprefix("test:"), flow)
            case _:
                pass
        return flow, None

    async def _test_node(self, run: Run, node_id: str, name: str, flow: Flow) -> tuple[Flow, Json]:
        inputs: dict[str, Json] = run.prompt[node_id]["inputs"]
        picture = replace(flow, width=flow.width or 64, height=flow.height or 64, images=flow.images or 1)
        picture = replace(picture, seed=inputs.get("seed", flow.seed))
        match name:
            case "Slow":
                self._occupy(run, None)
                await self._steps(
                    run, node_id, inputs["steps"], inputs["delay"], with_preview=inputs["preview"]
                )
            case "Block":
                self._occupy(run, None)
                await self._card.sleep(inputs["seconds"])
                await self._strike(run)
            case "Model":
                await self._load(run, replace(picture, model=f"sim-{inputs['mb']}-{inputs['seed']}"))
            case "TinyModel":
                return replace(picture, model="sim-tiny"), None
            case "Raise":
                raise ValueError(inputs["message"])
            case _:
                pass
        if self.is_interrupted:
            raise Interrupted
        return picture, None

    def _upstream(self, run: Run, node: Json) -> Flow:
        """What comes in by the links; of two that say the same the first counts (so `positive` wins)."""
        merged = Flow()
        for value in node["inputs"].values():
            if not is_link(value):
                continue
            flow = run.flows.get(value[0])
            if flow is None:  # it was cached, and so were those above it
                flow, _ui = self._cache.get(run.signatures[value[0]], (Flow(), None))
            merged = Flow(
                model=merged.model or flow.model,
                text=merged.text or flow.text,
                width=merged.width or flow.width,
                height=merged.height or flow.height,
                images=merged.images or flow.images,
                seed=merged.seed or flow.seed,
            )
        return merged

    def _occupy(self, run: Run, model: str | None) -> None:
        """From here on the prompt uses the card."""
        if run.interval is None:
            run.interval = self._card.begin("compute", run.prompt_id, model)

    async def _load(self, run: Run, flow: Flow) -> None:
        if flow.model is not None:
            self._occupy(run, flow.model)
            await self._card.load(flow.model, run.prompt_id, keep_others=True)

    async def _sample(self, run: Run, node_id: str, flow: Flow) -> Flow:
        inputs: dict[str, Json] = run.prompt[node_id]["inputs"]
        await self._load(run, flow)
        self._occupy(run, flow.model)
        images = max(1, flow.images)
        seconds = self._card.card.step_seconds(flow.megapixels, images)
        with self._card.working(run.prompt_id, flow.model, flow.megapixels, images):
            await self._steps(run, node_id, inputs["steps"], seconds, with_preview=self._previews)
        seed: int = inputs.get("seed", inputs.get("noise_seed", 0))
        return replace(flow, images=images, seed=seed)

    async def _steps(self, run: Run, node_id: str, steps: int, seconds: float, *, with_preview: bool) -> None:
        for step in range(1, steps + 1):
            await self._card.sleep(seconds)
            if step * 2 >= steps:
                await self._strike(run)
            if self.is_interrupted:
                raise Interrupted
            run.progress[node_id].value, run.progress[node_id].max = step, steps
            if not self._hub.hears(run.client_id):
                continue
            self._send_progress_state(run)
            negotiated = self._hub.takes_metadata(run.client_id)
            if with_preview and negotiated:
                self._hub.send_preview(run.client_id, node_id, run.prompt_id, with_metadata=True)
            data = {"value": step, "max": steps, "prompt_id": run.prompt_id, "node": node_id}
            self._hub.send("progress", data, run.client_id)
            if with_preview and not negotiated:
                self._hub.send_preview(run.client_id, node_id, run.prompt_id, with_metadata=False)

    async def _strike(self, run: Run) -> None:
        """Half-way: what was to go wrong goes wrong, once."""
        trouble, run.trouble = run.trouble, None
        match trouble:
            case "crash":
                raise Died
            case "hang":
                await asyncio.Event().wait()
            case "oom":
                self._card.raise_oom(run.prompt_id, None, 1)
            case "error":
                raise RuntimeError("simulated failure")
            case _:
                pass

    def _save(self, run: Run, node_id: str, flow: Flow, *, to_temp: bool) -> list[Json]:
        inputs: dict[str, Json] = run.prompt[node_id]["inputs"]
        texts: dict[str, Json] = {"prompt": run.prompt}
        texts |= run.extra_data.get("extra_pnginfo") or {}
        return self._folders.save(
            "temp" if to_temp else "output",
            self._folders.temp_prefix(node_id) if to_temp else str(inputs.get("filename_prefix", "ComfyUI")),
            max(1, flow.images),
            show=(flow.text, flow.seed, self._card.card.name),
            size=(flow.width or 64, flow.height or 64),
            texts=texts,
            plain=self._plain_pictures,
        )

    # -- messages

    def _say(self, run: Run, event: str, data: dict[str, Json], *, broadcast: bool = False) -> None:
        """A message that history keeps."""
        data = data | {"timestamp": now_ms()}
        run.messages.append([event, data])
        if run.client_id is not None or broadcast:
            self._hub.send(event, data, run.client_id)

    def _send_status(self) -> None:
        self._hub.send("status", {"status": {"exec_info": {"queue_remaining": self._queue.remaining}}}, None)

    def _send_text(self, node_id: str, text: str) -> None:
        """Progress text goes to everybody, with a bare node id."""
        node = node_id.encode()
        self._hub.send_bytes((3).to_bytes(4) + len(node).to_bytes(4) + node + text.encode(), None)

    def _send_progress_state(self, run: Run) -> None:
        """All nodes that are not pending, at every step, as in the original: put together from kept texts."""
        if not self._hub.hears(run.client_id):
            return
        nodes = ", ".join(
            f"{json.dumps(node)}: {state.as_text(node, run)}" for node, state in run.progress.items()
        )
        data = f'{{"prompt_id": {json.dumps(run.prompt_id)}, "nodes": {{{nodes}}}}}'
        self._hub.send_text(f'{{"type": "progress_state", "data": {data}}}', run.client_id)

    # -- /free

    async def _obey_flags(self) -> None:
        flags, self._queue.flags = self._queue.flags, set()
        if not flags or self._faults.unload == "lies":
            return
        if self._faults.unload == "late":
            self._later(self._unload_late())
        else:
            await self._card.unload()
        if "free_memory" in flags:
            self._cache.clear()

    async def _unload_late(self) -> None:
        await asyncio.sleep(self._faults.unload_seconds)
        await self._card.unload()


def _exception(run: Run, error: Exception, kind: str) -> dict[str, Json]:
    return {
        "exception_message": f"{error}\n",
        "exception_type": kind,
        "traceback": ['  File "/opt/comfyui/execution.py", line 542, in execute\n'],
        "current_inputs": {},
        "current_outputs": list(run.prompt),
    }


def _record(item: Item, run: Run, outcome: str) -> Json:
    """The prompt as the history keeps it."""
    is_success = outcome == "ok"
    return {
        "prompt": list(item),
        "outputs": run.outputs,
        "status": {
            "status_str": "success" if is_success else "error",
            "completed": is_success,
            "messages": run.messages,
        },
        "meta": run.meta,
    }
