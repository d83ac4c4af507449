"""Inputs of a shape: random values that the cases of a run share, worked through so that L2 is cold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._torch import Tensor, torch
from .shapes import HEAD_DIM_QK, HEAD_DIM_V, Shape

POOL_BYTES = 512e6
MAX_ROTATIONS = 512
CHECKED_REQUESTS = 3


def num_pages(shape: Shape) -> int:
    """Of all requests of a step."""
    return sum(-(-length // shape.page_size) for length in shape.lengths())


def num_rotations(shape: Shape) -> int:
    """How many steps' caches a shape takes turns in."""
    return min(max(math.ceil(POOL_BYTES / shape.kv_bytes), 1), MAX_ROTATIONS)


def cache_values(shape: Shape, rotations: int) -> int:
    """Values in the caches of so many steps."""
    return rotations * num_pages(shape) * shape.page_size * shape.num_heads_k * HEAD_DIM_QK


def query_values(shape: Shape) -> int:
    """Values in q."""
    return shape.batch_size * shape.seqlen_q * shape.num_heads_q * HEAD_DIM_QK


class Memory:
    """Random values on the GPU, large enough for the caches and queries of every shape of a run; drawn once."""

    def __init__(self, shapes: Sequence[Shape], min_bytes: float = 0, device: str = "cuda", seed: int = 0) -> None:
        dtypes = {shape.dtype for shape in shapes}
        if len(dtypes) != 1:
            raise ValueError(f"shapes: expected one dtype, got {', '.join(sorted(dtypes))}")
        dtype = getattr(torch, dtypes.pop())
        generator = torch.Generator(device).manual_seed(seed)
        size = max(math.ceil(min_bytes / 2), *(cache_values(shape, num_rotations(shape)) for shape in shapes))
        self.cache: Tensor = torch.randn(size, generator=generator, dtype=dtype, device=device)
        size = max(query_values(shape) for shape in shapes)
        self.queries: Tensor = torch.randn(size, generator=generator, dtype=dtype, device=device)


class Pool:
    """A shape's arguments of flash_mla_with_kvcache for each rotation: the same block table over another cache."""

    def __init__(self, shape: Shape, memory: Memory | None = None, seed: int = 0) -> None:
        memory = memory or Memory([shape])
        self.shape = shape
        self.rotations = num_rotations(shape)
        self.lengths = shape.lengths()
        pages = num_pages(shape)
        cache_shape = (self.rotations, pages, shape.page_size, shape.num_heads_k, HEAD_DIM_QK)
        q_shape = (shape.batch_size, shape.seqlen_q, shape.num_heads_q, HEAD_DIM_QK)
        self._caches = memory.cache[: math.prod(cache_shape)].view(cache_shape)
        self.q: Tensor = memory.queries[: math.prod(q_shape)].view(q_shape)
        self.page_indices: Tensor = torch.from_numpy(
            np.random.default_rng(seed).permutation(pages).astype(np.int32)
        ).to(self.q.device)
        self.pages_of = [-(-length // shape.page_size) for length in self.lengths]
        width = -(-max(shape.table_tokens, *self.lengths) // shape.page_size)
        self.block_table: Tensor = _block_table(self.page_indices, self.pages_of, width)
        self.cache_seqlens: Tensor = torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)
        self.out: Tensor = self.q.new_empty((*q_shape[:3], HEAD_DIM_V))
        self.lse: Tensor = self.q.new_empty((shape.batch_size, shape.num_heads_q, shape.seqlen_q), dtype=torch.float32)

    def k_cache(self, rotation: int) -> Tensor:
        """(pages, page_size, num_heads_k, 576), a part of its own of the memory."""
        return self._caches[rotation]

    def arguments(self, rotation: int) -> dict[str, Any]:
        """Keyword arguments of flash_mla_with_kvcache, caller-owned results among them."""
        return {
            "q": self.q,
            "k_cache": self.k_cache(rotation),
            "block_table": self.block_table,
            "cache_seqlens": self.cache_seqlens,
            "head_dim_v": HEAD_DIM_V,
            "causal": self.shape.causal,
            "out": self.out,
            "lse": self.lse,
        }

    def poison_results(self) -> None:
        """So that a result that was never written is found."""
        self.out.fill_(math.nan)
        self.lse.fill_(math.nan)

    def some_requests(self, count: int = CHECKED_REQUESTS) -> list[int]:
        """A few of the batch, from the shortest to the longest, to hold against the oracle."""
        by_length = sorted(range(self.shape.batch_size), key=self.lengths.__getitem__)
        places = np.linspace(self.shape.batch_size - 1, 0, count)
        return sorted({by_length[round(place)] for place in places.tolist()})


def _block_table(page_indices: Tensor, pages_of: Sequence[int], width: int) -> Tensor:
    table = page_indices.new_zeros((len(pages_of), width))
    start = 0
    for request, count in enumerate(pages_of):
        table[request, :count] = page_indices[start : start + count]
        start += count
    return table
