"""The C interface through ctypes, on the library that the package brings."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from cases import HEAD_DIM_V, Case, Spec, make_case
from checks import decode, same_bits
from flash_mla import __version__, installed, merge_states
from merges import DTYPES as MERGE_DTYPES
from merges import Merge, assert_merged, make_states, reference
from oracle import assert_close, decode_reference

OK, INVALID_ARGUMENT, INVALID_TYPE, UNSUPPORTED, CUDA_ERROR = range(5)
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3, "int32": 8, "int64": 9}
CPU, CUDA = 0, 1
SPEC = Spec((300, 0, 17, 64), seqlen_q=2, num_heads_q=16, causal=True)
TENSORS = ("q", "k_cache", "block_table", "cache_seqlens", "out", "lse", "tile_scheduler_metadata", "num_splits")


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 5),
        ("strides", ctypes.c_int64 * 5),
    )


class Arguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, Tensor) for name in TENSORS),
        ("softmax_scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


class MergeArguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("outs", ctypes.POINTER(Tensor)),
        ("lses", ctypes.POINTER(Tensor)),
        ("num_states", ctypes.c_int64),
        ("out", Tensor),
        ("lse", Tensor),
    )


@pytest.fixture(scope="module")
def library() -> Any:
    loaded = ctypes.CDLL(str(installed.library_dir() / "libflash_mla.so"))
    loaded.flash_mla_version.restype = ctypes.c_char_p
    loaded.flash_mla_last_error.restype = ctypes.c_char_p
    tensor, arguments, size = ctypes.POINTER(Tensor), ctypes.POINTER(Arguments), ctypes.c_size_t
    loaded.flash_mla_set_contiguous_strides.argtypes = (tensor,)
    loaded.flash_mla_dense_decode_num_sm_parts.argtypes = (
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32),
        ctypes.POINTER(ctypes.c_int64),
    )
    loaded.flash_mla_plan_dense_decode.argtypes = (tensor, ctypes.c_int64, tensor, tensor, ctypes.c_void_p)
    loaded.flash_mla_dense_decode_workspace_size.argtypes = (arguments, ctypes.POINTER(size))
    loaded.flash_mla_dense_decode_max_workspace_size.argtypes = (arguments, ctypes.POINTER(size))
    loaded.flash_mla_dense_decode.argtypes = (arguments, ctypes.c_void_p, size, ctypes.c_void_p)
    loaded.flash_mla_merge_states.argtypes = (ctypes.POINTER(MergeArguments), ctypes.c_void_p)
    return loaded


def describe(array: Any) -> Tensor:
    """An array of NumPy or a tensor of PyTorch, as the C interface sees it."""
    if isinstance(array, np.ndarray):
        data, device, index = array.ctypes.data, CPU, 0
        strides = [stride // array.itemsize for stride in array.strides]
    else:
        data, device, index, strides = array.data_ptr(), CUDA, array.device.index, array.stride()
    dtype = DTYPES[str(array.dtype).removeprefix("torch.")]
    extents = ctypes.c_int64 * 5
    return Tensor(data, dtype, device, index, array.ndim, extents(*array.shape), extents(*strides))


def make_arguments(case: Case, out: Any, lse: Any) -> Arguments:
    arrays = (case.q, case.k_cache, case.block_table, case.cache_seqlens, out, lse)
    arguments = Arguments(ctypes.sizeof(Arguments), *map(describe, arrays))
    arguments.softmax_scale = case.spec.softmax_scale or 0.0
    arguments.causal = case.spec.causal
    return arguments


def new_results(case: Case) -> tuple[Any, Any]:
    spec = case.spec
    shapes = (
        (spec.batch_size, spec.seqlen_q, spec.num_heads_q, HEAD_DIM_V),
        (spec.batch_size, spec.num_heads_q, spec.seqlen_q),
    )
    if isinstance(case.q, np.ndarray):
        return np.full(shapes[0], np.nan, case.q.dtype), np.full(shapes[1], np.nan, np.float32)
    out = case.q.new_full(shapes[0], float("nan"))
    return out, case.q.float().new_full(shapes[1], float("nan"))


def make_merge(outs: Any, lses: Any, out: Any, lse: Any) -> MergeArguments:
    """`outs` and `lses`: the states' arrays, as lists or stacked."""
    tensors = Tensor * len(outs)
    return MergeArguments(
        ctypes.sizeof(MergeArguments),
        tensors(*map(describe, outs)),
        tensors(*map(describe, lses)),
        len(outs),
        describe(out),
        describe(lse),
    )


def new_merged(outs: Any, lses: Any, out_dtype: Any) -> tuple[Any, Any]:
    """Results of the first state's shapes, NaN."""
    if isinstance(lses[0], np.ndarray):
        return np.full(outs[0].shape, np.nan, out_dtype), np.full(lses[0].shape, np.nan, np.float32)
    nan = float("nan")
    return outs[0].new_full(outs[0].shape, nan, dtype=out_dtype), lses[0].new_full(lses[0].shape, nan)


def last_error(library: Any) -> str:
    message: bytes = library.flash_mla_last_error()
    return message.decode()


@pytest.fixture
def on_cpu() -> tuple[Case, Any, Any, Arguments]:
    case = make_case(SPEC)
    out, lse = new_results(case)
    return case, out, lse, make_arguments(case, out, lse)


def test_version(library: Any) -> None:
    assert (
        library.flash_mla_version().decode() == __version__.partition("+")[0]
    )  # wheels have a local part, such as cu128


def test_contiguous_strides(library: Any) -> None:
    expected = describe(np.zeros((3, 5, 7, 576), np.float16))
    tensor = Tensor(rank=4, shape=expected.shape)
    assert library.flash_mla_set_contiguous_strides(tensor) == OK
    assert list(tensor.strides) == list(expected.strides)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
@pytest.mark.parametrize("softmax_scale", [None, 0.02])
def test_gives_what_the_package_gives(library: Any, dtype: str, layout: str, softmax_scale: float | None) -> None:
    case = make_case(Spec(SPEC.lengths, 2, 16, causal=True, dtype=dtype, layout=layout, softmax_scale=softmax_scale))
    out, lse = new_results(case)
    arguments = make_arguments(case, out, lse)
    workspace_bytes = ctypes.c_size_t(1)
    assert library.flash_mla_dense_decode_workspace_size(arguments, workspace_bytes) == OK, last_error(library)
    assert workspace_bytes.value == 0
    assert library.flash_mla_dense_decode(arguments, None, 0, None) == OK, last_error(library)
    assert_close(out, lse, *decode_reference(case), case.spec)
    for ours, packages in zip((out, lse), decode(case), strict=True):
        assert same_bits(ours, packages)


def test_plans_on_the_cpu(library: Any) -> None:
    case = make_case(SPEC)
    parts = ctypes.c_int64()
    assert library.flash_mla_dense_decode_num_sm_parts(32, 1, CPU, 0, parts) == OK
    metadata, num_splits = np.zeros((parts.value, 8), np.int32), np.zeros(5, np.int32)
    lengths, *plan = (describe(array) for array in (case.cache_seqlens, metadata, num_splits))
    assert library.flash_mla_plan_dense_decode(lengths, 32, *plan, None) == OK, last_error(library)
    assert num_splits.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "field", "value", "status", "message"),
    [
        ("q", "dtype", DTYPES["float32"], INVALID_TYPE, "q: expected dtype bfloat16 or float16, got float32"),
        (
            "q",
            "rank",
            3,
            INVALID_ARGUMENT,
            "q: expected shape (batch_size, seqlen_q, num_heads_q, 576), got (4, 2, 16)",
        ),
        ("k_cache", "data", None, INVALID_ARGUMENT, "k_cache: expected data, got a null pointer"),
        ("block_table", "dtype", DTYPES["int64"], INVALID_TYPE, "block_table: expected dtype int32, got int64"),
        ("lse", "device_type", CUDA, INVALID_ARGUMENT, "lse: expected device cpu as q, got cuda:0"),
        ("out", "device_type", 7, INVALID_ARGUMENT, "out: expected device_type 0 (CPU) or 1 (CUDA), got 7"),
    ],
)
def test_errors_name_the_argument(
    library: Any,
    on_cpu: tuple[Case, Any, Any, Arguments],
    name: str,
    field: str,
    value: int | None,
    status: int,
    message: str,
) -> None:
    _, out, lse, arguments = on_cpu
    setattr(getattr(arguments, name), field, value)
    assert library.flash_mla_dense_decode(arguments, None, 0, None) == status
    assert last_error(library) == message
    assert np.isnan(out.astype(np.float32)).all()
    assert np.isnan(lse).all()


def test_struct_size_left_out(library: Any, on_cpu: tuple[Case, Any, Any, Arguments]) -> None:
    arguments = on_cpu[-1]
    arguments.struct_size = 0
    assert library.flash_mla_dense_decode(arguments, None, 0, None) == INVALID_ARGUMENT
    size = ctypes.sizeof(Arguments)
    assert last_error(library) == f"arguments: expected struct_size of at least {size}, got 0"


@pytest.mark.parametrize("dtype", MERGE_DTYPES)
@pytest.mark.parametrize("layout", ["stacked", "strided", "list of strided"])
@pytest.mark.parametrize("widen", [False, True])
def test_merges_as_the_package_does(library: Any, dtype: str, layout: str, widen: bool) -> None:
    spec = Merge(5, 3, 2, 4, dtype, layout=layout, lse_layout=layout)
    outs, lses = make_states(spec, None)
    out, lse = new_merged(outs, lses, np.float32 if widen else outs[0].dtype)
    assert library.flash_mla_merge_states(make_merge(outs, lses, out, lse), None) == OK, last_error(library)
    assert_merged(spec, out, lse, reference(outs, lses), "float32" if widen else dtype)
    for ours, packages in zip((out, lse), merge_states(outs, lses, out=np.empty_like(out)), strict=True):
        assert same_bits(ours, packages)


@pytest.mark.parametrize("num_states", [0, 129])
def test_number_of_states(library: Any, num_states: int) -> None:
    outs, lses = make_states(Merge(2), None)
    out, lse = new_merged(outs, lses, outs.dtype)
    arguments = make_merge(outs, lses, out, lse)
    arguments.num_states = num_states
    assert library.flash_mla_merge_states(arguments, None) == INVALID_ARGUMENT
    assert last_error(library) == f"outs: expected 1 to 128 states, got {num_states}"
    arguments.struct_size = 0
    assert library.flash_mla_merge_states(arguments, None) == INVALID_ARGUMENT
    size = ctypes.sizeof(MergeArguments)
    assert last_error(library) == f"arguments: expected struct_size of at least {size}, got 0"
    assert np.isnan(lse).all()


def test_errors_name_the_state(library: Any) -> None:
    outs, lses = make_states(Merge(3), None)
    out, lse = new_merged(outs, lses, outs.dtype)
    wrong = [*lses[:2], lses[2].astype(np.float64)]
    assert library.flash_mla_merge_states(make_merge(outs, wrong, out, lse), None) == INVALID_TYPE
    assert last_error(library) == "lses[2]: expected dtype float32, got float64"
    assert np.isnan(lse).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", MERGE_DTYPES)
@pytest.mark.parametrize("num_states", [1, 8, 128])
def test_merges_tensors_of_the_gpu(library: Any, torch: Any, dtype: str, num_states: int) -> None:
    """On a stream of its own, on which the states are written too; then captured in a graph."""
    spec = Merge(num_states, 3, 2, 16, dtype, layout="list of strided", lse_layout="strided")
    outs, lses = make_states(spec, "cuda")
    expected = reference(outs, lses)
    out, lse = new_merged(outs, lses, outs[0].dtype)
    given = [torch.full_like(state, float("nan")) for state in outs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for late, state in zip(given, outs, strict=True):
            late.copy_(state)
        arguments = make_merge(given, lses, out, lse)
        assert library.flash_mla_merge_states(arguments, stream.cuda_stream) == OK, last_error(library)
    stream.synchronize()
    assert_merged(spec, out, lse, expected, dtype)
    for ours, packages in zip((out, lse), merge_states(outs, lses), strict=True):
        assert same_bits(ours, packages)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        current = torch.cuda.current_stream().cuda_stream
        assert library.flash_mla_merge_states(arguments, current) == OK, last_error(library)
    lses += 1.0
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_merged(spec, out, lse, reference(outs, lses), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [False, True])
def test_decodes_tensors_of_the_gpu(library: Any, torch: Any, planned: bool) -> None:
    case = make_case(SPEC, "cuda")
    out, lse = new_results(case)
    arguments = make_arguments(case, out, lse)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    keep = plan_on_gpu(library, torch, case, arguments, stream) if planned else ()
    workspace = allocate_workspace(library, torch, arguments)

    status = library.flash_mla_dense_decode(arguments, workspace.data_ptr(), workspace.numel(), stream.cuda_stream)
    assert status == OK, last_error(library)
    stream.synchronize()
    assert_close(out, lse, *decode_reference(case), case.spec)
    del keep

    too_small = library.flash_mla_dense_decode(arguments, workspace.data_ptr(), workspace.numel() - 1, None)
    assert too_small == INVALID_ARGUMENT
    assert last_error(library).startswith("workspace: expected at least ")


@pytest.mark.gpu
def test_is_captured_in_a_graph(library: Any, torch: Any) -> None:
    case = make_case(SPEC, "cuda")
    out, lse = new_results(case)
    arguments = make_arguments(case, out, lse)
    workspace = allocate_workspace(library, torch, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        status = library.flash_mla_dense_decode(arguments, workspace.data_ptr(), workspace.numel(), stream)
    assert status == OK, last_error(library)
    case.cache_seqlens.copy_(torch.tensor([299, 0, 1, 0], dtype=torch.int32))
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(out, lse, *decode_reference(case), case.spec)


def plan_on_gpu(library: Any, torch: Any, case: Case, arguments: Arguments, stream: Any) -> tuple[Any, Any]:
    """Plans on `stream` and gives the plan to `arguments`. Returns its tensors, to be kept alive."""
    parts = ctypes.c_int64()
    status = library.flash_mla_dense_decode_num_sm_parts(case.num_q_tokens_per_head_k, 1, CUDA, 0, parts)
    assert status == OK, last_error(library)
    assert parts.value > 1
    metadata = torch.zeros(parts.value, 8, dtype=torch.int32, device="cuda")
    num_splits = torch.zeros(case.spec.batch_size + 1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    arguments.tile_scheduler_metadata, arguments.num_splits = describe(metadata), describe(num_splits)
    lengths, *plan = describe(case.cache_seqlens), arguments.tile_scheduler_metadata, arguments.num_splits
    status = library.flash_mla_plan_dense_decode(lengths, case.num_q_tokens_per_head_k, *plan, stream.cuda_stream)
    assert status == OK, last_error(library)
    return metadata, num_splits


def allocate_workspace(library: Any, torch: Any, arguments: Arguments) -> Any:
    size = ctypes.c_size_t()
    assert library.flash_mla_dense_decode_workspace_size(arguments, size) == OK, last_error(library)
    assert size.value > 0
    enough = ctypes.c_size_t()
    assert library.flash_mla_dense_decode_max_workspace_size(arguments, enough) == OK, last_error(library)
    assert size.value <= enough.value
    return torch.empty(size.value, dtype=torch.uint8, device="cuda")
