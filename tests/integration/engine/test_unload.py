"""Telling each service to give its memory back, in all ways that it goes: done, refused, late, lied, hung."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gpulane.config.unloading import parse_unload
from gpulane.core.model import EngineUrl, JobState
from gpulane.engine.a1111 import A1111Client
from gpulane.engine.base import ServiceClient, Vram
from gpulane.engine.comfyui import ComfyUIClient, Timings
from gpulane.engine.http import HttpServiceClient
from gpulane.errors import EngineError
from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import GIB, Card, CardOptions
from gpulane.testing.comfyui import SimComfyUI
from gpulane.testing.faults import Faults
from gpulane.testing.http_engine import Flavor, SimHttpEngine
from tests.integration.engine import a1111_scene, comfyui_scene
from tests.integration.engine.a1111_scene import Scene as A1111Scene
from tests.integration.engine.a1111_scene import Sink, until
from tests.integration.engine.test_http_client import attempt

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 10.0
ACKNOWLEDGE_SECONDS = 0.2
PICTURE: dict[str, Any] = {"steps": 1, "width": 64, "height": 64}
LONGER: dict[str, Any] = {"steps": 20, "width": 512, "height": 512}
MODELS = {"llm-a": 3.0, "llm-b": 2.0}


def card() -> Card:
    return Card(
        options=CardOptions(
            vram_gib=24.0,
            context_gib=0.0,
            unload_seconds=0.01,
            seconds_per_step=0.01,
            load_seconds=dict.fromkeys([*MODELS, "sd15.safetensors"], 0.01),
            model_gib={**MODELS, "sd15.safetensors": 4.0},
        )
    )


@asynccontextmanager
async def comfyui(on: Card) -> AsyncIterator[tuple[SimComfyUI, ComfyUIClient]]:
    async with SimComfyUI(card=on) as sim, asyncio.timeout(WAIT_SECONDS):
        timings = Timings(request_seconds=2.0, acknowledge_seconds=ACKNOWLEDGE_SECONDS)
        client = ComfyUIClient(EngineUrl(sim.url), timings=timings)
        try:
            yield sim, client
        finally:
            await client.close()


@asynccontextmanager
async def a1111(on: Card, **engine: Any) -> AsyncIterator[tuple[SimA1111, A1111Client]]:
    async with SimA1111(card=on, checkpoints=["sd15.safetensors"], **engine) as sim:
        client = A1111Client(EngineUrl(sim.url), timeout_seconds=2.0, acknowledge_seconds=ACKNOWLEDGE_SECONDS)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await client.describe()
                yield sim, client
        finally:
            await client.close()


@asynccontextmanager
async def http(
    on: Card, *, flavor: Flavor = "ollama", unload: str | None = None
) -> AsyncIterator[tuple[SimHttpEngine, HttpServiceClient]]:
    async with SimHttpEngine(card=on, models=tuple(MODELS), flavor=flavor) as sim:
        client = HttpServiceClient(
            EngineUrl(sim.url),
            unload=None if unload is None else parse_unload(unload),
            timeout_seconds=2.0,
            acknowledge_seconds=ACKNOWLEDGE_SECONDS,
        )
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                yield sim, client
        finally:
            await client.close()


ENGINES = {"comfyui": comfyui, "a1111": a1111, "http": http}


def hold(on: Card, url: str, *models: str) -> None:
    """As if jobs of these models had run."""
    with on.change(url) as memory:
        memory.resident.update({model: on.model_bytes(model) for model in models})


# --- every service, every fault


@pytest.fixture(params=list(ENGINES))
async def loaded(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Card, Faults, ServiceClient]]:
    """An engine with something in memory, whichever service."""
    on = card()
    model = "llm-a" if request.param == "http" else "sd15.safetensors"
    async with ENGINES[request.param](on) as (sim, client):
        hold(on, sim.url, model)
        yield on, sim.faults, client


async def test_commanded_and_then_seen_free(loaded: tuple[Card, Faults, ServiceClient]) -> None:
    on, _, client = loaded
    assert on.bytes_used() > 2 * GIB
    await client.unload()
    await until(lambda: on.bytes_used() == 0)
    await client.unload()


async def test_an_acknowledgment_may_be_a_lie(loaded: tuple[Card, Faults, ServiceClient]) -> None:
    on, faults, client = loaded
    used = on.bytes_used()
    faults.unload = "lies"
    await client.unload()
    assert on.bytes_used() == used
    faults.unload = "ok"
    await client.unload()
    await until(lambda: on.bytes_used() == 0)


async def test_memory_may_fall_late(loaded: tuple[Card, Faults, ServiceClient]) -> None:
    on, faults, client = loaded
    used = on.bytes_used()
    faults.unload, faults.unload_seconds = "late", 0.1
    await client.unload()
    assert on.bytes_used() == used
    await until(lambda: on.bytes_used() == 0)


async def test_an_unload_that_hangs_is_an_error_in_time(loaded: tuple[Card, Faults, ServiceClient]) -> None:
    on, faults, client = loaded
    used = on.bytes_used()
    faults.unload = "hangs"
    async with asyncio.timeout(5 * ACKNOWLEDGE_SECONDS):
        with pytest.raises(EngineError, match="did not"):
            await client.unload()
    assert on.bytes_used() == used
    faults.unload = "ok"
    await client.unload()
    await until(lambda: on.bytes_used() == 0)


async def test_an_engine_that_fails_or_is_gone(loaded: tuple[Card, Faults, ServiceClient]) -> None:
    on, faults, client = loaded
    faults.fail_requests = 100
    with pytest.raises(EngineError):
        await client.unload()
    assert on.bytes_used() > 0


@pytest.mark.parametrize("service", list(ENGINES))
async def test_an_engine_that_is_down(service: str) -> None:
    on = card()
    async with ENGINES[service](on) as (sim, client):
        await sim.server.crash()
        with pytest.raises(EngineError):
            await client.unload()


# --- what is free, as they tell it


@pytest.mark.parametrize("make", [comfyui, a1111])
async def test_what_they_tell_of_the_card_is_of_all_its_engines(make: Any) -> None:
    on = card()
    async with make(on, **({"skip_load": True} if make is a1111 else {})) as (_, client):
        assert await client.vram() == Vram(bytes_free=24 * GIB, bytes_total=24 * GIB)
        on.attach("another", "http")
        hold(on, "another", "llm-a")
        assert await client.vram() == Vram(bytes_free=21 * GIB, bytes_total=24 * GIB)
        await on.attach("another", "http").unload()
        assert (await client.vram()).bytes_free == 24 * GIB


async def test_a_server_of_another_kind_tells_nothing() -> None:
    async with http(card()) as (sim, client):
        hold(sim.card, sim.url, "llm-a")
        assert await client.vram() == Vram()
        await client.make_loadable()


async def test_a_probe_after_an_unload_measures_again() -> None:
    async with a1111_scene.scene() as here:
        before = (await here.client.probe(frozenset())).vram_bytes_free
        await here.client.unload()
        after = (await here.client.probe(frozenset())).vram_bytes_free
        assert before is not None and after is not None and after > before
    async with comfyui(card()) as (sim, client):
        hold(sim.card, sim.url, "sd15.safetensors")
        before = (await client.probe(frozenset())).vram_bytes_free
        await client.unload()
        await until(lambda: sim.card.bytes_used() == 0)
        assert before == 20 * GIB
        assert (await client.probe(frozenset())).vram_bytes_free == 24 * GIB


# --- ComfyUI


async def test_nothing_is_sent_to_a_comfyui_at_work() -> None:
    async with comfyui_scene.scene() as here:
        async with here.running(here.attempt(comfyui_scene.slow(steps=20))):
            with pytest.raises(EngineError) as caught:
                await here.client.unload()
            assert caught.value.code == "engine_busy" and not caught.value.sent
        stranger = {"prompt": comfyui_scene.slow(steps=1000)}
        assert await here.post("/prompt", stranger) == 200
        with pytest.raises(EngineError) as caught:
            await here.client.unload()
        assert caught.value.code == "engine_busy"
        assert not here.sim.queue.flags
        assert await here.post("/interrupt", {}) == 200


async def test_the_cache_of_node_outputs_goes_too() -> None:
    async with comfyui_scene.scene() as here:
        graph = comfyui_scene.slow(steps=2)
        assert (await here.run(graph)).state is JobState.SUCCEEDED
        await here.client.unload()
        began = len(here.heard)
        assert (await here.run(graph)).state is JobState.SUCCEEDED
        assert here.values(here.heard[-1].job) and len(here.heard) > began, "computed again, not cached"


# --- A1111


def unload_lines(on: Card) -> list[str]:
    return [line["kind"] for line in on.lines() if line["event"] == "begin"]


async def test_an_a1111_computes_again_after_unload_and_make_loadable() -> None:
    async with a1111_scene.scene() as here:
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED
        await here.client.unload()
        assert here.sim.card.resident(here.sim.url) == {}
        await here.client.make_loadable()
        assert here.sim.card.resident(here.sim.url) != {}
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED
        requests = here.sim.server.requests
        await here.client.make_loadable()
        assert here.sim.server.requests == requests, "nothing is needed, so nothing is asked"


async def test_without_make_loadable_the_job_would_fail() -> None:
    async with a1111_scene.scene() as here:
        await here.client.unload()
        outcome = await here.run(PICTURE)
        assert outcome.failure is not None and "same device" in outcome.failure.message
        await here.client.make_loadable()
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED


async def test_an_unload_that_may_have_come_through_is_followed_by_a_reload() -> None:
    async with a1111_scene.scene() as here:
        await restarted_client(here)
        with pytest.raises(EngineError, match="did not answer"):
            await here.client.unload()  # this card takes 0.3 s for it
        await until(lambda: here.sim.card.resident(here.sim.url) == {})
        await here.client.make_loadable()
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED


async def restarted_client(here: A1111Scene) -> A1111Client:
    """As after a restart of the gateway: a client that knows nothing."""
    await here.client.close()
    client = A1111Client(
        EngineUrl(here.sim.url), pace=a1111_scene.QUICK, timeout_seconds=0.5, acknowledge_seconds=0.1
    )
    here.client = client
    return client


async def test_a_restarted_gateway_finds_the_checkpoint_off_the_card() -> None:
    async with a1111_scene.scene() as here:
        await here.client.unload()
        client = await restarted_client(here)
        await client.make_loadable()
        assert here.sim.card.resident(here.sim.url) != {}
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED


async def test_a_checkpoint_that_somebody_else_took_off_is_found_after_the_failure() -> None:
    async with a1111_scene.scene() as here:
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED
        assert await here.post("/sdapi/v1/unload-checkpoint", {}) == 200
        await here.client.make_loadable()
        assert (await here.run(PICTURE)).state is JobState.FAILED
        await here.client.make_loadable()
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED


async def test_an_a1111_with_nothing_loaded_is_left_alone() -> None:
    on = card()
    async with a1111(on, skip_load=True) as (sim, client):
        await client.unload()
        assert unload_lines(on) == [] and sim.checkpoints.loaded is None, "an unload would have loaded first"


async def test_an_a1111_that_tells_no_memory_is_unloaded_only_after_a_job() -> None:
    async with a1111_scene.scene(tells_memory=False) as here:
        assert await here.client.vram() == Vram()
        await here.client.unload()
        assert here.sim.card.resident(here.sim.url) != {}
        await here.client.make_loadable()
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED
        await here.client.unload()
        assert here.sim.card.resident(here.sim.url) == {}
        await here.client.make_loadable()
        assert here.sim.card.resident(here.sim.url) != {}


async def test_nothing_is_sent_to_an_a1111_at_work() -> None:
    async with a1111_scene.scene() as here:
        async with here.running(here.attempt(LONGER)) as task:
            await refused_as_busy(here)
            assert (await task).state is JobState.SUCCEEDED
        async with asyncio.TaskGroup() as group:
            stranger = group.create_task(here.post("/sdapi/v1/txt2img", LONGER))
            await until(lambda: here.sim.sim_state()["running"] is not None)
            await refused_as_busy(here)
            assert await stranger == 200, "the sampler keeps its model"


async def refused_as_busy(here: A1111Scene) -> None:
    with pytest.raises(EngineError) as caught:
        await here.client.unload()
    assert caught.value.code == "engine_busy" and not caught.value.sent


async def test_a_reload_waits_for_a_strangers_job_too() -> None:
    async with a1111_scene.scene(strict_unload=False) as here, asyncio.TaskGroup() as group:
        await here.client.unload()
        stranger = group.create_task(here.post("/sdapi/v1/txt2img", LONGER))
        await until(lambda: here.sim.sim_state()["running"] is not None)
        with pytest.raises(EngineError) as caught:
            await here.client.make_loadable()
        assert caught.value.code == "engine_busy"
        assert await stranger == 200


async def test_forge_is_unloaded_and_loads_by_itself() -> None:
    async with a1111_scene.scene(forge=True) as here:
        await here.client.unload()
        assert here.sim.card.resident(here.sim.url) == {}
        requests = here.sim.server.requests
        await here.client.make_loadable()
        assert here.sim.server.requests == requests
        assert (await here.run(PICTURE)).state is JobState.SUCCEEDED


# --- http engines


@pytest.mark.parametrize(
    ("flavor", "unload"),
    [
        ("ollama", None),
        ("ollama", "ollama"),
        ("llama-swap", None),
        ("llama-swap", "llama-swap"),
        ("llama-swap-old", None),
        ("llama-swap-old", "llama-swap"),
        ("plain", "POST /api/unload"),
        ("plain", 'POST /api/unload {"all": true}'),
    ],
)
async def test_each_way_frees_all_models(flavor: Flavor, unload: str | None) -> None:
    on = card()
    async with http(on, flavor=flavor, unload=unload) as (sim, client):
        hold(on, sim.url, *MODELS)
        await client.unload()
        assert on.bytes_used() == 0 and sim.unloads == (2 if flavor == "ollama" else 1)
        await client.unload()


async def test_a_server_that_cannot_be_told() -> None:
    async with http(card(), flavor="plain") as (sim, client):
        with pytest.raises(EngineError) as caught:
            await client.unload()
        assert caught.value.code == "cannot_unload" and "`unload`" in caught.value.message
        assert sim.unloads == 0


async def test_a_refusal_is_an_error() -> None:
    async with http(card(), flavor="plain", unload="DELETE /no/such/path") as (_, client):
        with pytest.raises(EngineError, match="404"):
            await client.unload()


async def test_one_model_that_is_refused_does_not_keep_the_others() -> None:
    on = card()
    async with http(on) as (sim, client):
        hold(on, sim.url, "gone", "llm-b")
        with pytest.raises(EngineError, match="404"):
            await client.unload()
        assert list(on.resident(sim.url)) == ["gone"]


async def test_what_speaks_as_no_ollama() -> None:
    async with http(card(), flavor="plain", unload="ollama") as (_, client):
        with pytest.raises(EngineError, match="404"):
            await client.unload()


async def test_a_command(tmp_path: Path) -> None:
    done = tmp_path / "done"
    async with http(card(), unload=f"run /bin/sh -c 'echo $0 > {done}' word") as (_, client):
        await client.unload()
        assert done.read_text() == "word\n"


async def test_nothing_is_sent_while_our_own_request_runs() -> None:
    async with http(card()) as (sim, client), asyncio.TaskGroup() as group:
        body: dict[str, Any] = {"model": "llm-a", "messages": [], "max_tokens": 20, "stream": True}
        task = group.create_task(client.run(attempt(body, Sink())))
        await until(lambda: bool(sim.sim_state()["running"]))
        with pytest.raises(EngineError) as caught:
            await client.unload()
        assert caught.value.code == "engine_busy" and sim.unloads == 0
        assert (await task).state is JobState.SUCCEEDED
