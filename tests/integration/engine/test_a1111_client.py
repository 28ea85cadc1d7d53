"""Jobs on a simulated A1111, with every fault: how they end, and that a gpu is free only when it is."""

import asyncio

import pytest

from gpulane.adapters.a1111.catalogue import Catalogue
from gpulane.core.model import EngineUrl, FailureKind, JobId, JobState
from gpulane.engine.a1111 import A1111Client, intake
from gpulane.engine.base import Found, is_refused
from gpulane.errors import EngineError, StoreError
from gpulane.testing.faults import Faults
from gpulane.wire import ResponseTooLarge
from tests.integration.engine.a1111_scene import CHECKPOINTS, QUICK, WAIT_SECONDS, Sink, scene, until
from tests.integration.raw_engine import Peer, raw_engine

pytestmark = pytest.mark.anyio

SMALL = {"prompt": "a cat", "steps": 3, "width": 128, "height": 128, "seed": 1}
LONG = SMALL | {"steps": 30, "width": 512, "height": 512}
"""About 0.6 s."""
B = {"override_settings": {"sd_model_checkpoint": "tinyB"}}


async def test_a_held_job_gets_its_answer() -> None:
    async with scene() as here:
        sink = Sink()
        outcome = await here.run(SMALL, answer=sink)
        assert outcome.state is JobState.SUCCEEDED and outcome.engine_idle
        assert outcome.model == CHECKPOINTS[0]
        assert sink.status == 200 and sink.is_finished and len(sink.json()["images"]) == 1
        assert outcome.service_seconds > 0
        assert here.runs == 1


async def test_a_stored_job_records_its_answer() -> None:
    async with scene() as here:
        outcome = await here.run(SMALL | {"batch_size": 2})
        assert outcome.result is not None
        assert [a.name for a in outcome.result.artifacts] == ["0.png", "1.png"]
        assert bytes(outcome.result.document).startswith(b"{")


async def test_the_checkpoint_asked_for_is_the_one_that_runs() -> None:
    async with scene(load_seconds=0.3) as here:
        outcome = await here.run(SMALL | B | {"steps": 20})
        assert outcome.state is JobState.SUCCEEDED
        assert outcome.model == CHECKPOINTS[1]
        assert outcome.load_seconds is not None and 0.1 < outcome.load_seconds < 2
        warm = await here.run(SMALL | B)
        assert warm.load_seconds is None
        # Only options are restored: the model stays, so the next account's job brings its own.
        assert here.sim.checkpoints.loaded == CHECKPOINTS[1]
        assert here.sim.options["sd_model_checkpoint"] == CHECKPOINTS[0]


async def test_options_that_were_never_saved_are_given_back_too() -> None:
    async with scene() as here:
        before = dict(here.sim.options)
        outcome = await here.run(SMALL | {"override_settings": {"eta_noise_seed_delta": 31337}})
        assert outcome.state is JobState.SUCCEEDED
        assert here.sim.options == before, "another account's job would run with them"


async def test_another_model_than_asked_for_is_a_failure() -> None:
    async with scene() as here:
        # A checkpoint that was removed after the list was read: the engine takes the current one and says
        # nothing.
        here.catalogue = Catalogue()
        sink = Sink()
        outcome = await here.run(
            SMALL | {"override_settings": {"sd_model_checkpoint": "gone.ckpt"}}, answer=sink
        )
        assert outcome.state is JobState.FAILED and outcome.failure is not None
        assert outcome.failure.code == "wrong_model"
        assert sink.status == 0, "another attempt may still answer"
        assert outcome.model == CHECKPOINTS[0]


async def test_progress_is_told() -> None:
    async with scene() as here:
        attempt = here.attempt(LONG)
        async with here.running(attempt):
            await until(lambda: any((p.value or 0) > 0.3 for p in here.heard))
        assert {p.job for p in here.heard} == {attempt.job.id}
        assert all(p.image is None for p in here.heard)


@pytest.mark.parametrize("nowebui", [False, True])
async def test_a_cancel_interrupts_and_the_client_gets_what_there_is(nowebui: bool) -> None:
    async with scene(nowebui=nowebui) as here:
        sink = Sink()
        attempt = here.attempt(LONG | {"steps": 200}, answer=sink)
        async with here.running(attempt) as task:
            attempt.cancel_wanted.set()
            outcome = await task
        assert outcome.state is JobState.CANCELLED and outcome.engine_idle
        assert sink.is_finished and len(sink.json()["images"]) == 1
        assert (await here.client.probe(frozenset())).idle


async def test_a_cancel_before_the_start_sends_nothing() -> None:
    async with scene() as here:
        attempt = here.attempt(SMALL)
        attempt.cancel_wanted.set()
        before = here.sim.server.requests
        assert (await here.client.run(attempt)).state is JobState.CANCELLED
        assert here.sim.server.requests == before


async def test_a_cancel_never_reaches_a_strangers_job() -> None:
    async with scene() as here, asyncio.TaskGroup() as group:
        stranger = group.create_task(here.post("/sdapi/v1/txt2img", LONG | {"force_task_id": "theirs"}))
        await until(lambda: here.sim.sim_state()["running"] == "theirs")
        attempt = here.attempt(LONG | {"steps": 200})
        ours = group.create_task(here.client.run(attempt))
        await until(lambda: attempt.job.id in here.sim.sim_state()["pending"])
        attempt.cancel_wanted.set()
        assert await stranger == 200
        assert not any(
            line.get("outcome") == "interrupted"
            for line in here.sim.card.lines()
            if line.get("job") == "theirs"
        )
        outcome = await asyncio.wait_for(ours, WAIT_SECONDS)
        assert outcome.state is JobState.CANCELLED


async def test_an_interrupt_that_nobody_here_asked_for_is_a_failure() -> None:
    async with scene() as here:
        sink = Sink()
        attempt = here.attempt(LONG | {"steps": 200}, answer=sink)
        async with here.running(attempt) as task:
            await here.post("/sdapi/v1/interrupt")
            outcome = await task
        assert outcome.failure is not None and outcome.failure.kind is FailureKind.INTERRUPTED
        assert sink.status == 0


async def test_out_of_memory_is_the_engines_fault() -> None:
    async with scene(faults=Faults(oom_jobs=1)) as here:
        sink = Sink()
        outcome = await here.run(SMALL, answer=sink)
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.ENGINE, "out_of_memory")
        assert sink.status == 0 and outcome.engine_idle
        # Its id stays active in the engine's table; that is no work.
        assert (await here.client.probe(frozenset())).idle
        assert (await here.run(SMALL)).state is JobState.SUCCEEDED


async def test_the_requests_own_fault_goes_to_its_client_as_it_is() -> None:
    async with scene() as here:
        sink = Sink()
        outcome = await here.run(SMALL | {"init_images": ["xxxx"]}, endpoint="img2img", answer=sink)
        assert outcome.failure is not None and outcome.failure.kind is FailureKind.CLIENT
        assert sink.status == 500 and sink.is_finished
        assert sink.json()["detail"] == "Invalid encoded image"


async def test_a_task_that_never_started_stays_pending_and_is_no_work() -> None:
    async with scene() as here:
        await here.run(SMALL | {"init_images": ["xxxx"]}, endpoint="img2img")
        assert here.sim.sim_state()["pending"], "as the real one does"
        idle: list[bool] = []
        async with asyncio.timeout(WAIT_SECONDS):
            while not idle or not idle[-1]:
                idle.append((await here.client.probe(frozenset())).idle)
                await asyncio.sleep(0.05)
        assert idle[0] is False


async def test_probes_in_between_do_not_make_an_own_stale_task_young_again() -> None:
    async with scene() as here:
        await here.run(SMALL | {"init_images": ["xxxx"]}, endpoint="img2img")
        (stale,) = here.sim.sim_state()["pending"]
        looks = here.client._looks
        async with asyncio.timeout(WAIT_SECONDS):
            while not (await looks.look(JobId(stale))).is_idle:
                await here.client.probe(frozenset({JobId(stale)}))
                await asyncio.sleep(0.05)


async def test_the_engine_dies_in_the_middle() -> None:
    async with scene(faults=Faults(crash_mid_jobs=1)) as here:
        sink = Sink()
        outcome = await here.run(LONG, answer=sink)
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.LOST, "engine_lost")
        assert outcome.failure.killed_engine and not outcome.engine_idle
        assert sink.status == 0
        with pytest.raises(EngineError) as caught:
            await here.client.probe(frozenset(), fresh=True)
        assert is_refused(caught.value)


async def test_the_engine_restarts_in_the_middle() -> None:
    async with scene() as here:
        attempt = here.attempt(LONG)
        async with here.running(attempt) as task:
            await here.sim.server.restart()
            outcome = await task
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.LOST, "engine_restarted")
        assert outcome.failure.killed_engine and outcome.engine_idle
        assert await here.client.find(attempt.job.id) is Found.ABSENT


async def test_a_broken_connection_does_not_free_a_computing_engine() -> None:
    async with scene(timeout_seconds=0.5) as here:
        attempt = here.attempt(LONG | {"steps": 60})
        async with here.running(attempt) as task:
            here.sim.server._cut_connections()
            outcome = await task
        assert outcome.failure is not None and outcome.failure.code == "connection_lost"
        assert outcome.engine_idle and not outcome.failure.killed_engine
        assert here.sim.sim_state()["running"] is None and here.runs == 1


async def test_a_truncated_answer_is_lost_but_not_the_engine() -> None:
    async with scene() as here:
        sink = Sink()
        attempt = here.attempt(LONG, answer=sink)
        async with here.running(attempt) as task:
            # Polls of ours are answered too: the answer of the job is the one with half a body.
            await until(lambda: (here.sim.state.sampling_step or 0) > 25)
            here.sim.faults.truncate_responses = 20
            await until(lambda: here.runs == 1)
            here.sim.faults.truncate_responses = 1
            await until(lambda: here.sim.faults.truncate_responses == 0 or task.done())
            here.sim.faults.truncate_responses = 0
            outcome = await task
        assert outcome.state is JobState.FAILED and outcome.failure is not None
        assert outcome.failure.kind is FailureKind.LOST and not outcome.failure.killed_engine
        assert outcome.engine_idle and sink.status == 0


async def test_a_slow_body_is_waited_for() -> None:
    async with scene() as here:
        sink = Sink()
        here.sim.faults.slow_body_bytes_per_second = 20_000
        outcome = await here.run(SMALL, answer=sink)
        assert outcome.state is JobState.SUCCEEDED and sink.is_finished
        assert sink.json()["images"]


async def test_late_answers_are_waited_for() -> None:
    async with scene() as here:
        here.sim.faults.latency_seconds = 0.3
        outcome = await here.run(SMALL)
        assert outcome.state is JobState.SUCCEEDED


async def test_a_hung_job_keeps_the_gpu_occupied() -> None:
    async with scene(faults=Faults(hang_jobs=1)) as here:
        attempt = here.attempt(LONG)
        async with here.running(attempt) as task:
            await until(lambda: here.sim.state.sampling_step * 2 >= 29)
            attempt.cancel_wanted.set()
            await until(lambda: here.sim.state.interrupted)
            # An engine that ignores interrupts is not idle, whatever we wish.
            done, _ = await asyncio.wait({task}, timeout=0.5)
            assert not done and not (await here.client.probe(frozenset())).idle
            task.cancel()


async def test_a_refused_connection_did_not_start_anything() -> None:
    async with scene() as here:
        attempt = here.attempt(SMALL)
        await here.sim.server.crash()
        outcome = await here.client.run(attempt)
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.NOT_STARTED, "connect_failed")


@pytest.mark.parametrize("error", [StoreError("disk full"), ResponseTooLarge("over the limit")])
@pytest.mark.parametrize("held_back_bytes", [10, 10**9])
async def test_an_answer_that_cannot_be_kept_frees_the_gpu(
    error: Exception, held_back_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "HELD_BACK_BYTES_MAX", held_back_bytes)
    async with scene() as here:
        outcome = await here.run(SMALL, answer=Sink(refuse=error))
        assert outcome.failure is not None and outcome.engine_idle
        # Not LOST: that would be computed again, to no better end.
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.CLIENT, "answer_not_kept")
        bad = await here.run(SMALL | {"init_images": ["x"]}, endpoint="img2img", answer=Sink(refuse=error))
        assert bad.failure is not None and bad.failure.kind is FailureKind.CLIENT


async def test_a_big_answer_is_handed_on_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "HELD_BACK_BYTES_MAX", 100)
    async with scene() as here:
        sink = Sink()
        assert (await here.run(SMALL, answer=sink)).state is JobState.SUCCEEDED
        assert sink.json()["images"] and sink.is_finished
        here.catalogue = Catalogue()
        late = Sink()
        settings = {"override_settings": {"sd_model_checkpoint": "gone.ckpt"}}
        assert (await here.run(SMALL | settings, answer=late)).state is JobState.FAILED
        assert late.error is not None and not late.is_finished


async def test_a_stranger_is_seen() -> None:
    async with scene() as here, asyncio.TaskGroup() as group:
        group.create_task(here.post("/sdapi/v1/txt2img", LONG | {"force_task_id": "one"}))
        await until(lambda: here.sim.sim_state()["running"] == "one")
        group.create_task(here.post("/sdapi/v1/txt2img", SMALL | {"force_task_id": "two"}))
        await until(lambda: "two" in here.sim.sim_state()["pending"])
        report = await here.client.probe(frozenset())
        assert not report.idle and report.strange_jobs == ("two",)


async def test_following_after_a_restart_of_ours() -> None:
    async with scene() as here, asyncio.TaskGroup() as group:
        attempt = here.attempt(LONG)
        body = {"force_task_id": attempt.job.id}
        group.create_task(here.post("/sdapi/v1/txt2img", LONG | body))
        await until(lambda: here.sim.sim_state()["running"] == attempt.job.id)
        assert await here.client.find(attempt.job.id) is Found.RUNNING
        assert await here.client.find(JobId("other")) is Found.ABSENT
        outcome = await here.client.follow(attempt)
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.LOST, "answer_lost")
        assert outcome.engine_idle and here.sim.sim_state()["running"] is None


async def test_interrupting_an_orphan_reaches_only_it() -> None:
    async with scene() as here, asyncio.TaskGroup() as group:
        long = LONG | {"steps": 400, "force_task_id": "orphan"}
        group.create_task(here.post("/sdapi/v1/txt2img", long))
        await until(lambda: here.sim.sim_state()["running"] == "orphan")
        await here.client.interrupt(JobId("another"))
        assert not here.sim.state.interrupted
        await here.client.interrupt(JobId("orphan"))
        assert here.sim.state.interrupted


async def test_without_its_web_ui() -> None:
    async with scene(nowebui=True) as here:
        assert (await here.client.probe(frozenset())).idle
        attempt = here.attempt(LONG)
        async with here.running(attempt) as task:
            assert await here.client.find(attempt.job.id) is Found.BUSY
            await until(lambda: any((p.value or 0) > 0.2 for p in here.heard))
            assert (await task).state is JobState.SUCCEEDED


async def test_forge_and_what_it_offers() -> None:
    async with scene(forge=True) as here:
        description = await here.client.describe()
        assert description.flavor == "forge"
        assert description.offers is not None
        assert {"endpoint:txt2img", f"checkpoint:{CHECKPOINTS[1]}"} <= description.offers
        assert "sd-modules" in description.documents and "sd-vae" not in description.documents
        assert (await here.run(SMALL | B)).model == CHECKPOINTS[1]


async def test_what_an_engine_offers_and_its_card() -> None:
    async with scene() as here:
        description = await here.client.describe()
        assert description.flavor == "a1111"
        assert description.digest == (await here.client.describe()).digest
        report = await here.client.probe(frozenset())
        assert report.vram_bytes_total == here.sim.card.bytes_total
        assert here.client.known_idle() is None


async def test_extras_and_interrogate() -> None:
    async with scene() as here:
        first = await here.run(SMALL)
        assert first.result is not None
        import json

        picture = json.loads(bytes(first.result.document))["images"][0]
        outcome = await here.run({"image": picture, "upscaler_1": "Lanczos"}, endpoint="extra-single-image")
        assert outcome.state is JobState.SUCCEEDED and outcome.result is not None
        assert (await here.run({"image": picture}, endpoint="interrogate")).state is JobState.SUCCEEDED


async def test_one_job_at_a_time() -> None:
    async with scene() as here:
        attempt = here.attempt(LONG)
        async with here.running(attempt):
            assert here.client.known_idle() is False
            with pytest.raises(RuntimeError, match="already runs"):
                await here.client.run(here.attempt(SMALL))


async def test_a_listener_that_fails_does_not_end_the_job() -> None:
    async with scene() as here:

        def fail(_message: object) -> None:
            raise ValueError("a listener's mistake")

        here.hub.listen(fail)
        assert (await here.run(LONG)).state is JobState.SUCCEEDED


async def test_a_silent_engine_is_given_up_and_stays_occupied() -> None:
    """A machine that vanished without a word: connections stand, nothing is answered."""

    async def mute(peer: Peer) -> None:
        await peer.gone()

    async with raw_engine(mute) as silent, scene() as here:
        client = A1111Client(EngineUrl(silent.url), pace=QUICK, timeout_seconds=0.2)
        try:
            outcome = await asyncio.wait_for(client.run(here.attempt(SMALL)), WAIT_SECONDS)
        finally:
            await client.close()
        assert outcome.failure is not None and outcome.failure.code == "engine_silent"
        assert not outcome.engine_idle


async def test_an_engine_that_forgot_the_job_on_a_standing_connection() -> None:
    """A machine was switched off and on: nobody told the old connection."""
    asked: list[str] = []

    async def forgetful(peer: Peer) -> None:
        while head := await peer.head():
            target = head.split(" ")[1]
            asked.append(target)
            await peer.body(head)
            if target.endswith("/txt2img"):
                await peer.gone()
                return
            if target == "/internal/progress":
                is_first = asked.count(target) == 1
                await peer.answer(b'{"active":true,"progress":0.1}' if is_first else b'{"active":false}')
            else:
                await peer.answer(b'{"progress":0,"state":{"job":"","job_count":0}}')

    async with raw_engine(forgetful) as engine, scene() as here:
        client = A1111Client(EngineUrl(engine.url), pace=QUICK, timeout_seconds=1.0)
        try:
            outcome = await asyncio.wait_for(client.run(here.attempt(SMALL)), WAIT_SECONDS)
        finally:
            await client.close()
        assert outcome.failure is not None and outcome.failure.code == "engine_restarted"
        assert outcome.failure.killed_engine and outcome.engine_idle
        assert asked.count("/sdapi/v1/txt2img") == 1


async def test_a_lost_job_does_not_wait_for_a_strangers() -> None:
    async with scene() as here, asyncio.TaskGroup() as group:
        attempt = here.attempt(LONG)
        async with here.running(attempt) as task:
            await here.sim.server.restart()
            long = LONG | {"steps": 100, "force_task_id": "theirs"}
            group.create_task(here.post("/sdapi/v1/txt2img", long))
            outcome = await task
        assert outcome.failure is not None and outcome.failure.kind is FailureKind.LOST
        assert not outcome.engine_idle and here.sim.sim_state()["running"] == "theirs"
