"""Rates of a measured time, and how near they come to what the GPU gives."""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Shape


@dataclass(frozen=True)
class Ceilings:
    """What a GPU gives: reading HBM through bulk copies, and MLA's mix of tensor core instructions without loads."""

    hbm_tbps: float
    mma_tflops: float
    hbm_tbps_cold: float
    mma_tflops_cold: float
    source: str


# Measured hot on one H200 with 132 SMs and a power limit of 700 W: for a run that cannot measure its own.
RECORDED = Ceilings(4.65, 833.0, 4.65, 833.0, "recorded on another H200, 2026-11-23")


def hot_rates(shape: Shape, microseconds: float, ceilings: Ceilings) -> dict[str, float]:
    """TFLOP/s and TB/s of a call, and each in percent of its ceiling."""
    return _rates(shape, microseconds, ceilings.mma_tflops, ceilings.hbm_tbps)


def cold_rates(shape: Shape, microseconds: float, ceilings: Ceilings) -> dict[str, float]:
    """The same against what the GPU gives after a rest."""
    return _rates(shape, microseconds, ceilings.mma_tflops_cold, ceilings.hbm_tbps_cold)


def _rates(shape: Shape, microseconds: float, mma_tflops: float, hbm_tbps: float) -> dict[str, float]:
    tflops = shape.flops / microseconds / 1e6
    tbps = shape.bytes_moved / microseconds / 1e6
    return {
        "us": microseconds,
        "tflops": tflops,
        "tbps": tbps,
        "mma_percent": 100 * tflops / mma_tflops,
        "hbm_percent": 100 * tbps / hbm_tbps,
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
