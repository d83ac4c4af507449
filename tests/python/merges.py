"""Builds states to merge, merges them in float64, and holds results against that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import HEAD_DIM_V, NumpyArrays, TorchArrays

DTYPES = ("bfloat16", "float16", "float32")
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
SMALLEST = {"bfloat16": 0.0, "float16": 2.0**-24, "float32": 0.0}  # subnormal
LAYOUTS = ("stacked", "strided", "list", "list of strided")


@dataclass(frozen=True)
class Merge:
    """States to merge, by their shapes."""

    num_states: int = 3
    batch_size: int = 2
    seqlen_q: int = 1
    num_heads_q: int = 4
    dtype: str = "bfloat16"
    out_dtype: str | None = None  # of the caller's own result; default: as dtype
    layout: str = "stacked"
    lse_layout: str = "stacked"
    empty: float = 0.3  # share of rows of a state that have no key
    spread: float = 3.0  # standard deviation of lse
    shift: float = 0.0  # its mean
    seed: int = 0

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.batch_size, self.seqlen_q, self.num_heads_q, HEAD_DIM_V

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return self.batch_size, self.num_heads_q, self.seqlen_q


def make_states(spec: Merge, device: str | None) -> tuple[Any, Any]:
    """outs and lses, as merge_states takes them. Rows without a key have NaN as their out."""
    arrays: Any = NumpyArrays(spec.seed) if device is None else TorchArrays(spec.seed, device)
    rng = np.random.default_rng(spec.seed)
    lse = rng.normal(spec.shift, spec.spread, (spec.num_states, *spec.lse_shape)).astype(np.float32)
    without_key = rng.random(lse.shape) < spec.empty
    lse[without_key] = rng.choice(np.array([math.inf, -math.inf], np.float32), lse.shape)[without_key]
    out = arrays.normal((spec.num_states, *spec.out_shape), 1.0, spec.dtype)
    out[arrays.array(without_key.swapaxes(2, 3).copy())] = math.nan
    return lay_out(arrays, out, spec.dtype, spec.layout), lay_out(arrays, arrays.array(lse), "float32", spec.lse_layout)


def lay_out(arrays: Any, stacked: Any, dtype: str, layout: str) -> Any:
    """The states in another layout: padded with NaN, as a list, or a list whose arrays have strides of their own."""
    if layout == "stacked":
        return stacked
    if layout == "list":
        return list(stacked)
    if layout == "strided":
        padded = arrays.nans(
            [stacked.shape[0], *(extent + 1 for extent in stacked.shape[1:-1]), stacked.shape[-1] + 8], dtype
        )
        view = padded[(slice(None), *(slice(1, None) for _ in stacked.shape[1:-1]), slice(8, None))]
        view[...] = stacked
        return view
    states = []
    for index, state in enumerate(stacked):
        swapped = list(state.shape)
        axes = (0, 1) if index % 2 else (1, 2) if state.ndim == 4 else (0, 2)
        swapped[axes[0]], swapped[axes[1]] = state.shape[axes[1]], state.shape[axes[0]]
        view = arrays.nans(swapped, dtype).swapaxes(*axes)
        view[...] = state
        states.append(view)
    return tuple(states)


def to_float64(states: Any) -> Any:
    """States of any library and layout, stacked."""
    if isinstance(states, (list, tuple)):
        return np.stack([to_float64(state) for state in states])
    return np.asarray(states if isinstance(states, np.ndarray) else states.double().cpu()).astype(np.float64)


def reference(outs: Any, lses: Any) -> tuple[Any, Any, Any]:
    """(out, lse, sum of w * |out|) in float64."""
    outs, lses = to_float64(outs), to_float64(lses)
    logs = np.where(np.isinf(lses), -math.inf, lses)
    top = np.where(np.isnan(logs), -math.inf, logs).max(0)
    top = np.where(top == -math.inf, 0.0, top)
    weights = np.exp(logs - top)
    total = weights.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.where(total == 0, math.inf, top + np.log(total))
        weights = np.where(total == 0, 0.0, weights / total)
    weights = weights.swapaxes(2, 3)[..., None]
    counts = np.where(np.isinf(lses), False, True).swapaxes(2, 3)[..., None]
    weighted = weights * np.where(counts, outs, 0.0)
    return weighted.sum(0), lse, abs(weighted).sum(0)


def assert_merged(spec: Merge, out: Any, lse: Any, expected: tuple[Any, Any, Any], dtype: str) -> None:
    ref_out, ref_lse, magnitude = expected
    out, lse = to_float64(out), to_float64(lse)
    assert out.shape == spec.out_shape
    assert lse.shape == spec.lse_shape
    allowed = EPSILON[dtype] * abs(ref_out) + 2e-6 * magnitude + SMALLEST[dtype]
    np.testing.assert_array_less(abs(out - ref_out), np.nextafter(allowed, math.inf), f"out: {spec}")
    finite = np.isfinite(ref_lse)
    np.testing.assert_array_equal(lse[~finite], ref_lse[~finite], f"lse: {spec}")
    np.testing.assert_allclose(lse[finite], ref_lse[finite], 1e-6, 1e-6, err_msg=f"lse: {spec}")
