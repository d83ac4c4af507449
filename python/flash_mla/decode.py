"""Dense decoding over a paged cache."""

from __future__ import annotations

from . import _C, frameworks, options
from .calls import HEAD_DIM_V, Array, DecodeCall
from .frameworks import Operations, check_framework, framework_of
from .plan import FlashMLASchedMeta


def flash_mla_with_kvcache(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    head_dim_v: int,
    tile_scheduler_metadata: Array | FlashMLASchedMeta | None = None,
    num_splits: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Array | None = None,
    attn_sink: Array | None = None,
    extra_k_cache: Array | None = None,
    extra_indices_in_kvcache: Array | None = None,
    topk_length: Array | None = None,
    extra_topk_length: Array | None = None,
    *,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Array, Array]:
    """Attend to a paged MLA cache.

    All arrays belong to one library (PyTorch, CuPy, JAX or NumPy) and lie on one device: a Hopper GPU, or the CPU. On
    a GPU the work is queued on the library's current stream of that device and the call returns at once; it can be
    captured in a CUDA graph. It can be called in functions that torch.compile, torch.export or jax.jit compile.

    There is no backward pass: results never require grad, whatever the arguments do. JAX raises on differentiation.

    Parameters
    ----------
    q : array of bfloat16 or float16, shape (batch, seqlen_q, num_heads_q, 576)
        Last dimension contiguous, the others strided.
    k_cache : array like q, shape (num_pages, page_size, num_heads_k, 576)
        The first 512 values of a token are its V. ``page_size`` is a power of two, ``num_heads_k`` divides
        ``num_heads_q``.
    block_table : array of int32, shape (batch, max_pages)
        The pages of each request. Entries past its last page may hold anything.
    cache_seqlens : array of int32, shape (batch,)
        Tokens in each request's cache. 0 is legal; negative counts as 0. Cut at ``max_pages * page_size``.
    head_dim_v : int
        Must be 512.
    tile_scheduler_metadata, num_splits : optional
        What ``get_mla_metadata`` returned for these ``cache_seqlens``. Left out, the call plans by itself, on the
        device.
    softmax_scale : float, optional
        Finite and above 0; ``576 ** -0.5`` by default. On the GPU scores times it are float32: where they exceed 2^27,
        rows may be infinite or NaN, or count as having no key.
    causal : bool
        Query i of seqlen_q sees keys up to ``cache_seqlens - seqlen_q + i``.
    is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
        Must keep their defaults.
    out : array like q, shape (batch, seqlen_q, num_heads_q, 512), optional
        Where the result goes; a new array by default. (A tensor that requires grad is refused, unless grad is off.)
    lse : array of float32, shape (batch, num_heads_q, seqlen_q), optional
        Where the log-sum-exp goes; a new array by default, as for ``out``.

    Returns
    -------
    out : array like q, shape (batch, seqlen_q, num_heads_q, 512)
        Rows with no key to see are 0.
    lse : array of float32, shape (batch, num_heads_q, seqlen_q)
        Natural logarithm of the sum of exp(softmax_scale * q.k); +inf for rows with no key to see.

    Raises
    ------
    ValueError, TypeError
        for a wrong argument, which the message names.
    Unsupported
        a RuntimeError: an FP8 cache, sparse attention, or a GPU that is not a Hopper.
    CudaError
        a RuntimeError: a call of CUDA failed.
    """
    if (
        is_fp8_kvcache is not False
        or indices is not None
        or attn_sink is not None
        or extra_k_cache is not None
        or extra_indices_in_kvcache is not None
        or topk_length is not None
        or extra_topk_length is not None
    ):
        _refuse(
            is_fp8_kvcache=options.flag("is_fp8_kvcache", is_fp8_kvcache) or None,
            indices=indices,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
        )
    if type(head_dim_v) is not int:
        head_dim_v = options.integer("head_dim_v", head_dim_v)
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(f"head_dim_v: expected {HEAD_DIM_V}, got {head_dim_v}")
    # A literal: torch.compile would take a global number for one that changes.
    scale = 576**-0.5 if softmax_scale is None else options.number("softmax_scale", softmax_scale)
    if type(causal) is not bool:
        causal = options.flag("causal", causal)

    meta = tile_scheduler_metadata
    if frameworks.is_read_by_dynamo():
        from . import torch_library

        if torch_library.is_tensor(q):
            return _decode(
                torch_library,
                meta,
                DecodeCall(q, k_cache, block_table, cache_seqlens, out, lse, None, num_splits, scale, bool(causal)),
            )
    if out is not None or lse is not None:
        frameworks.check_gradless(out, lse)
    metadata, splits, extents = meta, num_splits, None
    if splits is None and meta is not None and isinstance(meta, FlashMLASchedMeta) and meta.have_initialized:
        metadata, splits, extents = meta.tile_scheduler_metadata, meta.num_splits, meta.config
    results = _C.torch_dense_decode(
        q, k_cache, block_table, cache_seqlens, out, lse, metadata, splits, scale, causal, extents
    )
    if results is not None:
        if out is not None or lse is not None:
            frameworks.note_written(out, lse)
        return results
    return _decode_with_framework(
        meta, DecodeCall(q, k_cache, block_table, cache_seqlens, out, lse, None, num_splits, scale, causal)
    )


def _decode_with_framework(meta: Array | FlashMLASchedMeta | None, call: DecodeCall) -> tuple[Array, Array]:
    """Decode with arrays of any library. The call's ``tile_scheduler_metadata`` is to be filled in from ``meta``."""
    framework = framework_of(call.q, "q")
    for name in ("q", "k_cache", "block_table", "cache_seqlens"):
        check_framework(framework, getattr(call, name), name)
    if call.out is not None:
        framework.check_output(call.out, "out")
    if call.lse is not None:
        framework.check_output(call.lse, "lse")
    if isinstance(meta, FlashMLASchedMeta):
        metadata, num_splits = meta.tile_scheduler_metadata, meta.num_splits
    else:
        if isinstance(meta, tuple):  # what get_mla_metadata returns, as it is
            raise TypeError("tile_scheduler_metadata: expected an array or a FlashMLASchedMeta, got tuple")
        metadata, num_splits = meta, call.num_splits
    for name, array in (("tile_scheduler_metadata", metadata), ("num_splits", num_splits)):
        if array is not None:
            check_framework(framework, array, name)
    return _decode(framework, meta, call)


def _decode(operations: Operations, meta: Array | FlashMLASchedMeta | None, call: DecodeCall) -> tuple[Array, Array]:
    """Decode with the arrays of ``meta``, a FlashMLASchedMeta being filled here if this is the first call with it."""
    if not isinstance(meta, FlashMLASchedMeta):
        return operations.dense_decode(call.with_plan(meta, call.num_splits))
    if call.num_splits is not None:
        raise ValueError(
            f"num_splits: expected None beside a FlashMLASchedMeta, got {type(call.num_splits).__qualname__}"
        )
    operations.check_dense_decode(call)
    extents = (*call.q.shape[:3], call.k_cache.shape[2])
    metadata, num_splits = meta.arrays(extents, call.cache_seqlens, operations)
    return operations.dense_decode(call.with_plan(metadata, num_splits))


def _refuse(**arguments: object) -> None:
    """Raises for the first argument that is given: they all belong to FP8 caches or to sparse attention."""
    for name, value in arguments.items():
        if value is not None:
            raise _C.Unsupported(f"{name}: only dense attention over bfloat16 and float16 caches is supported")
