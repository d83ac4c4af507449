"""The kernels that measure a GPU's ceilings: what they refuse, and on a Hopper GPU that they run and come out sane."""

from __future__ import annotations

from typing import Any

import flash_mla
import hopper
import pytest
from fakes import CPU, CUDA, FakeArray
from flash_mla import _C

OPERANDS = 3 * 64 * 576
PIECE = 16384  # bytes that hbm_read copies at a time


def call(name: str, arguments: tuple[Any, ...]) -> float:
    return getattr(_C, name)(*arguments)  # type: ignore[no-any-return]


def operands(**options: Any) -> FakeArray:
    return FakeArray(**{"shape": (OPERANDS,), "dtype": "bfloat16", **options})


def sink(**options: Any) -> FakeArray:
    return FakeArray(**{"shape": (132,), "dtype": "float32", **options})


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("launch_hbm_read", (operands(dtype="float32"),), TypeError, "buffer: expected dtype bfloat16, got float32"),
        ("launch_hbm_read", (operands(device=(CPU, 0)),), ValueError, "buffer: expected a CUDA device, got the CPU"),
        ("launch_hbm_read", (operands(shape=(64, 576)),), ValueError, "buffer: expected 1 dimension, got 2"),
        ("launch_hbm_read", (operands(shape=(100,)),), ValueError, "buffer: expected at least 8192 values, got 100"),
        ("launch_hbm_read", (operands(strides=(2,)),), ValueError, "buffer: expected stride 1, got 2"),
        ("launch_hbm_read", (operands(offset=2),), ValueError, "buffer: expected 16-byte alignment"),
        ("launch_mma_mix", (operands(dtype="float16"), sink(), 1), TypeError, "operands: expected dtype bfloat16"),
        ("launch_mma_mix", (operands(shape=(9,)), sink(), 1), ValueError, "operands: expected at least 110592 values"),
        ("launch_mma_mix", (operands(), sink(dtype="int32"), 1), TypeError, "sink: expected dtype float32, got int32"),
        ("launch_mma_mix", (operands(), sink(device=(CUDA, 1)), 1), ValueError, "sink: expected device cuda:0"),
        ("launch_mma_mix", (operands(), sink(), 0), ValueError, "iterations: expected 1 to 2147483647, got 0"),
        ("launch_mma_mix", (operands(), sink(), 1 << 31), ValueError, "iterations: expected 1 to 2147483647"),
    ],
)
def test_names_the_wrong_argument(name: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call(name, arguments)


@pytest.mark.skipif(hopper.missing() is None, reason="with a Hopper GPU the call would run")
@pytest.mark.parametrize(
    ("name", "arguments"), [("launch_hbm_read", (operands(),)), ("launch_mma_mix", (operands(), sink(), 1))]
)
def test_says_that_there_is_no_hopper_gpu(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(flash_mla.Unsupported, match=r"Hopper|driver"):
        call(name, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("num_pieces", [1, 131, 132, 133, 132 * 12 + 5])
def test_reads_whole_pieces(torch: Any, num_pieces: int) -> None:
    buffer = torch.zeros(num_pieces * PIECE // 2 + 100, dtype=torch.float16, device="cuda")
    assert call("launch_hbm_read", (buffer,)) == num_pieces * PIECE
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_reaches_what_hopper_gives(torch: Any) -> None:
    """No more than an H200's data sheet, in whatever time: other work may have the GPU, too."""
    buffer = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    sums = torch.full((1024,), float("nan"), device="cuda")
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    for _ in range(3):
        begin.record()
        num_bytes = call("launch_hbm_read", (buffer,))
        middle.record()
        flops = call("launch_mma_mix", (buffer[:OPERANDS], sums, 400))
        end.record()
    torch.cuda.synchronize()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert num_bytes == buffer.nbytes // PIECE * PIECE
    assert flops == num_sms * 400 * 2 * 2 * 64 * 64 * (576 + 512)  # of two blocks, by 64 rows each
    assert num_bytes / begin.elapsed_time(middle) / 1e9 < 4.9
    assert flops / middle.elapsed_time(end) / 1e9 < 1100
    assert bool(sums[:num_sms].isfinite().all())
    assert bool(sums[num_sms:].isnan().all())
