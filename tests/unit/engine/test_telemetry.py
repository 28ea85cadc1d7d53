"""What the driver tells of cards, and that no fault of it becomes an exception, a zero or a long wait."""

import asyncio
import inspect
import threading
from collections.abc import Iterator

import pytest

from gpulane.engine.nvml import Nvml
from gpulane.engine.telemetry import THREADS_HUNG_MAX, CardReading, Telemetry
from tests.unit.engine.fake_nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    NOT_SUPPORTED,
    UNKNOWN,
    FakeCard,
    FakeMemory,
    FakeNvml,
)

pytestmark = pytest.mark.anyio

QUICK_SECONDS = 0.05


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nvml() -> Iterator[FakeNvml]:
    fake = FakeNvml(FakeCard("GPU-a"), FakeCard("GPU-b", utilization=97))
    yield fake
    fake.release()


def telemetry(nvml: FakeNvml, clock: Clock, *, call_seconds: float = 5.0) -> Telemetry:
    return Telemetry(nvml, call_seconds=call_seconds, clock=clock)


async def test_a_card_by_its_uuid_never_by_its_place(nvml: FakeNvml, clock: Clock) -> None:
    cards = telemetry(nvml, clock)
    await cards.open()
    first = await cards.read("GPU-b")
    assert first == CardReading(
        uuid="GPU-b",
        name="NVIDIA Test",
        bytes_used=30,
        bytes_free=70,
        bytes_total=100,
        utilization_percent=97.0,
        temperature_celsius=41.0,
        power_watts=65.5,
    )
    nvml.cards.reverse()
    assert await cards.read("GPU-b") == first
    assert "nvmlDeviceGetHandleByIndex" not in nvml.calls
    assert threading.get_ident() not in nvml.threads, "a driver call would hold up the loop"
    await cards.close()
    assert not nvml.is_up and not cards.is_there


async def test_all_cards(nvml: FakeNvml, clock: Clock) -> None:
    found = await telemetry(nvml, clock).cards()
    assert [card.uuid for card in found] == ["GPU-a", "GPU-b"]
    nvml.cards[0].errors["nvmlDeviceGetUUID"] = GPU_IS_LOST
    assert [card.uuid for card in await telemetry(nvml, clock).cards()] == ["GPU-b"]


@pytest.mark.parametrize("uuid", ["GPU-c", "", "GPU-ü"])
async def test_an_unknown_card_is_no_fault_of_the_driver(nvml: FakeNvml, clock: Clock, uuid: str) -> None:
    cards = telemetry(nvml, clock)
    assert await cards.read(uuid) is None
    assert await cards.read("GPU-a") is not None


async def test_without_the_library_all_is_unknown() -> None:
    cards = Telemetry()
    cards._nvml = None  # as `load` answers where nothing is installed
    await cards.open()
    assert await cards.read("GPU-a") is None and await cards.cards() == () and not cards.is_there
    await cards.close()


async def test_what_a_card_does_not_tell_is_unknown_and_the_rest_is_told(
    nvml: FakeNvml, clock: Clock
) -> None:
    nvml.cards[0].errors |= {
        "nvmlDeviceGetPowerUsage": NOT_SUPPORTED,
        "nvmlDeviceGetUtilizationRates": NOT_SUPPORTED,
    }
    nvml.cards[1].memory = FakeMemory(total=0, free=0, used=0)
    cards = telemetry(nvml, clock)
    one, two = await cards.read("GPU-a"), await cards.read("GPU-b")
    assert one is not None and one.power_watts is None and one.utilization_percent is None
    assert one.bytes_free == 70
    assert two is not None and two.bytes_free is None and two.bytes_used is None and two.bytes_total is None


async def test_a_lost_card_leaves_the_others(nvml: FakeNvml, clock: Clock) -> None:
    names = [name for name in dir(nvml) if name.startswith("nvmlDeviceGet")]
    nvml.cards[0].errors = dict.fromkeys(names, GPU_IS_LOST)
    cards = telemetry(nvml, clock)
    assert await cards.read("GPU-a") is None
    assert await cards.read("GPU-b") is not None


@pytest.mark.parametrize(
    "crash", [None, OSError("the driver was replaced"), AttributeError("no such function")]
)
async def test_a_driver_that_fails_midway_is_asked_again_later(
    nvml: FakeNvml, clock: Clock, crash: Exception | None
) -> None:
    cards = telemetry(nvml, clock)
    assert await cards.read("GPU-a") is not None
    nvml.error, nvml.crash = UNKNOWN, crash
    assert await cards.read("GPU-a") is None and not cards.is_there
    nvml.error = nvml.crash = None
    asked = len(nvml.calls)
    assert await cards.read("GPU-a") is None and await cards.cards() == ()
    assert len(nvml.calls) == asked, "not before the rest is over"
    clock.now += 1.0
    assert await cards.read("GPU-a") is not None and cards.is_there
    assert nvml.calls[asked : asked + 2] == ["nvmlShutdown", "nvmlInit"], "as after a new driver"


async def test_the_rest_grows_up_to_a_limit(nvml: FakeNvml, clock: Clock) -> None:
    nvml.error = DRIVER_NOT_LOADED
    cards = Telemetry(nvml, rest_seconds=1.0, rest_seconds_max=8.0, clock=clock)
    await cards.open()
    rests: list[float] = []
    for _ in range(6):
        began, asked = clock.now, len(nvml.calls)
        while len(nvml.calls) == asked:
            clock.now += 0.5
            await cards.read("GPU-a")
        rests.append(clock.now - began)
    assert rests == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    nvml.error = None
    clock.now += 8.0
    assert await cards.read("GPU-a") is not None


async def test_a_driver_that_hangs_holds_nobody_up(nvml: FakeNvml, clock: Clock) -> None:
    cards = telemetry(nvml, clock, call_seconds=QUICK_SECONDS)
    await cards.open()
    nvml.hangs.set()
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*(cards.read("GPU-a") for _ in range(20)), cards.cards())
    assert not any(answers)
    assert nvml.calls.count("nvmlDeviceGetHandleByUUID") == 1, "who waited behind it did not ask too"
    nvml.release()
    clock.now += 1.0
    assert await cards.read("GPU-a") is not None


async def test_threads_that_hang_are_counted(nvml: FakeNvml, clock: Clock) -> None:
    cards = telemetry(nvml, clock, call_seconds=QUICK_SECONDS)
    nvml.hangs.set()
    for _ in range(THREADS_HUNG_MAX + 3):
        assert await cards.read("GPU-a") is None
        clock.now += 100.0
    assert len(nvml.calls) == THREADS_HUNG_MAX
    nvml.release()
    async with asyncio.timeout(5):
        while await cards.read("GPU-a") is None:
            clock.now += 100.0
            await asyncio.sleep(0.01)


async def test_a_caller_who_leaves_breaks_nothing(nvml: FakeNvml, clock: Clock) -> None:
    cards = telemetry(nvml, clock)
    nvml.hangs.set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(QUICK_SECONDS):
            await cards.read("GPU-a")
    nvml.release()
    assert await cards.read("GPU-a") is not None


def test_the_real_library_has_all_that_is_used() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not here")
    names = [name for name, _ in inspect.getmembers(Nvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) == 12
    assert [name for name in names if not hasattr(real, name)] == []
    assert issubclass(real.NVMLError, Exception)


async def test_the_real_library_without_a_driver_or_with_one() -> None:
    cards = Telemetry()
    await cards.open()
    for card in await cards.cards():
        again = await cards.read(card.uuid)
        assert again is not None and again.bytes_total == card.bytes_total
    await cards.close()
