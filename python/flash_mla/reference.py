"""Dense decoding in float64 with NumPy: what the results are held against. Shares no code with the library."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEAD_DIM_V = 512

# How far a result may be off. An element is right if it is within one of the two bounds; OUT_COSINE is of the cosine
# difference of the whole.
OUT_ABSOLUTE, OUT_RELATIVE, OUT_COSINE = 8e-4, 2.01 / 128, 5e-6
LSE_ABSOLUTE, LSE_RELATIVE = 1e-6, 8.01 / 65536


def dense_decode(
    q: NDArray[Any],
    k_cache: NDArray[Any],
    block_table: NDArray[np.int32],
    cache_seqlens: NDArray[np.int32],
    softmax_scale: float,
    causal: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attend to a paged cache, one request after the other.

    Parameters and results are those of ``flash_mla_with_kvcache``, with results in float64.
    """
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    out = np.zeros((batch_size, seqlen_q, num_heads_q, _HEAD_DIM_V))
    lse = np.full((batch_size, num_heads_q, seqlen_q), np.inf)
    for request, seqlen_k in enumerate(cache_seqlens.tolist()):
        keys = _gather(k_cache, block_table[request], seqlen_k)
        for query in range(seqlen_q):
            num_visible = seqlen_k - seqlen_q + query + 1 if causal else seqlen_k
            if num_visible > 0:
                out[request, query], lse[request, :, query] = _attend(
                    q[request, query].astype(np.float64), keys[:num_visible], softmax_scale
                )
    return out, lse


def _gather(k_cache: NDArray[Any], pages: NDArray[np.int32], seqlen_k: int) -> NDArray[np.float64]:
    """A request's tokens in order: (seqlen_k, num_heads_k, 576)."""
    page_size = k_cache.shape[1]
    token = np.arange(seqlen_k)
    return np.asarray(k_cache[pages[token // page_size], token % page_size], np.float64)


def _attend(
    q: NDArray[np.float64], keys: NDArray[np.float64], softmax_scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One query token: q (num_heads_q, 576) and keys (num_visible, num_heads_k, 576) to out and lse of each head."""
    num_heads_q, num_heads_k = q.shape[0], keys.shape[1]
    out = np.empty((num_heads_q, _HEAD_DIM_V))
    lse = np.empty(num_heads_q)
    group = num_heads_q // num_heads_k
    for head_k in range(num_heads_k):
        heads = slice(head_k * group, (head_k + 1) * group)
        scores = q[heads] @ keys[:, head_k].T * softmax_scale
        row_max = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - row_max)
        row_sum = weights.sum(axis=1, keepdims=True)
        out[heads] = weights @ keys[:, head_k, :_HEAD_DIM_V] / row_sum
        lse[heads] = (row_max + np.log(row_sum))[:, 0]
    return out, lse
