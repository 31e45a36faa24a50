"""The NVIDIA driver's answers about the GPU, through ctypes: no CUDA toolkit, no torch, no context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from gkp.text import clean

Capability = tuple[int, int]
"""CUDA compute capability, (major, minor): (8, 9) is Ada."""

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver API (cuda.h)."""
_NAME_BYTES = 256


@dataclass(frozen=True)
class Driver:
    """What the driver says. version: of the newest CUDA that it serves ("12.4"); name, capability: of the first visible
    GPU (CUDA_VISIBLE_DEVICES), None without one."""

    version: str
    name: str | None = None
    capability: Capability | None = None


def device_capability() -> Capability | None:
    """Compute capability of the first visible GPU; None without a driver or a GPU. Makes no CUDA context."""
    found = ask_driver()
    return found.capability if found else None


def device_name() -> str | None:
    """Name of the first visible GPU; None without a driver or a GPU."""
    found = ask_driver()
    return found.name if found else None


def driver_version() -> str | None:
    """Newest CUDA version that the driver serves ("12.4"); None without a driver."""
    found = ask_driver()
    return found.version if found else None


def ask_driver(library: str = _DRIVER) -> Driver | None:
    """Ask the driver API in a shared library. None when it cannot be loaded, or is no driver. Never raises."""
    try:
        cuda = ctypes.CDLL(library)
        number = ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(number)) or number.value <= 0:
            return None
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        return _first_device(cuda, version) or Driver(version)
    except (OSError, AttributeError):  # no such library; no such function in it
        return None


def _first_device(cuda: ctypes.CDLL, version: str) -> Driver | None:
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(_NAME_BYTES)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1 \
            or cuda.cuDeviceGet(ctypes.byref(device), 0) \
            or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device) \
            or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device) \
            or cuda.cuDeviceGetName(name, _NAME_BYTES, device):
        return None
    return Driver(version, clean(name.value.decode("utf-8", "replace")), (major.value, minor.value))
