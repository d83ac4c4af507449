"""The demo: decode a paged batch of requests of different lengths and hold the results against a float64 oracle."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import cuda, reference
from .decode import flash_mla_with_kvcache

_SOFTMAX_SCALE = 576**-0.5
_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_NUM_TIMED_CALLS = 5

# Standard deviations of the random values: logits of about 0.25, and V small beside the absolute bound.
_Q_STD, _KV_STD = 5.0, 0.05


_Arrays: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class Case:
    """A batch to decode."""

    name: str
    seqlens_k: tuple[int, ...]
    seqlen_q: int = 1
    num_heads_q: int = 16
    num_heads_k: int = 1
    page_size: int = 64
    dtype: str = "bfloat16"
    causal: bool = False


CASES = (
    Case("one request", (300,)),
    Case("variable lengths", (1, 64, 65, 700)),
    Case("empty requests", (0, 130, 0, 17), dtype="float16"),
    Case("2 queries, causal", (1, 200, 333), seqlen_q=2, causal=True),
    Case("128 heads", (90, 150), num_heads_q=128),
    Case("3 KV heads", (120, 77), num_heads_q=6, num_heads_k=3, dtype="float16"),
    Case("pages of 256", (257, 600), page_size=256),
)


@dataclass(frozen=True)
class Result:
    """How a case went. Errors are the largest absolute ones; times are medians."""

    case: Case
    error_out: float
    error_lse: float
    cosine_difference: float
    milliseconds: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """How all cases went, and on what."""

    runs_on: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Backend:
    """Where the cases run, and the way there and back."""

    runs_on: str
    from_numpy: Callable[[NDArray[Any]], Any]
    to_numpy: Callable[[Any], NDArray[Any]]
    synchronize: Callable[[], None]


def run() -> Report:
    """Run all cases: on a Hopper GPU if there is one and PyTorch or CuPy to reach it, else on the CPU."""
    backend = choose_backend()
    random = np.random.default_rng(0)
    return Report(backend.runs_on, tuple(_run_case(case, backend, random) for case in CASES))


def choose_backend() -> Backend:
    """The GPU through PyTorch or CuPy, or the CPU through NumPy."""
    hopper = next((gpu for gpu in cuda.gpus() if gpu.is_hopper), None)
    if hopper is None:
        return _numpy_backend("CPU (no Hopper GPU found)")
    for make_backend in (_torch_backend, _cupy_backend):
        if (backend := make_backend(hopper)) is not None:
            return backend
    return _numpy_backend(f"CPU ({hopper.name} found, but neither PyTorch with CUDA nor CuPy to reach it)")


def _numpy_backend(runs_on: str) -> Backend:
    return Backend(runs_on, lambda array: array, lambda array: array, lambda: None)


def _torch_backend(gpu: cuda.Gpu) -> Backend | None:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def from_numpy(array: NDArray[Any]) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda(gpu.index)
        return torch.from_numpy(array).cuda(gpu.index)

    def to_numpy(tensor: Any) -> NDArray[Any]:
        result: NDArray[Any] = tensor.float().cpu().numpy()
        return result

    return Backend(f"{gpu.name}, through PyTorch", from_numpy, to_numpy, lambda: torch.cuda.synchronize(gpu.index))


def _cupy_backend(gpu: cuda.Gpu) -> Backend | None:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return None
    device = cupy.cuda.Device(gpu.index)

    def from_numpy(array: NDArray[Any]) -> Any:
        with device:
            return cupy.asarray(array)

    return Backend(f"{gpu.name}, through CuPy", from_numpy, cupy.asnumpy, device.synchronize)


def _run_case(case: Case, backend: Backend, random: np.random.Generator) -> Result:
    arrays = _make_arrays(case, random)
    q, k_cache, block_table, cache_seqlens = map(backend.from_numpy, arrays)

    def call() -> tuple[Any, Any]:
        results = flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, 512, softmax_scale=_SOFTMAX_SCALE, causal=case.causal
        )
        backend.synchronize()
        return results

    out, lse = (backend.to_numpy(result).astype(np.float64) for result in call())
    milliseconds = statistics.median(_time(call) for _ in range(_NUM_TIMED_CALLS))
    expected_out, expected_lse = reference.dense_decode(*arrays, softmax_scale=_SOFTMAX_SCALE, causal=case.causal)
    difference = _cosine_difference(out, expected_out)
    return Result(
        case=case,
        error_out=float(np.abs(out - expected_out).max()),
        error_lse=float(_absolute_error(lse, expected_lse).max()),
        cosine_difference=difference,
        milliseconds=milliseconds,
        passed=difference < reference.OUT_COSINE
        and _is_close(out, expected_out, reference.OUT_ABSOLUTE, reference.OUT_RELATIVE)
        and _is_close(lse, expected_lse, reference.LSE_ABSOLUTE, reference.LSE_RELATIVE),
    )


def _make_arrays(case: Case, random: np.random.Generator) -> _Arrays:
    """q, k_cache, block_table and cache_seqlens, with pages in random order and NaN wherever no token lies."""
    dtype = _DTYPES[case.dtype]
    batch_size = len(case.seqlens_k)
    num_pages = [-(-seqlen_k // case.page_size) for seqlen_k in case.seqlens_k]
    q = _normal(random, (batch_size, case.seqlen_q, case.num_heads_q, 576), _Q_STD).astype(dtype)
    k_cache = np.full((sum(num_pages), case.page_size, case.num_heads_k, 576), np.nan, dtype)
    block_table = np.full((batch_size, max(num_pages)), -1, np.int32)
    free_pages = iter(random.permutation(sum(num_pages)))
    for request, seqlen_k in enumerate(case.seqlens_k):
        for index in range(num_pages[request]):
            page = block_table[request, index] = next(free_pages)
            num_tokens = min(seqlen_k - index * case.page_size, case.page_size)
            k_cache[page, :num_tokens] = _normal(random, (num_tokens, case.num_heads_k, 576), _KV_STD).astype(dtype)
    return q, k_cache, block_table, np.array(case.seqlens_k, np.int32)


def _normal(random: np.random.Generator, shape: tuple[int, ...], std: float) -> NDArray[np.float64]:
    return random.standard_normal(shape) * std


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _absolute_error(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """|actual - expected|, and 0 where both are the same infinity."""
    error = np.zeros_like(expected)
    np.subtract(actual, expected, out=error, where=actual != expected)
    return np.abs(error)


def _is_close(actual: NDArray[np.float64], expected: NDArray[np.float64], absolute: float, relative: float) -> bool:
    error = _absolute_error(actual, expected)
    return bool(np.all((error <= absolute) | (error <= relative * np.abs(np.where(error == 0, 0, expected)))))


def _cosine_difference(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """1 - 2 (a.b) / (a.a + b.b): 0 for equal arrays."""
    norms = float((actual * actual + expected * expected).sum())
    return 0.0 if norms == 0 else 1 - 2 * float((actual * expected).sum()) / norms
