"""What differs between array libraries: making an array, the current stream, the way through DLPack.

A library is known by the module that its array type comes from and is imported here only once one of its arrays has
come in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from . import _C

# An array of any of the libraries: they share no base class.
Array = Any

Result = TypeVar("Result")


class Framework(ABC):
    """An array library. The methods' arrays are its own."""

    name: str

    @abstractmethod
    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """A new array on the device of ``like``, and of its dtype unless one is named ("float32", "int32")."""

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        """Call a function of the compiled module, with arrays in a form that it can read through DLPack."""
        return function(*arrays, *options)

    def stream(self, like: Array) -> int | None:
        """The current stream on the device of ``like``. None where the compiled module finds it, or there is none."""
        return None

    def allocator(self, like: Array) -> Callable[[int], object] | None:
        """Makes byte arrays on the device of ``like``; to be kept until ``finish`` returns.

        None where the compiled module allocates through DLPack.
        """
        return None

    def check_output(self, array: Array, name: str, like: str = "q") -> None:
        """Raises unless the array is one of the library's, as that named ``like`` is, and may be written to."""
        check_framework(self, array, name, like)

    def finish(self, like: Array) -> None:  # noqa: B027 (most libraries have nothing to do here)
        """Called after a launch."""


class PyTorch(Framework):
    """Tensors on the CPU or a GPU, with the stream and the allocator that are current on that device."""

    name = "PyTorch"

    def __init__(self) -> None:
        self._torch = torch = import_module("torch")
        self._dtypes = {"float32": torch.float32, "int32": torch.int32}
        # PyTorch 2.11 and later: stream and workspace need no way through Python.
        self._has_exchange_table = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
        _C.find_torch(torch.Tensor)

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return like.new_empty(shape, dtype=like.dtype if dtype is None else self._dtypes[dtype])

    def stream(self, like: Array) -> int | None:
        if self._has_exchange_table or not like.is_cuda:
            return None
        return int(self._torch.cuda.current_stream(like.device).cuda_stream)

    def allocator(self, like: Array) -> Callable[[int], object] | None:
        if self._has_exchange_table:
            return None
        return lambda num_bytes: like.new_empty((num_bytes,), dtype=self._torch.uint8)


class NumPy(Framework):
    """Arrays on the CPU: ``float16``, and ``bfloat16`` by way of ml_dtypes."""

    name = "NumPy"

    def __init__(self) -> None:
        self._empty = import_module("numpy").empty

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return self._empty(shape, like.dtype if dtype is None else dtype)

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        return function(*map(_bits_if_bfloat16, arrays), *options)


class CuPy(Framework):
    """Arrays on a GPU, with the stream that is current on that device."""

    name = "CuPy"

    def __init__(self) -> None:
        self._cupy = import_module("cupy")

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        with like.device:
            return self._cupy.empty(shape, like.dtype if dtype is None else dtype)

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        return function(*map(_bits_if_bfloat16, arrays), *options)

    def stream(self, like: Array) -> int | None:
        with like.device:
            return int(self._cupy.cuda.get_current_stream().ptr)

    def allocator(self, like: Array) -> Callable[[int], object] | None:
        return lambda num_bytes: self.empty(like, (num_bytes,), "uint8")


class Jax(Framework):
    """Concrete arrays, outside ``jit``, on the CPU or a GPU.

    JAX has no current stream, and knows nothing of work that it has not launched itself: a call waits for its inputs,
    runs on the device's default stream and waits for the results.
    """

    name = "JAX"

    def __init__(self) -> None:
        self._jax = import_module("jax")

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        with self._jax.default_device(self._device(like)):
            return self._jax.numpy.empty(shape, like.dtype if dtype is None else dtype)

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        return function(*(None if array is None else self._capsule(array) for array in arrays), *options)

    def allocator(self, like: Array) -> Callable[[int], object] | None:
        kept = []  # JAX does not know of the launch, and would give the memory to others before its end

        def allocate(num_bytes: int) -> object:
            kept.append(self.empty(like, (num_bytes,), "uint8"))
            return self._capsule(kept[-1])

        return allocate

    def check_output(self, array: Array, name: str, like: str = "q") -> None:
        super().check_output(array, name, like)
        raise ValueError(f"{name}: expected None, as JAX arrays are immutable, got one")

    def finish(self, like: Array) -> None:
        if self._device(like).platform == "gpu":
            from . import cuda

            cuda.synchronize(self._device(like).local_hardware_id)

    def _capsule(self, array: Array) -> object:
        return self._concrete(array).block_until_ready().__dlpack__()

    def _device(self, array: Array) -> Any:
        return next(iter(self._concrete(array).devices()))

    def _concrete(self, array: Array) -> Array:
        if isinstance(array, self._jax.core.Tracer):
            raise TypeError("flash_mla runs outside jit: expected concrete JAX arrays, got a traced one")
        return array


_FRAMEWORKS: dict[str, type[Framework]] = {
    "torch": PyTorch,
    "numpy": NumPy,
    "cupy": CuPy,
    "jax": Jax,
    "jaxlib": Jax,
}
_instances: dict[type[Framework], Framework] = {}
_by_array_type: dict[type, Framework] = {}


def framework_of(array: Array, name: str) -> Framework:
    """The library that an array belongs to.

    Raises
    ------
    TypeError
        for anything but an array of PyTorch, CuPy, JAX or NumPy; the message starts with ``name``.
    """
    framework = _by_array_type.get(type(array))
    if framework is None:
        framework = _by_array_type[type(array)] = _find(type(array), name)
    return framework


def check_framework(framework: Framework, array: Array, name: str, like: str = "q") -> None:
    """Raises ``TypeError`` where an array belongs to another library than that named ``like``.

    The message starts with ``name``.
    """
    other = framework_of(array, name)
    if other is not framework:
        raise TypeError(f"{name}: expected an array of {framework.name} as {like}, got one of {other.name}")


def _find(array_type: type, name: str) -> Framework:
    for base in array_type.__mro__:
        kind = _FRAMEWORKS.get(base.__module__.partition(".")[0])
        if kind is not None:
            if kind not in _instances:
                _instances[kind] = kind()
            return _instances[kind]
    raise TypeError(f"{name}: expected an array of PyTorch, CuPy, JAX or NumPy, got {array_type.__qualname__}")


def _bits_if_bfloat16(array: Array | None) -> object | None:
    """NumPy knows bfloat16 only through ml_dtypes, and DLPack exports of such arrays are refused."""
    if array is None or array.dtype.name != "bfloat16":
        return array
    return _C.Bfloat16Bits(array.view("uint16"))
