"""The few calls of the CUDA driver that Python needs, without a toolkit and without an array library."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ._C import CudaError

_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_COMPUTE_CAPABILITY_MINOR = 76
_RELEASE_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    index: int
    name: str
    compute_capability: tuple[int, int]

    @property
    def is_hopper(self) -> bool:
        """Whether the kernels run on it."""
        return self.compute_capability == (9, 0)


@cache
def _library() -> ctypes.CDLL | None:
    """The driver's library, None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@cache
def start_error() -> str | None:
    """Why the driver does not start, None where it does: no library, no GPU, or what it says itself."""
    driver = _library()
    if driver is None:
        return "there is no CUDA driver: libcuda.so.1 is not found"
    code = driver.cuInit(0)
    return None if code == 0 else f"the CUDA driver does not start: {_describe(driver, 'cuInit', code)}"


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver runs, such as (13, 0), GPU or not. None without a driver."""
    driver = _library()
    if driver is None:
        return None
    version = ctypes.c_int()
    _check(driver, "cuDriverGetVersion", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def driver_release() -> str | None:
    """The release of the driver's kernel module, such as "580.159.04". None where the system does not say."""
    try:
        text = _RELEASE_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    return found.group(1) if found else None


def gpus() -> list[Gpu]:
    """The CUDA devices of this machine, empty without a driver."""
    driver = _library()
    if driver is None or start_error() is not None:
        return []
    count = ctypes.c_int()
    _check(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_gpu(driver, index) for index in range(count.value)]


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    handle = ctypes.c_int()
    _check(driver, "cuDeviceGet", ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    _check(driver, "cuDeviceGetName", name, len(name), handle)
    major, minor = (
        _attribute(driver, attribute, handle) for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
    )
    return Gpu(index, name.value.decode(), (major, minor))


def _attribute(driver: ctypes.CDLL, attribute: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
    return value.value


def _check(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code != 0:
        raise CudaError(_describe(driver, function, code))


def _describe(driver: ctypes.CDLL, function: str, code: int) -> str:
    message = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(message))
    text = message.value.decode() if message.value else "unknown error"
    return f"{function} failed with {code}: {text}"
