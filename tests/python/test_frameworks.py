"""Each array library in, the same one out: on the CPU, and on the caller's stream of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import Case, Spec, make_case
from flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, frameworks, get_mla_metadata
from oracle import assert_close, decode_numpy

SPEC = Spec(lengths=(0, 70, 129), seqlen_q=2, num_heads_q=6, num_heads_k=3, causal=True)
GPU_SPEC = Spec(lengths=(4096, 1, 0, 700), seqlen_q=2, num_heads_q=32, causal=True)
NUM_Q_TOKENS, NUM_HEADS_K = 4, 3


class Library:
    """An array library on the CPU."""

    def __init__(self, name: str) -> None:
        self.module = pytest.importorskip(name)
        self.name = name

    def array(self, array: Any) -> Any:
        if self.name == "torch":
            return from_numpy_to_torch(self.module, array)
        return self.module.asarray(array)

    def to_numpy(self, array: Any) -> Any:
        return (array.float().numpy() if self.name == "torch" else np.asarray(array)).astype(np.float64)

    @property
    def array_type(self) -> Any:
        return self.module.Tensor if self.name == "torch" else self.module.ndarray


def from_numpy_to_torch(torch: Any, array: Any) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture(params=["numpy", "torch", "jax.numpy"])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


@pytest.fixture(params=["bfloat16", "float16"])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(Spec(**{**vars(SPEC), "dtype": request.param}))


def call(library: Library, case: Case, *plan: Any, **options: Any) -> tuple[Any, Any]:
    arrays = [library.array(array) for array in (case.q, case.k_cache, case.block_table, case.cache_seqlens)]
    return flash_mla_with_kvcache(*arrays, 512, *plan, causal=case.spec.causal, **options)


def check(library: Library, case: Case, results: tuple[Any, Any]) -> None:
    out, lse = results
    assert isinstance(out, library.array_type)
    assert isinstance(lse, library.array_type)
    assert str(out.dtype).removeprefix("torch.") == case.spec.dtype
    assert str(lse.dtype).removeprefix("torch.") == "float32"
    assert_close(library.to_numpy(out), library.to_numpy(lse), *decode_numpy(case))


def test_without_metadata(library: Library, case: Case) -> None:
    check(library, case, call(library, case))
    check(library, case, call(library, case, None, None))


FIRST_GENERATION: list[Callable[[Any], tuple[Any, Any]]] = [
    lambda seqlens: get_mla_metadata(seqlens, NUM_Q_TOKENS, NUM_HEADS_K),
    lambda seqlens: get_mla_metadata(seqlens, num_heads_per_head_k=NUM_Q_TOKENS, num_heads_k=NUM_HEADS_K),
    lambda seqlens: get_mla_metadata(
        cache_seqlens=seqlens, num_q_tokens_per_head_k=NUM_Q_TOKENS, num_heads_k=NUM_HEADS_K
    ),
]
SECOND_GENERATION: list[Callable[[Any], tuple[Any, Any]]] = [
    lambda seqlens: get_mla_metadata(seqlens, NUM_Q_TOKENS, NUM_HEADS_K, 6, False, None),
    lambda seqlens: get_mla_metadata(
        seqlens, NUM_Q_TOKENS, NUM_HEADS_K, num_heads_q=6, is_fp8_kvcache=False, topk=None
    ),
]


@pytest.mark.parametrize("plan", FIRST_GENERATION + SECOND_GENERATION)
def test_with_metadata(library: Library, case: Case, plan: Callable[[Any], tuple[Any, Any]]) -> None:
    metadata, num_splits = plan(library.array(case.cache_seqlens))
    for array, shape in ((metadata, (1, 8)), (num_splits, (4,))):
        assert isinstance(array, library.array_type)
        assert tuple(array.shape) == shape
        assert str(array.dtype).endswith("int32")
    check(library, case, call(library, case, metadata, num_splits))
    check(library, case, call(library, case, tile_scheduler_metadata=metadata, num_splits=num_splits))


def test_with_a_sched_meta(library: Library, case: Case) -> None:
    meta, nothing = get_mla_metadata()
    assert meta != get_mla_metadata()[0]
    assert isinstance(meta, FlashMLASchedMeta)
    assert nothing is None
    assert not meta.have_initialized
    check(library, case, call(library, case, meta, None))
    assert meta.have_initialized
    assert meta.config == (3, 2, 6, 3)
    filled = meta.tile_scheduler_metadata, meta.num_splits
    check(library, case, call(library, case, meta, nothing))
    assert meta.tile_scheduler_metadata is filled[0]
    assert meta.num_splits is filled[1]


@pytest.mark.parametrize("given", [("out",), ("lse",), ("out", "lse")], ids="+".join)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_writes_the_callers_results(name: str, case: Case, given: tuple[str, ...]) -> None:
    library = Library(name)
    single = np.full((3, 6, 2), np.nan, np.float32)
    own = {"out": library.array(np.full((3, 2, 6, 512), np.nan, case.q.dtype)), "lse": library.array(single)}
    own = {argument: own[argument] for argument in given}
    results = dict(zip(("out", "lse"), call(library, case, **own), strict=True))
    assert all(results[argument] is own[argument] for argument in given)
    check(library, case, (results["out"], results["lse"]))


@pytest.mark.parametrize("argument", ["out", "lse"])
def test_does_not_write_to_jax_arrays_of_others(case: Case, argument: str) -> None:
    library = Library("jax.numpy")
    own = {"out": library.array(np.zeros((3, 2, 6, 512), case.q.dtype)), "lse": library.array(np.zeros((3, 6, 2)))}
    with pytest.raises(ValueError, match=rf"^{argument}: .*immutable"):
        call(library, case, **{argument: own[argument]})


@pytest.mark.parametrize("name", ["k_cache", "block_table", "cache_seqlens", "out", "lse", "num_splits"])
def test_refuses_arrays_of_two_libraries(name: str) -> None:
    torch = pytest.importorskip("torch")
    arguments: dict[str, Any] = make_case(SPEC).arguments()
    arguments["tile_scheduler_metadata"] = np.zeros((1, 8), np.int32)
    with pytest.raises(TypeError, match=rf"^{name}: expected an array of NumPy as q, got one of PyTorch"):
        flash_mla_with_kvcache(**arguments | {name: torch.zeros(1)})


@pytest.mark.parametrize(
    "names", [("numpy", "torch"), ("torch", "numpy"), ("torch", "jax.numpy"), ("numpy", "jax.numpy")]
)
def test_refuses_a_sched_meta_of_another_library(names: tuple[str, str]) -> None:
    first, second = map(Library, names)
    meta, _ = get_mla_metadata()
    call(first, make_case(SPEC), meta)
    with pytest.raises(TypeError, match=r"^tile_scheduler_metadata: expected an array of \w+ as q, got one of \w+$"):
        call(second, make_case(SPEC), meta)


def test_first_calls_of_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of one library belong together, whoever sees the first."""

    class Slow(frameworks.NumPy):
        def __init__(self) -> None:
            time.sleep(0.05)
            super().__init__()

    monkeypatch.setattr(frameworks, "_instances", {})
    monkeypatch.setattr(frameworks, "_by_array_type", {})
    monkeypatch.setitem(frameworks._FRAMEWORKS, "numpy", Slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(frameworks.framework_of, (np.zeros(1), np.ma.zeros(1)), ("q", "k_cache"))
    assert first is second


def test_takes_subclasses() -> None:
    torch = pytest.importorskip("torch")
    library = Library("torch")
    case = make_case(SPEC)
    q, *others = (library.array(array) for array in (case.q, case.k_cache, case.block_table, case.cache_seqlens))
    parameter = torch.nn.Parameter(q, requires_grad=False)
    check(library, case, flash_mla_with_kvcache(parameter, *others, 512, causal=True))


# On a GPU, the work goes to the caller's own stream: the inputs are written there, behind work that takes a while, and
# the results are read there.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_runs_on_the_current_stream(torch: Any, dtype: str) -> None:
    case = make_case(Spec(**{**vars(GPU_SPEC), "dtype": dtype}))
    host = [case.q, case.k_cache, case.block_table, case.cache_seqlens]
    sources = [from_numpy_to_torch(torch, array).cuda() for array in host]
    arrays = [torch.zeros_like(source) for source in sources]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for array, source in zip(arrays, sources, strict=True):
            array.copy_(source)
        out, lse = flash_mla_with_kvcache(*arrays, 512, causal=True)
        results = out.float().cpu().numpy(), lse.cpu().numpy()
    assert_close(*results, *decode_numpy(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cupy_runs_on_the_current_stream(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    case = make_case(Spec(**{**vars(GPU_SPEC), "dtype": dtype}))
    sources = [cupy.asarray(array) for array in (case.q, case.k_cache, case.block_table, case.cache_seqlens)]
    arrays = [cupy.zeros_like(source) for source in sources]
    cupy.cuda.Device().synchronize()
    busy = cupy.ones((4096, 4096), cupy.float32)
    with cupy.cuda.Stream(non_blocking=True):
        for _ in range(20):
            busy = busy @ busy
        for array, source in zip(arrays, sources, strict=True):
            array[...] = source
        results = flash_mla_with_kvcache(*arrays, 512, causal=True)
        assert all(isinstance(result, cupy.ndarray) for result in results)
        out, lse = (cupy.asnumpy(result).astype(np.float64) for result in results)
    assert_close(out, lse, *decode_numpy(case))


@pytest.mark.gpu
def test_metadata_lies_on_the_gpu(torch: Any) -> None:
    seqlens = torch.tensor([4096, 1, 0, 700], dtype=torch.int32, device="cuda")
    metadata, num_splits = get_mla_metadata(seqlens, 64, 1)
    assert metadata.device == num_splits.device == seqlens.device
    assert num_splits[0] == 0
    assert bool((num_splits.diff() >= 0).all())
