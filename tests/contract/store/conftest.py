"""The stores under one contract: each test of this folder that asks for `ground` runs once per kind."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpulane.store.memory import MemoryStore
from gpulane.store.sqlite import SqliteStore
from tests.contract.store.ground import Clock, Ground

KINDS = ("memory", "sqlite")


def make_ground(kind: str, folder: Path) -> Ground:
    clock = Clock()
    if kind == "memory":
        return Ground(store=MemoryStore(clock), clock=clock)
    return Ground(store=SqliteStore(folder, clock), clock=clock, folder=folder)


@pytest.fixture(params=KINDS)
async def ground(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ground]:
    made = make_ground(str(request.param), tmp_path)
    await made.open()
    yield made
    await made.store.close()
