"""JAX: calls in functions that jax.jit compiles, and outside, as custom calls of XLA."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from cases import Case, Spec, make_case
from flash_mla import flash_mla_with_kvcache, get_mla_metadata, merge_states
from merges import Merge, assert_merged, make_states
from merges import reference as merged_reference
from oracle import assert_close, decode_numpy
from ways import CPU_SPEC, Results, arrays_of, left_out, plan_for, planned_inside

jax_module = pytest.importorskip("jax")

GPU_SPEC = Spec(lengths=(4096, 1, 0, 700), seqlen_q=2, num_heads_q=32, causal=True)
SOURCES = Path(__file__).parents[2] / "src"
STEPS = 4


def missing_on_the_gpu() -> str | None:
    try:
        jax_module.devices("cuda")
    except RuntimeError:
        return "needs JAX with CUDA"
    return None


@pytest.fixture(params=["bfloat16", "float16"])
def case(request: pytest.FixtureRequest, device: str | None) -> Case:
    """Of JAX's arrays, on the device."""
    if device is not None and (reason := missing_on_the_gpu()):
        pytest.skip(reason)
    spec = GPU_SPEC if device else CPU_SPEC
    host = make_case(Spec(**{**vars(spec), "dtype": request.param}))
    return put(host, jax_module.devices("cuda" if device else "cpu")[0])


def put(host: Case, device: Any) -> Case:
    return Case(host.spec, *(jax_module.device_put(x, device) for x in arrays_of(host)))


def sched_meta_inside(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    meta, num_splits = get_mla_metadata()
    for _ in range(2):
        results = flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, meta, num_splits, causal=True)
    return results


def in_a_loop(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    """As a model whose layers are scanned: each takes the query that the one before made."""

    def layer(query: Any, scale: Any) -> tuple[Any, Results]:
        results = left_out(query * scale, k_cache, block_table, cache_seqlens)
        return query + 0 * results[0][..., :1], results

    scales = jax_module.numpy.array([3, 2, 1], q.dtype)
    _, (outs, lses) = jax_module.lax.scan(layer, q, scales)
    return outs[-1], lses[-1]


WAYS: list[Callable[..., Results]] = [left_out, planned_inside, sched_meta_inside, in_a_loop]


def check(case: Case, results: Results) -> None:
    """Right, and JAX's own arrays on the device of the case."""
    out, lse = results
    host = Case(case.spec, *(np.asarray(x) for x in arrays_of(case)))
    assert isinstance(out, jax_module.Array)
    assert isinstance(lse, jax_module.Array)
    assert (out.dtype, lse.dtype) == (case.q.dtype, np.float32)
    assert out.devices() == lse.devices() == case.q.devices()
    assert_close(np.asarray(out).astype(np.float64), np.asarray(lse).astype(np.float64), *decode_numpy(host))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("compiled", [False, True], ids=["outside jit", "inside jit"])
def test_decodes(case: Case, way: Callable[..., Results], compiled: bool) -> None:
    check(case, (jax_module.jit(way) if compiled else way)(*arrays_of(case)))


def test_inside_and_outside_agree_to_the_bit(case: Case) -> None:
    for a, b in zip(jax_module.jit(left_out)(*arrays_of(case)), left_out(*arrays_of(case)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_plan_from_outside_jit(case: Case) -> None:
    @jax_module.jit
    def decode(metadata: Any, num_splits: Any, *arrays: Any) -> Results:
        return flash_mla_with_kvcache(*arrays, 512, metadata, num_splits, causal=True)

    plan = plan_for(case.q, case.k_cache, case.cache_seqlens)
    assert all(x.devices() == case.q.devices() for x in plan)
    check(case, decode(*plan, *arrays_of(case)))


def test_a_sched_meta_from_outside_jit(case: Case) -> None:
    """Empty ones keep nothing of a trace; filled ones serve inside."""
    meta, _ = get_mla_metadata()

    def decode(*arrays: Any) -> Results:
        return flash_mla_with_kvcache(*arrays, 512, meta, causal=True)

    check(case, jax_module.jit(decode)(*arrays_of(case)))
    assert not meta.have_initialized
    check(case, decode(*arrays_of(case)))
    assert meta.have_initialized
    check(case, jax_module.jit(lambda *arrays: decode(*arrays))(*arrays_of(case)))


def test_follows_new_values(case: Case) -> None:
    """XLA may capture the call in a CUDA graph; all of this runs one compiled function."""
    compiled = jax_module.jit(lambda *arrays: planned_inside(*arrays))
    lengths = np.asarray(case.cache_seqlens)
    for step in range(STEPS):
        fewer = jax_module.device_put(np.maximum(lengths - 3 * step, 0).astype(np.int32), next(iter(case.q.devices())))
        changed = Case(case.spec, case.q * (1 + step), case.k_cache, case.block_table, fewer)
        check(changed, compiled(*arrays_of(changed)))
    assert compiled._cache_size() == 1


def test_is_ordered_among_the_work_of_xla(case: Case) -> None:
    """Arguments are still on their way, and the results are taken at once."""

    @jax_module.jit
    def step(q: Any, *others: Any) -> Results:
        late = q
        for _ in range(20):
            late = jax_module.numpy.roll(late, 1, axis=2)
        late = jax_module.numpy.roll(late, -20, axis=2)
        out, lse = left_out(late, *others)
        return out + 0, lse + 0

    check(case, step(*arrays_of(case)))


def test_of_no_requests() -> None:
    q, k_cache, block_table, cache_seqlens = (
        jax_module.device_put(x, jax_module.devices("cpu")[0]) for x in arrays_of(make_case(CPU_SPEC))
    )
    for call in (left_out, jax_module.jit(planned_inside)):
        out, lse = call(q[:0], k_cache, block_table[:0], cache_seqlens[:0])
        assert (out.shape, lse.shape) == ((0, 2, 6, 512), (0, 6, 2))


@pytest.mark.parametrize("way", [left_out, sched_meta_inside], ids=lambda way: way.__name__)
def test_lowers_for_a_gpu_that_is_not_there(way: Callable[..., Results]) -> None:
    """A function can be exported for GPUs where there is none: nothing asks the device."""
    arrays = (jax_module.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays_of(make_case(CPU_SPEC)))
    lowered = jax_module.jit(way).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @flash_mla_dense_decode" in lowered


@pytest.mark.parametrize("compiled", [False, True], ids=["outside jit", "inside jit"])
@pytest.mark.parametrize("layout", ["stacked", "list"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merges_states(device: str | None, dtype: str, layout: str, compiled: bool) -> None:
    if device is not None and (reason := missing_on_the_gpu()):
        pytest.skip(reason)
    spec = Merge(dtype=dtype)
    outs, lses = make_states(spec, None)
    given: Any = jax_module.device_put((outs, lses), jax_module.devices(device or "cpu")[0])
    if layout == "list":
        given = [list(x) for x in given]
    out, lse = (jax_module.jit(merge_states) if compiled else merge_states)(*given)
    assert (out.dtype, lse.dtype) == (outs.dtype, np.float32)
    assert_merged(spec, np.asarray(out), np.asarray(lse), merged_reference(outs, lses), dtype)


# Errors


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ((3, 2, 1, 4, 500), (3, 2, 4, 1), ValueError, r"outs\[0\]: expected shape \(2, 1, 4, 512\), got"),
        ((2, 1, 4, 512), (3, 2, 4, 1), ValueError, "outs: expected shape"),
        ((129, 2, 1, 4, 512), (129, 2, 4, 1), ValueError, "outs: expected 1 to 128 states, got 129"),
        ((3, 2, 1, 4, 512), (2, 2, 4, 1), ValueError, "lses: expected 3 states as outs, got 2"),
        ((3, 2, 1, 4, 512), (3, 2, 1, 4), ValueError, r"lses\[0\]: expected shape \(2, 4, 1\), got \(2, 1, 4\)"),
        ((3, 2, 1, 4, 512), (), ValueError, "lses: expected 1 to 5 dimensions, got 0"),
    ],
)
def test_errors_of_a_merge(outs: tuple[int, ...], lses: tuple[int, ...], error: type[Exception], message: str) -> None:
    zeros = jax_module.numpy.zeros
    with pytest.raises(error, match=f"^{message}"):
        merge_states(zeros(outs, "bfloat16"), zeros(lses, "float32"))
    one = zeros((2, 1, 4, 512), "bfloat16")
    with pytest.raises(TypeError, match=r"^outs\[1\]: expected dtype bfloat16, got float32"):
        merge_states([one, one.astype("float32")], [zeros((2, 4, 1), "float32")] * 2)
    with pytest.raises(TypeError, match=r"^lses\[0\]: expected dtype float32, got bfloat16"):
        merge_states([one], [zeros((2, 4, 1), "bfloat16")])


@pytest.mark.parametrize("compiled", [False, True], ids=["outside jit", "inside jit"])
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda x: x[0], ValueError, "shape"),
        ("q", lambda x: x.astype("float32"), TypeError, "dtype"),
        ("q", lambda x: x.astype("float8_e4m3fn"), TypeError, "got float8_e4m3fn"),
        ("q", lambda x: x[None], ValueError, "got"),
        ("k_cache", lambda x: x[..., :512], ValueError, "shape"),
        ("block_table", lambda x: x.astype("int16"), TypeError, "dtype"),
        ("cache_seqlens", lambda x: x[1:], ValueError, "shape"),
    ],
)
def test_errors_name_the_argument(name: str, change: Any, error: type[Exception], message: str, compiled: bool) -> None:
    host = make_case(CPU_SPEC)
    arrays = dict(
        zip(
            ("q", "k_cache", "block_table", "cache_seqlens"),
            map(jax_module.numpy.asarray, arrays_of(host)),
            strict=True,
        )
    )
    arrays[name] = change(arrays[name])
    for way in (left_out, sched_meta_inside):
        with pytest.raises(error, match=rf"^{name}: .*{message}"):
            (jax_module.jit(way) if compiled else way)(**arrays)


def test_errors_of_a_plan() -> None:
    seqlens = jax_module.numpy.asarray([1, 2], "int32")
    for wrong, error in ((seqlens[None], ValueError), (seqlens.astype("float32"), TypeError)):
        with pytest.raises(error, match=r"^cache_seqlens: expected"):
            get_mla_metadata(wrong, 16, 1)
    with pytest.raises(ValueError, match=r"^num_heads_k: expected at least 1"):
        get_mla_metadata(seqlens, 16, 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["outside jit", "inside jit"])
def test_half_a_plan_is_refused(compiled: bool) -> None:
    arrays = [jax_module.numpy.asarray(x) for x in arrays_of(make_case(CPU_SPEC))]
    metadata, num_splits = plan_for(arrays[0], arrays[1], arrays[3])
    for plan, name in (((metadata, None), "num_splits"), ((None, num_splits), "tile_scheduler_metadata")):

        def decode(*arrays: Any, plan: Any = plan) -> Results:
            return flash_mla_with_kvcache(*arrays, 512, *plan)

        with pytest.raises(ValueError, match=f"^{name}: expected both parts of a plan or neither, got one alone"):
            (jax_module.jit(decode) if compiled else decode)(*arrays)


def test_has_no_derivative_and_no_vmap() -> None:
    q, *others = (jax_module.numpy.asarray(x) for x in arrays_of(make_case(CPU_SPEC)))
    with pytest.raises(ValueError, match=r"flash_mla_dense_decode.*cannot be differentiated"):
        jax_module.grad(lambda q: left_out(q, *others)[0].astype("float32").sum())(q)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax_module.vmap(lambda q: left_out(q, *others))(q[None])


def test_a_traced_scale_is_refused() -> None:
    arrays = [jax_module.numpy.asarray(x) for x in arrays_of(make_case(CPU_SPEC))]
    with pytest.raises(TypeError, match=r"^softmax_scale: expected a number"):
        jax_module.jit(lambda scale: flash_mla_with_kvcache(*arrays, 512, softmax_scale=scale))(0.1)


def test_the_handlers_errors_reach_the_caller() -> None:
    """Those that Python finds come earlier."""
    left_out(*(jax_module.numpy.asarray(x) for x in arrays_of(make_case(CPU_SPEC))))  # registers the handlers
    shape = jax_module.ShapeDtypeStruct((1,), "int32")
    call = jax_module.ffi.ffi_call("flash_mla_plan_dense_decode", (shape, shape))
    seqlens, rows = jax_module.numpy.zeros(3, "int32"), np.int64(1)
    with pytest.raises(RuntimeError, match=r"tile_scheduler_metadata: expected shape \(num_sm_parts, 8\), got \(1,\)"):
        jax_module.block_until_ready(call(seqlens, num_q_tokens_per_head_k=rows))
    with pytest.raises(RuntimeError, match="custom call: expected 1 arguments and 2 results, got 2 and 2"):
        jax_module.block_until_ready(call(seqlens, seqlens, num_q_tokens_per_head_k=rows))


# The ABI that the handlers are written to

# Ours: (theirs, members by our names)
LAYOUTS = {
    "Extension": ("TheirExtension", {"type": "type", "next": "next"}),
    "Version": ("XLA_FFI_Api_Version", {"major": "major_version", "minor": "minor_version"}),
    "Metadata": ("XLA_FFI_Metadata", {"version": "api_version", "traits": "traits"}),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"metadata": "metadata"}),
    "CreateErrorArgs": ("XLA_FFI_Error_Create_Args", {"message": "message", "code": "errc"}),
    "GetStreamArgs": ("XLA_FFI_Stream_Get_Args", {"context": "ctx", "stream": "stream"}),
    "GetDeviceOrdinalArgs": ("XLA_FFI_DeviceOrdinal_Get_Args", {"context": "ctx", "ordinal": "device_ordinal"}),
    "Api": (
        "XLA_FFI_Api",
        {
            "version": "api_version",
            "create_error": "XLA_FFI_Error_Create",
            "get_stream": "XLA_FFI_Stream_Get",
            "get_device_ordinal": "XLA_FFI_DeviceOrdinal_Get",
        },
    ),
    "Buffer": ("XLA_FFI_Buffer", {"dtype": "dtype", "data": "data", "rank": "rank", "shape": "dims"}),
    "Buffers": ("XLA_FFI_Args", {"size": "size", "kinds": "types", "buffers": "args"}),
    "Name": ("XLA_FFI_ByteSpan", {"data": "ptr", "size": "len"}),
    "Scalar": ("XLA_FFI_Scalar", {"dtype": "dtype", "value": "value"}),
    "Attributes": ("XLA_FFI_Attrs", {"size": "size", "kinds": "types", "names": "names", "values": "attrs"}),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        {
            "extensions": "extension_start",
            "api": "api",
            "context": "ctx",
            "stage": "stage",
            "arguments": "args",
            "results": "rets",
            "attributes": "attrs",
        },
    ),
}
VALUES = {
    "kMajorVersion": "XLA_FFI_API_MAJOR",
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kBuffer": "XLA_FFI_ArgType_BUFFER",
    "kScalar": "XLA_FFI_AttrType_SCALAR",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE",
    "kCommandBufferCompatible": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "static_cast<int>(ErrorCode::kInvalidArgument)": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "static_cast<int>(ErrorCode::kUnimplemented)": "XLA_FFI_Error_Code_UNIMPLEMENTED",
    "static_cast<int>(ErrorCode::kInternal)": "XLA_FFI_Error_Code_INTERNAL",
    "static_cast<int>(DataType::kBool)": "XLA_FFI_DataType_PRED",
    "static_cast<int>(DataType::kInt32)": "XLA_FFI_DataType_S32",
    "static_cast<int>(DataType::kUInt8)": "XLA_FFI_DataType_U8",
    "static_cast<int>(DataType::kFloat16)": "XLA_FFI_DataType_F16",
    "static_cast<int>(DataType::kFloat32)": "XLA_FFI_DataType_F32",
    "static_cast<int>(DataType::kBFloat16)": "XLA_FFI_DataType_BF16",
}


def test_declarations_agree_with_those_of_the_installed_jaxlib(tmp_path: Path) -> None:
    compiler = which("c++") or which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    checks = [f"static_assert({ours} == {theirs});" for ours, theirs in VALUES.items()]
    for ours, (theirs, members) in LAYOUTS.items():
        checks += [
            f"static_assert(offsetof({ours}, {mine}) == offsetof({theirs}, {its}));\n"
            f"static_assert(sizeof({ours}::{mine}) == sizeof({theirs}::{its}));"
            for mine, its in members.items()
        ]
    source = tmp_path / "layouts.cpp"
    source.write_text(
        '#include <xla/ffi/api/c_api.h>\n#include <type_traits>\n#include "bindings/xla_ffi_abi.h"\n'
        "using namespace flash_mla::bindings::xla_ffi;\n"
        # Its name has changed in minor version 4.
        "using TheirExtension = std::remove_pointer_t<decltype(XLA_FFI_CallFrame::extension_start)>;\n"
        + "\n".join(checks)
    )
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{SOURCES}", f"-I{jax_module.ffi.include_dir()}", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# On GPUs


@pytest.mark.gpu
def test_on_another_device() -> None:
    if (reason := missing_on_the_gpu()) or len(jax_module.devices("cuda")) < 2:
        pytest.skip(reason or "needs two GPUs")
    case = put(make_case(GPU_SPEC), jax_module.devices("cuda")[1])
    for way in (left_out, planned_inside):
        check(case, way(*arrays_of(case)))
        check(case, jax_module.jit(way)(*arrays_of(case)))


@pytest.mark.gpu
def test_a_call_does_not_wait() -> None:
    """Outside jit too, a call returns before its arguments are there."""
    if reason := missing_on_the_gpu():
        pytest.skip(reason)
    gpu = jax_module.devices("cuda")[0]
    case = put(make_case(GPU_SPEC), gpu)
    q, *others = arrays_of(case)
    matrix = jax_module.device_put(np.ones((4096, 4096), np.float32), gpu)

    @jax_module.jit
    def arrives_late(q: Any) -> Any:
        busy = jax_module.lax.fori_loop(0, 500, lambda _, x: x @ x * 1e-4, matrix)
        return q + (busy[0, 0] * 0).astype(q.dtype)

    jax_module.block_until_ready(left_out(arrives_late(q), *others))  # compiles
    late = arrives_late(q)
    out, lse = left_out(late, *others)
    assert not late.is_ready()
    assert not out.is_ready()
    check(case, (out, lse))


@pytest.mark.gpu
def test_a_step_of_many_layers() -> None:
    """Enough of them for XLA to make a CUDA graph of the step, which it then runs on other arrays."""
    if reason := missing_on_the_gpu():
        pytest.skip(reason)

    @jax_module.jit
    def step(q: Any, *others: Any) -> Results:
        for _ in range(12):
            out, lse = left_out(q, *others)
            q = q + 0 * out[..., :1]
        return out, lse

    gpu = jax_module.devices("cuda")[0]
    for seed in range(STEPS):
        case = put(make_case(Spec(**{**vars(GPU_SPEC), "seed": seed})), gpu)
        check(case, step(*arrays_of(case)))
