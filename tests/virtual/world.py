"""A whole gateway over scripted engines in virtual time: started, killed and started again over what is
durable."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from gpulane.adapters.base import EngineRequest
from gpulane.config import parse_settings
from gpulane.core.model import (
    ENDED,
    Account,
    ClaimId,
    Engine,
    EngineUrl,
    Gpu,
    GpuId,
    Job,
    JobId,
    JobState,
    NodeId,
    Service,
)
from gpulane.core.policy import Policy
from gpulane.dispatcher.gateway import Gateway, GatewayParts
from gpulane.store.base import JobQuery, JobRecord, NewJob
from gpulane.testing.virtual_time import VirtualTimeLoop
from tests.virtual.scripted import FailingStore, MemoryRecords, ScriptedCard, ScriptedEngine, Trouble

NODE = NodeId("node")
SETTINGS = """
probe: {interval_seconds: 2, timeout_seconds: 2, misses_max: 2, quiet_seconds: 1}
retry: {rest_seconds: 0.2}
hold: {rejoin_seconds: 5, orphan_result_seconds: 60}
"""


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class World:
    """Everything that outlives a gateway."""

    chance: random.Random
    folder: Path
    trouble: Trouble
    store: FailingStore
    records: MemoryRecords
    cards: dict[GpuId, ScriptedCard]
    engines: dict[EngineUrl, ScriptedEngine]
    gpus: tuple[Gpu, ...]
    boots: int = 0
    gateways: list[Gateway] = field(default_factory=list[Gateway])

    @contextlib.asynccontextmanager
    async def gateway(self, more: str = "") -> AsyncIterator[Gateway]:
        """Leaving the block is a sudden end: nothing is drained."""
        self.boots += 1
        settings = parse_settings(SETTINGS + more, source="test")
        parts = GatewayParts(
            settings=settings,
            policy=Policy(skip_leaking=settings.handoff.when_leaking == "skip"),
            store=self.store,
            node_store=self.records,
            node=NODE,
            boot=self.boots,
            gpus=self.gpus,
            clients={e.url: self.engines[e.url] for gpu in self.gpus for e in gpu.engines},
            wires={},
            client_for=lambda url, _: self.engines[url],
            data_folder=self.folder,
            clock=now,
            wall=now,
            new_claim=lambda: ClaimId(f"{self.chance.getrandbits(64):016x}"),
            chance=random.Random(self.chance.random()),
        )
        gateway = Gateway(parts)
        self.gateways.append(gateway)
        async with gateway.running():
            yield gateway

    def new(self, service: Service, *, account: str = "ann", digest: str = "") -> NewJob:
        number = uuid.UUID(int=self.chance.getrandbits(128), version=4)
        job = Job(id=JobId(str(number)), account=Account(account), service=service, kind="test")
        return NewJob(job=job, digest=digest or job.id)

    async def records_of_jobs(self) -> tuple[JobRecord, ...]:
        return await self.store.jobs(JobQuery(limit=500))

    async def all_ended(self, seconds: float = 3_000.0) -> tuple[JobRecord, ...]:
        async with asyncio.timeout(seconds):
            while True:
                records = await self.records_of_jobs()
                if all(record.state in ENDED for record in records):
                    return records
                await asyncio.sleep(0.5)

    async def state(self, job: JobId) -> JobState | None:
        record = await self.store.job(job)
        return None if record is None else record.state

    def overlaps(self) -> list[tuple[float, tuple[str, ...]]]:
        return [overlap for card in self.cards.values() for overlap in card.overlaps]

    def unloaded_at_work(self) -> list[tuple[float, str]]:
        return [order for engine in self.engines.values() for order in engine.unloaded_at_work]

    def computed(self) -> list[str]:
        return [job for card in self.cards.values() for job in card.computed if not job.startswith("canary")]


@contextlib.asynccontextmanager
async def world(folder: Path, *, seed: int = 0, gpus: int = 1) -> AsyncIterator[World]:
    chance, trouble = random.Random(seed), Trouble()
    store = FailingStore(lambda: 1e9 + now(), chance, trouble)
    await store.open()
    cards: dict[GpuId, ScriptedCard] = {}
    engines: dict[EngineUrl, ScriptedEngine] = {}
    described: list[Gpu] = []
    async with asyncio.TaskGroup() as tasks:
        for number in range(gpus):
            gpu = GpuId(f"box/gpu{number}")
            card = cards[gpu] = ScriptedCard()
            mine: list[Engine] = []
            for service in (Service.COMFYUI, Service.A1111):
                url = EngineUrl(f"http://{service}{number}")
                engines[url] = ScriptedEngine(url, service, card, chance, trouble, tasks)
                mine.append(Engine(url=url, service=service))
            described.append(
                Gpu(id=gpu, node=NODE, name=f"gpu{number}", uuid=f"uuid-{number}", engines=tuple(mine))
            )
        records = MemoryRecords(chance, trouble)
        yield World(chance, folder, trouble, store, records, cards, engines, tuple(described))
        for engine in engines.values():
            await engine.die()


def request() -> EngineRequest:
    return EngineRequest(method="POST", target="/run", headers=(), body=b"{}")


def the_loop() -> VirtualTimeLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop
