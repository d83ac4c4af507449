"""The tests' own tools: the two oracles agree, and assert_close accepts and refuses what it should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import LAYOUTS, Case, NumpyArrays, Spec, make_case
from oracle import assert_close, decode_numpy, decode_torch


def as_numpy(x: Any) -> Any:
    """A CPU tensor as a NumPy array with the same bits."""
    import torch

    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(NumpyArrays.dtype("bfloat16"))
    return x.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_oracles_agree(layout: str, causal: bool, dtype: str) -> None:
    pytest.importorskip("torch")
    spec = Spec((0, 1, 65, 130, -3), 3, 6, 2, causal=causal, dtype=dtype, layout=layout, rising=20.0)
    case = make_case(spec, "cpu")
    arrays = [as_numpy(x) for x in (case.q, case.k_cache, case.block_table, case.cache_seqlens)]
    out, lse = decode_torch(case)
    ref_out, ref_lse = decode_numpy(Case(spec, *arrays))
    np.testing.assert_allclose(out.numpy(), ref_out, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(lse.numpy(), ref_lse, rtol=1e-12)
    some_out, some_lse = decode_torch(case, [3, 0, 2])
    np.testing.assert_allclose(some_out.numpy(), ref_out[[3, 0, 2]], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(some_lse.numpy(), ref_lse[[3, 0, 2]], rtol=1e-12)


def test_one_key_gives_its_value() -> None:
    case = make_case(Spec((1,), num_heads_q=2))
    out, lse = decode_numpy(case)
    key = case.k_cache[case.block_table[0, 0], 0, 0].astype(np.float64)
    np.testing.assert_array_equal(out[0, 0], np.stack([key[:512]] * 2))
    np.testing.assert_allclose(lse[0, :, 0], case.q[0, 0].astype(np.float64) @ key / 24)


def test_dead_cells_are_poisoned() -> None:
    case = make_case(Spec((70, 0, 3), num_heads_k=2, layout="padded"))
    assert np.isnan(case.k_cache.astype(np.float32)).any(axis=(2, 3)).sum() == case.k_cache[..., 0, 0].size - 73
    assert np.isfinite(decode_numpy(case)[0]).all()


@pytest.fixture
def result() -> tuple[Any, Any]:
    return decode_numpy(make_case(Spec((70, 0, 30), num_heads_q=2)))


def test_accepts_the_reference_rounded_to_bfloat16(result: tuple[Any, Any]) -> None:
    out, lse = result
    assert_close(out.astype(NumpyArrays.dtype("bfloat16")), lse.astype(np.float32), out, lse)


@pytest.mark.parametrize("value", [math.nan, math.inf, 10.0])
def test_refuses_one_wrong_value_of_out(result: tuple[Any, Any], value: float) -> None:
    out, lse = result
    wrong = out.copy()
    wrong[0, 0, 1, 7] = value
    with pytest.raises(AssertionError, match=r"the first out\[0, 0, 1, 7\]"):
        assert_close(wrong, lse, out, lse)


def test_refuses_a_small_error_everywhere(result: tuple[Any, Any]) -> None:
    out, lse = result
    with pytest.raises(AssertionError, match="cosine difference"):
        assert_close(out * 1.01, lse, out, lse)


@pytest.mark.parametrize(("request_idx", "value"), [(0, math.nan), (0, math.inf), (0, 9.0), (1, -math.inf), (1, 3.0)])
def test_refuses_one_wrong_value_of_lse(result: tuple[Any, Any], request_idx: int, value: float) -> None:
    out, lse = result
    wrong = lse.copy()
    wrong[request_idx, 1, 0] = value
    with pytest.raises(AssertionError, match=rf"the first lse\[{request_idx}, 1, 0\]"):
        assert_close(out, wrong, out, lse)
