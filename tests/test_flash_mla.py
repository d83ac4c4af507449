"""Tests dense decode and prints what each case takes.

    python tests/test_flash_mla.py      a line per case: ms, TFLOPS and GB/s
    pytest tests/test_flash_mla.py      smaller cases, without times

It runs on a Hopper GPU where there is one (with PyTorch), otherwise on the CPU (with NumPy).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "python"))

import hopper
from cases import HEAD_DIM_QK, HEAD_DIM_V, Case, Spec, make_case, varied_lengths
from checks import check, decode, plan
from oracle import assert_close, decode_reference, decode_torch

DEVICE = "cuda" if hopper.missing() is None else None
CHECKED_REQUESTS = 4  # of each timed case on the GPU: the oracle works in float64


def specs(batch_size: int, lengths: tuple[int, ...], heads: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Spec]:
    """Every length, fixed and varied, number of heads, one and two query tokens."""
    for dtype, length, num_heads_q, seqlen_q, varied in itertools.product(
        dtypes, lengths, heads, (1, 2), (False, True)
    ):
        yield Spec(
            lengths=varied_lengths(batch_size, length, seed=length, zeros=False) if varied else (length,) * batch_size,
            seqlen_q=seqlen_q,
            num_heads_q=num_heads_q,
            causal=seqlen_q > 1,
            dtype=dtype,
        )


@pytest.mark.parametrize("spec", list(specs(5, (100, 300), (1, 16, 64), ("bfloat16", "float16"))), ids=str)
def test_flash_mla(spec: Spec) -> None:
    if DEVICE is not None:
        pytest.importorskip("torch")
    check(make_case(spec, DEVICE))


def main() -> None:
    print("on the GPU" if DEVICE else f"on the CPU ({hopper.missing()})")
    print(f"{'case':<66} {'ms':>9} {'TFLOPS':>8} {'GB/s':>7}")
    if DEVICE:
        cases = specs(128, (4096, 8192, 16384), (16, 32, 64, 128), ("bfloat16",))
    else:
        cases = specs(2, (256, 1024), (16, 128), ("bfloat16", "float16"))
    for spec in cases:
        case = make_case(spec, DEVICE)
        verify(case)
        seconds = timed(case)
        varied = "varied" if len(set(spec.lengths)) > 1 else "fixed"
        name = (
            f"batch {spec.batch_size}, {varied} {sum(spec.lengths) // spec.batch_size} tokens, s_q {spec.seqlen_q}, "
            f"{spec.num_heads_q} heads, {spec.dtype}"
        )
        rates = f"{flops(spec) / seconds / 1e12:8.2f} {bytes_moved(spec) / seconds / 1e9:7.1f}"
        print(f"{name:<66} {seconds * 1e3:9.3f} {rates}", flush=True)


def verify(case: Case) -> None:
    """Against the oracle, on the GPU for some requests; no result is NaN. (A causal row with no key has lse +inf.)"""
    out, lse = decode(case, **plan(case))
    if DEVICE is None:
        assert_close(out, lse, *decode_reference(case), case.spec)
        return
    assert not bool(out.isnan().any() | lse.isnan().any()), f"a result is NaN: {case.spec}"
    some = list(range(0, case.spec.batch_size, case.spec.batch_size // CHECKED_REQUESTS))
    assert_close(out[some], lse[some], *decode_torch(case, some), case.spec)


def timed(case: Case) -> float:
    """Seconds per call, the metadata given: the median of several."""
    metadata = plan(case)

    def call() -> None:
        decode(case, **metadata)

    return timed_on_gpu(call) if DEVICE else timed_on_cpu(call)


def timed_on_cpu(call: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def timed_on_gpu(call: Callable[[], None]) -> float:
    import torch

    for _ in range(5):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(float(events[i].elapsed_time(events[i + 1])) for i in range(30)) / 1e3


def flops(spec: Spec) -> float:
    return 2.0 * spec.seqlen_q * spec.num_heads_q * sum(spec.lengths) * (HEAD_DIM_QK + HEAD_DIM_V)


def bytes_moved(spec: Spec) -> float:
    """KV once, q and out."""
    rows = spec.batch_size * spec.seqlen_q * spec.num_heads_q
    return 2.0 * (sum(spec.lengths) * spec.num_heads_k * HEAD_DIM_QK + rows * (HEAD_DIM_QK + HEAD_DIM_V))


if __name__ == "__main__":
    main()
