"""The GPU that a run measures, and its clocks meanwhile, as NVIDIA's management library tells them.

Neither torch nor a CUDA context is needed, so the clocks can be read beside the program that works.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

LIBRARIES = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1")
SM, MEMORY = 1, 2  # nvmlClockType_t
NAME_BYTES = 96
PERIOD = 0.05  # seconds from one reading of the clocks to the next


class Device(Protocol):
    """What a run asks of a GPU."""

    def about(self) -> dict[str, Any]:
        """Name, driver, and the clocks and power it may reach."""

    def reading(self) -> dict[str, int]:
        """Clocks in MHz, power in W, temperature in degrees Celsius, reasons to slow down, now."""


def visible(environ: Mapping[str, str]) -> str | None:
    """The one device that a run uses: an index in the order of the bus, or a UUID; None: none."""
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return "0"
    first = given.split(",")[0].strip()
    return first if first and first != "-1" else None


def find(environ: Mapping[str, str] = os.environ) -> Device | None:
    """The device, or None where there is none, or nothing that knows its clocks."""
    which = visible(environ)
    for library in LIBRARIES if which is not None else ():
        try:
            return NvmlDevice(ctypes.CDLL(library), which or "")
        except (OSError, NvmlError):
            continue
    return None


class NvmlError(Exception):
    """The management library refused."""


@dataclass
class NvmlDevice:
    """A GPU by index or UUID."""

    library: ctypes.CDLL
    which: str

    def __post_init__(self) -> None:
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        if self.which.isdigit():
            index = ctypes.c_uint(int(self.which))
            self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(self._handle))
        else:
            uuid = self.which.encode()
            self._call("nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(self._handle))

    def about(self) -> dict[str, Any]:
        driver = ctypes.create_string_buffer(NAME_BYTES)
        name = ctypes.create_string_buffer(NAME_BYTES)
        self._call("nvmlSystemGetDriverVersion", driver, ctypes.c_uint(NAME_BYTES))
        self._call("nvmlDeviceGetName", self._handle, name, ctypes.c_uint(NAME_BYTES))
        limits = {
            "most_sm_mhz": self._number("nvmlDeviceGetMaxClockInfo", SM),
            "most_memory_mhz": self._number("nvmlDeviceGetMaxClockInfo", MEMORY),
            "most_watts": self._number("nvmlDeviceGetEnforcedPowerLimit") // 1000,
        }
        return {"name": name.value.decode(), "driver": driver.value.decode(), **limits}

    def reading(self) -> dict[str, int]:
        return {
            "sm_mhz": self._number("nvmlDeviceGetClockInfo", SM),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", MEMORY),
            "watts": self._number("nvmlDeviceGetPowerUsage") // 1000,
            "celsius": self._number("nvmlDeviceGetTemperature", 0),
            "slowed": self._number("nvmlDeviceGetCurrentClocksThrottleReasons"),
        }

    def _number(self, function: str, *which: int) -> int:
        """0 where this device does not tell."""
        value = ctypes.c_ulonglong(0)
        try:
            self._call(function, self._handle, *which, ctypes.byref(value))
        except NvmlError:
            return 0
        return value.value

    def _call(self, function: str, *arguments: object) -> None:
        try:
            status = getattr(self.library, function)(*arguments)
        except AttributeError as error:
            raise NvmlError(function) from error
        if status != 0:
            raise NvmlError(f"{function} returned {status}")


class Clocks:
    """Reads a device's clocks all the time; `taken` tells of those since it was last asked."""

    def __init__(self, device: Device | None, period: float = PERIOD) -> None:
        self._device, self._period = device, period
        self._readings: list[dict[str, int]] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Clocks:
        if self._device is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def taken(self) -> dict[str, Any]:
        """Lowest, median and highest of each; `slowed` holds the bits of all reasons that were met.

        Empty where there is no device.
        """
        if self._device is None:
            return {}
        with self._lock:
            readings, self._readings = self._readings or [self._device.reading()], []
        summary: dict[str, Any] = {"readings": len(readings)}
        for key in readings[0]:
            values = [reading[key] for reading in readings]
            summary[key] = [min(values), int(statistics.median(values)), max(values)]
        reasons = 0
        for reading in readings:
            reasons |= reading.get("slowed", 0)
        return {**summary, "slowed": hex(reasons)}

    def _read(self) -> None:
        assert self._device is not None
        while not self._stop.wait(self._period):
            reading = self._device.reading()
            with self._lock:
                self._readings.append(reading)
