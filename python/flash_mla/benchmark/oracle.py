"""Decoding in float64 with PyTorch, a stretch of tokens at a time, and how far a result is from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import reference
from ._torch import Tensor, torch
from .pool import Pool
from .shapes import HEAD_DIM_QK, HEAD_DIM_V

SOFTMAX_SCALE = HEAD_DIM_QK**-0.5
_TOKENS_AT_A_TIME = 16384


class WrongResultError(AssertionError):
    """A result that is not what the oracle says."""


@dataclass(frozen=True)
class Agreement:
    """How far a checked result is off; lse is None for who gives none."""

    error_out: float
    cosine_difference: float
    error_lse: float | None


def check(pool: Pool, rotation: int, out: Tensor, lse: Tensor | None, requests: Sequence[int]) -> Agreement:
    """Hold the named requests of a result against the oracle.

    Raises
    ------
    WrongResultError
        where they are off, or any value of the result is not finite.
    """
    expected_shape = (*pool.q.shape[:3], HEAD_DIM_V)
    if tuple(out.shape) != expected_shape:
        raise WrongResultError(f"out: expected shape {expected_shape}, got {tuple(out.shape)}")
    if not bool(out.isfinite().all()) or (lse is not None and not bool(lse.isfinite().all())):
        raise WrongResultError("a value of the result is not finite")
    k_cache = pool.k_cache(rotation)
    pairs = [decode(pool.q[r], k_cache, pool.block_table[r], pool.lengths[r], pool.shape.causal) for r in requests]
    some = list(requests)
    expected_out = torch.stack([pair[0] for pair in pairs])
    expected_lse = torch.stack([pair[1] for pair in pairs])
    error_out, difference = _check_out(out[some].double(), expected_out)
    error_lse = None if lse is None else _check_lse(lse[some].double(), expected_lse)
    return Agreement(error_out, difference, error_lse)


def decode(q: Tensor, k_cache: Tensor, pages: Tensor, seqlen_k: int, causal: bool) -> tuple[Tensor, Tensor]:
    """One request in float64.

    Parameters
    ----------
    q : (seqlen_q, num_heads_q, 576)
    k_cache : (num_pages, page_size, num_heads_k, 576)
    pages : (max_pages,), the request's row of the block table

    Returns
    -------
    out : (seqlen_q, num_heads_q, 512)
    lse : (num_heads_q, seqlen_q), +inf where there is no key
    """
    seqlen_q, num_heads_q, _ = q.shape
    page_size, num_heads_k = k_cache.shape[1:3]
    # (num_heads_k, seqlen_q, heads of one KV head, 576)
    rows = q.double().view(seqlen_q, num_heads_k, num_heads_q // num_heads_k, HEAD_DIM_QK).transpose(0, 1)
    out = rows.new_zeros((*rows.shape[:3], HEAD_DIM_V))
    lse = rows.new_full(rows.shape[:3], -math.inf)
    limits = seqlen_k - torch.arange(seqlen_q - 1, -1, -1, device=q.device) * int(causal)
    for begin in range(0, seqlen_k, _TOKENS_AT_A_TIME):
        token = torch.arange(begin, min(begin + _TOKENS_AT_A_TIME, seqlen_k), device=q.device)
        keys = k_cache[pages[token // page_size].long(), token % page_size].double().transpose(0, 1)
        scores = torch.einsum("kqgd,ktd->kqgt", rows, keys) * SOFTMAX_SCALE
        scores.masked_fill_((token >= limits[:, None])[None, :, None, :], -math.inf)
        chunk_lse = scores.logsumexp(-1)
        weights = (scores - _finite(chunk_lse)[..., None]).exp_()
        chunk_out = torch.einsum("kqgt,ktd->kqgd", weights, keys[..., :HEAD_DIM_V])
        both = torch.logaddexp(lse, chunk_lse)
        out = out * (lse - _finite(both)).exp()[..., None] + chunk_out * (chunk_lse - _finite(both)).exp()[..., None]
        lse = both
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(1, 2).flatten(0, 1)


def _finite(lse: Tensor) -> Tensor:
    """Zero for -inf, so that exp(-inf - lse) is 0 where there is no key yet."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _check_out(out: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest error and the cosine difference."""
    error = (out - expected).abs()
    good = (error <= reference.OUT_ABSOLUTE) | (error <= reference.OUT_RELATIVE * expected.abs())
    energy = float((out * out + expected * expected).sum())
    difference = 1.0 - 2.0 * float((out * expected).sum()) / energy if energy else 0.0
    largest = float(error.max())
    if not bool(good.all()):
        raise WrongResultError(f"{_share(good)} of out is off, by {largest:.2g} at most")
    if difference >= reference.OUT_COSINE:
        raise WrongResultError(f"out: cosine difference {difference:.2g}, expected below {reference.OUT_COSINE:.2g}")
    return largest, difference


def _check_lse(lse: Tensor, expected: Tensor) -> float:
    """The largest error."""
    if lse.shape != expected.shape:
        raise WrongResultError(f"lse: expected shape {tuple(expected.shape)} of the checked, got {tuple(lse.shape)}")
    error = (lse - expected).abs()
    good = (error <= reference.LSE_ABSOLUTE) | (error <= reference.LSE_RELATIVE * expected.abs())
    if not bool(good.all()):
        raise WrongResultError(f"{_share(good)} of lse is off, by {float(error.max()):.2g} at most")
    return float(error.max())


def _share(good: Any) -> str:
    return f"{100 * (1 - float(good.double().mean())):.3g} %"
