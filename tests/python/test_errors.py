"""Every mistake is an error that names the argument, before anything runs. No GPU is needed to say so.

Arrays that claim to lie on a GPU have no memory: whatever looked at their values would crash.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import flash_mla
import hopper
import ml_dtypes
import numpy as np
import pytest
from cases import Spec, make_case
from fakes import CPU, CUDA, FakeArray
from flash_mla import _C, flash_mla_with_kvcache, get_mla_metadata

BATCH, SEQLEN_Q, HEADS_Q, HEADS_K, PAGES, PAGE_SIZE, MAX_PAGES = 2, 3, 8, 2, 5, 64, 4
PLAN = {"tile_scheduler_metadata": ((7, 8), "int32"), "num_splits": ((BATCH + 1,), "int32")}
OPTIONAL = tuple(PLAN)
SWAPPED_BFLOAT16 = np.dtype(ml_dtypes.bfloat16).newbyteorder(">")


@dataclass(frozen=True)
class Mistake:
    """One argument gone wrong: how its array is made, or another value for it."""

    argument: str
    error: type[Exception]
    message: str
    array: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    with_plan: bool = False


def shape(argument: str, *extents: int, message: str = "shape", **more: Any) -> Mistake:
    return Mistake(argument, ValueError, message, {"shape": extents}, **more)


def dtype(argument: str, name: str, **more: Any) -> Mistake:
    return Mistake(argument, TypeError, rf"dtype.*got {name}", {"dtype": name}, **more)


def strides(argument: str, *steps: int, message: str) -> Mistake:
    return Mistake(argument, ValueError, message, {"strides": steps})


def option(argument: str, value: Any, error: type[Exception], message: str) -> Mistake:
    return Mistake(argument, error, message, value=value)


MISTAKES = [
    shape("q", BATCH, HEADS_Q, 576),
    shape("q", BATCH, SEQLEN_Q, HEADS_Q, 512),
    shape("q", BATCH, SEQLEN_Q, 0, 576, message="num_heads_q"),
    shape("q", 1, BATCH, SEQLEN_Q, HEADS_Q, 576),
    shape("q", 1, 1, BATCH, SEQLEN_Q, HEADS_Q, 576, message="1 to 5 dimensions, got 6"),
    shape("q", message="1 to 5 dimensions, got 0"),
    shape("k_cache", PAGES, PAGE_SIZE, 576),
    shape("k_cache", PAGES, PAGE_SIZE, HEADS_K, 575),
    shape("k_cache", PAGES, 48, HEADS_K, 576, message="power of two.*got 48"),
    shape("k_cache", PAGES, 0, HEADS_K, 576, message="page_size"),
    shape("k_cache", PAGES, PAGE_SIZE, 0, 576, message="num_heads_k"),
    shape("k_cache", PAGES, PAGE_SIZE, 3, 576, message="divides num_heads_q 8, got 3"),
    shape("block_table", BATCH + 1, MAX_PAGES),
    shape("block_table", BATCH),
    shape("cache_seqlens", BATCH, 1),
    shape("cache_seqlens", BATCH + 1),
    shape("out", BATCH, SEQLEN_Q, HEADS_Q, 576),
    shape("out", BATCH, HEADS_Q, SEQLEN_Q, 512),
    shape("lse", BATCH, SEQLEN_Q, HEADS_Q),
    shape("tile_scheduler_metadata", 7, 5, with_plan=True),
    shape("tile_scheduler_metadata", 0, 8, message="num_sm_parts", with_plan=True),
    shape("num_splits", BATCH, with_plan=True),
    dtype("q", "float32"),
    dtype("k_cache", "float16"),
    dtype("k_cache", "uint8"),
    dtype("block_table", "int64"),
    dtype("cache_seqlens", "int64"),
    dtype("out", "float32"),
    dtype("lse", "float64"),
    dtype("lse", "bfloat16"),
    dtype("tile_scheduler_metadata", "int64", with_plan=True),
    dtype("num_splits", "float32", with_plan=True),
    strides("q", 1, 2, 6, 48, message="contiguous last dimension"),
    strides("q", 24 * 576, 8 * 576, -576, 1, message="strides of at least 0"),
    strides("k_cache", 2 * 64 * 576, 2 * 576, 1, 2, message="contiguous last dimension"),
    strides("block_table", 2 * MAX_PAGES, 2, message="contiguous last dimension"),
    strides("cache_seqlens", 2, message="contiguous array"),
    strides("out", 24 * 1024, 8 * 1024, 1024, 2, message="contiguous last dimension"),
    strides("out", 0, 8 * 512, 512, 1, message="keep its elements apart"),
    strides("lse", 0, 3, 1, message="keep its elements apart"),
    option("softmax_scale", 0.0, ValueError, "finite number above 0, got 0"),
    option("softmax_scale", -1.0, ValueError, "finite number above 0, got -1"),
    option("softmax_scale", float("nan"), ValueError, "finite number above 0, got -?nan"),
    option("softmax_scale", float("inf"), ValueError, "finite number above 0, got inf"),
    *(
        option(name, [1, 2], TypeError, "supports DLPack, got list")
        for name in ("q", "k_cache", "block_table", "cache_seqlens", "out", "lse", *OPTIONAL)
    ),
    option("q", None, TypeError, "supports DLPack, got NoneType"),
    Mistake("lse", TypeError, "float32, got an unknown dtype", {"lanes": 2}),
    Mistake("q", ValueError, "DLPack device type 10", {"device": (10, 0)}),
    Mistake("q", ValueError, "DLPack version 1, got 2", {"version": 2}),
]

# Only a GPU wants rows that its copy engine can take.
MISALIGNED = [
    strides("q", 24 * 580, 8 * 580, 580, 1, message="strides that are multiples of 8 elements"),
    strides("k_cache", 2 * 64 * 577, 2 * 577, 577, 1, message="strides that are multiples of 8 elements"),
    strides("out", 24 * 516, 8 * 516, 516, 1, message="strides that are multiples of 8 elements"),
    *(Mistake(name, ValueError, "address that is a multiple of 16", {"offset": 8}) for name in ("q", "k_cache", "out")),
]


def arguments(device: tuple[int, int], mistake: Mistake | None = None, with_plan: bool = False) -> dict[str, Any]:
    """Arguments of _C.dense_decode, one of them wrong."""
    arrays: dict[str, tuple[tuple[int, ...], str]] = {
        "q": ((BATCH, SEQLEN_Q, HEADS_Q, 576), "bfloat16"),
        "k_cache": ((PAGES, PAGE_SIZE, HEADS_K, 576), "bfloat16"),
        "block_table": ((BATCH, MAX_PAGES), "int32"),
        "cache_seqlens": ((BATCH,), "int32"),
        "out": ((BATCH, SEQLEN_Q, HEADS_Q, 512), "bfloat16"),
        "lse": ((BATCH, HEADS_Q, SEQLEN_Q), "float32"),
        **(PLAN if with_plan or (mistake is not None and mistake.with_plan) else {}),
    }
    call: dict[str, Any] = {"tile_scheduler_metadata": None, "num_splits": None, "softmax_scale": 0.04, "causal": True}
    for name, (extents, element) in arrays.items():
        made: dict[str, Any] = {"shape": extents, "dtype": element, "device": device}
        call[name] = FakeArray(**(made | mistake.array if mistake and mistake.argument == name else made))
    if mistake is not None and not mistake.array:
        call[mistake.argument] = mistake.value
    return call


def describe(mistake: Mistake) -> str:
    return f"{mistake.argument}-{mistake.array or mistake.value}"


@pytest.mark.parametrize("device", [(CPU, 0), (CUDA, 0), (CUDA, 3)], ids=["cpu", "cuda:0", "cuda:3"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=describe)
def test_names_the_wrong_argument(mistake: Mistake, device: tuple[int, int]) -> None:
    with pytest.raises(mistake.error, match=rf"^{mistake.argument}: .*{mistake.message}"):
        _C.dense_decode(**arguments(device, mistake))


@pytest.mark.parametrize("mistake", MISALIGNED, ids=describe)
def test_names_the_misaligned_argument(mistake: Mistake) -> None:
    with pytest.raises(mistake.error, match=rf"^{mistake.argument}: .*{mistake.message}"):
        _C.dense_decode(**arguments((CUDA, 0), mistake))


@pytest.mark.parametrize("name", ["k_cache", "block_table", "cache_seqlens", "out", "lse", *OPTIONAL])
@pytest.mark.parametrize("other", [(CPU, 0), (CUDA, 1)], ids=["cpu", "cuda:1"])
def test_names_the_array_on_another_device(name: str, other: tuple[int, int]) -> None:
    mistake = Mistake(name, ValueError, "device cuda:0 as q, got", {"device": other}, with_plan=True)
    with pytest.raises(ValueError, match=rf"^{name}: .*{mistake.message}"):
        _C.dense_decode(**arguments((CUDA, 0), mistake))


@pytest.mark.parametrize("name", OPTIONAL)
def test_wants_both_parts_of_a_plan(name: str) -> None:
    other = next(part for part in OPTIONAL if part != name)
    with pytest.raises(ValueError, match=rf"^{name}: .*both parts"):
        _C.dense_decode(**arguments((CUDA, 0), with_plan=True) | {name: None, other: FakeArray(*PLAN[other])})


@pytest.mark.skipif(hopper.missing() is None, reason="with a Hopper GPU the call would run")
@pytest.mark.parametrize("with_plan", [False, True], ids=["no plan", "plan"])
@pytest.mark.parametrize("device", [(CUDA, 0), (CUDA, 3)], ids=["cuda:0", "cuda:3"])
def test_says_that_there_is_no_hopper_gpu(device: tuple[int, int], with_plan: bool) -> None:
    with pytest.raises(flash_mla.Unsupported, match=r"Hopper|driver"):
        _C.dense_decode(**arguments(device, with_plan=with_plan))


@pytest.mark.skipif(hopper.missing() is None, reason="with a Hopper GPU the call would run")
def test_says_that_there_is_no_hopper_gpu_to_plan_on() -> None:
    with pytest.raises(flash_mla.Unsupported, match=r"Hopper|driver"):
        _C.dense_decode_num_sm_parts(FakeArray((4,), "int32"), 16, 1)


@pytest.mark.parametrize(
    "mistake",
    [
        shape("cache_seqlens", BATCH, 1),
        dtype("cache_seqlens", "int64"),
        shape("tile_scheduler_metadata", 7, 5),
        dtype("tile_scheduler_metadata", "int64"),
        shape("num_splits", BATCH),
        dtype("num_splits", "int64"),
        Mistake("num_splits", ValueError, "device", {"device": (CUDA, 1)}),
    ],
    ids=describe,
)
def test_names_the_wrong_array_of_a_plan(mistake: Mistake) -> None:
    arrays = {"cache_seqlens": ((BATCH,), "int32"), **PLAN}
    made = {name: {"shape": extents, "dtype": element} for name, (extents, element) in arrays.items()}
    made[mistake.argument] |= mistake.array
    with pytest.raises(mistake.error, match=rf"^{mistake.argument}: .*{mistake.message}"):
        _C.plan_dense_decode(
            **{name: FakeArray(**options) for name, options in made.items()}, num_q_tokens_per_head_k=1
        )


# The public functions, on the CPU.


@pytest.fixture
def call() -> dict[str, Any]:
    return {**make_case(Spec(lengths=(70, 5), dtype="float16", num_heads_q=4)).arguments()}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("head_dim_v", 576, ValueError, "expected 512, got 576"),
        ("head_dim_v", np.array([512, 512]), TypeError, "expected an integer, got ndarray"),
        ("softmax_scale", "0.04", TypeError, "expected a number, got str"),
        ("softmax_scale", True, TypeError, "expected a number, got bool"),
        ("softmax_scale", np.bool_(True), TypeError, "expected a number, got bool"),
        ("causal", "no", TypeError, "expected a bool, got str"),
        ("is_fp8_kvcache", b"", TypeError, "expected a bool, got bytes"),
        ("tile_scheduler_metadata", (None, None), TypeError, "expected an array or a FlashMLASchedMeta, got tuple"),
        ("softmax_scale", 10**400, ValueError, "finite number above 0, got inf"),
        ("causal", np.array([True, False]), TypeError, "expected a bool, got ndarray"),
        ("is_fp8_kvcache", np.array([False, False]), TypeError, "expected a bool, got ndarray"),
        ("softmax_scale", -0.5, ValueError, "above 0"),
        ("q", [[1.0]], TypeError, "array of PyTorch, CuPy, JAX or NumPy, got list"),
        ("q", np.dtype(np.float16), TypeError, "array of PyTorch, CuPy, JAX or NumPy, got "),
        ("q", np.zeros((2, 576), np.float16), ValueError, r"expected shape .*got \(2, 576\)"),
        *(
            ("q", np.zeros((2, 1, 4, 576)).astype(dtype), TypeError, "expected dtype bfloat16 or float16, got")
            for dtype in (ml_dtypes.float8_e4m3fn, object, np.longdouble)
        ),
        ("q", np.zeros((2, 1, 4, 576), ">f2"), ValueError, "cannot be read through DLPack"),
        ("q", np.zeros((2, 1, 4, 576), SWAPPED_BFLOAT16), ValueError, "cannot be read through DLPack"),
        ("out", np.zeros((2, 1, 4, 512), SWAPPED_BFLOAT16), ValueError, "cannot be read through DLPack"),
        (
            "k_cache",
            np.zeros((2, 64, 1, 576), ml_dtypes.float8_e4m3fn),
            TypeError,
            "expected dtype float16 as q, got float8_e4m3fn",
        ),
        ("k_cache", None, TypeError, "got NoneType"),
        ("block_table", [[0]], TypeError, "got list"),
        ("cache_seqlens", np.array([70.0, 5.0]), TypeError, "int32"),
        ("out", "there", TypeError, "got str"),
        ("out", SimpleNamespace(requires_grad=True), TypeError, "array of PyTorch, CuPy, JAX or NumPy, got SimpleNam"),
        ("out", np.zeros((2, 1, 4, 576), np.float16), ValueError, "shape"),
        ("lse", np.zeros((2, 1, 4), np.float32), ValueError, "shape"),
        ("lse", np.zeros((2, 4, 1), ">f4"), ValueError, "DLPack"),
        ("num_splits", np.zeros(3, np.int32), ValueError, "plan"),
        ("is_fp8_kvcache", True, RuntimeError, "only dense attention"),
        *(
            (name, np.zeros(1, np.int32), RuntimeError, "only dense attention")
            for name in (
                "indices",
                "attn_sink",
                "extra_k_cache",
                "extra_indices_in_kvcache",
                "topk_length",
                "extra_topk_length",
            )
        ),
    ],
)
def test_flash_mla_with_kvcache_names_the_argument(
    call: dict[str, Any], name: str, value: Any, error: type[Exception], message: str
) -> None:
    named = "tile_scheduler_metadata" if name == "num_splits" else name
    with pytest.raises(error, match=rf"^{named}: .*{message}"):
        flash_mla_with_kvcache(**call | {name: value})


def test_refuses_a_plan_beside_a_sched_meta(call: dict[str, Any]) -> None:
    meta, _ = get_mla_metadata()
    with pytest.raises(ValueError, match=r"^num_splits: expected None"):
        flash_mla_with_kvcache(**call, tile_scheduler_metadata=meta, num_splits=np.zeros(3, np.int32))


def test_refuses_a_sched_meta_of_another_step(call: dict[str, Any]) -> None:
    meta, _ = get_mla_metadata()
    flash_mla_with_kvcache(**call, tile_scheduler_metadata=meta)
    other = make_case(Spec(lengths=(70, 5), dtype="float16", num_heads_q=8)).arguments()
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata: .*\(2, 1, 4, 1\), got \(2, 1, 8, 1\)"):
        flash_mla_with_kvcache(**other, tile_scheduler_metadata=meta)


def test_leaves_a_sched_meta_empty_after_an_error(call: dict[str, Any]) -> None:
    meta, _ = get_mla_metadata()
    with pytest.raises(ValueError, match=r"^k_cache"):
        flash_mla_with_kvcache(**call | {"k_cache": call["k_cache"][:, :63]}, tile_scheduler_metadata=meta)
    assert not meta.have_initialized
    flash_mla_with_kvcache(**call, tile_scheduler_metadata=meta)
    assert meta.have_initialized


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_q_tokens_per_head_k": 0}, ValueError, "^num_q_tokens_per_head_k: expected at least 1, got 0"),
        ({"num_heads_k": 0}, ValueError, "^num_heads_k: expected at least 1, got 0"),
        ({"num_heads_k": None}, TypeError, "^num_heads_k: expected an integer, got NoneType"),
        ({"num_q_tokens_per_head_k": 1.5}, TypeError, "^num_q_tokens_per_head_k: expected an integer, got float"),
        ({"num_q_tokens_per_head_k": np.array([16])}, TypeError, "^num_q_tokens_per_head_k: .*integer, got ndarray"),
        ({"num_heads_k": 2**63}, ValueError, "^num_heads_k: expected an integer of 64 bits, got one of 65"),
        ({"num_heads_k": -(2**63)}, ValueError, "^num_heads_k: expected at least 1"),
        ({"num_heads_per_head_k": 16}, TypeError, "^num_heads_per_head_k: .*got both"),
        ({"cache_seqlens": [1, 2]}, TypeError, "^cache_seqlens: expected an array"),
        ({"cache_seqlens": np.zeros((2, 2), np.int32)}, ValueError, "^cache_seqlens: expected shape"),
        ({"cache_seqlens": np.zeros(2, np.int64)}, TypeError, "^cache_seqlens: expected dtype int32, got int64"),
        ({"is_fp8_kvcache": True}, RuntimeError, "^is_fp8_kvcache: .*bfloat16 and float16"),
        ({"is_fp8_kvcache": np.zeros(2)}, TypeError, "^is_fp8_kvcache: expected a bool, got ndarray"),
        ({"topk": 2048}, RuntimeError, "^topk: only dense attention"),
        ({"topk": 2048, "cache_seqlens": None}, RuntimeError, "^topk: only dense attention"),
        ({"is_fp8_kvcache": True, "cache_seqlens": None}, RuntimeError, "^is_fp8_kvcache: .*bfloat16 and float16"),
    ],
    ids=str,
)
def test_get_mla_metadata_names_the_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"cache_seqlens": np.zeros(2, np.int32), "num_q_tokens_per_head_k": 16, "num_heads_k": 1}
    with pytest.raises(error, match=message):
        get_mla_metadata(**good | options)
