"""Inputs of a shape: one cache of at least 512 MB, and block tables that take turns in it, so that L2 is cold."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import HEAD_DIM_QK, HEAD_DIM_V, Shape

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "python"))

from cases import Case, Spec
from oracle import assert_close, decode_torch

POOL_BYTES = 512e6
MAX_ROTATIONS = 512
CHECKED_REQUESTS = 3


class Pool:
    """Random q and cache, and arguments of flash_mla_with_kvcache for each rotation."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        dtype = getattr(torch, shape.dtype)
        lengths = shape.lengths()
        pages_of = [-(-length // shape.page_size) for length in lengths]
        self.shape = shape
        self.rotations = min(max(math.ceil(POOL_BYTES / shape.kv_bytes), 1), MAX_ROTATIONS)

        num_pages = sum(pages_of) * self.rotations
        self._k_cache = _random((num_pages, shape.page_size, shape.num_heads_k, HEAD_DIM_QK), dtype, generator)
        self._q = _random((shape.batch_size, shape.seqlen_q, shape.num_heads_q, HEAD_DIM_QK), dtype, generator)
        self.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        order = rng.permutation(num_pages).astype(np.int32)
        self._tables = [_block_table(part, pages_of) for part in np.split(order, self.rotations)]
        self._out = self._q.new_empty((*self._q.shape[:3], HEAD_DIM_V))
        self._lse = self._q.new_empty((shape.batch_size, shape.num_heads_q, shape.seqlen_q), dtype=torch.float32)

    def arguments(self, rotation: int) -> dict[str, Any]:
        """Keyword arguments of flash_mla_with_kvcache, caller-owned results among them."""
        return {
            "q": self._q,
            "k_cache": self._k_cache,
            "block_table": self._tables[rotation],
            "cache_seqlens": self.cache_seqlens,
            "head_dim_v": HEAD_DIM_V,
            "causal": self.shape.causal,
            "out": self._out,
            "lse": self._lse,
        }

    def poison_results(self) -> None:
        self._out.fill_(math.nan)
        self._lse.fill_(math.nan)

    def check_results(self, rotation: int) -> None:
        """What a call on this rotation left in the results.

        Raises AssertionError unless a few requests, from the shortest to the longest, agree with the oracle, and all
        are finite.
        """
        shape, lengths = self.shape, self.shape.lengths()
        by_length = sorted(range(shape.batch_size), key=lengths.__getitem__)
        some = sorted({by_length[round(i)] for i in np.linspace(0, shape.batch_size - 1, CHECKED_REQUESTS)})
        spec = Spec(
            lengths=tuple(lengths),
            seqlen_q=shape.seqlen_q,
            num_heads_q=shape.num_heads_q,
            num_heads_k=shape.num_heads_k,
            page_size=shape.page_size,
            causal=shape.causal,
            dtype=shape.dtype,
        )
        case = Case(spec, self._q, self._k_cache, self._tables[rotation], self.cache_seqlens)
        assert bool(self._out.isfinite().all() & self._lse.isfinite().all()), f"{shape.name}: a result is not finite"
        assert_close(self._out[some], self._lse[some], *decode_torch(case, some), shape.name)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device="cuda")


def _block_table(pages: np.ndarray[Any, np.dtype[np.int32]], pages_of: list[int]) -> torch.Tensor:
    table = np.zeros((len(pages_of), max(pages_of)), np.int32)
    start = 0
    for request, count in enumerate(pages_of):
        table[request, :count] = pages[start : start + count]
        start += count
    return torch.from_numpy(table).cuda()
