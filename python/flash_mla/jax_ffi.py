"""JAX: the operations as custom calls of XLA, in functions that ``jax.jit`` compiles and outside."""

from __future__ import annotations

import operator
from importlib import import_module
from typing import Any

from . import _C
from .calls import METADATA_SIZE, Array, DecodeCall, MergeCall
from .frameworks import Framework

_DECODE, _PLAN, _MERGE = "flash_mla_dense_decode", "flash_mla_plan_dense_decode", "flash_mla_merge_states"


class Jax(Framework):
    """Arrays of JAX on the CPU or a GPU, concrete or traced.

    XLA launches the work, in order with its own and without waiting for it. For that it is told a workspace that is
    large enough on any GPU: the device isn't known when a function is traced.
    """

    name = "JAX"

    def __init__(self) -> None:
        self._jax = jax = import_module("jax")
        self._ffi = import_module("jax.ffi")
        self._numpy = import_module("numpy")
        for platform, handlers in _C.xla_ffi_handlers().items():
            for name, handler in handlers.items():
                self._ffi.register_ffi_target(name, handler, platform=platform)
        # Compiled once for each set of shapes; inside another jit they are inlined.
        self._decode = jax.jit(self._call_decode, static_argnames=("softmax_scale", "causal"), inline=True)
        self._plan = jax.jit(self._call_plan, static_argnames=("num_q_tokens_per_head_k", "num_sm_parts"), inline=True)
        self._merge = jax.jit(self._call_merge, static_argnames=("num_outs", "result_shapes"), inline=True)

    def can_keep(self, array: Array) -> bool:
        return not isinstance(array, self._jax.core.Tracer)

    def check_output(self, array: Array, name: str, like: str = "q") -> None:
        super().check_output(array, name, like)
        raise ValueError(f"{name}: expected None, as JAX arrays are immutable, got one")

    def check_dense_decode(self, call: DecodeCall) -> None:
        _workspace_size(call)

    def dense_decode(self, call: DecodeCall) -> tuple[Array, Array]:
        out, lse = self._decode(*call.arrays, softmax_scale=call.softmax_scale, causal=call.causal)
        return out, lse

    def plan_dense_decode(
        self, cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[Array, Array]:
        if cache_seqlens.ndim != 1:
            raise ValueError(f"cache_seqlens: expected shape (batch_size,), got {cache_seqlens.shape}")
        if cache_seqlens.dtype != "int32":
            raise TypeError(f"cache_seqlens: expected dtype int32, got {cache_seqlens.dtype}")
        extents = operator.index(num_q_tokens_per_head_k), operator.index(num_heads_k)
        metadata, num_splits = self._plan(
            cache_seqlens,
            num_q_tokens_per_head_k=extents[0],
            num_sm_parts=self._num_sm_parts(cache_seqlens, *extents),
        )
        return metadata, num_splits

    def merge_states(self, call: MergeCall) -> tuple[Array, Array]:
        call.check_shapes(lambda array: str(array.dtype))
        num_outs = len(call.outs.arrays)
        out, lse = self._merge(*call.states(), num_outs=num_outs, result_shapes=call.result_shapes())
        return out, lse

    def _call_decode(self, *arrays: Array | None, softmax_scale: float, causal: bool) -> tuple[Array, Array]:
        """arrays: those of a DecodeCall."""
        call = DecodeCall._make((*arrays, softmax_scale, causal))
        out_shape, lse_shape = call.result_shapes()
        results = (
            self._result(out_shape, call.q.dtype),
            self._result(lse_shape, "float32"),
            self._result((_workspace_size(call),), "uint8"),
        )
        options = {"softmax_scale": self._numpy.float32(softmax_scale), "causal": self._numpy.bool_(causal)}
        given = [array for array in arrays if array is not None]
        out, lse, _ = self._ffi.ffi_call(_DECODE, results)(*given, **options)
        return out, lse

    def _call_plan(self, cache_seqlens: Array, num_q_tokens_per_head_k: int, num_sm_parts: int) -> tuple[Array, Array]:
        shapes = (num_sm_parts, METADATA_SIZE), (cache_seqlens.shape[0] + 1,)
        results = tuple(self._result(shape, "int32") for shape in shapes)
        num_q_tokens = self._numpy.int64(num_q_tokens_per_head_k)
        metadata, num_splits = self._ffi.ffi_call(_PLAN, results)(cache_seqlens, num_q_tokens_per_head_k=num_q_tokens)
        return metadata, num_splits

    def _call_merge(
        self, *arrays: Array, num_outs: int, result_shapes: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[Array, Array]:
        """arrays: those of outs, then those of lses."""
        out_shape, lse_shape = result_shapes
        results = self._result(out_shape, arrays[0].dtype), self._result(lse_shape, "float32")
        count = self._numpy.int32(num_outs)
        out, lse = self._ffi.ffi_call(_MERGE, results)(*arrays, num_outs=count)
        return out, lse

    def _result(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._jax.ShapeDtypeStruct(shape, dtype)

    def _num_sm_parts(self, cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int) -> int:
        """For the array's device; for a traced array, which has none yet, the one that JAX would take by itself.

        Elsewhere such a plan gives the same results, if perhaps later.
        """
        is_traced = isinstance(cache_seqlens, self._jax.core.Tracer)
        devices = self._jax.local_devices() if is_traced else cache_seqlens.devices()
        device = next(iter(devices))
        if device.platform == "gpu":
            index = device.local_hardware_id
            return _C.dense_decode_num_sm_parts_of_gpu(index, num_q_tokens_per_head_k, num_heads_k)
        return _C.dense_decode_num_sm_parts(_C.ShapeDType([1], "int32"), num_q_tokens_per_head_k, num_heads_k)


def _workspace_size(call: DecodeCall) -> int:
    """Bytes that suffice on any GPU. Raises for wrong shapes and dtypes."""
    return _C.dense_decode_max_workspace_size(*call.map_arrays(_describe))


def _describe(array: Array) -> _C.ShapeDType:
    return _C.ShapeDType(list(map(int, array.shape)), array.dtype.name)
