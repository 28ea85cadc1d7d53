"""Jobs on a simulated LLM server: streamed as they come, and the gpu free at the last byte only."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from gpulane.adapters.http.requests import recognize
from gpulane.core.model import Account, EngineUrl, FailureKind, Job, JobId, JobState, Service
from gpulane.engine.base import AttemptContext, Found
from gpulane.engine.http import HttpServiceClient
from gpulane.engine.progress import ProgressHub
from gpulane.errors import EngineError, StoreError
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.faults import Faults
from gpulane.testing.http_engine import SimHttpEngine
from gpulane.wire import ResponseTooLarge
from tests.integration.engine.a1111_scene import WAIT_SECONDS, Sink, until
from tests.integration.raw_engine import Peer, raw_engine

pytestmark = pytest.mark.anyio

CHAT: dict[str, Any] = {"model": "tiny-llm", "messages": [], "max_tokens": 10}


def attempt(body: dict[str, Any], sink: Sink | None = None) -> AttemptContext:
    headers = (("Content-Type", "application/json"),)
    known = recognize("POST", "/v1/chat/completions", headers, json.dumps(body).encode())
    return AttemptContext(
        job=Job(
            id=JobId(str(uuid4())),
            account=Account("ann"),
            service=Service.HTTP,
            kind=known.kind,
            model=known.model,
        ),
        request=known.request,
        meta=known.meta,
        hub=ProgressHub(),
        answer=sink,
    )


@asynccontextmanager
async def served(faults: Faults | None = None) -> AsyncIterator[tuple[SimHttpEngine, HttpServiceClient]]:
    card = Card(options=CardOptions(load_seconds={"tiny-llm": 0.02}))
    async with SimHttpEngine(card=card, faults=faults) as engine:
        client = HttpServiceClient(
            EngineUrl(engine.url), name="llm", probe_path="/health", timeout_seconds=2.0
        )
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                yield engine, client
        finally:
            await client.close()


async def test_an_answer_is_streamed_as_it_comes() -> None:
    async with served() as (engine, client), asyncio.TaskGroup() as group:
        sink = Sink()
        work = attempt(CHAT | {"stream": True}, sink)
        task = group.create_task(client.run(work))
        await until(lambda: sink.body.count(b"data:") >= 2)
        assert not sink.is_finished
        assert client.known_idle() is False and not (await client.probe(frozenset())).idle
        outcome = await task
        assert outcome.state is JobState.SUCCEEDED and outcome.model == "tiny-llm"
        assert bytes(sink.body).endswith(b"data: [DONE]\n\n") and sink.is_finished
        assert client.known_idle() is True
        assert any(line.get("job") == work.job.id for line in engine.card.lines())


async def test_a_stored_answer_is_recorded() -> None:
    async with served() as (_, client):
        outcome = await client.run(attempt(CHAT))
        assert outcome.result is not None
        assert json.loads(bytes(outcome.result.document))["model"] == "tiny-llm"
        streamed = await client.run(attempt(CHAT | {"stream": True}))
        assert streamed.result is not None
        assert "[DONE]" in json.loads(bytes(streamed.result.document))


async def test_the_servers_refusal_is_passed_on() -> None:
    async with served() as (_, client):
        sink = Sink()
        outcome = await client.run(attempt(CHAT | {"model": "gone"}, sink))
        assert outcome.failure is not None and outcome.failure.kind is FailureKind.CLIENT
        assert sink.status == 404 and sink.is_finished


async def test_the_server_fails() -> None:
    async with served(Faults(error_jobs=1)) as (_, client):
        sink = Sink()
        outcome = await client.run(attempt(CHAT, sink))
        assert outcome.failure is not None and outcome.failure.kind is FailureKind.ENGINE
        assert sink.status == 500


async def test_the_server_dies_in_the_middle() -> None:
    async with served(Faults(crash_mid_jobs=1)) as (_, client):
        sink = Sink()
        outcome = await client.run(attempt(CHAT | {"stream": True}, sink))
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.code) == (FailureKind.LOST, "engine_lost")
        assert not outcome.engine_idle and sink.error is not None


async def test_a_server_that_hangs_up_is_done_with_us() -> None:
    async with served(Faults(truncate_responses=1)) as (_, client):
        sink = Sink()
        outcome = await client.run(attempt(CHAT, sink))
        assert outcome.failure is not None and outcome.failure.code == "connection_lost"
        assert outcome.engine_idle and sink.error is not None


async def test_a_refused_connection_did_not_start_anything() -> None:
    async with served() as (engine, client):
        await engine.server.crash()
        outcome = await client.run(attempt(CHAT))
        assert outcome.failure is not None and outcome.failure.kind is FailureKind.NOT_STARTED
        with pytest.raises(EngineError):
            await client.probe(frozenset())


async def test_a_cancel_waits_for_the_servers_last_byte() -> None:
    async with served() as (engine, client), asyncio.TaskGroup() as group:
        work = attempt(CHAT | {"stream": True}, Sink())
        task = group.create_task(client.run(work))
        await until(lambda: bool(engine.sim_state()["running"]))
        work.cancel_wanted.set()
        outcome = await task
        assert outcome.state is JobState.CANCELLED and engine.runs == 1
        work.cancel_wanted.set()
        assert (await client.run(work)).state is JobState.CANCELLED and engine.runs == 1


@pytest.mark.parametrize("error", [StoreError("disk full"), ResponseTooLarge("over the limit")])
async def test_an_answer_that_cannot_be_kept_is_read_to_its_end(error: Exception) -> None:
    async with served() as (engine, client):
        outcome = await client.run(attempt(CHAT | {"stream": True}, Sink(refuse=error)))
        assert outcome.failure is not None and outcome.failure.code == "answer_not_kept"
        assert outcome.engine_idle and not engine.sim_state()["running"]


async def test_what_it_says_of_itself() -> None:
    async with served() as (engine, client):
        description = await client.describe()
        assert description.offers == {"http:llm"} and b"tiny-llm" in description.documents["models"]
        assert await client.find(JobId("x")) is Found.ABSENT
        engine.faults.fail_requests = 1
        with pytest.raises(EngineError, match="500"):
            await client.probe(frozenset())


async def test_a_silent_server_is_given_up_and_stays_occupied() -> None:
    async def mute(peer: Peer) -> None:
        await peer.gone()

    async with raw_engine(mute) as silent:
        client = HttpServiceClient(
            EngineUrl(silent.url), timeout_seconds=0.1, poll_seconds=0.05, silent_seconds_max=0.3
        )
        try:
            outcome = await asyncio.wait_for(client.run(attempt(CHAT, Sink())), WAIT_SECONDS)
        finally:
            await client.close()
        assert outcome.failure is not None and outcome.failure.code == "engine_silent"
        assert not outcome.engine_idle
