"""Calls as functions of their arrays alone, as compilers are given them; the arrays are of any library."""

from __future__ import annotations

from typing import Any

from cases import Case, Spec
from flash_mla import flash_mla_with_kvcache, get_mla_metadata

Arrays = tuple[Any, Any, Any, Any]
Results = tuple[Any, Any]

CPU_SPEC = Spec(lengths=(0, 70, 129), seqlen_q=2, num_heads_q=6, num_heads_k=3, causal=True)


def arrays_of(case: Case) -> Arrays:
    return case.q, case.k_cache, case.block_table, case.cache_seqlens


def plan_for(q: Any, k_cache: Any, cache_seqlens: Any) -> Results:
    return get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2] // k_cache.shape[2], k_cache.shape[2])


def left_out(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, causal=True)


def planned_inside(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    return flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, *plan_for(q, k_cache, cache_seqlens), causal=True
    )
