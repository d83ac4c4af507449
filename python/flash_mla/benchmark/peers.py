"""Other implementations of decoding, run on the same inputs where they are installed.

A peer turns a pool into a call. What can be done once per step and shared by the layers of a model (planning) is done
before, as for our own calls; what a layer must do is in the call.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._torch import Tensor, torch
from .oracle import SOFTMAX_SCALE
from .pool import Pool
from .shapes import FLASH_MLA_MODULE, HEAD_DIM_QK, HEAD_DIM_V

_FLASHINFER_WORKSPACE_BYTES = 128 * 1024 * 1024
_HEAD_DIM_ROPE = HEAD_DIM_QK - HEAD_DIM_V


class UnsuitedError(RuntimeError):
    """A shape that a peer cannot run."""


@dataclass(frozen=True)
class Prepared:
    """A call that takes a rotation, and the way from what it returns to out and lse in our form (None: no lse)."""

    call: Callable[[int], Any]
    results: Callable[[Any], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """An implementation: the name on the command line, the one in tables, the module, and how a pool becomes a call."""

    name: str
    title: str
    module: str
    prepare: Callable[[Any, Pool], Prepared]

    def load(self) -> Any:
        """The module. Raises ImportError, or whatever its import raises."""
        return importlib.import_module(self.module)

    def installed_as(self) -> str | None:
        """The distribution that the module comes from, with its version; None where none says that it has it."""
        names = importlib.metadata.packages_distributions().get(self.module.split(".")[0])
        return f"{names[0]} {importlib.metadata.version(names[0])}" if names else None


def _prepare_flash_mla(module: Any, pool: Pool) -> Prepared:
    """DeepSeek's, in any of its generations: the newest takes and ignores the arguments of get_mla_metadata."""
    shape = pool.shape
    metadata, num_splits = module.get_mla_metadata(pool.cache_seqlens, shape.num_q_tokens_per_head_k, shape.num_heads_k)

    def call(rotation: int) -> Any:
        return module.flash_mla_with_kvcache(
            pool.q,
            pool.k_cache(rotation),
            pool.block_table,
            pool.cache_seqlens,
            HEAD_DIM_V,
            metadata,
            num_splits,
            softmax_scale=SOFTMAX_SCALE,
            causal=shape.causal,
        )

    return Prepared(call, lambda result: (result[0], result[1]))


def _prepare_flashinfer(module: Any, pool: Pool) -> Prepared:
    shape = pool.shape
    if shape.num_heads_k != 1:
        raise UnsuitedError(f"one KV head only, not {shape.num_heads_k}")
    device = pool.q.device
    wrapper = module.BatchMLAPagedAttentionWrapper(
        torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device), backend="fa3"
    )
    pages_before = [0]
    for pages in pool.pages_of:
        pages_before.append(pages_before[-1] + pages)
    wrapper.plan(
        qo_indptr=torch.arange(shape.batch_size + 1, dtype=torch.int32, device=device) * shape.seqlen_q,
        kv_indptr=torch.tensor(pages_before, dtype=torch.int32, device=device),
        kv_indices=pool.page_indices,
        kv_len_arr=pool.cache_seqlens,
        num_heads=shape.num_heads_q,
        head_dim_ckv=HEAD_DIM_V,
        head_dim_kpe=_HEAD_DIM_ROPE,
        page_size=shape.page_size,
        causal=shape.causal,
        sm_scale=SOFTMAX_SCALE,
        q_data_type=pool.q.dtype,
        kv_data_type=pool.q.dtype,
    )
    q_nope, q_pe = pool.q.flatten(0, 1).split([HEAD_DIM_V, _HEAD_DIM_ROPE], dim=-1)

    def call(rotation: int) -> Any:
        ckv, kpe = pool.k_cache(rotation)[:, :, 0].split([HEAD_DIM_V, _HEAD_DIM_ROPE], dim=-1)
        return wrapper.run(q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv, kpe_cache=kpe, return_lse=True)

    def results(result: Any) -> tuple[Tensor, Tensor | None]:
        rows = (shape.batch_size, shape.seqlen_q, shape.num_heads_q)
        lse = result[1].view(rows).transpose(1, 2) * math.log(2)  # theirs is of base 2
        return result[0].view(*rows, HEAD_DIM_V), lse

    return Prepared(call, results)


def _prepare_fa3(module: Any, pool: Pool) -> Prepared:
    shape = pool.shape
    q_v, q_rope = pool.q.split([HEAD_DIM_V, _HEAD_DIM_ROPE], dim=-1)
    scheduler_metadata = module.get_scheduler_metadata(
        shape.batch_size,
        shape.seqlen_q,
        max(pool.pages_of) * shape.page_size,
        shape.num_heads_q,
        shape.num_heads_k,
        _HEAD_DIM_ROPE,
        pool.cache_seqlens,
        pool.q.dtype,
        headdim_v=HEAD_DIM_V,
        page_size=shape.page_size,
        causal=shape.causal,
    )

    def call(rotation: int) -> Any:
        v_cache, k_cache = pool.k_cache(rotation).split([HEAD_DIM_V, _HEAD_DIM_ROPE], dim=-1)
        return module.flash_attn_with_kvcache(
            q_rope,
            k_cache,
            v_cache,
            qv=q_v,
            cache_seqlens=pool.cache_seqlens,
            page_table=pool.block_table[:, : max(pool.pages_of)],
            softmax_scale=SOFTMAX_SCALE,
            causal=shape.causal,
            scheduler_metadata=scheduler_metadata,
            return_softmax_lse=True,
        )

    return Prepared(call, lambda result: (result[0], result[1]))


def _prepare_sdpa(module: Any, pool: Pool) -> Prepared:
    """The naive way: gather each request's pages, padded to the longest, and attend with all heads as query rows."""
    shape = pool.shape
    length = max(pool.pages_of) * shape.page_size
    group = shape.num_heads_q // shape.num_heads_k
    rows = shape.seqlen_q * group
    _require_memory(2 * shape.batch_size * shape.num_heads_k * length * (6 * HEAD_DIM_QK + 6 * rows), pool.q)
    # (batch, num_heads_k, seqlen_q * group, 576)
    q = pool.q.view(shape.batch_size, shape.seqlen_q, shape.num_heads_k, group, HEAD_DIM_QK).transpose(1, 2)
    q = q.flatten(2, 3)
    table = pool.block_table[:, : max(pool.pages_of)].long()
    position = torch.arange(length, device=q.device)
    causal = shape.causal and shape.seqlen_q > 1
    queries = torch.arange(shape.seqlen_q if causal else 1, device=q.device)
    limits = pool.cache_seqlens[:, None] - (len(queries) - 1 - queries)
    mask = None
    if causal or min(pool.lengths) < length:
        mask = position < limits[..., None]
        if causal:
            mask = mask.repeat_interleave(group, dim=1)
        mask = mask[:, None]

    def call(rotation: int) -> Any:
        tokens = pool.k_cache(rotation)[table].flatten(1, 2).transpose(1, 2)
        return module.scaled_dot_product_attention(
            q, tokens, tokens[..., :HEAD_DIM_V], attn_mask=mask, scale=SOFTMAX_SCALE
        )

    def results(result: Any) -> tuple[Tensor, Tensor | None]:
        by_query = result.view(shape.batch_size, shape.num_heads_k, shape.seqlen_q, group, HEAD_DIM_V)
        return by_query.transpose(1, 2).flatten(2, 3), None

    return Prepared(call, results)


def _require_memory(num_bytes: int, like: Tensor) -> None:
    if like.is_cuda:
        free = torch.cuda.mem_get_info()[0]
        if num_bytes > free:
            raise UnsuitedError(f"needs about {num_bytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


PEERS = (
    Peer("flash_mla", "FlashMLA", FLASH_MLA_MODULE, _prepare_flash_mla),
    Peer("flashinfer", "FlashInfer fa3", "flashinfer.mla", _prepare_flashinfer),
    Peer("fa3", "FA3", "flash_attn_interface", _prepare_fa3),
    Peer("sdpa", "PyTorch SDPA", "torch.nn.functional", _prepare_sdpa),
)


def chosen(names: Sequence[str] | None, flash_mla_module: str | None) -> tuple[list[Peer], dict[str, str]]:
    """The peers of these names that can be imported (None: all of them), and why the others cannot, by title."""
    found: list[Peer] = []
    why_not: dict[str, str] = {}
    for peer in PEERS:
        if names is not None and peer.name not in names:
            continue
        if peer.name == "flash_mla" and flash_mla_module is not None:
            peer = replace(peer, module=flash_mla_module)
        try:
            peer.load()
        except Exception as error:  # an extension built for another torch may raise anything
            why_not[peer.title] = f"{type(error).__name__}: {error}"
        else:
            found.append(peer)
    return found, why_not
