"""What differs between array libraries: making an array, the current stream, the way to the compiled module.

A library is known by the module that its array type comes from and is imported here only once one of its arrays has
come in.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, TypeVar

from . import _C
from .calls import METADATA_SIZE, Array, DecodeCall, MergeCall


def _is_read_by_dynamo() -> bool:
    return "torch._dynamo" in sys.modules and bool(sys.modules["torch"].compiler.is_dynamo_compiling())


# Whether the code that asks isn't run but read, by torch.compile or torch.export, which can't read the compiled module.
# Every call of ours asks: with PyTorch at hand, PyTorch's own function stands here, which takes a fifth of the time.
is_read_by_dynamo: Callable[[], bool] = _is_read_by_dynamo

_increment_version: Callable[[Array], None]  # PyTorch's, once it is at hand

Result = TypeVar("Result")


class Operations(Protocol):
    """What a library's arrays are decoded by: a Framework, or ``torch_library``."""

    @abstractmethod
    def check_dense_decode(self, call: DecodeCall) -> None:
        """Raises for wrong arrays, before a plan is made of their shapes."""

    @abstractmethod
    def dense_decode(self, call: DecodeCall) -> tuple[Array, Array]:
        """(out, lse): the call's, or new arrays where it has none."""

    @abstractmethod
    def plan_dense_decode(
        self, cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[Array, Array]:
        """(tile_scheduler_metadata, num_splits)"""

    @abstractmethod
    def merge_states(self, call: MergeCall) -> tuple[Array, Array]:
        """(out, lse): the call's, or new arrays where it has none."""

    @abstractmethod
    def can_keep(self, array: Array) -> bool:
        """Whether the array outlives the function that has made it: not what stands for one while JAX traces."""

    @abstractmethod
    def can_use(self, kept: Array, like: Array) -> bool:
        """Whether an array that an earlier call has kept goes with ``like``: not one that stands for others in a trace
        that is over."""


class Framework(Operations, ABC):
    """An array library. The methods' arrays are its own."""

    name: str

    def check_array(self, array: Array, name: str) -> None:
        """Raises for an array of the library's of a kind that is never taken; the message starts with ``name``."""

    def can_keep(self, array: Array) -> bool:
        return True

    def can_use(self, kept: Array, like: Array) -> bool:
        return True

    def check_output(self, array: Array, name: str, like: str = "q") -> None:
        """Raises unless the array is one of the library's, as that named ``like`` is, and may be written to."""
        check_framework(self, array, name, like)


class DLPackFramework(Framework):
    """A library whose arrays the compiled module reads and writes through DLPack."""

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
        """Makes byte arrays on the device of ``like``. None where the compiled module allocates through DLPack."""
        return None

    def check_dense_decode(self, call: DecodeCall) -> None:
        self.call(_C.dense_decode_workspace_size, call.arrays, call.softmax_scale, call.causal)

    def dense_decode(self, call: DecodeCall) -> tuple[Array, Array]:
        out_shape, lse_shape = call.result_shapes()
        out = self.empty(call.q, out_shape) if call.out is None else call.out
        lse = self.empty(call.q, lse_shape, "float32") if call.lse is None else call.lse
        arrays = call._replace(out=out, lse=lse).arrays
        self.call(_C.dense_decode, arrays, call.softmax_scale, call.causal, self.stream(call.q), self.allocator(call.q))
        return out, lse

    def plan_dense_decode(
        self, cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[Array, Array]:
        num_sm_parts = self.call(_C.dense_decode_num_sm_parts, (cache_seqlens,), num_q_tokens_per_head_k, num_heads_k)
        metadata = self.empty(cache_seqlens, (num_sm_parts, METADATA_SIZE), "int32")
        num_splits = self.empty(cache_seqlens, (cache_seqlens.shape[0] + 1,), "int32")
        arrays = cache_seqlens, metadata, num_splits
        self.call(_C.plan_dense_decode, arrays, num_q_tokens_per_head_k, self.stream(cache_seqlens))
        return metadata, num_splits

    def merge_states(self, call: MergeCall) -> tuple[Array, Array]:
        like = call.outs.arrays[0]
        out_shape, lse_shape = call.result_shapes()
        out = self.empty(like, out_shape) if call.out is None else call.out
        lse = self.empty(like, lse_shape, "float32") if call.lse is None else call.lse

        def launch(*arrays: Any) -> None:
            *states, out, lse, stream = arrays
            outs, lses = states[: len(call.outs.arrays)], states[len(call.outs.arrays) :]
            _C.merge_states(call.outs.regroup(outs), call.lses.regroup(lses), out, lse, stream)

        self.call(launch, (*call.states(), out, lse), self.stream(like))
        return out, lse


class TorchMemory(DLPackFramework):
    """PyTorch's tensors that have memory, with the stream and the allocator that are current on their device."""

    name = "PyTorch"

    def __init__(self) -> None:
        global _increment_version
        self._torch = torch = import_module("torch")
        _increment_version = torch.autograd.graph.increment_version
        self._dtypes = {"float32": torch.float32, "int32": torch.int32}
        # PyTorch 2.11 and later: stream and workspace need no way through Python.
        self._has_exchange_table = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
        _C.find_torch(torch.Tensor)

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return like.new_empty(shape, dtype=like.dtype if dtype is None else self._dtypes[dtype])

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        if not self._has_exchange_table:  # __dlpack__ refuses tensors that require grad
            arrays = tuple(None if array is None else array.detach() for array in arrays)
        return function(*arrays, *options)

    def dense_decode(self, call: DecodeCall) -> tuple[Array, Array]:
        results = super().dense_decode(call)
        note_written(call.out, call.lse)
        return results

    def merge_states(self, call: MergeCall) -> tuple[Array, Array]:
        results = super().merge_states(call)
        note_written(call.out, call.lse)
        return results

    def stream(self, like: Array) -> int | None:
        if self._has_exchange_table or not like.is_cuda:
            return None
        return int(self._torch.cuda.current_stream(like.device).cuda_stream)

    def allocator(self, like: Array) -> Callable[[int], object] | None:
        if self._has_exchange_table:
            return None
        return lambda num_bytes: like.new_empty((num_bytes,), dtype=self._torch.uint8)


class PyTorch(Framework):
    """Tensors of PyTorch.

    The compiled module takes those that have memory, while nobody else watches what is done with them. All others are
    dispatched by PyTorch: a compiler's and torch.func's, fake ones, those on device "meta". So are those of PyTorch
    before 2.11, which doesn't tell.
    """

    name = "PyTorch"

    def __init__(self) -> None:
        global is_read_by_dynamo
        torch = import_module("torch")
        self._memory = TorchMemory()
        self._strided = torch.strided
        is_read_by_dynamo = torch.compiler.is_dynamo_compiling

    def check_array(self, array: Array, name: str) -> None:
        if array.layout is self._strided and not array.is_nested and not array.is_quantized:
            return
        kind = "nested" if array.is_nested else "quantized" if array.is_quantized else str(array.layout)
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")

    def check_output(self, array: Array, name: str, like: str = "q") -> None:
        super().check_output(array, name, like)
        if array.is_neg():
            raise TypeError(f"{name}: expected a tensor whose values lie in memory, got one that is yet to be negated")

    def check_dense_decode(self, call: DecodeCall) -> None:
        self._operations(*call.arrays).check_dense_decode(call)

    def can_use(self, kept: Array, like: Array) -> bool:
        return getattr(kept, "fake_mode", None) is getattr(like, "fake_mode", None)

    def dense_decode(self, call: DecodeCall) -> tuple[Array, Array]:
        return self._operations(*call.arrays).dense_decode(call)

    def plan_dense_decode(
        self, cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[Array, Array]:
        return self._operations(cache_seqlens).plan_dense_decode(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)

    def merge_states(self, call: MergeCall) -> tuple[Array, Array]:
        return self._operations(*call.states(), call.out, call.lse).merge_states(call)

    def _operations(self, *arrays: Array | None) -> Operations:
        if all(array is None or _C.torch_can_read(array) for array in arrays):
            return self._memory
        from . import torch_library

        return torch_library


class NumPy(DLPackFramework):
    """Arrays on the CPU: ``float16``, and ``bfloat16`` by way of ml_dtypes."""

    name = "NumPy"

    def __init__(self) -> None:
        self._empty = import_module("numpy").empty

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        return self._empty(shape, like.dtype if dtype is None else dtype)

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        return function(*map(_to_readable, arrays), *options)


class CuPy(DLPackFramework):
    """Arrays on a GPU, with the stream that is current on that device."""

    name = "CuPy"

    def __init__(self) -> None:
        self._cupy = import_module("cupy")

    def empty(self, like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        with like.device:
            return self._cupy.empty(shape, like.dtype if dtype is None else dtype)

    def call(self, function: Callable[..., Result], arrays: tuple[Array | None, ...], *options: object) -> Result:
        return function(*map(_to_readable, arrays), *options)

    def stream(self, like: Array) -> int | None:
        with like.device:
            return int(self._cupy.cuda.get_current_stream().ptr)

    def allocator(self, like: Array) -> Callable[[int], object] | None:
        return lambda num_bytes: self.empty(like, (num_bytes,), "uint8")


def _jax() -> Framework:
    from .jax_ffi import Jax

    return Jax()


# By the module that an array's type, or a base of it, comes from.
_FRAMEWORKS: dict[str, Callable[[], Framework]] = {
    "torch": PyTorch,
    "numpy": NumPy,
    "cupy": CuPy,
    "jax": _jax,
    "jaxlib": _jax,
}
_instances: dict[Callable[[], Framework], Framework] = {}
_by_array_type: dict[type, Framework] = {}
_making = threading.RLock()  # a library's module may register its arrays while it is imported


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
    """Raises ``TypeError`` where an array belongs to another library than that named ``like``, or is never taken.

    The message starts with ``name``.
    """
    other = framework_of(array, name)
    if other is not framework:
        raise TypeError(f"{name}: expected an array of {framework.name} as {like}, got one of {other.name}")
    framework.check_array(array, name)


def check_gradless(out: Array | None, lse: Array | None) -> None:
    """Raises ``ValueError`` for a tensor of PyTorch that requires grad, which would be that of its old values."""
    if not getattr(out, "requires_grad", False) and not getattr(lse, "requires_grad", False):
        return
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "Tensor") or not torch.is_grad_enabled():
        return
    for name, result in (("out", out), ("lse", lse)):
        if result is not None and isinstance(result, torch.Tensor) and result.requires_grad:
            raise ValueError(f"{name}: expected a tensor that does not require grad, got one that does")


def note_written(out: Array | None, lse: Array | None) -> None:
    """Tell PyTorch of the tensors that a caller gave for results, so that autograd notices where it has saved them."""
    if out is not None:
        _increment_version(out)
    if lse is not None:
        _increment_version(lse)


def take_note_of_torch() -> None:
    """Get ready for tensors and register ``torch_library``, if PyTorch has been imported; else that comes later."""
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "library") and hasattr(torch, "compiler"):
        _by_array_type[torch.Tensor] = _find(torch.Tensor, "tensor")
        import_module(".torch_library", __package__)


def _find(array_type: type, name: str) -> Framework:
    for base in array_type.__mro__:
        kind = _FRAMEWORKS.get(base.__module__.partition(".")[0])
        if kind is None or (kind is not _jax and not _is_of_arrays(array_type)):
            continue
        with _making:
            if kind not in _instances:
                _instances[kind] = kind()
            return _instances[kind]
    raise TypeError(f"{name}: expected an array of PyTorch, CuPy, JAX or NumPy, got {array_type.__qualname__}")


def _is_of_arrays(library_type: type) -> bool:
    """Whether a type of PyTorch, NumPy or CuPy is one of arrays, not of dtypes or devices. JAX's tracers don't tell."""
    return hasattr(library_type, "shape") and hasattr(library_type, "dtype")


# What NumPy and CuPy export through DLPack.
_EXPORTED = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
)


def _to_readable(array: Array | None) -> object | None:
    """NumPy knows bfloat16 only through ml_dtypes and doesn't export it. Of what else it doesn't, an error tells."""
    if array is None or array.dtype.name in _EXPORTED:
        return array
    if array.dtype.name == "bfloat16":
        return _C.Bfloat16Bits(array.view(f"{array.dtype.byteorder}u2"))
    return _C.ShapeDType(list(array.shape), array.dtype.name)
