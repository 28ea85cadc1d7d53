"""The ring of facts and what waits for slow readers: limits, gaps, ids of another process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpulane.core.events import CancelWanted, JobStarted, QueuePaused, StoreEvent
from gpulane.core.model import JobId, Token
from gpulane.engine.progress import Progress
from gpulane.errors import Unavailable
from gpulane.web import feed as feed_module
from gpulane.web.feed import PENDING_MAX, Feed
from tests.integration.web.standin import StandIn

pytestmark = pytest.mark.anyio

ONE, TWO = JobId("one"), JobId("two")


def started(n: int, job: JobId = ONE) -> StoreEvent:
    return JobStarted(n=n, job=job, token=Token("1.a"), attempts=1)


@pytest.fixture
def gateway(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


async def test_ring_gives_what_was_missed_or_says_that_it_cannot(gateway: StandIn) -> None:
    feed = Feed(gateway, boot="b", ring_max=4)
    gateway.tell(tuple(started(n) for n in range(1, 4)))
    assert [fact.n for fact in feed.since(1) or ()] == [2, 3]
    assert feed.since(0) is not None
    gateway.tell(tuple(started(n) for n in range(4, 8)))
    assert [fact.n for fact in feed.since(3) or ()] == [4, 5, 6, 7]
    assert feed.since(2) is None
    assert feed.n == 7


async def test_ids_of_another_process_mean_nothing(gateway: StandIn) -> None:
    feed = Feed(gateway, boot="b")
    assert feed.number_of(feed.event_id(5)) == 5
    assert [feed.number_of(text) for text in (None, "", "c-5", "b-", "b-x", "b--1", "5")] == [None] * 7


async def test_slow_reader_holds_a_bounded_number_of_facts(gateway: StandIn) -> None:
    feed = Feed(gateway, boot="b")
    stream = feed.subscribe(None)
    for n in range(1, PENDING_MAX + 3):
        gateway.tell((started(n),))
    assert stream.is_behind
    assert len(stream.facts) == 2


async def test_stream_of_a_job_hears_of_that_job_alone(gateway: StandIn) -> None:
    feed = Feed(gateway, boot="b")
    stream = feed.subscribe(ONE)
    gateway.tell((started(1, TWO), started(2, ONE), CancelWanted(n=3, job=TWO)))
    gateway.hub.publish(Progress(job=TWO, value=1))
    assert [fact.n for fact in stream.facts] == [2]
    assert not stream.moved
    begun = time.monotonic()
    await stream.wait(5.0)
    gateway.tell((QueuePaused(n=4, paused=True),))
    await stream.wait(5.0)
    assert time.monotonic() - begun < 1.0


async def test_streams_are_limited_and_end(gateway: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "STREAMS_MAX", 1)
    feed = Feed(gateway, boot="b")
    stream = feed.subscribe(None)
    with pytest.raises(Unavailable):
        feed.subscribe(None)
    feed.unsubscribe(stream)
    other = feed.subscribe(None)
    feed.close()
    assert other.is_closed
    gateway.tell((started(1),))
    assert feed.n == 0
