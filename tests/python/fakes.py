"""Arrays that exist only as DLPack capsules: any device, dtype, shape and strides, with memory or without."""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA = 1, 2  # DLPack device types
READ_ONLY = 1

_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4
_DTYPES = {
    "bfloat16": (_BFLOAT, 16),
    "float16": (_FLOAT, 16),
    "float32": (_FLOAT, 32),
    "float64": (_FLOAT, 64),
    "int32": (_INT, 32),
    "int64": (_INT, 64),
    "uint8": (_UINT, 8),
}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class FakeArray:
    """An array of a library that knows DLPack and nothing else.

    It counts the capsules that it has handed out and that have been given back, and notes the options that it was
    asked with. Without `data` it points to an address at which there is no memory; `owner` keeps the memory alive.
    """

    _next_address = 1 << 44

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        *,
        strides: tuple[int, ...] | None = None,
        device: tuple[int, int] = (CUDA, 0),
        data: int | None = None,
        offset: int = 0,
        flags: int = 0,
        lanes: int = 1,
        version: int | None = 1,
        owner: object = None,
    ) -> None:
        if data is None:
            data = FakeArray._next_address
            FakeArray._next_address += 1 << 36
        self.device = device
        self.requests: list[dict[str, Any]] = []
        self.num_returned = 0
        extents = (ctypes.c_int64 * len(shape))(*shape)
        steps = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        self._kept = (extents, steps, owner)
        tensor = _Tensor(data, _Device(*device), len(shape), _DType(*_DTYPES[dtype], lanes), extents, steps, offset)
        self._versioned = version is not None
        self._managed = _ManagedVersioned(version, 0, None, None, flags, tensor) if version else _Managed(tensor)
        self._destructor = _Destructor(self._give_back)

    def __dlpack__(self, **options: Any) -> Any:
        self.requests.append(options)
        if "max_version" in options and not self._versioned:
            raise TypeError("got an unexpected keyword argument 'max_version'")
        self._name = b"dltensor_versioned" if self._versioned else b"dltensor"
        return _new_capsule(ctypes.addressof(self._managed), self._name, ctypes.cast(self._destructor, ctypes.c_void_p))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    @property
    def num_capsules_alive(self) -> int:
        taken = sum(1 for options in self.requests if self._versioned or "max_version" not in options)
        return taken - self.num_returned

    def _give_back(self, _: int) -> None:
        self.num_returned += 1
