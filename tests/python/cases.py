"""Builds dense decode cases: what a caller passes, with every cell that must not matter poisoned.

Pages are allotted in random order. Cells of the cache past a request's length, pages of no request and the padding of
strided arrays hold NaN; block table entries past a request's last page hold garbage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

HEAD_DIM_QK = 576
HEAD_DIM_V = 512
LAYOUTS = ("contiguous", "padded", "transposed")
GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 123_456_789)
SPARE_PAGES = 3
SPARE_COLUMNS = 2

# Standard deviations of the random values. Logits of about 0.25 at the default scale: enough for a wrong row of Q to
# show, and little enough for the contract's 1e-6 of lse, which tensor cores cannot keep where large products cancel to
# an lse near 0. V is small enough for the rounding of P to stay within the contract's absolute 8e-4.
Q_STD = 5.0
KV_STD = 0.05


@dataclass(frozen=True)
class Spec:
    """One case, by its shapes. `lengths` has one entry per request."""

    lengths: tuple[int, ...] = (128,)
    seqlen_q: int = 1
    num_heads_q: int = 16
    num_heads_k: int = 1
    page_size: int = 64
    causal: bool = False
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    softmax_scale: float | None = None
    rising: float = 0.0  # the logits grow by this much from a request's first token to its last
    num_pages: int | None = None  # default: a few more than needed
    first_page: int = 0  # pages below it belong to no request
    spare_columns: int = SPARE_COLUMNS  # block table columns that no request needs
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lengths[:6])) + (", ..." if self.batch_size > 6 else "")
        return (
            f"batch {self.batch_size}, s_q {self.seqlen_q}, heads {self.num_heads_q}/{self.num_heads_k}, "
            f"page {self.page_size}, lengths [{shown}], causal {self.causal}, {self.dtype}, {self.layout}, "
            f"rising {self.rising}, seed {self.seed}"
        )


@dataclass
class Case:
    """Arrays of one framework, as flash_mla_with_kvcache takes them."""

    spec: Spec
    q: Any  # (batch, seqlen_q, num_heads_q, 576)
    k_cache: Any  # (num_pages, page_size, num_heads_k, 576)
    block_table: Any  # (batch, max_pages) int32
    cache_seqlens: Any  # (batch,) int32

    @property
    def softmax_scale(self) -> float:
        given = self.spec.softmax_scale
        return HEAD_DIM_QK**-0.5 if given is None else given

    @property
    def num_q_tokens_per_head_k(self) -> int:
        return self.spec.seqlen_q * self.spec.num_heads_q // self.spec.num_heads_k

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of flash_mla_with_kvcache."""
        return {
            "q": self.q,
            "k_cache": self.k_cache,
            "block_table": self.block_table,
            "cache_seqlens": self.cache_seqlens,
            "head_dim_v": HEAD_DIM_V,
            "softmax_scale": self.spec.softmax_scale,
            "causal": self.spec.causal,
        }


class NumpyArrays:
    """Arrays of NumPy; bfloat16 is that of ml_dtypes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    @staticmethod
    def dtype(name: str) -> Any:
        if name != "bfloat16":
            return np.dtype(name)
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)

    def nans(self, shape: Sequence[int], dtype: str) -> Any:
        return np.full(shape, np.nan, self.dtype(dtype))

    def normal(self, shape: Sequence[int], std: float, dtype: str) -> Any:
        return (self._rng.standard_normal(shape, np.float32) * np.float32(std)).astype(self.dtype(dtype))

    def array(self, values: npt.NDArray[Any]) -> Any:
        return values


class TorchArrays:
    """Tensors of PyTorch on one device."""

    def __init__(self, seed: int, device: str) -> None:
        import torch

        self._torch = torch
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def nans(self, shape: Sequence[int], dtype: str) -> Any:
        return self._torch.full(tuple(shape), float("nan"), dtype=getattr(self._torch, dtype), device=self._device)

    def normal(self, shape: Sequence[int], std: float, dtype: str) -> Any:
        values = self._torch.randn(
            tuple(shape), generator=self._generator, dtype=getattr(self._torch, dtype), device=self._device
        )
        return values.mul_(std)

    def array(self, values: npt.NDArray[Any]) -> Any:
        return self._torch.from_numpy(values).to(self._device)


Arrays = NumpyArrays | TorchArrays


def make_case(spec: Spec, device: str | None = None) -> Case:
    """Builds a case: of NumPy arrays, or of PyTorch tensors where a device is named ("cpu", "cuda")."""
    arrays: Arrays = NumpyArrays(spec.seed) if device is None else TorchArrays(spec.seed, device)
    rng = np.random.default_rng(spec.seed + 1)
    lengths = np.maximum(np.array(spec.lengths, np.int64), 0)
    pages_of = -(-lengths // spec.page_size)
    num_live = int(pages_of.sum())
    num_pages = spec.first_page + num_live + SPARE_PAGES if spec.num_pages is None else spec.num_pages
    live = _allot_pages(rng, num_live, spec.first_page, num_pages)

    return Case(
        spec,
        q=_make_q(arrays, spec),
        k_cache=_make_cache(arrays, spec, lengths, pages_of, live, num_pages),
        block_table=_make_block_table(arrays, spec, rng, pages_of, live),
        cache_seqlens=arrays.array(np.array(spec.lengths, np.int32)),
    )


def varied_lengths(batch_size: int, mean: int, seed: int, zeros: bool = True) -> tuple[int, ...]:
    """Lengths around a mean, normally distributed, at least 1; with `zeros`, about every fifth request has none."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.normal(mean, mean / 2, batch_size), 1).astype(np.int64)
    if zeros:
        lengths[rng.random(batch_size) < 0.2] = 0
    return tuple(int(x) for x in lengths)


def _allot_pages(rng: np.random.Generator, num_live: int, first_page: int, num_pages: int) -> npt.NDArray[np.int64]:
    """Page numbers in random order; the last page of the cache is always among them."""
    if num_live == 0:
        return np.empty(0, np.int64)
    chosen = rng.choice(num_pages - 1 - first_page, num_live - 1, replace=False) + first_page
    return rng.permutation(np.append(chosen, num_pages - 1)).astype(np.int64)


def _empty(arrays: Arrays, shape: tuple[int, int, int, int], spec: Spec, axes: tuple[int, int]) -> Any:
    """A NaN-filled array in the case's layout; "transposed" swaps the two axes in memory.

    Strides and addresses are multiples of 16 bytes.
    """
    if spec.layout == "contiguous":
        return arrays.nans(shape, spec.dtype)
    if spec.layout == "padded":
        return arrays.nans([extent + 1 for extent in shape[:3]] + [shape[3] + 16], spec.dtype)[1:, 1:, 1:, 8:-8]
    swapped = list(shape)
    swapped[axes[0]], swapped[axes[1]] = shape[axes[1]], shape[axes[0]]
    return arrays.nans(swapped, spec.dtype).swapaxes(*axes)


def _make_q(arrays: Arrays, spec: Spec) -> Any:
    q = _empty(arrays, (spec.batch_size, spec.seqlen_q, spec.num_heads_q, HEAD_DIM_QK), spec, axes=(0, 1))
    q[...] = arrays.normal(q.shape, Q_STD, spec.dtype)
    if spec.rising:
        q[..., -1] = 1.0
    return q


def _make_cache(
    arrays: Arrays,
    spec: Spec,
    lengths: npt.NDArray[np.int64],
    pages_of: npt.NDArray[np.int64],
    live: npt.NDArray[np.int64],
    num_pages: int,
) -> Any:
    cache = _empty(arrays, (num_pages, spec.page_size, spec.num_heads_k, HEAD_DIM_QK), spec, axes=(1, 2))
    owner = np.repeat(np.arange(spec.batch_size), pages_of)
    first = np.cumsum(pages_of) - pages_of
    ordinal = np.arange(live.size) - first[owner]
    position = ordinal[:, None] * spec.page_size + np.arange(spec.page_size)

    values = arrays.normal((live.size, spec.page_size, spec.num_heads_k, HEAD_DIM_QK), KV_STD, spec.dtype)
    if spec.rising:
        scale = HEAD_DIM_QK**-0.5 if spec.softmax_scale is None else spec.softmax_scale
        climb = np.minimum(position / lengths[owner][:, None], 1.0) * spec.rising / scale
        values[..., -1] = arrays.array(climb.astype(np.float32))[:, :, None]
    values[arrays.array(position >= lengths[owner][:, None])] = float("nan")
    cache[arrays.array(live)] = values
    return cache


def _make_block_table(
    arrays: Arrays,
    spec: Spec,
    rng: np.random.Generator,
    pages_of: npt.NDArray[np.int64],
    live: npt.NDArray[np.int64],
) -> Any:
    max_pages = int(pages_of.max(initial=0)) + spec.spare_columns
    row_stride = max_pages if spec.layout == "contiguous" else max_pages + 3
    table = rng.choice(np.array(GARBAGE_PAGES, np.int32), (spec.batch_size, row_stride)).astype(np.int32)
    start = 0
    for request, count in enumerate(pages_of):
        table[request, :count] = live[start : start + count]
        start += count
    return arrays.array(table)[:, :max_pages]
