"""Planning a step: which part of the GPU works on which blocks of which request's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from . import _C, frameworks, options
from .calls import Array
from .frameworks import Operations, check_framework, framework_of


@dataclass(eq=False)
class FlashMLASchedMeta:
    """A plan that the first call of ``flash_mla_with_kvcache`` with it fills and later calls of the same step reuse.

    A plan follows from ``cache_seqlens``: make a new one, with ``get_mla_metadata()``, whenever the lengths change.
    In a function that jax.jit compiles, one that is still empty stays so, as what it would hold ends with the function:
    each call there plans by itself. The fake tensors that PyTorch traces with (torch.export without ``strict``) are
    replaced by the next call outside of that trace.

    Attributes
    ----------
    have_initialized : bool
        Whether a call has filled it.
    config : tuple of int or None
        (batch, seqlen_q, num_heads_q, num_heads_k) of that call. Later calls must have the same.
    tile_scheduler_metadata, num_splits : array or None
        The plan: (num_sm_parts, 8) and (batch + 1,), int32.
    """

    have_initialized: bool = False
    config: tuple[int, int, int, int] | None = None
    tile_scheduler_metadata: Array | None = None
    num_splits: Array | None = None

    def arrays(
        self, config: tuple[int, int, int, int], cache_seqlens: Array, operations: Operations
    ) -> tuple[Array, Array]:
        """The plan for a call of these extents; made now if this is the first, or what there is belongs to a trace.

        Raises
        ------
        ValueError
            where an earlier call had other extents.
        """
        if not self.have_initialized or not operations.can_use(self.tile_scheduler_metadata, cache_seqlens):
            _, seqlen_q, num_heads_q, num_heads_k = config
            metadata, num_splits = _plan(cache_seqlens, max(seqlen_q * num_heads_q // num_heads_k, 1), num_heads_k)
            if not operations.can_keep(metadata):
                return metadata, num_splits
            self.tile_scheduler_metadata, self.num_splits = metadata, num_splits
            self.config = config
            self.have_initialized = True
        elif config != self.config:
            raise ValueError(
                "tile_scheduler_metadata: expected calls of one step, with the same (batch, seqlen_q, num_heads_q, "
                f"num_heads_k): it was filled for {self.config}, got {config}"
            )
        return self.tile_scheduler_metadata, self.num_splits


@overload
def get_mla_metadata() -> tuple[FlashMLASchedMeta, None]: ...


@overload
def get_mla_metadata(
    cache_seqlens: Array,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[Array, Array]: ...


def get_mla_metadata(
    cache_seqlens: Array | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[Array | FlashMLASchedMeta, Array | None]:
    """Plan a step of decoding.

    ``flash_mla_with_kvcache`` plans by itself where it gets no plan, so this is for callers who keep one: to share it
    between the layers of a step, or to update it in place between the replays of a CUDA graph.

    Parameters
    ----------
    cache_seqlens : array of int32, shape (batch,)
        Tokens in each request's cache. Left out: the plan is made by the first call that uses it, and what is said
        here of query tokens and heads is ignored, as by DeepSeek's.
    num_q_tokens_per_head_k : int
        seqlen_q * num_heads_q // num_heads_k. Also taken by its older name, ``num_heads_per_head_k``.
    num_heads_k : int
        KV heads.
    num_heads_q : int, optional
        Taken for compatibility; dense decoding does not need it.
    is_fp8_kvcache, topk
        Must keep their defaults.

    Returns
    -------
    tile_scheduler_metadata : array of int32, shape (num_sm_parts, 8), or FlashMLASchedMeta
    num_splits : array of int32, shape (batch + 1,), or None
        Arrays of the same library and on the same device as ``cache_seqlens``. Without arguments: a
        ``FlashMLASchedMeta`` and None.

    Raises
    ------
    ValueError, TypeError
        for a wrong argument, which the message names.
    Unsupported
        for an FP8 cache or sparse attention, and on a GPU that is not a Hopper.
    """
    if options.flag("is_fp8_kvcache", is_fp8_kvcache):
        raise _C.Unsupported("is_fp8_kvcache: only bfloat16 and float16 caches are supported")
    if topk is not None:
        raise _C.Unsupported(f"topk: only dense attention is supported, expected None, got {topk}")
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    if num_q_tokens_per_head_k is None:
        num_q_tokens_per_head_k = num_heads_per_head_k
    elif num_heads_per_head_k is not None:
        raise TypeError("num_heads_per_head_k: is another name of num_q_tokens_per_head_k, got both")
    return _plan(
        cache_seqlens,
        options.integer("num_q_tokens_per_head_k", num_q_tokens_per_head_k),
        options.integer("num_heads_k", num_heads_k),
    )


def _plan(cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int) -> tuple[Array, Array]:
    if frameworks.is_read_by_dynamo():
        from . import torch_library

        if torch_library.is_tensor(cache_seqlens):
            return torch_library.plan_dense_decode(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    plan = _C.torch_plan_dense_decode(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    if plan is not None:
        return plan
    framework = framework_of(cache_seqlens, "cache_seqlens")
    check_framework(framework, cache_seqlens, "cache_seqlens")
    return framework.plan_dense_decode(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
