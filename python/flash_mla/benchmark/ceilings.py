"""Measures what this GPU gives: HBM read by bulk copies, and MLA's tensor core instructions without loads."""

from __future__ import annotations

from typing import Any

from .. import _C
from ._torch import Tensor, torch
from .machine import ClockMonitor
from .roofline import Ceilings
from .timing import Plan, Timed, time_cold, time_hot

_OPERAND_VALUES = 3 * 64 * 576  # a query tile and two KV tiles
_MAX_SMS = 1024
_ITERATIONS = 400  # about a millisecond


def measure(buffer: Tensor, plan: Plan, monitor: ClockMonitor) -> tuple[Ceilings, dict[str, Any]]:
    """The ceilings, and clock and power while each was measured. ``buffer``: random values, much larger than L2."""
    operands = torch.randn(_OPERAND_VALUES, dtype=torch.bfloat16, device=buffer.device)
    sink = torch.empty(_MAX_SMS, dtype=torch.float32, device=buffer.device)

    def read() -> int:
        return _C.launch_hbm_read(buffer, torch.cuda.current_stream().cuda_stream)

    def multiply() -> float:
        return _C.launch_mma_mix(operands, sink, _ITERATIONS, torch.cuda.current_stream().cuda_stream)

    num_bytes, flops = read(), multiply()
    calls = {"hbm": Timed(lambda _: read(), 1), "mma": Timed(lambda _: multiply(), 1)}
    cold = time_cold(calls, plan)
    hot = time_hot(calls, plan)
    ceilings = Ceilings(
        hbm_tbps=num_bytes / hot["hbm"].microseconds / 1e6,
        mma_tflops=flops / hot["mma"].microseconds / 1e6,
        hbm_tbps_cold=num_bytes / cold["hbm"] / 1e6,
        mma_tflops_cold=flops / cold["mma"] / 1e6,
        source="measured in this run",
    )
    return ceilings, {name: monitor.during(hot[name].bursts) for name in calls}
