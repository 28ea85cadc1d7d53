"""The whole gateway over simulated engines: one job per gpu, nothing lost, whatever dies or leaves."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.gateway.small_fleet import Client, picture, slow, small_fleet, until

pytestmark = pytest.mark.anyio


async def test_both_services_share_each_card_one_job_at_a_time(tmp_path: Path) -> None:
    async with small_fleet(tmp_path, gpus=2) as fleet, fleet.gateway() as client:
        prompts = [await client.prompt(slow(seed=n)) for n in range(20)]
        answers = await asyncio.gather(
            *(client.post("/sdapi/v1/txt2img", picture(seed=n)) for n in range(20))
        )
        assert [status for status, _ in answers] == [200] * 20
        ended = [await client.ended(job) for job in prompts]
    assert {job["state"] for job in ended} == {"succeeded"}
    verdict = fleet.judged()
    assert verdict.is_clean, verdict
    computed = fleet.computed()
    assert len(computed) == 40
    assert set(computed.values()) == {1}
    assert {job["gpu"] for job in ended} == {"box/gpu0", "box/gpu1"}


async def test_a_cancelled_waiting_job_never_runs(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        first = await client.prompt(slow(steps=40, seed=1))
        second = await client.prompt(slow(seed=2))
        await until(lambda: client.is_running(first))
        async with client.http.delete(f"{client.url}/gpulane/v1/jobs/{second}") as answer:
            assert answer.status in {200, 202, 204}
        assert (await client.ended(second))["state"] == "cancelled"
        assert (await client.ended(first))["state"] == "succeeded"
    assert list(fleet.computed()) == [first]


async def test_of_several_prompts_put_to_the_front_the_last_goes_first(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        running = await client.prompt(slow(steps=40, seed=1))
        await until(lambda: client.is_running(running))
        plain = await client.prompt(slow(steps=1, seed=2))
        fronts = [await client.prompt(slow(steps=1, seed=seed), front=True) for seed in (3, 4, 5)]
        ended = [await client.ended(job) for job in (running, *reversed(fronts), plain)]
        started = [job["started_at"] for job in ended]
    assert started == sorted(started)


async def test_a_cancelled_running_job_is_interrupted_and_the_gpu_goes_on(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        first = await client.prompt(slow(steps=2000, seed=1))
        second = await client.prompt(slow(seed=2))
        await until(lambda: client.is_running(first))
        async with client.http.delete(f"{client.url}/gpulane/v1/jobs/{first}"):
            pass
        assert (await client.ended(first))["state"] == "cancelled"
        assert (await client.ended(second))["state"] == "succeeded"
    assert fleet.judged().is_clean


async def test_an_engine_that_dies_loses_no_job(tmp_path: Path) -> None:
    async with small_fleet(tmp_path, gpus=2) as fleet, fleet.gateway() as client:
        jobs = [await client.prompt(slow(steps=20, seed=n)) for n in range(6)]
        await until(lambda: client.is_running(jobs[0]))
        running = await client.job(jobs[0])
        victim = next(g for g in fleet.gpus if g.comfyui.server.url == running["engine"])
        await victim.comfyui.server.restart()
        ended = [await client.ended(job) for job in jobs]
        assert [job["state"] for job in ended] == ["succeeded"] * 6
        lost = next(job for job in ended if job["id"] == jobs[0])
        assert len(lost["attempts"]) == 2
    assert fleet.judged().is_clean


async def test_work_that_bypassed_the_gateway_counts_as_occupancy(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        engine = fleet.gpus[0].comfyui.server.url
        async with client.http.post(f"{engine}/prompt", json={"prompt": slow(steps=50, seed=7)}) as answer:
            assert answer.status == 200
        job = await client.prompt(slow(seed=8))
        status, _ = await client.post("/sdapi/v1/txt2img", picture(seed=9))
        assert status == 200
        assert (await client.ended(job))["state"] == "succeeded"
    assert fleet.judged().is_clean, fleet.judged()


async def test_a_waiting_call_whose_client_left_is_not_run_and_can_be_rejoined(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        first = await client.prompt(slow(steps=60, seed=1))
        await until(lambda: client.is_running(first))
        with pytest.raises(TimeoutError):
            await short_call(client, picture(seed=3))
        with pytest.raises(TimeoutError):
            await short_call(client, picture(seed=4))
        again, _ = await client.post("/sdapi/v1/txt2img", picture(seed=3))
        assert again == 200

        async def gone() -> Any:
            jobs = (await client.get("/gpulane/v1/jobs?service=a1111"))["jobs"]
            return {job["state"] for job in jobs} == {"succeeded", "cancelled"}

        await until(gone)
    assert len(fleet.computed()) == 2, "the one that nobody came back for was not rendered"


async def test_an_answer_whose_client_left_is_given_to_the_identical_request(tmp_path: Path) -> None:
    async with small_fleet(tmp_path, seconds_per_step=200.0) as fleet, fleet.gateway() as client:
        with pytest.raises(TimeoutError):
            await short_call(client, picture(steps=60, seed=5))
        status, _ = await client.post("/sdapi/v1/txt2img", picture(steps=60, seed=5))
        assert status == 200
    assert set(fleet.computed().values()) == {1}
    assert len(fleet.computed()) == 1


async def test_a_restart_finds_the_running_job_and_keeps_the_waiting_ones(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet:
        async with fleet.gateway() as client:
            jobs = [await client.prompt(slow(steps=80, seed=n)) for n in range(3)]
            await until(lambda: client.is_running(jobs[0]))
        async with fleet.gateway() as client:
            ended = [await client.ended(job) for job in jobs]
    assert [job["state"] for job in ended] == ["succeeded"] * 3
    assert len(ended[0]["attempts"]) == 1, "re-attached, not run again"
    verdict = fleet.judged()
    assert verdict.is_clean, verdict
    assert fleet.computed() == dict.fromkeys(jobs, 1)


async def test_what_ended_while_the_gateway_was_away_is_recorded_from_history(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet:
        async with fleet.gateway() as client:
            job = await client.prompt(slow(steps=40, seed=1))
            await until(lambda: client.is_running(job))

        async def is_computed() -> bool:
            return job in fleet.computed()

        await until(is_computed)
        async with fleet.gateway() as client:
            ended = await client.ended(job)
            assert ended["state"] == "succeeded"
            assert (await client.get(f"/history/{job}"))[job]["status"]["status_str"] == "success"
    assert fleet.computed() == {job: 1}


async def test_a_zombie_gets_no_jobs(tmp_path: Path) -> None:
    async with small_fleet(tmp_path, gpus=2) as fleet:
        fleet.gpus[0].comfyui.faults.zombie = True
        async with fleet.gateway(wait_for=3) as client:
            jobs = [await client.prompt(slow(seed=n)) for n in range(4)]
            ended = [await client.ended(job) for job in jobs]
    assert {job["state"] for job in ended} == {"succeeded"}
    assert {job["gpu"] for job in ended} == {"box/gpu1"}


async def short_call(client: Client, body: dict[str, object], seconds: float = 0.3) -> None:
    """A client behind a proxy with a short time-out."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with client.http.post(client.url + "/sdapi/v1/txt2img", json=body, timeout=timeout) as answer:
        await answer.read()
