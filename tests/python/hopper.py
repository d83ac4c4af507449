"""Asks the CUDA driver whether there is a Hopper GPU, without any framework."""

from __future__ import annotations

import ctypes
import functools

NEEDED = "needs a Hopper GPU (compute capability 9.0)"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def missing() -> str | None:
    """What is missing to run the kernels on device 0, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return f"{NEEDED}: no CUDA driver"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return f"{NEEDED}: no CUDA device"
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    if (major.value, minor.value) != (9, 0):
        return f"{NEEDED}: found {name.value.decode()} ({major.value}.{minor.value})"
    return None
