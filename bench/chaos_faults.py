"""The faults of a chaos run. Each is fired on a card that works, and counted only when it struck there.

One card has one fault at a time, since a fault on a card that stands still proves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import uuid4

import aiohttp
from chaos_users import picture, workflow
from chaos_world import Box, Sim, World, until

from gpulane.testing.a1111 import SimA1111

STRIKE_SECONDS: Final = 3.0
"""How long a fault waits for its turn."""
COUNTED: Final = (
    "crash_mid_jobs",
    "hang_jobs",
    "lose_jobs",
    "oom_jobs",
    "error_jobs",
    "fail_requests",
    "truncate_responses",
)
UNLOADS: Final = ("late", "lies", "hangs")
GATEWAY: Final = "gateway stopped at once, started again"

Fire = Callable[[Box], Awaitable[bool]]


class Faults:
    """Fires every kind of fault so often, in a random order."""

    def __init__(self, world: World, seed: int, each: int) -> None:
        self._world = world
        self._chance = random.Random(f"faults {seed}")
        self._kinds = self._all()
        self._deck = [name for name in self._kinds for _ in range(each)]
        self._chance.shuffle(self._deck)
        self._left = dict.fromkeys(self._kinds, 6 * each)
        """A fault that did not strike is tried again, this often in all."""
        self.each = each
        self.is_over = False
        self.wanted = len(self._deck)
        self.done = 0

    @property
    def share_done(self) -> float:
        return min(1.0, self.done / max(1, self.wanted))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._kinds)

    def _all(self) -> dict[str, Fire]:
        found: dict[str, Fire] = {name: self._counted(name) for name in COUNTED}
        found |= {f"unload {kind}": self._unload(kind) for kind in UNLOADS}
        found |= {
            "engine crashes while it works": self._crash,
            "engine crashes during a hand-off": self._crash_in_handoff,
            "engine restarts": self._restart,
            "zombie": self._zombie,
            "websocket mute": self._mute,
            "websocket dropped": self._drop,
            "stranger's job at an engine": self._stranger,
            "stranger has the lock file": self._flock,
            "drain and resume": self._drain,
            GATEWAY: self._gateway,
        }
        return found

    # -- the order

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for box in self._world.boxes:
                group.create_task(self._on_card(box))

    async def _on_card(self, box: Box) -> None:
        world = self._world
        while self._deck:
            name = self._deck.pop()
            if name == GATEWAY and not world.up.is_set():
                self._deck.insert(0, name)
                await asyncio.sleep(0.1)
                continue
            await world.up.wait()
            if not await until(lambda: world.job_on(box), STRIKE_SECONDS):
                struck = False
            else:
                struck = await self._fire(name, box)
            if struck:
                world.fired[name] += 1
                self.done += 1
            elif self._left[name] > 0:
                self._left[name] -= 1
                self._deck.insert(0, name)
            else:
                self.done += 1
            await asyncio.sleep(self._chance.random() * 0.1)

    async def _fire(self, name: str, box: Box) -> bool:
        try:
            return await self._kinds[name](box)
        except (aiohttp.ClientError, TimeoutError):
            return False
        finally:
            await self.mend(box)

    async def mend(self, box: Box) -> None:
        """Take all switches back, and start what is down: somebody looks after the engines."""
        for engine in box.engines:
            faults = engine.faults
            faults.set(dict.fromkeys(COUNTED, 0) | {"unload": "ok", "zombie": False, "mute_ws": False})
            if not engine.server.is_up:
                await asyncio.sleep(self._chance.random() * 0.3)
                await engine.server.restart()

    # -- switches of the engines

    def _counted(self, name: str) -> Fire:
        async def fire(box: Box) -> bool:
            before = box.struck(name)
            for engine in box.engines:
                engine.faults.set({name: 1})

            async def has_struck() -> bool:
                return box.struck(name) > before

            if not await until(has_struck, STRIKE_SECONDS, 0.005):
                return False
            hurt = [engine for engine in box.engines if getattr(engine.faults, name) == 0]
            for engine in box.engines:
                engine.faults.set({name: 0})
            if name == "hang_jobs":
                # Interrupted when it has hung too long; what cannot be interrupted is restarted by somebody.
                await asyncio.sleep(3.5)
                for engine in hurt:
                    await engine.server.restart()
            if name == "crash_mid_jobs":
                await until(lambda: self._is_down(box), 1.5)
            return True

        return fire

    async def _is_down(self, box: Box) -> bool:
        return not all(engine.server.is_up for engine in box.engines)

    def _unload(self, kind: str) -> Fire:
        async def fire(box: Box) -> bool:
            return await self._in_handoff(box, kind, 0.4)

        return fire

    async def _in_handoff(self, box: Box, kind: str, seconds: float) -> bool:
        """Wait until somebody unloads, badly."""
        before = box.struck(f"unload {kind}")
        for engine in box.engines:
            engine.faults.set({"unload": kind, "unload_seconds": seconds})

        async def is_asked() -> bool:
            return box.struck(f"unload {kind}") > before

        struck = bool(await until(is_asked, STRIKE_SECONDS, 0.005))
        if struck and kind != "late":
            await asyncio.sleep(self._chance.random() * 0.8)
        return struck

    async def _crash_in_handoff(self, box: Box) -> bool:
        if not await self._in_handoff(box, "late", 0.3):
            return False
        await asyncio.sleep(self._chance.random() * 0.2)
        await self._chance.choice(box.engines).server.crash()
        await asyncio.sleep(self._chance.random() * 0.5)
        return True

    async def _working(self, box: Box) -> Sim | None:
        """The engine that the gateway's job runs in."""
        url = await self._engine_of(await self._world.job_on(box))
        return next((engine for engine in box.engines if engine.url == url), None)

    async def _engine_of(self, job: str | None) -> str | None:
        if job is None:
            return None
        return (await self._world.get(f"/gpulane/v1/jobs/{job}")).get("engine")

    async def _crash(self, box: Box) -> bool:
        engine = await until(lambda: self._working(box), STRIKE_SECONDS)
        if engine is None:
            return False
        await asyncio.sleep(self._chance.random() * 0.1)  # at any step
        await engine.server.crash()
        await asyncio.sleep(self._chance.random() * 0.8)
        return True

    async def _restart(self, box: Box) -> bool:
        engine = await until(lambda: self._working(box), STRIKE_SECONDS)
        if engine is None:
            return False
        await engine.server.restart()
        return True

    async def _zombie(self, box: Box) -> bool:
        before = box.struck("zombie")
        for engine in (box.a1111, box.comfyui):
            engine.faults.set({"zombie": True})

        async def is_met() -> bool:
            return box.struck("zombie") > before

        struck = bool(await until(is_met, STRIKE_SECONDS))
        await asyncio.sleep(self._chance.random() * 2)
        for engine in (box.a1111, box.comfyui):
            engine.faults.set({"zombie": False})
            await engine.server.restart()  # nothing less helps a zombie
        return struck

    async def _mute(self, box: Box) -> bool:
        box.comfyui.faults.set({"mute_ws": True})
        engine = await until(lambda: self._comfyui_works(box), STRIKE_SECONDS)
        await asyncio.sleep(self._chance.random())
        return bool(engine)

    async def _comfyui_works(self, box: Box) -> bool:
        return await self._working(box) is box.comfyui

    async def _drop(self, box: Box) -> bool:
        if not await until(lambda: self._comfyui_works(box), STRIKE_SECONDS):
            return False
        await box.comfyui.drop_sockets()
        return True

    # -- people

    async def _stranger(self, box: Box) -> bool:
        """Somebody opens the engine's own page while a job of ours runs in it."""
        engine = await until(lambda: self._working(box), STRIKE_SECONDS)
        if engine is None or engine is box.llm:
            return False
        world = self._world
        if isinstance(engine, SimA1111):
            task = f"stranger({uuid4().hex[:12]})"
            world.strangers.add(task)
            body, path = picture(1, 3) | {"force_task_id": task}, "/sdapi/v1/txt2img"
        else:
            body, path = {"prompt": workflow(self._chance.randrange(10**9), 3)}, "/prompt"
        timeout = aiohttp.ClientTimeout(total=STRIKE_SECONDS)
        async with world.http.post(engine.url + path, json=body, timeout=timeout) as answer:
            told = await answer.json()
            if "prompt_id" in told:
                world.strangers.add(told["prompt_id"])
            return answer.status == 200

    async def _flock(self, box: Box) -> bool:
        world = self._world

        async def has_it() -> bool:
            if not world.up.is_set():
                return False
            with world.flocked(box, f"flock {uuid4().hex[:12]}") as is_ours:
                if is_ours:
                    await asyncio.sleep(0.1 + self._chance.random() * 0.4)
                return is_ours

        return bool(await until(has_it, STRIKE_SECONDS, 0.003))

    async def _drain(self, box: Box) -> bool:
        world = self._world
        status, _ = await world.post(f"/gpulane/v1/gpus/{box.name}/drain")
        await asyncio.sleep(self._chance.random() * 0.5)
        for _ in range(5):
            with contextlib.suppress(aiohttp.ClientError):
                if (await world.post(f"/gpulane/v1/gpus/{box.name}/resume"))[0] < 300:
                    return status < 300
            await asyncio.sleep(0.2)
        return False

    async def _gateway(self, _box: Box) -> bool:
        world = self._world
        if not world.up.is_set():
            return False
        world.up.clear()  # nobody takes a lock file from here on

        async def nobody_holds() -> bool:
            return world.held == 0

        if not await until(nobody_holds, STRIKE_SECONDS):
            world.up.set()
            return False
        await world.stop()
        await asyncio.sleep(self._chance.random() * 0.3)
        await world.start()
        return True
