"""The operations as PyTorch's own, ``torch.ops.flash_mla``: what compilers put into their graphs.

Importing this module registers them. ``flash_mla`` does so by itself as soon as one is needed, and when it is imported
after PyTorch; a program that torch.export has saved needs them before it is loaded.

Results never require grad, as those of calls that go around PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from . import _C
from .calls import MAX_STATES, METADATA_SIZE, Array, DecodeCall, MergeCall, States
from .frameworks import TorchMemory, check_gradless, note_written

torch: Any = import_module("torch")

_memory = TorchMemory()
_library: Any = torch.library.Library("flash_mla", "DEF")
_DECODE = (
    "(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? tile_scheduler_metadata, "
    "Tensor? num_splits, float softmax_scale, bool causal"
)
_SCHEMAS = (
    f"dense_decode{_DECODE}) -> (Tensor out, Tensor lse)",
    f"dense_decode_into{_DECODE}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "plan_dense_decode(Tensor cache_seqlens, SymInt num_q_tokens_per_head_k, SymInt num_heads_k) "
    "-> (Tensor tile_scheduler_metadata, Tensor num_splits)",
    "merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
    "merge_states_into(Tensor[] outs, Tensor[] lses, Tensor(a!) out, Tensor(b!) lse) -> ()",
)


def is_tensor(array: Array) -> bool:
    """Whether it is a tensor of PyTorch."""
    return isinstance(array, torch.Tensor)


def check_dense_decode(call: DecodeCall) -> None:
    """Raises where no plan can be made for the shapes. All else is checked with the call, be it real or traced."""
    call.result_shapes()
    shape = tuple(call.k_cache.shape)
    if len(shape) != 4 or shape[2] < 1:
        raise ValueError(f"k_cache: expected shape (num_pages, page_size, num_heads_k, 576), got {shape}")


def can_keep(array: Array) -> bool:
    """Always: Dynamo sees to what a traced function leaves behind."""
    return True


def can_use(kept: Array, like: Array) -> bool:
    """Always: what Dynamo reads has no fakes of other traces."""
    return True


def dense_decode(call: DecodeCall) -> tuple[Array, Array]:
    """(out, lse): the call's, or new tensors where it has none."""
    inputs = (
        call.q,
        call.k_cache,
        call.block_table,
        call.cache_seqlens,
        call.tile_scheduler_metadata,
        call.num_splits,
        call.softmax_scale,
        call.causal,
    )
    if call.out is None and call.lse is None:
        out, lse = torch.ops.flash_mla.dense_decode.default(*inputs)
        return out, lse
    check_gradless(call.out, call.lse)
    out_shape, lse_shape = call.result_shapes()
    out = call.q.new_empty(out_shape) if call.out is None else call.out
    lse = call.q.new_empty(lse_shape, dtype=torch.float32) if call.lse is None else call.lse
    torch.ops.flash_mla.dense_decode_into.default(*inputs, out, lse)
    return out, lse


def plan_dense_decode(cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int) -> tuple[Array, Array]:
    """(tile_scheduler_metadata, num_splits)"""
    metadata, num_splits = torch.ops.flash_mla.plan_dense_decode.default(
        cache_seqlens, num_q_tokens_per_head_k, num_heads_k
    )
    return metadata, num_splits


def merge_states(call: MergeCall) -> tuple[Array, Array]:
    """(out, lse): the call's, or new tensors where it has none."""
    out_shape, lse_shape = call.result_shapes()
    call.lses.shapes()  # raises for an array that holds no states
    outs, lses = (
        list(states.arrays) if states.is_list else list(states.arrays[0].unbind(0)) for states in (call.outs, call.lses)
    )
    if not outs:  # PyTorch finds an operation by its tensors
        raise ValueError(f"outs: expected 1 to {MAX_STATES} states, got 0")
    if call.out is None and call.lse is None:
        out, lse = torch.ops.flash_mla.merge_states.default(outs, lses)
        return out, lse
    check_gradless(call.out, call.lse)
    out = outs[0].new_empty(out_shape) if call.out is None else call.out
    lse = outs[0].new_empty(lse_shape, dtype=torch.float32) if call.lse is None else call.lse
    torch.ops.flash_mla.merge_states_into.default(outs, lses, out, lse)
    return out, lse


# What runs on tensors that have memory.


def _decode(*arguments: Any) -> tuple[Array, Array]:
    return _decode_in_memory(_to_call(*arguments))


def _decode_into(*arguments: Any) -> None:
    call = _to_call(*arguments)
    check_gradless(call.out, call.lse)
    _decode_in_memory(call)


def _plan(cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int) -> tuple[Array, Array]:
    plan = _C.torch_plan_dense_decode(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    if plan is None:
        plan = _memory.plan_dense_decode(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    return plan


def _merge(outs: list[Array], lses: list[Array]) -> tuple[Array, Array]:
    return _memory.merge_states(_to_merge_call(outs, lses))


def _merge_into(outs: list[Array], lses: list[Array], out: Array, lse: Array) -> None:
    check_gradless(out, lse)
    _memory.merge_states(_to_merge_call(outs, lses, out, lse))


def _to_merge_call(
    outs: list[Array], lses: list[Array], out: Array | None = None, lse: Array | None = None
) -> MergeCall:
    return MergeCall(States("outs", outs, True), States("lses", lses, True), out, lse)


def _to_call(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    tile_scheduler_metadata: Array | None,
    num_splits: Array | None,
    softmax_scale: float,
    causal: bool,
    out: Array | None = None,
    lse: Array | None = None,
) -> DecodeCall:
    """The call with the operations' arguments, of which the results come last."""
    plan = tile_scheduler_metadata, num_splits
    return DecodeCall(q, k_cache, block_table, cache_seqlens, out, lse, *plan, softmax_scale, causal)


def _decode_in_memory(call: DecodeCall) -> tuple[Array, Array]:
    results = _C.torch_dense_decode(*call, None)
    if results is None:
        return _memory.dense_decode(call)
    note_written(call.out, call.lse)
    return results


# What runs on tensors that only have shapes.


def _decode_shapes(*arguments: Any) -> tuple[Array, Array]:
    call = _to_call(*arguments)
    _check(call)
    out_shape, lse_shape = call.result_shapes()
    return call.q.new_empty(out_shape), call.q.new_empty(lse_shape, dtype=torch.float32)


def _decode_into_shapes(*arguments: Any) -> None:
    _check(_to_call(*arguments))


def _plan_shapes(cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int) -> tuple[Array, Array]:
    if cache_seqlens.dim() != 1:
        raise ValueError(f"cache_seqlens: expected shape (batch_size,), got {tuple(cache_seqlens.shape)}")
    num_sm_parts = _num_sm_parts(cache_seqlens.device, num_q_tokens_per_head_k, num_heads_k)
    metadata = cache_seqlens.new_empty((num_sm_parts, METADATA_SIZE))
    return metadata, cache_seqlens.new_empty((cache_seqlens.shape[0] + 1,))


def _merge_shapes(outs: list[Array], lses: list[Array]) -> tuple[Array, Array]:
    call = _to_merge_call(outs, lses)
    _check_merge(call)
    out_shape, lse_shape = call.result_shapes()
    return outs[0].new_empty(out_shape), outs[0].new_empty(lse_shape, dtype=torch.float32)


def _merge_into_shapes(outs: list[Array], lses: list[Array], out: Array, lse: Array) -> None:
    _check_merge(_to_merge_call(outs, lses, out, lse))


def _num_sm_parts(device: Any, num_q_tokens_per_head_k: int, num_heads_k: int) -> int:
    """A number where the device is there to be asked, else a symbol: of any device that the program will run on."""
    if device.type == "meta":
        raise _C.Unsupported("cache_seqlens: expected a device, on which the size of a plan depends, got meta")
    if device.type == "cpu":
        return 1
    if not isinstance(num_q_tokens_per_head_k, torch.SymInt) and not isinstance(num_heads_k, torch.SymInt):
        try:
            return _C.dense_decode_num_sm_parts_of_gpu(device.index or 0, num_q_tokens_per_head_k, num_heads_k)
        except (_C.Unsupported, _C.CudaError):
            pass  # no Hopper GPU where the program is traced
    return torch.library.get_ctx().new_dynamic_size(min=1)  # type: ignore[no-any-return]


def _check(call: DecodeCall) -> None:
    """Raises as the call would; not where a shape is a symbol, of which the call itself will know more."""
    shapes = call.map_arrays(_describe)
    if shapes.arrays.count(None) == call.arrays.count(None):
        _C.dense_decode_workspace_size(*shapes)
    _check_devices(call._fields, call.arrays)


def _check_merge(call: MergeCall) -> None:
    """The same."""
    call.check_shapes(_dtype_name)
    _check_devices((*call.outs.names(), *call.lses.names(), "out", "lse"), (*call.states(), call.out, call.lse))


def _check_devices(names: Sequence[str], arrays: Sequence[Array | None]) -> None:
    """Raises unless all lie on the device of the first."""
    device = arrays[0].device  # type: ignore[union-attr]
    for name, array in zip(names, arrays, strict=False):
        if array is not None and array.device != device:
            raise ValueError(f"{name}: expected device {device} as {names[0]}, got {array.device}")


def _describe(tensor: Array) -> _C.ShapeDType | None:
    """None where the shape isn't known."""
    if any(isinstance(extent, torch.SymInt) for extent in tensor.shape):
        return None
    return _C.ShapeDType(list(tensor.shape), _dtype_name(tensor))


def _dtype_name(tensor: Array) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    kernels = {
        "dense_decode": (_decode, _decode_shapes),
        "dense_decode_into": (_decode_into, _decode_into_shapes),
        "plan_dense_decode": (_plan, _plan_shapes),
        "merge_states": (_merge, _merge_shapes),
        "merge_states_into": (_merge_into, _merge_into_shapes),
    }
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        in_memory, of_shapes = kernels[name]
        _library.define(schema, tags=tags)
        for key in ("CPU", "CUDA"):
            _library.impl(name, in_memory, key)
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"flash_mla::{name}", of_shapes, lib=_library)


_register()
