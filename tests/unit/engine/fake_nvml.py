"""NVIDIA's library as the tests have it: cards in a list, and switches for what can go wrong."""

import threading
from dataclasses import dataclass, field

NOT_SUPPORTED, NOT_FOUND, UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, UNKNOWN = 3, 6, 1, 9, 15, 999
HANG_SECONDS_MAX = 20.0


class FakeError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


@dataclass(frozen=True)
class FakeMemory:
    total: int
    free: int
    used: int


@dataclass(frozen=True)
class FakeUtilization:
    gpu: int


@dataclass
class FakeCard:
    uuid: str
    memory: FakeMemory = FakeMemory(total=100, free=70, used=30)
    utilization: int = 0
    celsius: int = 41
    milliwatts: int = 65_500
    errors: dict[str, int] = field(default_factory=dict[str, int])
    """Error number by function."""


class FakeNvml:
    """The functions that are used, with the real names; `calls` is what was called."""

    NVMLError: type[Exception] = FakeError

    def __init__(self, *cards: FakeCard) -> None:
        self.cards = list(cards)
        self.error: int | None = None
        """Every call fails with it."""
        self.crash: Exception | None = None
        """Every call fails as no NVML error."""
        self.hangs = threading.Event()
        """Set: calls hang until it is cleared."""
        self.goes_on = threading.Event()
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.is_up = False

    def release(self) -> None:
        self.hangs.clear()
        self.goes_on.set()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        if self.hangs.is_set():
            self.goes_on.wait(HANG_SECONDS_MAX)
        if self.crash is not None:
            raise self.crash
        if self.error is not None:
            raise FakeError(self.error)
        if not self.is_up and name != "nvmlInit":
            raise FakeError(UNINITIALIZED)

    def _of(self, handle: object, name: str) -> FakeCard:
        assert isinstance(handle, FakeCard)
        self._called(name)
        if name in handle.errors:
            raise FakeError(handle.errors[name])
        return handle

    def nvmlInit(self) -> None:  # noqa: N802
        self._called("nvmlInit")
        self.is_up = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._called("nvmlShutdown")
        self.is_up = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._called("nvmlDeviceGetCount")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object:  # noqa: N802
        self._called("nvmlDeviceGetHandleByIndex")
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object:  # noqa: N802
        self._called("nvmlDeviceGetHandleByUUID")
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise FakeError(NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:  # noqa: N802
        return self._of(handle, "nvmlDeviceGetUUID").uuid

    def nvmlDeviceGetName(self, handle: object, /) -> str:  # noqa: N802
        self._of(handle, "nvmlDeviceGetName")
        return "NVIDIA Test"

    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> FakeMemory:  # noqa: N802
        return self._of(handle, "nvmlDeviceGetMemoryInfo").memory

    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> FakeUtilization:  # noqa: N802
        return FakeUtilization(self._of(handle, "nvmlDeviceGetUtilizationRates").utilization)

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int:  # noqa: N802
        assert sensor == 0
        return self._of(handle, "nvmlDeviceGetTemperature").celsius

    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int:  # noqa: N802
        return self._of(handle, "nvmlDeviceGetPowerUsage").milliwatts
