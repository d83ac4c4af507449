"""Merging states: against float64, with states without keys, in every layout, through every array library."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import HEAD_DIM_V, NumpyArrays, Spec, TorchArrays, make_case
from checks import Guarded, decode, same_bits
from flash_mla import merge_states
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merges import DTYPES, LAYOUTS, Merge, assert_merged, make_states, reference, to_float64
from oracle import assert_close, decode_reference


def check(spec: Merge, device: str | None, padded: bool = False) -> None:
    """Right against float64, into new arrays and the caller's, the same bits twice, nothing written beside them."""
    outs, lses = make_states(spec, device)
    expected = reference(outs, lses)
    out, lse = merge_states(outs, lses)
    assert_merged(spec, out, lse, expected, spec.dtype)
    again = merge_states(outs, lses)
    assert same_bits(out, again[0])
    assert same_bits(lse, again[1])

    arrays: Any = NumpyArrays(0) if device is None else TorchArrays(0, device)
    out_dtype = spec.out_dtype or spec.dtype
    own_out = Guarded(arrays.nans((0,), out_dtype), spec.out_shape, padded)
    own_lse = Guarded(arrays.nans((0,), "float32"), spec.lse_shape, padded)
    given_out, given_lse = own_out.view, own_lse.view
    results = merge_states(outs, lses, out=given_out, lse=given_lse)
    assert results[0] is given_out
    assert results[1] is given_lse
    own_out.check(f"out: {spec}")
    own_lse.check(f"lse: {spec}")
    assert_merged(spec, given_out, given_lse, expected, out_dtype)
    assert same_bits(given_lse, lse)
    if out_dtype == spec.dtype:
        assert same_bits(given_out, out)


@st.composite
def merges(draw: st.DrawFn, max_states: int, max_rows: int) -> Merge:
    dtype = draw(st.sampled_from(DTYPES))
    return Merge(
        num_states=draw(st.integers(1, 9) | st.integers(1, max_states)),
        batch_size=draw(st.integers(0, max_rows)),
        seqlen_q=draw(st.integers(0, 3)),
        num_heads_q=draw(st.integers(0, max_rows)),
        dtype=dtype,
        out_dtype=draw(st.sampled_from((dtype, "float32"))),
        layout=draw(st.sampled_from(LAYOUTS)),
        lse_layout=draw(st.sampled_from(LAYOUTS)),
        empty=draw(st.sampled_from((0.0, 0.3, 0.9, 1.0))),
        spread=draw(st.sampled_from((0.0, 1.0, 30.0, 1e4))),
        shift=draw(st.sampled_from((0.0, -100.0, 1e5))),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=150)
@given(merges(max_states=40, max_rows=5), st.booleans())
@example(Merge(1), False)
@example(Merge(128, 1, 1, 2), False)
@example(Merge(9, 3, 2, 5, "float16", "float32", "list of strided", "list of strided"), True)
def test_any_merge_on_cpu(spec: Merge, padded: bool) -> None:
    check(spec, None, padded)


@pytest.mark.gpu
@settings(max_examples=300)
@given(spec=merges(max_states=128, max_rows=20), padded=st.booleans())
@example(spec=Merge(1), padded=False)
@example(spec=Merge(8, 1, 1, 128), padded=False)
@example(spec=Merge(128, 1, 1, 2), padded=False)
@example(spec=Merge(9, 3, 2, 5, "float16", "float32", "list of strided", "list of strided"), padded=True)
def test_any_merge_on_gpu(torch: Any, spec: Merge, padded: bool) -> None:
    check(spec, "cuda", padded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_states", [2, 8, 64])
def test_many_rows(device: str | None, num_states: int, dtype: str) -> None:
    check(Merge(num_states, 16, 2, 16 if device is None else 128, dtype), device)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(torch: Any) -> None:
    """Offsets beyond 32 bits, in each dimension and of bytes."""
    storage = torch.zeros(5 << 30, dtype=torch.bfloat16, device="cuda")
    outs = storage.as_strided((2, 2, 2, 2, HEAD_DIM_V), (2 << 30, 1 << 30, 1 << 29, 1 << 28, 1))
    outs.copy_(torch.randn(outs.shape, device="cuda"))
    lses = torch.randn(2, 2, 2, 2, device="cuda")
    assert_merged(Merge(2, 2, 2, 2), *merge_states(outs, lses), reference(outs, lses), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("batch_size", "seqlen_q"), [(70_000, 1), (1, 70_000)])
def test_more_rows_than_a_grid_is_high(torch: Any, batch_size: int, seqlen_q: int) -> None:
    check(Merge(2, batch_size, seqlen_q, 1), "cuda")


def test_extreme_lse(device: str | None) -> None:
    """lse near the ends of float32: weights neither overflow nor vanish together."""
    for shift in (3e38, -3e38, 1e30, -1e30):
        check(Merge(5, shift=shift, spread=0.0), device)
    outs, lses = make_states(Merge(3, empty=0.0), device)
    lses[0], lses[1], lses[2] = 3e38, -3e38, 0.0
    out, lse = merge_states(outs, lses)
    assert same_bits(out, outs[0])
    assert same_bits(lse, lses[0])


def test_one_state_is_itself(device: str | None) -> None:
    for dtype in DTYPES:
        outs, lses = make_states(Merge(1, empty=0.0, dtype=dtype), device)
        out, lse = merge_states(outs, lses)
        assert same_bits(out, outs[0])
        assert same_bits(lse, lses[0])


def test_states_without_keys_count_for_nothing(device: str | None) -> None:
    """Among any number of them, +inf and -inf, whatever their out is."""
    outs, lses = make_states(Merge(20, empty=0.0), device)
    for used in (0, 7, 8, 19):
        others = [i for i in range(20) if i != used]
        some, logs = (x.copy() if device is None else x.clone() for x in (outs, lses))
        some[others], logs[others[::2]], logs[others[1::2]] = math.nan, math.inf, -math.inf
        out, lse = merge_states(some, logs)
        assert same_bits(out, outs[used])
        assert same_bits(lse, lses[used])


def test_no_state_has_a_key(device: str | None) -> None:
    for num_states in (1, 2, 9):
        outs, lses = make_states(Merge(num_states, empty=1.0), device)
        out, lse = merge_states(outs, lses)
        assert bool((out == 0).all())
        assert bool((lse == math.inf).all())


@pytest.mark.parametrize("place", [0, 2, 9])
def test_nan_stays(device: str | None, place: int) -> None:
    outs, lses = make_states(Merge(10, empty=0.0, spread=0.1), device)
    outs[place, 1, 0, 2, 5] = math.nan
    lses[place, 0, 3, 0] = math.nan
    out, lse = (to_float64(x) for x in merge_states(outs, lses))
    expected_out, expected_lse = np.zeros(out.shape, bool), np.zeros(lse.shape, bool)
    expected_out[1, 0, 2, 5] = expected_out[0, 0, 3] = expected_lse[0, 3, 0] = True
    np.testing.assert_array_equal(np.isnan(out), expected_out)
    np.testing.assert_array_equal(np.isnan(lse), expected_lse)


def test_nan_stays_alone(device: str | None) -> None:
    """Where every lse is NaN or infinite, the row has no maximum."""
    outs, lses = make_states(Merge(3, empty=0.0), device)
    lses[0], lses[1], lses[2] = math.nan, math.inf, math.nan
    out, lse = (to_float64(x) for x in merge_states(outs, lses))
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cuts", [(0.5,), (0.0, 0.1, 0.1, 0.7), (1.0,)], ids=str)
def test_parts_of_a_cache(device: str | None, cuts: tuple[float, ...], dtype: str) -> None:
    """Decoding page ranges of a request and merging is decoding the request, within the contract."""
    case = make_case(Spec((700, 0, 64, 1, 129), 2, num_heads_q=16, dtype=dtype), device)
    pages = case.block_table.shape[1]
    bounds = [0, *(round(cut * pages) for cut in cuts), pages]
    states = []
    for begin, end in itertools.pairwise(bounds):
        lengths = (case.cache_seqlens - begin * 64).clip(0, (end - begin) * 64)
        states.append(decode(replace(case, block_table=case.block_table[:, begin:end], cache_seqlens=lengths)))
    out, lse = merge_states([out for out, _ in states], [lse for _, lse in states])
    assert_close(out, lse, *decode_reference(case), f"{cuts}, {dtype}")


@pytest.mark.parametrize("name", ["numpy", "torch", "jax.numpy"])
@pytest.mark.parametrize("layout", ["stacked", "list"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_array_libraries(name: str, layout: str, dtype: str) -> None:
    module = pytest.importorskip(name)
    spec = Merge(dtype=dtype)
    outs, lses = make_states(spec, None)

    def array(x: Any) -> Any:
        if name != "torch":
            return module.asarray(x)
        return (
            module.from_numpy(x.view(np.int16)).view(module.bfloat16) if dtype == "bfloat16" else module.from_numpy(x)
        )

    given_outs, given_lses = array(outs), module.from_numpy(lses) if name == "torch" else module.asarray(lses)
    if layout == "list":
        given_outs, given_lses = list(given_outs), list(given_lses)
    out, lse = merge_states(given_outs, given_lses)
    array_type = module.Tensor if name == "torch" else module.ndarray
    assert isinstance(out, array_type)
    assert isinstance(lse, array_type)
    assert str(out.dtype).removeprefix("torch.") == dtype
    results = (x.double().numpy() if name == "torch" else np.asarray(x) for x in (out, lse))
    assert_merged(spec, *results, reference(outs, lses), dtype)


def test_releases_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    """This thread goes on during one long call."""
    monkeypatch.setenv("FLASH_MLA_NUM_THREADS", "1")
    outs, lses = [np.ones((256, 2, 128, 512), np.float32)] * 128, [np.ones((256, 128, 2), np.float32)] * 128
    thread = threading.Thread(target=merge_states, args=(outs, lses))
    interval = sys.getswitchinterval()
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(interval)
        num_turns += 1
    assert num_turns > 10


# On a GPU, on the caller's stream.


@pytest.mark.gpu
@pytest.mark.parametrize("num_states", [3, 20])
def test_replays_in_a_graph(torch: Any, num_states: int) -> None:
    """A captured merge follows new values, also behind decodes that it may overlap with."""
    case = make_case(Spec((500, 0, 65), num_heads_q=16), "cuda")
    spec = Merge(num_states, 3, 1, 16)
    outs, lses = make_states(spec, "cuda")
    outs.nan_to_num_()
    decode(case)
    merge_states(outs, lses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(case, out=outs[1], lse=lses[1])
        out, lse = merge_states(outs, lses)
    for seed in range(5):
        fresh_outs, fresh_lses = make_states(Merge(num_states, 3, 1, 16, seed=seed), "cuda")
        outs.copy_(fresh_outs)
        lses.copy_(fresh_lses)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        assert_merged(spec, out, lse, reference(outs, lses), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["stacked", "list"])
def test_runs_on_the_current_stream(torch: Any, layout: str) -> None:
    outs, lses = make_states(Merge(8, 4, 1, 128), "cuda")
    expected = merge_states(outs, lses)
    late_outs, late_lses = torch.zeros_like(outs), torch.zeros_like(lses)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late_outs.copy_(outs)
        late_lses.copy_(lses)
        states = (late_outs, late_lses) if layout == "stacked" else (list(late_outs), list(late_lses))
        out, lse = merge_states(*states)
        late_outs.zero_()
        late_lses.zero_()
        copies = out.clone(), lse.clone()
        assert all(same_bits(a, b) for a, b in zip(copies, expected, strict=True))


@pytest.mark.gpu
def test_cupy_on_the_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    outs, lses = make_states(Merge(dtype="float16"), None)
    with cupy.cuda.Stream(non_blocking=True):
        out, lse = merge_states(cupy.asarray(outs), list(cupy.asarray(lses)))
        results = cupy.asnumpy(out), cupy.asnumpy(lse)
    assert_merged(Merge(dtype="float16"), *results, reference(outs, lses), "float16")
