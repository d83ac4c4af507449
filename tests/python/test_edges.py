"""Dense decode at the edges of what it takes, on the CPU and on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
from cases import HEAD_DIM_QK, HEAD_DIM_V, LAYOUTS, Spec, make_case, varied_lengths
from checks import Guarded, check, decode, plan, same_bits
from flash_mla import get_mla_metadata
from oracle import assert_close, decode_reference

Device = str | None


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_page_sizes(device: Device, page_size: int, seqlen_q: int) -> None:
    lengths = (1, page_size - 1, page_size, page_size + 1, 3 * page_size + 5, 0)
    check(make_case(Spec(lengths, seqlen_q, num_heads_q=5, page_size=page_size, causal=True), device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_heads_k", [1, 2])
def test_strides(device: Device, layout: str, padded: bool, num_heads_k: int) -> None:
    check(make_case(Spec((70, 130, 0), 3, num_heads_q=10, num_heads_k=num_heads_k, layout=layout), device), padded)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [*range(1, 17), 65, 200])
def test_many_query_tokens(device: Device, seqlen_q: int, causal: bool) -> None:
    lengths = (seqlen_q + 64, 1, seqlen_q, max(seqlen_q - 1, 0), seqlen_q + 1)
    check(make_case(Spec(lengths, seqlen_q, num_heads_q=3, causal=causal, seed=seqlen_q), device))


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), ()])
@pytest.mark.parametrize("num_pages", [None, 0])
def test_nothing_to_see(device: Device, lengths: tuple[int, ...], num_pages: int | None) -> None:
    spec = Spec(lengths, seqlen_q=2, num_pages=num_pages, spare_columns=0 if num_pages == 0 else 2)
    check(make_case(spec, device))


def test_more_tiles_than_a_gpu_has_sms(device: Device) -> None:
    """One part then, which splits nothing and has no memory for pieces."""
    check(make_case(Spec((300, 0, 139), 140, num_heads_q=64, causal=True), device))


@pytest.mark.parametrize("num_heads", [(1, 1), (17, 1), (40, 1), (64, 1), (100, 1), (128, 1), (66, 2), (160, 8)])
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 64, 65, 500, 1024, 2111])
def test_a_request_alone(device: Device, num_heads: tuple[int, int], seqlen_q: int, length: int) -> None:
    """Short ones are worked in smaller tiles, and more of them."""
    heads_q, heads_k = num_heads
    spec = Spec((length,), seqlen_q, heads_q, heads_k, causal=seqlen_q > 1, spare_columns=0, seed=length)
    check(make_case(spec, device))


@pytest.mark.parametrize("num_heads_q", [16, 32, 64, 128])
@pytest.mark.parametrize("num_blocks", [15, 16, 17, 23, 31, 133, 264])
@pytest.mark.parametrize("spare_columns", [2, 200])
def test_many_pieces(device: Device, num_heads_q: int, num_blocks: int, spare_columns: int) -> None:
    """A request that is alone, in pieces that are added in turn, or in shares, which are not all of one size.

    Where the block table has room for much, requests are not worked in smaller tiles, however short they are.
    """
    spec = Spec((64 * num_blocks - 7,), 1, num_heads_q, rising=20.0, spare_columns=spare_columns, seed=num_blocks)
    check(make_case(spec, device))


@pytest.mark.parametrize("num_heads", [(1, 1), (16, 1), (40, 1), (128, 1), (32, 2)])
@pytest.mark.parametrize("seqlen_q", [1, 2])
@pytest.mark.parametrize("capacity", [64, 128, 200, 512, 1024])
def test_short_requests(device: Device, num_heads: tuple[int, int], seqlen_q: int, capacity: int) -> None:
    """Where the block table has few columns, clusters of CTAs take a request each, if all of them run at once."""
    heads_q, heads_k = num_heads
    lengths = (capacity, 0, 1, capacity - 1, capacity // 2 + 1, 0, capacity // 3)
    for some in (lengths[:2], lengths):
        spec = Spec(some, seqlen_q, heads_q, heads_k, causal=seqlen_q > 1, rising=20.0, spare_columns=0, seed=len(some))
        check(make_case(spec, device))


@pytest.mark.parametrize("page_size", [1, 4, 16, 32, 128, 256])
def test_page_sizes_of_short_requests(device: Device, page_size: int) -> None:
    for dtype in ("bfloat16", "float16"):
        check(make_case(Spec((900, 77), 2, num_heads_q=5, page_size=page_size, dtype=dtype, spare_columns=0), device))


def test_no_query_tokens(device: Device) -> None:
    out, lse = decode(make_case(Spec((70, 0), seqlen_q=0), device))
    assert tuple(out.shape) == (2, 0, 16, 512)
    assert tuple(lse.shape) == (2, 16, 0)


def test_zeros_beside_long_requests(device: Device) -> None:
    check(make_case(Spec((0, 0, 1000, 0, 1, 0, 0, 500, 0), num_heads_q=4), device))


def test_negative_lengths_count_as_zero(device: Device) -> None:
    check(make_case(Spec((-1, 70, -(2**31), 3), num_heads_q=4), device))


def test_lengths_are_cut_at_the_block_table(device: Device) -> None:
    case = make_case(Spec((128, 128), num_heads_q=4, spare_columns=0), device)
    case.cache_seqlens[0] = 129
    case.cache_seqlens[1] = 2**31 - 1
    check(case)


def test_requests_share_pages(device: Device) -> None:
    case = make_case(Spec((200, 200, 200), num_heads_q=4), device)
    case.block_table[1] = case.block_table[0]
    case.block_table[2, :2] = case.block_table[0, :2]
    check(case)


@pytest.mark.parametrize("softmax_scale", [1e-4, 0.01, 0.3])
def test_softmax_scale(device: Device, softmax_scale: float) -> None:
    check(make_case(Spec((1, 100, 300), num_heads_q=4, softmax_scale=softmax_scale), device))


@pytest.mark.parametrize("softmax_scale", [1e9, 3e38])
@pytest.mark.parametrize(("num_heads_q", "spare_columns"), [(4, 0), (4, 40), (16, 40), (64, 40)])
def test_huge_scale_of_scores_that_are_0(
    device: Device, num_heads_q: int, spare_columns: int, softmax_scale: float
) -> None:
    # The first query of the first request sees no key.
    spec = Spec((1, 700, 0), 2, num_heads_q, causal=True, softmax_scale=softmax_scale, spare_columns=spare_columns)
    case = make_case(spec, device)
    case.q[:] = 0
    check(case)


@pytest.mark.parametrize("rising", [-200.0, -20.0, 5.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_far_from_flat(device: Device, rising: float, dtype: str) -> None:
    check(make_case(Spec((1, 64, 65, 500), 2, num_heads_q=4, causal=True, rising=rising, dtype=dtype), device))


def test_scale_left_out_is_the_default(device: Device) -> None:
    case = make_case(Spec((100, 0), num_heads_q=4), device)
    given = make_case(Spec((100, 0), num_heads_q=4, softmax_scale=HEAD_DIM_QK**-0.5), device)
    assert all(same_bits(a, b) for a, b in zip(decode(case), decode(given), strict=True))


def test_causal_changes_nothing_for_one_query(device: Device) -> None:
    case = make_case(Spec((100, 0, 1), num_heads_q=4), device)
    causal = make_case(Spec((100, 0, 1), num_heads_q=4, causal=True), device)
    assert all(same_bits(a, b) for a, b in zip(decode(case), decode(causal), strict=True))


def test_results_are_the_callers_own_arrays(device: Device) -> None:
    case = make_case(Spec((100, 0)), device)
    out, lse = Guarded.like_out(case, padded=True).view, Guarded.like_lse(case, padded=True).view
    got_out, got_lse = decode(case, out=out, lse=lse)
    assert got_out is out
    assert got_lse is lse
    fresh_out, _ = decode(case, lse=lse)
    assert same_bits(fresh_out, out)


def test_inputs_stay_as_they_are(device: Device) -> None:
    case, copy = (make_case(Spec((100, 0, 70), num_heads_q=4), device) for _ in range(2))
    decode(case)
    for name in ("q", "k_cache", "block_table", "cache_seqlens"):
        assert same_bits(getattr(case, name), getattr(copy, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cache_above_two_to_the_31_elements(torch: Any, dtype: str) -> None:
    first_page = 2**31 // (64 * HEAD_DIM_QK) + 1
    spec = Spec((1000, 0, 4096, 70), 2, num_heads_q=64, causal=True, dtype=dtype, first_page=first_page)
    case = make_case(spec, "cuda")
    assert case.k_cache.numel() > 2**31
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_very_long_request(torch: Any, num_heads_q: int) -> None:
    check(make_case(Spec((2**18,), num_heads_q=num_heads_q, rising=20.0), "cuda"))
    check(make_case(Spec((2**18, 0, 1, 100), 2, num_heads_q=num_heads_q, causal=True), "cuda"))
    check(make_case(Spec((2**20 + 100,), num_heads_q=num_heads_q), "cuda"))  # longer than is planned in 32 bits


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 32, 128])
@pytest.mark.parametrize("exponent", [-90, -30, 30, 100])
def test_splits_of_values_of_any_size(torch: Any, num_heads_q: int, exponent: int) -> None:
    """Pieces are written in float16, scaled: a power of 2 changes nothing but exponents."""
    case = make_case(Spec((3000,), num_heads_q=num_heads_q), "cuda")
    case.q[..., :HEAD_DIM_V] = 0  # scores come from RoPE alone
    out, lse = decode(case)
    case.k_cache[..., :HEAD_DIM_V] *= 2.0**exponent
    scaled_out, scaled_lse = decode(case)
    assert same_bits(scaled_lse, lse)
    assert same_bits(scaled_out, out * 2.0**exponent)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 32, 128])
def test_splits_of_values_of_many_sizes(torch: Any, num_heads_q: int) -> None:
    """The largest decide, whichever piece they are in."""
    case = make_case(Spec((3000,), num_heads_q=num_heads_q), "cuda")
    case.q[..., :HEAD_DIM_V] = 0
    sizes = torch.tensor([2.0**-60, 1.0, 2.0**60, 0.0], device="cuda")
    pages = torch.arange(case.k_cache.shape[0], device="cuda") % 4
    case.k_cache[..., :HEAD_DIM_V] *= sizes[pages, None, None, None].to(case.k_cache.dtype)
    out, lse = decode(case)
    expected_out, expected_lse = (torch.as_tensor(x, device="cuda") for x in decode_reference(case))
    assert float((lse - expected_lse).abs().max()) < 1e-4
    error = (out.double() - expected_out).abs().amax(-1)
    assert bool((error <= 2.01 / 128 * expected_out.abs().amax(-1)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 32, 128])
@pytest.mark.parametrize("first_column", [0, 128])
def test_splits_of_values_whose_columns_differ(torch: Any, num_heads_q: int, first_column: int) -> None:
    """Columns are written a half at a time: what is larger in the second than in the first needs another scale."""
    case = make_case(Spec((3000,), num_heads_q=num_heads_q), "cuda")
    case.q[..., :HEAD_DIM_V] = 0
    out, lse = decode(case)
    factors = torch.ones(2, 256, device="cuda", dtype=out.dtype)
    factors[:, first_column : first_column + 128] = 2.0**8
    case.k_cache[..., :HEAD_DIM_V] *= factors.flatten()
    scaled_out, scaled_lse = decode(case)
    assert same_bits(scaled_lse, lse)
    assert same_bits(scaled_out, out * factors.flatten())


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads_q", "page_size"), [(16, 64), (128, 64), (128, 16), (128, 1)])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_many_requests(torch: Any, num_heads_q: int, page_size: int, seqlen_q: int) -> None:
    """Several to a CTA, most of one to three blocks, some of none."""
    batch_size = 65536 // num_heads_q
    lengths = varied_lengths(batch_size, 100, seed=1)
    assert lengths.count(0) > batch_size // 8
    check(make_case(Spec(lengths, seqlen_q, num_heads_q, page_size=page_size, causal=True), "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 32, 64, 128])
@pytest.mark.parametrize(("batch_size", "mean"), [(50, 700), (100, 700), (140, 400), (300, 200)])
def test_same_bits_whoever_plans(torch: Any, num_heads_q: int, batch_size: int, mean: int) -> None:
    """Many requests in two pieces, which one CTA merges where the plan is given, and two else."""
    case = make_case(Spec(varied_lengths(batch_size, mean, seed=3), num_heads_q=num_heads_q), "cuda")
    results = decode(case, **plan(case))
    assert_close(*results, *decode_reference(case), "planned before")
    assert all(same_bits(a, b) for a, b in zip(decode(case), results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 64])
def test_long_request_among_short_ones(torch: Any, num_heads_q: int) -> None:
    """Where it ends, a CTA merges its slice of that one's many pieces, and both pieces of the next."""
    check(make_case(Spec((600,) * 70 + (65536,) + (600,) * 70, num_heads_q=num_heads_q), "cuda"))


@pytest.mark.gpu
def test_same_bits_over_many_calls(torch: Any) -> None:
    case = make_case(Spec(varied_lengths(32, 3000, seed=2), num_heads_q=128), "cuda")
    first = decode(case)
    for _ in range(200):
        assert all(same_bits(a, b) for a, b in zip(decode(case), first, strict=True))


def test_pytorch_on_the_cpu() -> None:
    pytest.importorskip("torch")
    check(make_case(Spec((100, 0, 70), 2, num_heads_q=4, causal=True), "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("planned_for", [(1, 1, 1), (9000, 0, 70), (0, 0, 0), (300, 5000, 300)])
def test_plan_of_other_lengths(torch: Any, planned_for: tuple[int, ...]) -> None:
    """A plan decides balance, not results: lengths may have changed since it was made."""
    case = make_case(Spec((2000, 65, 4100), seqlen_q=2, num_heads_q=16, causal=True), "cuda")
    lengths = torch.tensor(planned_for, dtype=torch.int32, device="cuda")
    metadata, num_splits = get_mla_metadata(lengths, case.num_q_tokens_per_head_k, 1)
    results = decode(case, tile_scheduler_metadata=metadata, num_splits=num_splits)
    assert_close(*results, *decode_reference(case), f"planned for {planned_for}")


@pytest.mark.gpu
@pytest.mark.parametrize("num_q_tokens_per_head_k", [1, 64, 4096])
@pytest.mark.parametrize("num_heads_q", [4, 128])
@pytest.mark.parametrize("lengths", [(2000, 65, 4100), (12000,)])
def test_plan_of_other_extents(
    torch: Any, lengths: tuple[int, ...], num_heads_q: int, num_q_tokens_per_head_k: int
) -> None:
    """With more parts than fit on the GPU at once, CTAs of their own merge."""
    case = make_case(Spec(lengths, seqlen_q=3, num_heads_q=num_heads_q, causal=True), "cuda")
    metadata, num_splits = get_mla_metadata(case.cache_seqlens, num_q_tokens_per_head_k, 1)
    results = decode(case, tile_scheduler_metadata=metadata, num_splits=num_splits)
    assert_close(*results, *decode_reference(case), f"planned for {num_q_tokens_per_head_k} query tokens")


@pytest.mark.gpu
def test_two_streams_that_plan_ahead(torch: Any) -> None:
    """More requests than parts, some long: planned by a launch of its own, and split all the same."""
    specs = [Spec((5000, *([64] * 150)), num_heads_q=128, seed=seed) for seed in (1, 2)]
    cases = [make_case(spec, "cuda") for spec in specs]
    references = [decode_reference(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(100):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(decode(case))
    torch.cuda.synchronize()
    for result, reference in zip(results, references, strict=True):
        assert_close(*result, *reference, "on two streams")


@pytest.mark.gpu
@pytest.mark.parametrize("low", [-(2**31), 0, -3])
@pytest.mark.parametrize("seed", range(4))
def test_garbage_plan_does_no_harm(torch: Any, low: int, seed: int) -> None:
    """Whatever is taken for a plan, the call ends, writes to its results only, and the next one is right."""
    case = make_case(Spec((2000, 65, 4100), num_heads_q=128), "cuda")
    metadata, num_splits = get_mla_metadata(case.cache_seqlens, case.num_q_tokens_per_head_k, 1)
    torch.manual_seed(seed)
    garbage = torch.randint(low, 2**31 if low < -3 else 8, metadata.shape, dtype=torch.int64, device="cuda")
    mixed = torch.where(torch.rand(metadata.shape, device="cuda") < 0.5, garbage.int(), metadata)
    for rows in (garbage.int(), mixed, torch.zeros_like(metadata)):
        out, lse = Guarded.like_out(case, padded=False), Guarded.like_lse(case, padded=False)
        decode(case, tile_scheduler_metadata=rows, num_splits=num_splits, out=out.view, lse=lse.view)
        torch.cuda.synchronize()
        out.check("garbage plan")
        lse.check("garbage plan")
    assert_close(*decode(case), *decode_reference(case), "after garbage plans")
