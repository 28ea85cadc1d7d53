"""One card, two engines, models of 7 GB: what is unloaded before a job, and what goes wrong with it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integration.gateway.shared_card import HANDOFF, SharedCard, shared_card
from tests.integration.gateway.small_fleet import slow, until
from tests.integration.gateway.test_locks import flocked, lock

pytestmark = pytest.mark.anyio

LATE_SECONDS = 0.4
LEAK_LOOKED_AT_SECONDS = 40.0
LONG_HANDOFF = "unload_seconds: 10, acknowledge_seconds: 0.5"
ONE_TRY = "max_attempts: 1"


async def in_turn(scene: SharedCard, rounds: int, first: int = 0) -> None:
    for number in range(first, first + rounds):
        assert (await scene.a_prompt(number))["state"] == "succeeded"
        assert await scene.a_picture(number) == 200


async def is_over(scene: SharedCard, job: str) -> bool:
    return (await scene.client.job(job))["state"] == "succeeded"


# --- what fits, and what does not


async def test_a_small_card_is_handed_over_without_running_out_of_memory(tmp_path: Path) -> None:
    async with shared_card(tmp_path) as scene:
        await in_turn(scene, 3)
        assert scene.ooms == 0
        assert scene.unloads == 5, "one before every job but the first"


async def test_a_large_card_is_left_alone_once_both_needs_are_known(tmp_path: Path) -> None:
    async with shared_card(tmp_path, vram_gib=24.0) as scene:
        await in_turn(scene, 2)
        learning = scene.unloads
        assert learning <= 2
        await in_turn(scene, 3, first=10)
        assert scene.unloads == learning
        assert scene.holds(scene.a1111) and scene.holds(scene.comfyui)


async def test_always_unloads_even_what_fits(tmp_path: Path) -> None:
    async with shared_card(tmp_path, vram_gib=24.0, engine=", handoff: always") as scene:
        await in_turn(scene, 3)
        assert scene.unloads == 5


async def test_never_is_not_asked(tmp_path: Path) -> None:
    async with shared_card(tmp_path, vram_gib=24.0, engine=", handoff: never") as scene:
        await in_turn(scene, 2)
        assert scene.unloads == 0
        assert scene.a1111.faults.struck.total() == scene.comfyui.faults.struck.total() == 0


async def test_what_is_warm_together_stays(tmp_path: Path) -> None:
    async with shared_card(tmp_path, vram_gib=24.0, gpu=", warm_together: [[a1111, comfyui]]") as scene:
        await in_turn(scene, 2)
        assert scene.unloads == 0
        assert scene.holds(scene.a1111) and scene.holds(scene.comfyui)


async def test_out_of_memory_once_is_tried_again_on_an_empty_card(tmp_path: Path) -> None:
    async with shared_card(tmp_path, gpu=", warm_together: [[a1111, comfyui]]") as scene:
        assert await scene.a_picture(1) == 200
        ended = await scene.a_prompt(2)
        assert ended["state"] == "succeeded" and len(ended["attempts"]) == 2
        assert (scene.ooms, scene.unloads) == (1, 1)
        assert not scene.holds(scene.a1111)


# --- engines that unload late, not at all, or never answer


async def test_a_late_unload_is_waited_for(tmp_path: Path) -> None:
    async with shared_card(tmp_path, handoff=LONG_HANDOFF) as scene:
        assert await scene.a_picture(1) == 200
        scene.a1111.faults.set({"unload": "late", "unload_seconds": LATE_SECONDS})
        ended = await scene.a_prompt(2)
        assert ended["state"] == "succeeded" and len(ended["attempts"]) == 1
        assert scene.ooms == 0
        assert await scene.state_of(scene.a1111) == "ready"


async def test_an_engine_that_lies_is_leaking_and_the_job_runs(tmp_path: Path) -> None:
    async with shared_card(tmp_path, more="retry: {attempts_max: 1}") as scene:
        assert await scene.a_picture(1) == 200
        scene.a1111.faults.set({"unload": "lies"})
        ended = await scene.a_prompt(2)
        assert ended["state"] == "failed" and scene.ooms == 1, "it ran, and there was no memory"
        assert scene.a1111.faults.struck["unload lies"] == 2, "asked twice"
        assert await scene.state_of(scene.a1111) == "leaking"
        scene.a1111.faults.set({"unload": "ok"})
        assert (await scene.a_prompt(3))["state"] == "succeeded"
        assert await scene.state_of(scene.a1111) == "ready"


async def test_a_leaking_engine_can_keep_the_card_from_others(tmp_path: Path) -> None:
    async with shared_card(tmp_path, handoff=f"{HANDOFF}, when_leaking: skip") as scene:
        assert await scene.a_picture(1) == 200
        scene.a1111.faults.set({"unload": "lies"})
        job = await scene.prompt(2)

        async def is_leaking() -> bool:
            return await scene.state_of(scene.a1111) == "leaking"

        await until(is_leaking)
        shown = await scene.client.job(job)
        assert shown["state"] == "queued" and shown["attempts"] == []
        assert scene.ooms == 0
        scene.a1111.faults.set({"unload": "ok"})
        await until(lambda: is_over(scene, job), LEAK_LOOKED_AT_SECONDS)
        assert await scene.state_of(scene.a1111) == "ready"
        assert scene.ooms == 0


async def test_an_unload_without_an_answer_has_a_limit(tmp_path: Path) -> None:
    async with shared_card(tmp_path, more="retry: {attempts_max: 1}") as scene:
        assert (await scene.a_prompt(1))["state"] == "succeeded"
        scene.comfyui.faults.set({"unload": "hangs"})
        assert await scene.a_picture(2) == 500
        assert await scene.state_of(scene.comfyui) == "leaking"
        scene.comfyui.faults.set({"unload": "ok"})
        assert await scene.a_picture(3) == 200
        assert await scene.state_of(scene.comfyui) == "ready"


# --- what happens meanwhile


async def test_a_cancel_in_a_handoff_costs_nobody_anything(tmp_path: Path) -> None:
    async with shared_card(tmp_path, handoff=LONG_HANDOFF) as scene:
        assert await scene.a_picture(1) == 200
        scene.a1111.faults.set({"unload": "late", "unload_seconds": LATE_SECONDS})
        job = await scene.prompt(2)
        await scene.until_asked(scene.a1111, "late")
        client = scene.client
        async with client.http.delete(f"{client.url}/gpulane/v1/jobs/{job}") as answer:
            assert answer.status in {200, 202}
        ended = await client.ended(job)
        assert ended["state"] == "cancelled"
        await until(scene.is_idle)
        assert not scene.holds(scene.comfyui), "it never got there"
        assert await scene.a_picture(3) == 200
        assert (await scene.a_prompt(4))["state"] == "succeeded"
        assert scene.ooms == 0


@pytest.mark.parametrize("which", ["the one that unloads", "the one that is to run"])
async def test_an_engine_that_dies_in_a_handoff(tmp_path: Path, which: str) -> None:
    async with shared_card(tmp_path, handoff=LONG_HANDOFF) as scene:
        assert await scene.a_picture(1) == 200
        scene.a1111.faults.set({"unload": "late", "unload_seconds": LATE_SECONDS})
        job = await scene.prompt(2)
        await scene.until_asked(scene.a1111, "late")
        victim = scene.a1111 if which == "the one that unloads" else scene.comfyui
        await victim.server.crash()
        if victim is scene.comfyui:
            await asyncio.sleep(LATE_SECONDS)  # it is not there when the card is
        await victim.server.restart()
        scene.a1111.faults.set({"unload": "ok"})
        assert (await scene.client.ended(job))["state"] == "succeeded"
        assert await scene.a_picture(3) == 200
        assert scene.ooms == 0


async def test_an_idle_card_gives_its_memory_back(tmp_path: Path) -> None:
    async with shared_card(tmp_path, handoff=f"{HANDOFF}, idle_unload_seconds: 0.3") as scene:
        assert await scene.a_picture(1) == 200

        async def is_empty() -> bool:
            return not scene.holds(scene.a1111)

        await until(is_empty)
        await until(scene.is_idle)
        assert await scene.a_picture(2) == 200


async def test_a_lock_gets_an_empty_card(tmp_path: Path) -> None:
    async with shared_card(tmp_path) as scene:
        assert await scene.a_picture(1) == 200
        assert scene.holds(scene.a1111)
        async with lock(scene.client) as lines:
            granted = await lines.until("granted")
            assert not scene.holds(scene.a1111)
            with flocked(granted["lock_file"]):
                await scene.client.post(f"/gpulane/v1/locks/{granted['job']}/hold", {})
        assert await scene.a_picture(2) == 200


# --- jobs that hang, and cards that fail


async def test_a_hung_job_is_interrupted_and_the_next_runs(tmp_path: Path) -> None:
    # A step takes 1.2 s; a first job too short to be measured must not leave the default of 15 s in force.
    more = (
        "health: {hung_seconds_min: 0.5, hung_factor: 1, hung_interrupt_seconds: 10}\n"
        "scheduling: {service_seconds_unknown: 0.1}"
    )
    async with shared_card(tmp_path, more=more + "\nretry: {attempts_max: 1}") as scene:
        assert (await scene.a_prompt(1))["state"] == "succeeded"
        hangs = await scene.client.prompt(slow(steps=10, seed=2, delay=59.0))
        after = await scene.prompt(3)
        ended = await scene.client.ended(hangs)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "hung")
        assert (await scene.client.ended(after))["state"] == "succeeded"


async def test_a_card_that_keeps_failing_rests_and_comes_back(tmp_path: Path) -> None:
    more = "health: {failures_pause: 3, pause_seconds: 1}"
    async with shared_card(tmp_path, more=more + "\nretry: {attempts_max: 1}") as scene:
        scene.comfyui.faults.set({"oom_jobs": 3})
        for number in range(3):
            assert (await scene.a_prompt(number))["state"] == "failed"
        job = await scene.prompt(10)
        shown = await scene.client.job(job)
        assert (shown["state"], shown["reason"]["code"]) == ("queued", "gpus_paused"), shown
        assert (await scene.client.ended(job))["state"] == "succeeded"
        await until(scene.is_idle)
