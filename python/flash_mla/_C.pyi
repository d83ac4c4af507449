# ruff: noqa: N999
"""The compiled module: the C++ library's functions on arrays that support DLPack.

Parameters typed ``object`` are arrays (or DLPack capsules, or ``Bfloat16Bits``). Every function raises ``ValueError``
or ``TypeError`` naming the argument for a wrong one, ``Unsupported`` where this machine cannot serve the call and
``CudaError`` where CUDA fails.
"""

from collections.abc import Callable, Sequence
from typing import Any

class Unsupported(RuntimeError): ...  # noqa: N818
class CudaError(RuntimeError): ...

class Bfloat16Bits:
    """A uint16 array whose values are the bits of bfloat16 numbers."""

    def __init__(self, bits: object) -> None: ...

class ShapeDType:
    """An array that isn't there yet, for checks of shapes and dtypes: row-major, on the CPU."""

    def __init__(self, shape: list[int], dtype: str) -> None: ...

def build_info() -> dict[str, str]:
    """How this module was built: version, commit, cuda, nvcc, architectures, compiler."""

def find_torch(tensor_type: object) -> None:
    """Takes the short way for tensors of PyTorch from now on, where this PyTorch has what it needs."""

def torch_can_read(array: object) -> bool:
    """Whether the short way takes this array, on this thread, now."""

def xla_ffi_handlers() -> dict[str, dict[str, object]]:
    """The operations as handlers of XLA's FFI.

    By platform, by name, a capsule that ``jax.ffi.register_ffi_target`` takes.
    """

def dense_decode_num_sm_parts(cache_seqlens: object, num_q_tokens_per_head_k: int, num_heads_k: int) -> int:
    """The first extent of tile_scheduler_metadata on the device of cache_seqlens."""

def dense_decode_num_sm_parts_of_gpu(index: int, num_q_tokens_per_head_k: int, num_heads_k: int) -> int:
    """The same for a CUDA device by its number."""

def plan_dense_decode(
    cache_seqlens: object,
    tile_scheduler_metadata: object,
    num_splits: object,
    num_q_tokens_per_head_k: int,
    stream: int | None = None,
) -> None:
    """Writes the plan of a step for cache_seqlens into the two other arrays."""

def torch_plan_dense_decode(
    cache_seqlens: object, num_q_tokens_per_head_k: int, num_heads_k: int
) -> tuple[Any, Any] | None:
    """(tile_scheduler_metadata, num_splits) for a tensor of PyTorch.

    None where ``plan_dense_decode`` is to be called instead.
    """

def dense_decode_workspace_size(
    q: object,
    k_cache: object,
    block_table: object,
    cache_seqlens: object,
    out: object | None,
    lse: object | None,
    tile_scheduler_metadata: object | None,
    num_splits: object | None,
    softmax_scale: float,
    causal: bool,
) -> int:
    """Checks the arguments of dense_decode; bytes of workspace that they need.

    ``out`` and ``lse`` may be None: results that are still to be made.
    """

def dense_decode_max_workspace_size(
    q: object,
    k_cache: object,
    block_table: object,
    cache_seqlens: object,
    out: object | None,
    lse: object | None,
    tile_scheduler_metadata: object | None,
    num_splits: object | None,
    softmax_scale: float,
    causal: bool,
) -> int:
    """The same, without asking a device: bytes that suffice on every GPU that the kernels run on."""

def dense_decode(
    q: object,
    k_cache: object,
    block_table: object,
    cache_seqlens: object,
    out: object,
    lse: object,
    tile_scheduler_metadata: object | None,
    num_splits: object | None,
    softmax_scale: float,
    causal: bool,
    stream: int | None = None,
    allocate: Callable[[int], object] | None = None,
) -> None:
    """Writes out and lse.

    ``stream`` and ``allocate``, (num_bytes) -> uint8 array, serve array types without DLPack's exchange table; for
    others the stream and the workspace come from their library.
    """

def merge_states(
    outs: object | Sequence[object],
    lses: object | Sequence[object],
    out: object,
    lse: object,
    stream: int | None = None,
) -> None:
    """Merges states into out and lse.

    ``outs`` and ``lses`` are lists (or tuples) of arrays, or arrays that hold all states along their first dimension.
    ``stream`` serves array types without DLPack's exchange table.
    """

def launch_hbm_read(buffer: object, stream: int | None = None) -> int:
    """Reads a float16 or bfloat16 array of one dimension once, by bulk copies into shared memory; bytes read.

    For benchmarks: what HBM gives, where the array is much larger than L2.
    """

def launch_mma_mix(operands: object, sink: object, iterations: int, stream: int | None = None) -> float:
    """Runs the MMAs of decoding without its loads; floating-point operations done.

    For benchmarks: what the tensor cores give. ``operands``: at least 110592 bfloat16 values, random ones; ``sink``: a
    float32 for each SM, written.
    """

def torch_dense_decode(
    q: object,
    k_cache: object,
    block_table: object,
    cache_seqlens: object,
    out: object | None,
    lse: object | None,
    tile_scheduler_metadata: object | None,
    num_splits: object | None,
    softmax_scale: float,
    causal: bool,
    extents: tuple[int, int, int, int] | None,
) -> tuple[Any, Any] | None:
    """``dense_decode`` on tensors of PyTorch: makes what is None of out and lse, and returns both.

    ``extents`` are what (batch, seqlen_q, num_heads_q, num_heads_k) must be. None is returned, and nothing done, where
    ``dense_decode`` is to be called instead: for other arrays, other extents, and where memory is short.
    """
