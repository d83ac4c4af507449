"""The contract's grid, against the float64 oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from cases import LAYOUTS, Spec, make_case, varied_lengths
from checks import check

PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16")


def heads(nums_heads_q: Sequence[int], nums_heads_k: Sequence[int]) -> list[tuple[int, int]]:
    """Every pair, num_heads_q multiplied by num_heads_k where it is not a multiple."""
    pairs = itertools.product(nums_heads_q, nums_heads_k)
    return sorted({(q if q % k == 0 else q * k, k) for q, k in pairs})


def grid(
    num_heads_q: int,
    num_heads_k: int,
    dtype: str,
    batch_sizes: Sequence[int],
    seqlens_q: Sequence[int],
    lengths: Sequence[int],
) -> Iterator[tuple[Spec, bool]]:
    """Every batch size, seqlen_q and length, fixed and varied with zeros between; where seqlen_q > 1, causal and not.

    Page size, layout, the shape of the softmax and whether results are padded are drawn.
    """
    draw = random.Random(f"{num_heads_q} {num_heads_k} {dtype}")
    for batch_size, seqlen_q, length, varied in itertools.product(batch_sizes, seqlens_q, lengths, (False, True)):
        for causal in (False, True) if seqlen_q > 1 else (draw.random() < 0.5,):
            seed = draw.randrange(2**31)
            spec = Spec(
                lengths=varied_lengths(batch_size, length, seed) if varied else (length,) * batch_size,
                seqlen_q=seqlen_q,
                num_heads_q=num_heads_q,
                num_heads_k=num_heads_k,
                page_size=draw.choice((64, *PAGE_SIZES)),
                causal=causal,
                dtype=dtype,
                layout=draw.choice(LAYOUTS),
                rising=draw.choice((0.0, 0.0, 20.0)),
                seed=seed,
            )
            yield spec, draw.random() < 0.5


CPU_HEADS = [*heads((1, 3, 9), (1, 2, 3, 8)), (63, 1), (64, 2), (126, 3), (128, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads_q", "num_heads_k"), CPU_HEADS)
def test_grid_on_cpu(num_heads_q: int, num_heads_k: int, dtype: str) -> None:
    few = num_heads_q <= 9
    batch_sizes = (1, 2, 6) if few else (2,)
    seqlens_q = (1, 2, 4) if few else (1, 3)
    for spec, padded in grid(num_heads_q, num_heads_k, dtype, batch_sizes, seqlens_q, (20, 140) if few else (75,)):
        check(make_case(spec), padded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_request_on_cpu(dtype: str) -> None:
    check(make_case(Spec(lengths=(4096, 0), seqlen_q=2, num_heads_q=3, causal=True, dtype=dtype, rising=20.0)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads_q", "num_heads_k"), heads((1, 3, 9, 63, 64, 126, 128), (1, 2, 3, 8)))
def test_grid_on_gpu(torch: Any, num_heads_q: int, num_heads_k: int, dtype: str) -> None:
    for spec, padded in grid(num_heads_q, num_heads_k, dtype, (1, 2, 6, 64), (1, 2, 4), (20, 140, 4096)):
        check(make_case(spec, "cuda"), padded)
