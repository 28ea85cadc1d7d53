# ruff: noqa: N802 - the names are NVIDIA's
"""What is used of NVIDIA's management library, as a type; and the library itself, where it is installed.

Nothing of it is called here. Every call may hang with the driver: see `telemetry`.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Final, Protocol, cast

NOT_THIS_CARD: Final = frozenset(
    {
        2,  # NVML_ERROR_INVALID_ARGUMENT: no UUID at all
        3,  # NVML_ERROR_NOT_SUPPORTED
        4,  # NVML_ERROR_NO_PERMISSION
        6,  # NVML_ERROR_NOT_FOUND
        13,  # NVML_ERROR_FUNCTION_NOT_FOUND: the driver is older than the question
        15,  # NVML_ERROR_GPU_IS_LOST: it fell off the bus; the others are still there
        16,  # NVML_ERROR_RESET_REQUIRED
        21,  # NVML_ERROR_NO_DATA
        28,  # NVML_ERROR_GPU_NOT_FOUND
    }
)
"""Errors that concern one card, or one question to it; any other is the driver's, and of all cards."""
TEMPERATURE_GPU: Final = 0
"""NVML_TEMPERATURE_GPU: the sensor on the die, the only one there is."""


class Memory(Protocol):
    """Bytes of one card."""

    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def used(self) -> int: ...


class Utilization(Protocol):
    """Percent of the last sampling time."""

    @property
    def gpu(self) -> int: ...


class Nvml(Protocol):
    """The functions of `pynvml` (nvidia-ml-py) that are called. Each may raise `NVMLError`."""

    @property
    def NVMLError(self) -> type[Exception]: ...
    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> Memory: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> Utilization: ...
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int: ...


def load() -> Nvml | None:
    """Import the library; None where it is not installed (extra `nvml`)."""
    if not has_driver():
        return None
    try:
        return cast("Nvml", importlib.import_module("pynvml"))
    except ImportError:
        return None


def concerns_one_card(nvml: Nvml, error: Exception) -> bool:
    """Tell an error of one card from one of the driver."""
    return isinstance(error, nvml.NVMLError) and getattr(error, "value", None) in NOT_THIS_CARD


def has_driver() -> bool:
    """Tell whether NVIDIA's driver is installed, before its library's 16 MiB of Python are loaded in vain."""
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True
