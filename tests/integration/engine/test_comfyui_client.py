"""Our client on a simulated ComfyUI: jobs to their end, and every fault that the engine knows."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from gpulane.adapters.comfyui.rewrite import frame_type
from gpulane.core.model import EngineUrl, FailureKind, JobId, JobState
from gpulane.engine.base import AttemptContext, Found, Outcome
from gpulane.engine.comfyui import ComfyUIClient
from gpulane.errors import EngineError
from gpulane.testing.comfyui import CLASSIC_VERSION, MODERN_VERSION
from tests.integration.engine.comfyui_scene import QUICK, Scene, scene, slow, until

pytestmark = pytest.mark.anyio

LONG: dict[str, Any] = slow(steps=200, delay=0.02, seed=7)
BOTH = pytest.mark.parametrize("version", [CLASSIC_VERSION, MODERN_VERSION])


@pytest.fixture
async def here() -> AsyncIterator[Scene]:
    async with scene() as one:
        yield one


def ended(outcome: Outcome, state: JobState, *, idle: bool = True) -> Outcome:
    assert (outcome.state, outcome.engine_idle) == (state, idle), outcome.failure
    return outcome


def failed(
    outcome: Outcome, kind: FailureKind, code: str, *, idle: bool = True, killed: bool = False
) -> Outcome:
    ended(outcome, JobState.FAILED, idle=idle)
    assert outcome.failure is not None
    assert (outcome.failure.kind, outcome.failure.code) == (kind, code), outcome.failure
    assert outcome.failure.killed_engine is killed
    return outcome


# --- to the end ---------------------------------------------------------------------------------------------


@BOTH
async def test_job_runs_to_its_result(version: str) -> None:
    async with scene(version=version) as here:
        attempt = here.attempt(slow())
        outcome = ended(await here.client.run(attempt), JobState.SUCCEEDED)
        assert outcome.result is not None
        (file,) = outcome.result.artifacts
        assert (file.node, file.content_type) == ("2", "image/png")
        async with aiohttp.ClientSession() as session, session.get(f"{here.sim.url}{file.target}") as answer:
            assert (await answer.read()).startswith(b"\x89PNG")
        document = json.loads(bytes(outcome.result.document))
        assert document["prompt"][1] == attempt.job.id
        assert document["status"]["status_str"] == "success"
        assert 0.05 < outcome.service_seconds < 2
        assert here.runs == 1


async def test_progress_previews_and_messages_are_published(here: Scene) -> None:
    attempt = here.attempt(slow())
    await here.client.run(attempt)
    assert here.values(attempt.job.id) == [1, 2, 3, 4, 5]
    assert all(p.job == attempt.job.id for p in here.heard)
    frames = [p for p in here.heard if p.binary is not None]
    assert len(frames) == 5
    assert all(frame_type(p.binary or b"") == 4 and p.image and p.image_type == "image/jpeg" for p in frames)
    kinds = [json.loads(p.message)["type"] for p in here.heard if p.message]
    assert kinds[0] == "execution_start"
    assert kinds[-2:] == ["execution_success", "executing"]
    assert "status" not in kinds
    assert {"execution_cached", "progress_state", "progress", "executed"} <= set(kinds)


async def test_load_is_told_apart_from_service(here: Scene) -> None:
    graph: dict[str, Any] = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["1", 1]}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 1,
                "steps": 3,
                "cfg": 7.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
                "model": ["1", 0],
                "positive": ["3", 0],
                "negative": ["3", 0],
                "latent_image": ["2", 0],
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }
    cold = ended(await here.run(graph), JobState.SUCCEEDED)
    assert cold.load_seconds is not None
    assert cold.load_seconds >= 0.04
    assert cold.model == "sd15.safetensors"
    graph["4"]["inputs"]["seed"] = 2
    warm = ended(await here.run(graph), JobState.SUCCEEDED)
    assert warm.load_seconds is None


async def test_cached_run_is_a_success(here: Scene) -> None:
    first = ended(await here.run(slow()), JobState.SUCCEEDED)
    again = ended(await here.run(slow()), JobState.SUCCEEDED)
    assert first.result is not None
    assert again.result is not None
    assert again.result.artifacts == first.result.artifacts


async def test_success_without_files_is_a_success(here: Scene) -> None:
    graph = slow()
    graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    outcome = ended(await here.run(graph), JobState.SUCCEEDED)
    assert outcome.result is not None
    assert outcome.result.artifacts == ()


async def test_many_jobs_one_after_the_other_share_one_socket(here: Scene) -> None:
    for seed in range(20):
        ended(await here.run(slow(steps=1, delay=0.001, seed=seed)), JobState.SUCCEEDED)
    assert here.runs == 20
    assert len(here.sim.hub) == 1


# --- what the engine refuses --------------------------------------------------------------------------------


async def test_refusal_of_the_content_keeps_the_engines_words(here: Scene) -> None:
    outcome = await here.run({"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}})
    failed(outcome, FailureKind.CLIENT, "prompt_outputs_failed_validation")
    assert outcome.result is not None
    assert outcome.result.status == 400
    assert "1" in json.loads(bytes(outcome.result.document))["node_errors"]
    assert outcome.failure is not None
    assert "Required input is missing" in outcome.failure.message


async def test_partly_valid_graph_tells_what_was_left_out(here: Scene) -> None:
    graph = slow() | {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    outcome = ended(await here.run(graph), JobState.SUCCEEDED)
    assert outcome.result is not None
    assert list(json.loads(bytes(outcome.result.document))["node_errors"]) == ["9"]


async def test_refused_connection_is_not_started(here: Scene) -> None:
    await here.sim.server.crash()
    failed(await here.run(slow()), FailureKind.NOT_STARTED, "connect_failed")


# --- how it fails -------------------------------------------------------------------------------------------


async def test_error_of_a_node(here: Scene) -> None:
    here.sim.faults.error_jobs = 1
    outcome = failed(await here.run(slow()), FailureKind.ENGINE, "execution_error")
    assert outcome.failure is not None
    assert outcome.failure.message == "SimSlow (node 1): simulated failure"
    assert "Traceback" not in outcome.failure.message
    ended(await here.run(slow(seed=2)), JobState.SUCCEEDED)


async def test_out_of_memory(here: Scene) -> None:
    here.sim.faults.oom_jobs = 1
    failed(await here.run(slow()), FailureKind.ENGINE, "out_of_memory")


async def test_lost_prompt(here: Scene) -> None:
    here.sim.faults.lose_jobs = 1
    failed(await here.run(slow()), FailureKind.LOST, "engine_lost")


async def test_restart_in_the_middle(here: Scene) -> None:
    async with here.running(here.attempt(LONG)) as task:
        await here.sim.server.restart()
        failed(await task, FailureKind.LOST, "engine_restarted", killed=True)
    ended(await here.run(slow()), JobState.SUCCEEDED)


async def test_crash_without_return_leaves_the_gpu_occupied(here: Scene) -> None:
    here.sim.faults.crash_mid_jobs = 1
    failed(await here.run(slow()), FailureKind.LOST, "engine_gone", idle=False, killed=True)


async def test_short_refusal_is_waited_out(here: Scene) -> None:
    attempt = here.attempt(slow(steps=30))
    async with here.running(attempt) as task:
        await here.sim.server.refuse(0.2)
        ended(await task, JobState.SUCCEEDED)
    assert here.runs == 1


async def test_engine_that_does_not_answer_any_more_is_given_up() -> None:
    timings = replace(QUICK, request_seconds=0.1)
    async with scene(timings=timings) as here, here.running(here.attempt(LONG)) as task:
        here.sim.faults.mute_ws = True
        here.sim.faults.latency_seconds = 5
        failed(await task, FailureKind.LOST, "engine_silent", idle=False, killed=True)


# --- sockets ------------------------------------------------------------------------------------------------


async def test_mute_socket(here: Scene) -> None:
    here.sim.faults.mute_ws = True
    ended(await here.run(slow()), JobState.SUCCEEDED)
    assert here.client.known_idle() is None
    here.sim.faults.mute_ws = False
    attempt = here.attempt(slow(seed=2))
    ended(await here.client.run(attempt), JobState.SUCCEEDED)
    assert here.values(attempt.job.id) == [1, 2, 3, 4, 5]


async def test_socket_that_another_client_has_stalled(here: Scene) -> None:
    here.sim.faults.stall_ws = True
    failed_attempt = here.attempt(slow())
    here.sim.faults.error_jobs = 1
    failed(await here.client.run(failed_attempt), FailureKind.ENGINE, "execution_error")
    # The same job again on the same engine, as a retry does: its old messages come now and must not end it.
    await here.client.erase(failed_attempt.job.id)
    again = AttemptContext(
        job=failed_attempt.job, request=failed_attempt.request, meta=failed_attempt.meta, hub=here.hub
    )
    async with here.running(again) as task:
        here.sim.faults.stall_ws = False
        ended(await task, JobState.SUCCEEDED)


async def test_dropped_socket_in_the_middle(here: Scene) -> None:
    attempt = here.attempt(slow(steps=60))
    async with here.running(attempt) as task:
        await until(lambda: len(here.values(attempt.job.id)) > 2)
        await here.sim.drop_sockets()
        ended(await task, JobState.SUCCEEDED)
    values = here.values(attempt.job.id)
    assert values[-1] == 60
    assert here.runs == 1


async def test_listener_that_fails_does_not_leave_the_engine_unheard(here: Scene) -> None:
    def fail(_progress: object) -> None:
        stop()
        raise RuntimeError("a listener's own fault")

    stop = here.hub.listen(fail)
    ended(await here.run(slow(steps=20)), JobState.SUCCEEDED)
    attempt = here.attempt(slow(seed=2))
    ended(await here.client.run(attempt), JobState.SUCCEEDED)
    assert here.values(attempt.job.id) == [1, 2, 3, 4, 5]


async def test_socket_that_opens_only_after_the_job_has_begun(here: Scene) -> None:
    late = ComfyUIClient(EngineUrl(here.sim.url), timings=QUICK)
    async with asyncio.timeout(10):
        ended(await late.run(here.attempt(slow())), JobState.SUCCEEDED)
    await late.close()


async def test_mute_socket_of_a_long_job_is_no_zombie(here: Scene) -> None:
    here.sim.faults.mute_ws = True
    ended(await here.run(slow(steps=100, delay=0.02)), JobState.SUCCEEDED)


# --- engines that answer and do not compute -----------------------------------------------------------------


async def test_zombie_is_told_by_a_job_that_nobody_takes(here: Scene) -> None:
    here.sim.faults.zombie = True
    failed(await here.run(slow()), FailureKind.LOST, "engine_zombie", idle=False, killed=True)
    assert here.sim.queue.heap == [], "it must not run there later"


async def test_canary_proves_life_and_leaves_nothing(here: Scene) -> None:
    assert await here.client.canary()
    assert here.runs == 1
    assert here.sim.queue.history == {}
    here.sim.faults.zombie = True
    assert not await here.client.canary()
    assert here.sim.queue.heap == []


async def test_canary_of_an_engine_at_work_proves_nothing_and_disturbs_nothing(here: Scene) -> None:
    async with here.running(here.attempt(slow(steps=20))) as task:
        assert await here.client.canary()
        assert here.sim.queue.heap == []
        ended(await task, JobState.SUCCEEDED)


async def test_running_job_that_never_began_is_a_zombie(here: Scene) -> None:
    attempt = here.attempt(slow())
    number, extra = 1.0, {"client_id": "x"}
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        here.sim.faults.zombie = True
        task = tasks.create_task(here.client.run(attempt))
        await until(lambda: bool(here.sim.queue.heap))
        here.sim.queue.heap.clear()
        # The executing thread took it and died of it: it "runs" for ever.
        here.sim.queue.running = (number, attempt.job.id, {}, extra, [])
        failed(await task, FailureKind.LOST, "engine_zombie", idle=False, killed=True)


# --- cancel -------------------------------------------------------------------------------------------------


async def test_cancel_before_it_is_sent(here: Scene) -> None:
    attempt = here.attempt(slow())
    attempt.cancel_wanted.set()
    ended(await here.client.run(attempt), JobState.CANCELLED)
    assert here.sim.server.requests <= 1  # the event socket


@BOTH
async def test_cancel_while_it_runs(version: str) -> None:
    async with scene(version=version) as here:
        attempt = here.attempt(LONG)
        async with here.running(attempt) as task:
            attempt.cancel_wanted.set()
            outcome = ended(await task, JobState.CANCELLED)
        assert outcome.result is not None
        ended(await here.run(slow()), JobState.SUCCEEDED)


@BOTH
async def test_cancel_of_a_waiting_job_leaves_a_strangers_alone(version: str) -> None:
    async with scene(version=version) as here:
        stranger = str(uuid4())
        body = {"prompt": slow(steps=30), "prompt_id": stranger, "client_id": "other"}
        assert await here.post("/prompt", body) == 200
        attempt = here.attempt(slow(seed=2))
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(here.client.run(attempt))
            await until(lambda: bool(here.sim.queue.heap))
            attempt.cancel_wanted.set()
            ended(await task, JobState.CANCELLED)
        await until(lambda: here.sim.queue.running is None)
        assert here.sim.queue.history[stranger]["status"]["status_str"] == "success"
        assert not [p for p in here.heard if p.message and stranger.encode() in p.message]


async def test_interrupt_that_nobody_here_asked_for_is_a_failure(here: Scene) -> None:
    async with here.running(here.attempt(LONG)) as task:
        await here.post("/interrupt", {})
        failed(await task, FailureKind.INTERRUPTED, "interrupted")


async def test_cancel_of_a_hanging_job_waits_for_the_engines_word(here: Scene) -> None:
    here.sim.faults.hang_jobs = 1
    attempt = here.attempt(slow())
    async with here.running(attempt) as task:
        attempt.cancel_wanted.set()
        await until(lambda: here.sim.runner is not None and here.sim.runner.is_interrupted)
        assert not task.done()
        await here.sim.server.restart()
        ended(await task, JobState.CANCELLED)


# --- answers that go wrong ----------------------------------------------------------------------------------


async def test_late_answers(here: Scene) -> None:
    await here.run(slow(seed=2))
    here.sim.faults.latency_seconds = 0.3
    ended(await here.run(slow()), JobState.SUCCEEDED)


async def test_lost_answer_to_the_submission_is_not_sent_again(here: Scene) -> None:
    await until(lambda: len(here.sim.hub) == 1)
    here.sim.faults.truncate_responses = 1
    ended(await here.run(slow()), JobState.SUCCEEDED)
    assert here.runs == 1


async def test_submission_that_timed_out_is_looked_for() -> None:
    timings = replace(QUICK, submit_seconds=0.2)
    async with scene(timings=timings) as here:
        await until(lambda: len(here.sim.hub) == 1)
        attempt = here.attempt(slow())
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            here.sim.faults.latency_seconds = 0.4
            task = tasks.create_task(here.client.run(attempt))
            await until(lambda: here.sim.server.requests >= 3)
            here.sim.faults.latency_seconds = 0
            outcome = await task
        # The simulated engine drops what its client gave up on; a real one may have it. Looking tells.
        assert outcome.engine_idle
        assert here.runs == (1 if outcome.state is JobState.SUCCEEDED else 0)


async def test_error_500_to_the_submission_is_looked_for(here: Scene) -> None:
    await until(lambda: len(here.sim.hub) == 1)
    here.sim.faults.fail_requests = 1
    failed(await here.run(slow()), FailureKind.LOST, "submission_lost")
    assert here.runs == 0


async def test_broken_answers_while_it_runs(here: Scene) -> None:
    async with here.running(here.attempt(slow(steps=30))) as task:
        here.sim.faults.fail_requests = 2
        here.sim.faults.truncate_responses = 2
        ended(await task, JobState.SUCCEEDED)


async def test_history_that_somebody_cleared_is_made_up_for_by_messages(
    here: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(_record: object) -> None:
        here.sim.queue.running = None

    attempt = here.attempt(slow(steps=20))
    async with here.running(attempt) as task:
        monkeypatch.setattr(here.sim.queue, "task_done", forget)
        outcome = ended(await task, JobState.SUCCEEDED)
    assert outcome.result is not None
    assert [file.name for file in outcome.result.artifacts] == ["rec_00001_.png"]


# --- after a restart of ours --------------------------------------------------------------------------------


async def test_job_is_found_and_followed_by_another_client(here: Scene) -> None:
    attempt = here.attempt(slow(steps=40))
    other = ComfyUIClient(EngineUrl(here.sim.url), timings=QUICK)
    await other.open()
    async with here.running(attempt) as task:
        assert await other.find(attempt.job.id) is Found.RUNNING
        again = AttemptContext(job=attempt.job, request=attempt.request, meta=attempt.meta, hub=here.hub)
        outcome = ended(await other.follow(again), JobState.SUCCEEDED)
        await task
    assert outcome.result is not None
    assert here.runs == 1
    assert await other.find(attempt.job.id) is Found.SUCCEEDED
    await other.erase(attempt.job.id)
    assert await other.find(attempt.job.id) is Found.ABSENT
    await other.close()


async def test_every_end_is_found(here: Scene) -> None:
    here.sim.faults.error_jobs = 1
    attempt = here.attempt(slow())
    await here.client.run(attempt)
    assert await here.client.find(attempt.job.id) is Found.FAILED
    attempt = here.attempt(LONG)
    async with here.running(attempt) as task:
        waiting = str(uuid4())
        await here.post("/prompt", {"prompt": slow(seed=3), "prompt_id": waiting})
        assert await here.client.find(JobId(waiting)) is Found.WAITING
        await here.client.interrupt(JobId(waiting))
        assert await here.client.find(JobId(waiting)) is Found.ABSENT
        await here.client.interrupt(attempt.job.id)
        await task
    assert await here.client.find(attempt.job.id) is Found.INTERRUPTED


async def test_following_what_the_engine_has_lost(here: Scene) -> None:
    async with asyncio.timeout(10):
        outcome = await here.client.follow(here.attempt(slow()))
    failed(outcome, FailureKind.LOST, "engine_lost")


# --- probes -------------------------------------------------------------------------------------------------


async def test_probe_sees_what_went_past_the_gateway(here: Scene) -> None:
    report = await here.client.probe(frozenset())
    assert report.idle
    assert report.vram_bytes_total == 24 * 1024**3
    stranger = str(uuid4())
    await here.post("/prompt", {"prompt": LONG, "prompt_id": stranger})
    attempt = here.attempt(slow())
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(here.client.run(attempt))
        await until(lambda: bool(here.sim.queue.heap))
        report = await here.client.probe(frozenset({attempt.job.id}), fresh=True)
        assert not report.idle
        assert report.strange_jobs == (stranger,)
        assert here.client.known_idle() is False
        await here.client.interrupt(JobId(stranger))
        ended(await task, JobState.SUCCEEDED)
    assert here.client.known_idle() is True


async def test_password_in_the_url_is_not_shown(here: Scene) -> None:
    await here.sim.server.crash()
    client = ComfyUIClient(EngineUrl(here.sim.url.replace("://", "://ann:hush@")), timings=QUICK)
    with pytest.raises(EngineError) as caught:
        await client.probe(frozenset())
    assert "hush" not in str(caught.value)
    await client.close()


async def test_probe_of_a_dead_engine_raises(here: Scene) -> None:
    await here.sim.server.crash()
    with pytest.raises(EngineError) as caught:
        await here.client.probe(frozenset())
    assert not caught.value.sent
    await until(lambda: here.client.known_idle() is None)


@BOTH
async def test_description(version: str) -> None:
    async with scene(version=version) as here:
        one = await here.client.describe()
        assert one.version == version
        assert one.offers is not None
        assert {"node:KSampler", "CheckpointLoaderSimple.ckpt_name=sd15.safetensors"} <= one.offers
        assert {
            "object_info",
            "system_stats",
            "features",
            "models",
            "models/checkpoints",
        } <= one.documents.keys()
        assert (await here.client.describe()).digest == one.digest


async def test_description_of_something_else_is_an_error(here: Scene) -> None:
    other = ComfyUIClient(EngineUrl(here.sim.url + "/nowhere"), timings=QUICK)
    with pytest.raises(EngineError):
        await other.describe()
    await other.close()
