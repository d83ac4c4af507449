"""The compiled module: how it reads arrays, what it holds on to, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import flash_mla
import numpy as np
import pytest
from cases import Spec, make_case
from checks import turns_during
from fakes import CPU, CUDA, READ_ONLY, FakeArray
from flash_mla import _C, flash_mla_interface
from oracle import assert_close, decode_numpy

SCALE = 576**-0.5
LENGTHS = (70, 5)


def numpy_arrays() -> dict[str, Any]:
    """The arrays of a call of _C.dense_decode on the CPU."""
    case = make_case(Spec(lengths=LENGTHS, dtype="float16", num_heads_q=4))
    return {
        "q": case.q,
        "k_cache": case.k_cache,
        "block_table": case.block_table,
        "cache_seqlens": case.cache_seqlens,
        "out": np.full((2, 1, 4, 512), np.nan, np.float16),
        "lse": np.full((2, 4, 1), np.nan, np.float32),
    }


def decode(arrays: dict[str, Any], **options: Any) -> None:
    _C.dense_decode(
        **arrays, tile_scheduler_metadata=None, num_splits=None, softmax_scale=SCALE, causal=False, **options
    )


def test_calls_are_also_where_deepseek_has_them() -> None:
    for name in flash_mla_interface.__all__:
        assert getattr(flash_mla_interface, name) is getattr(flash_mla, name)


def fake(array: Any, **options: Any) -> FakeArray:
    """A NumPy array's memory, as an array of another library."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    options = {"strides": strides, "data": array.ctypes.data, "owner": array, "device": (CPU, 0), **options}
    return FakeArray(array.shape, array.dtype.name, **options)


@pytest.fixture
def expected() -> tuple[Any, Any]:
    arrays = numpy_arrays()
    decode(arrays)
    return arrays["out"], arrays["lse"]


@pytest.mark.parametrize("version", [1, None], ids=["versioned capsule", "capsule from before DLPack 1.0"])
def test_reads_any_array_with_dlpack(expected: tuple[Any, Any], version: int | None) -> None:
    arrays = numpy_arrays()
    fakes = {name: fake(array, version=version) for name, array in arrays.items()}
    decode(fakes)
    np.testing.assert_array_equal(arrays["out"], expected[0])
    np.testing.assert_array_equal(arrays["lse"], expected[1])


def test_gives_capsules_back() -> None:
    arrays = numpy_arrays()
    fakes = {name: fake(array) for name, array in arrays.items()}
    decode(fakes)
    for array in fakes.values():
        assert len(array.requests) == 1
        assert array.num_capsules_alive == 0


def test_gives_capsules_back_after_an_error() -> None:
    fakes = {name: fake(array) for name, array in numpy_arrays().items()}
    fakes["lse"] = fake(np.empty((1, 1, 1), np.float32))
    with pytest.raises(ValueError, match="lse"):
        decode(fakes)
    assert all(array.num_capsules_alive == 0 for array in fakes.values())


def test_takes_capsules(expected: tuple[Any, Any]) -> None:
    arrays = numpy_arrays()
    decode({name: array.__dlpack__() for name, array in arrays.items()})
    np.testing.assert_array_equal(arrays["out"], expected[0])


def test_takes_a_row_major_array_without_strides(expected: tuple[Any, Any]) -> None:
    arrays = numpy_arrays()
    decode({**arrays, "q": fake(arrays["q"], strides=None)})
    np.testing.assert_array_equal(arrays["out"], expected[0])


def test_follows_the_byte_offset(expected: tuple[Any, Any]) -> None:
    arrays = numpy_arrays()
    decode({**arrays, "q": fake(arrays["q"], data=arrays["q"].ctypes.data - 64, offset=64)})
    np.testing.assert_array_equal(arrays["out"], expected[0])


def test_reads_bits_as_bfloat16() -> None:
    case = make_case(Spec(lengths=LENGTHS, dtype="bfloat16", num_heads_q=4))
    out, lse = np.empty((2, 1, 4, 512), case.q.dtype), np.empty((2, 4, 1), np.float32)
    q, k_cache, out_bits = (_C.Bfloat16Bits(array.view("uint16")) for array in (case.q, case.k_cache, out))
    _C.dense_decode(q, k_cache, case.block_table, case.cache_seqlens, out_bits, lse, None, None, SCALE, False)
    assert_close(out, lse, *decode_numpy(case))


def test_asks_for_no_synchronisation() -> None:
    arrays = {name: fake(array, device=(CUDA, 5)) for name, array in numpy_arrays().items()}
    with pytest.raises(RuntimeError, match=r"GPU|driver|device"):
        decode(arrays)
    for array in arrays.values():
        assert array.requests == [{"stream": -1, "max_version": (1, 3)}]


def test_asks_for_no_stream_on_the_cpu() -> None:
    arrays = {name: fake(array) for name, array in numpy_arrays().items()}
    decode(arrays)
    assert arrays["q"].requests == [{"max_version": (1, 3)}]


@pytest.mark.parametrize("name", ["out", "lse"])
def test_refuses_read_only_results(name: str) -> None:
    arrays = numpy_arrays()
    with pytest.raises(ValueError, match=rf"^{name}: .*read-only"):
        decode({**arrays, name: fake(arrays[name], flags=READ_ONLY)})


def test_takes_read_only_inputs(expected: tuple[Any, Any]) -> None:
    arrays = numpy_arrays()
    for name in ("q", "k_cache", "block_table", "cache_seqlens"):
        arrays[name].flags.writeable = False
    decode(arrays)
    np.testing.assert_array_equal(arrays["out"], expected[0])


def test_releases_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_MLA_NUM_THREADS", "1")
    case = make_case(Spec(lengths=(4096,) * 8, num_heads_q=128))
    arrays = case.q, case.k_cache, case.block_table, case.cache_seqlens
    assert turns_during(flash_mla.flash_mla_with_kvcache, *arrays, 512) > 10


def test_checks_arrays_that_are_not_there() -> None:
    """By shape and dtype, results to come included; on any GPU of those that the kernels run on."""
    shapes = {
        "q": _C.ShapeDType([2, 1, 16, 576], "bfloat16"),
        "k_cache": _C.ShapeDType([9, 64, 1, 576], "bfloat16"),
        "block_table": _C.ShapeDType([2, 4], "int32"),
        "cache_seqlens": _C.ShapeDType([2], "int32"),
    }
    more = {"out": None, "lse": None, "tile_scheduler_metadata": None, "num_splits": None}
    options = {"softmax_scale": SCALE, "causal": False}
    assert _C.dense_decode_workspace_size(**shapes, **more, **options) == 0
    # Of 144 parts, each: 32 bytes of plan, 5 words, and 2 slots of 16 rows: out in float32, and 16 bytes for each of 2
    # consumers.
    expected = 144 * (32 + 5 * 8 + 2 * 16 * (512 * 4 + 2 * 16))
    assert _C.dense_decode_max_workspace_size(**shapes, **more, **options) == expected
    wrong: list[tuple[str, list[int], str, type[Exception], str]] = [
        ("q", [2, 1, 16, 576], "float8_e4m3fn", TypeError, "dtype bfloat16 or float16, got float8_e4m3fn"),
        ("q", [2, 1, 16, 576], "complex64", TypeError, "dtype bfloat16 or float16, got an unknown dtype"),
        ("q", [2, 1, 1, 1, 16, 576], "bfloat16", ValueError, "1 to 5 dimensions, got 6"),
        ("k_cache", [9, 64, 1, 576], "float16", TypeError, "dtype bfloat16 as q, got float16"),
        ("cache_seqlens", [], "int32", ValueError, "1 to 5 dimensions, got 0"),
        ("out", [2, 1, 16, 576], "bfloat16", ValueError, r"shape \(2, 1, 16, 512\), got \(2, 1, 16, 576\)"),
    ]
    for name, shape, dtype, error, message in wrong:
        with pytest.raises(error, match=f"^{name}: expected {message}"):
            _C.dense_decode_workspace_size(**{**shapes, **more, name: _C.ShapeDType(shape, dtype)}, **options)


def test_imports_fast_and_alone() -> None:
    script = (
        "import sys, time; start = time.perf_counter(); import flash_mla; end = time.perf_counter();"
        "print(end - start, *({'torch', 'jax', 'cupy', 'numpy'} & set(sys.modules)))"
    )

    def measure() -> tuple[float, list[str]]:
        seconds, *modules = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout.split()
        return float(seconds), modules

    runs = [measure() for _ in range(3)]
    assert all(modules == [] for _, modules in runs)
    assert min(seconds for seconds, _ in runs) < 0.1


def test_the_stub_says_what_the_module_has() -> None:
    stub = ast.parse(Path(flash_mla.__file__).with_name("_C.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    assert {*functions, *classes} == {name for name in vars(_C) if not name.startswith("_")}
    for name, node in functions.items():
        # Defaults are "\\0", "\\1", ... there.
        signature = getattr(_C, name).__nb_signature__[0][0].replace("\\", "")
        compiled = ast.parse(f"{signature}: ...").body[0]
        assert isinstance(compiled, ast.FunctionDef)
        assert [a.arg for a in compiled.args.args] == [a.arg for a in node.args.args]
        assert len(compiled.args.defaults) == len(node.args.defaults)


def test_exceptions_are_runtime_errors() -> None:
    assert issubclass(flash_mla.Unsupported, RuntimeError)
    assert issubclass(flash_mla.CudaError, RuntimeError)


def test_has_a_version() -> None:
    assert flash_mla.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no_such_name"):
        flash_mla.no_such_name  # noqa: B018
