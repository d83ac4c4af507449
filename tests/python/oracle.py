"""Float64 MLA decoding in plain NumPy and PyTorch, independent of the library, and the contract's tolerances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from cases import HEAD_DIM_QK, HEAD_DIM_V, Case

OUT_ABSOLUTE = 8e-4
OUT_RELATIVE = 2.01 / 128
OUT_COSINE = 5e-6
OUT_ROW = 0.02  # of a row's length: not the contract's, but what rounding P and out to bfloat16 stays well below
LSE_ABSOLUTE = 1e-6
LSE_RELATIVE = 8.01 / 65536

# Float64 values that the PyTorch oracle holds at a time, about: 2 GB.
TORCH_BUDGET = 2**28


def decode_numpy(case: Case) -> tuple[Any, Any]:
    """(out, lse) in float64, one request and one KV head after another."""
    spec = case.spec
    out = np.zeros((spec.batch_size, spec.seqlen_q, spec.num_heads_q, HEAD_DIM_V))
    lse = np.full((spec.batch_size, spec.num_heads_q, spec.seqlen_q), math.inf)
    group = spec.num_heads_q // spec.num_heads_k
    for request, length in enumerate(seen_lengths(case)):
        pages = case.block_table[request, : -(-length // spec.page_size)]
        tokens = case.k_cache[pages].astype(np.float64).reshape(-1, spec.num_heads_k, HEAD_DIM_QK)[:length]
        for query in range(spec.seqlen_q):
            seen = max(length - spec.seqlen_q + query + 1, 0) if spec.causal else length
            if seen == 0:
                continue
            for head_k in range(spec.num_heads_k):
                heads = slice(head_k * group, (head_k + 1) * group)
                keys = tokens[:seen, head_k]
                scores = case.q[request, query, heads].astype(np.float64) @ keys.T * case.softmax_scale
                top = scores.max(axis=1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(axis=1, keepdims=True)
                out[request, query, heads] = weights / total @ keys[:, :HEAD_DIM_V]
                lse[request, heads, query] = (top + np.log(total))[:, 0]
    return out, lse


def decode_reference(case: Case) -> tuple[Any, Any]:
    """(out, lse) in float64, by the framework of the case."""
    return decode_numpy(case) if isinstance(case.q, np.ndarray) else decode_torch(case)


def decode_torch(case: Case, requests: Sequence[int] | None = None) -> tuple[Any, Any]:
    """(out, lse) in float64 on the case's device, for the named requests (default: all), many requests at a time."""
    import torch

    spec = case.spec
    chosen = list(range(spec.batch_size)) if requests is None else list(requests)
    lengths = seen_lengths(case)
    out = case.q.new_zeros((len(chosen), spec.seqlen_q, spec.num_heads_q, HEAD_DIM_V), dtype=torch.float64)
    lse = case.q.new_zeros((len(chosen), spec.num_heads_q, spec.seqlen_q), dtype=torch.float64)
    for first, last in _chunks(case, [lengths[request] for request in chosen]):
        some = chosen[first:last]
        out[first:last], lse[first:last] = _decode_some(case, some, [lengths[request] for request in some])
    return out, lse


def _decode_some(case: Case, requests: list[int], lengths: list[int]) -> tuple[Any, Any]:
    import torch

    spec, device = case.spec, case.q.device
    count, longest = len(requests), max(lengths)
    group = spec.num_heads_q // spec.num_heads_k
    which = torch.tensor(requests, device=device)
    length = torch.tensor(lengths, device=device)

    # (count, num_heads_k, longest, 576), zeros past each length
    position = torch.arange(longest, device=device)
    alive = position < length[:, None]
    page = case.block_table[which][:, position // spec.page_size].long().where(alive, 0)
    tokens = case.k_cache[page, position % spec.page_size].double()
    tokens = tokens.where(alive[:, :, None, None], 0.0).transpose(1, 2)

    # (count, num_heads_k, seqlen_q * group, longest)
    q = case.q[which].double().reshape(count, spec.seqlen_q, spec.num_heads_k, group, HEAD_DIM_QK).transpose(1, 2)
    scores = q.reshape(count, spec.num_heads_k, spec.seqlen_q * group, HEAD_DIM_QK) @ tokens.transpose(2, 3)
    scores = scores.mul_(case.softmax_scale).view(count, spec.num_heads_k, spec.seqlen_q, group, longest)
    query = torch.arange(spec.seqlen_q, device=device)
    limit = length[:, None] - (spec.seqlen_q - 1 - query if spec.causal else 0 * query)
    scores.masked_fill_((position >= limit[..., None])[:, None, :, None, :], -math.inf)

    # (count, num_heads_k, seqlen_q, group)
    lse = scores.logsumexp(-1) if longest else scores.new_full(scores.shape[:-1], -math.inf)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    weights = (scores - lse[..., None]).exp_().flatten(2, 3)
    out = (weights @ tokens[..., :HEAD_DIM_V]).view(*lse.shape, HEAD_DIM_V)
    return out.transpose(1, 2).flatten(2, 3), lse.transpose(2, 3).flatten(1, 2)


def _chunks(case: Case, lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive requests whose padded float64 arrays keep to the budget."""
    spec = case.spec
    per_token = spec.num_heads_k * HEAD_DIM_QK + 3 * spec.num_heads_q * spec.seqlen_q
    first, longest = 0, 0
    for request, length in enumerate(lengths):
        longest = max(longest, length)
        if request > first and (request - first + 1) * longest * per_token > TORCH_BUDGET:
            yield first, request
            first, longest = request, length
    if first < len(lengths):
        yield first, len(lengths)


def seen_lengths(case: Case) -> list[int]:
    """Lengths as the library counts them: not below 0, and no more than the block table has room for."""
    room = case.block_table.shape[1] * case.spec.page_size
    return [min(max(int(length), 0), room) for length in case.cache_seqlens.tolist()]


def assert_close(out: Any, lse: Any, ref_out: Any, ref_lse: Any, what: object = "") -> None:
    """Raises AssertionError unless the result keeps to the contract's tolerances. All four of one framework."""
    out, lse, ref_out, ref_lse = (_to_float64(x) for x in (out, lse, ref_out, ref_lse))
    assert tuple(out.shape) == tuple(ref_out.shape), f"{what}: out has shape {tuple(out.shape)}"
    assert tuple(lse.shape) == tuple(ref_lse.shape), f"{what}: lse has shape {tuple(lse.shape)}"

    with np.errstate(invalid="ignore"):
        error = abs(out - ref_out)
        good = (error <= OUT_ABSOLUTE) | (error <= OUT_RELATIVE * abs(ref_out))
        assert bool(good.all()), f"{what}: {_first_bad('out', good, out, ref_out)}"

        energy = float((out * out + ref_out * ref_out).sum())
        cosine = 1.0 - 2.0 * float((out * ref_out).sum()) / energy if energy else 0.0
        assert cosine < OUT_COSINE, f"{what}: cosine difference of out is {cosine:.3g}"

        # A single wrong row would hide in both: small beside 8e-4, and one among many.
        row_error, row_energy = (error * error).sum(-1), (ref_out * ref_out).sum(-1)
        good = row_error <= OUT_ROW**2 * row_energy
        assert bool(good.all()), f"{what}: {_first_bad('row errors of out', good, row_error, row_energy)}"

        error = abs(lse - ref_lse)
        finite = (abs(lse) < math.inf) & (abs(ref_lse) < math.inf)
        good = (lse == ref_lse) | (finite & ((error <= LSE_ABSOLUTE) | (error <= LSE_RELATIVE * abs(ref_lse))))
        assert bool(good.all()), f"{what}: {_first_bad('lse', good, lse, ref_lse)}"


def _to_float64(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double()


def _first_bad(name: str, good: Any, got: Any, expected: Any) -> str:
    bad = np.argwhere(~np.asarray(good if isinstance(good, np.ndarray) else good.cpu()))
    where = tuple(int(i) for i in bad[0])
    return (
        f"{len(bad)} of {math.prod(good.shape)} values of {name} are off, the first {name}{list(where)}: "
        f"{float(got[where])!r}, expected {float(expected[where])!r}"
    )
