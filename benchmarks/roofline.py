"""Rates of a measured time, and how near they come to what an H200 gives."""

from __future__ import annotations

from shapes import Shape

# Measured on one H200 with 132 SMs and a power limit of 700 W: HBM read through bulk copies, and MLA's mix of tensor
# core instructions without loads, both hot.
HBM_TBPS = 4.65
MMA_TFLOPS = 833.0


def rates(shape: Shape, microseconds: float) -> dict[str, float]:
    """TFLOP/s and TB/s of a call, and each in percent of its ceiling."""
    tflops = shape.flops / microseconds / 1e6
    tbps = shape.bytes_moved / microseconds / 1e6
    return {
        "us": microseconds,
        "tflops": tflops,
        "tbps": tbps,
        "mma_percent": 100 * tflops / MMA_TFLOPS,
        "hbm_percent": 100 * tbps / HBM_TBPS,
    }


def figure(shape: Shape, measured: dict[str, float]) -> float:
    """What counts for the shape: the rate, or the time, in its unit."""
    return measured[{"TFLOP/s": "tflops", "TB/s": "tbps", "us": "us"}[shape.unit]]


def ratios(shape: Shape, hot: dict[str, float], cold: dict[str, float]) -> dict[str, float | None]:
    """How many times as fast as the shape's reference, hot and cold; None where there is none."""
    if shape.reference is None:
        return {"hot": None, "cold": None}
    return {
        "hot": _ratio(shape, hot, shape.reference.hot),
        "cold": None if shape.reference.cold is None else _ratio(shape, cold, shape.reference.cold),
    }


def _ratio(shape: Shape, measured: dict[str, float], reference: float) -> float:
    ours = figure(shape, measured)
    return reference / ours if shape.unit == "us" else ours / reference
