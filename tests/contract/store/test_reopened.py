"""A verb whose reply was lost with the process is sent again to the next: same answer, nothing changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpulane.store.sqlite import SqliteStore
from tests.contract.store.ground import LEASE, Clock, Ground
from tests.contract.store.test_transitions import CASES, TWICE, bring, verb_of

pytestmark = pytest.mark.anyio

ACCEPTED = [(verb, state) for verb, state, outcome in CASES if ">" in outcome]


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    clock = Clock()
    made = Ground(store=SqliteStore(tmp_path, clock), clock=clock, folder=tmp_path)
    await made.open()
    yield made
    await made.store.close()


@pytest.mark.parametrize(("verb", "state"), ACCEPTED, ids=[f"{v}-{s}" for v, s in ACCEPTED])
async def test_second_time_to_the_next_process(ground: Ground, verb: str, state: str) -> None:
    assert ground.folder is not None
    job, token = await bring(ground, state)
    if verb == "expire_late":
        ground.clock.pass_seconds(LEASE)
    first = await verb_of(ground, verb, job, token)()
    after = await ground.store.job(job), await ground.store.snapshot()
    await ground.store.close()
    ground.store = SqliteStore(ground.folder, ground.clock)
    await ground.store.open()
    assert (await ground.store.job(job), await ground.store.snapshot()) == after
    second = await verb_of(ground, verb, job, token)()
    assert second.code == TWICE.get(verb, first.code)
    assert (second.n, second.job, second.token) == (first.n, first.job, first.token)
    assert (await ground.store.job(job), await ground.store.snapshot()) == after
