"""The driver's last word about each gpu of the settings."""

import asyncio

import pytest

from gpulane.core.model import Engine, EngineUrl, Gpu, GpuId, NodeId, Service
from gpulane.dispatcher.readings import Readings
from gpulane.engine.telemetry import Telemetry
from tests.unit.engine.fake_nvml import FakeCard, FakeNvml

pytestmark = pytest.mark.anyio


def gpu(name: str, uuid: str) -> Gpu:
    engine = Engine(url=EngineUrl(f"http://{name}"), service=Service.COMFYUI)
    return Gpu(id=GpuId(f"box/{name}"), node=NodeId("n"), name=name, uuid=uuid, engines=(engine,))


async def test_cards_are_told_by_their_uuid_and_what_is_unknown_stays_so() -> None:
    library = FakeNvml(FakeCard(uuid="GPU-1", celsius=55, utilization=80))
    telemetry = Telemetry(library)
    await telemetry.open()
    readings = Readings(telemetry, (gpu("a", "GPU-1"), gpu("b", "engines-0123")))
    task = asyncio.get_running_loop().create_task(readings.run())
    try:
        async with asyncio.timeout(5):
            while readings.last(GpuId("box/a")) is None:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await telemetry.close()
    card = readings.last(GpuId("box/a"))
    assert card is not None
    assert (card.temperature_celsius, card.utilization_percent, card.power_watts) == (55, 80, 65.5)
    unknown = readings.last(GpuId("box/b"))
    assert unknown is None or unknown.bytes_free is None


async def test_without_a_driver_it_ends_at_once() -> None:
    telemetry = Telemetry()
    await telemetry.open()
    async with asyncio.timeout(5):
        if not telemetry.is_there:
            await Readings(telemetry, (gpu("a", "GPU-1"),)).run()
    await telemetry.close()
