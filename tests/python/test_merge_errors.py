"""Every mistake in a merge is an error that names the argument, before anything runs. No GPU is needed to say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import CPU, CUDA, READ_ONLY, FakeArray
from flash_mla import _C, merge_states


def states_of(module: Any = np) -> dict[str, Any]:
    return {"outs": module.zeros((3, 2, 1, 4, 512)), "lses": module.zeros((3, 2, 4, 1))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outs": []}, ValueError, "^outs: expected 1 to 128 states, got 0"),
        ({"outs": np.zeros((0, 2, 1, 4, 512), np.float32)}, ValueError, "^outs: expected 1 to 128 states, got 0"),
        ({"outs": np.zeros((129, 2, 1, 4, 512), np.float32)}, ValueError, "^outs: expected 1 to 128 states, got 129"),
        ({"lses": []}, ValueError, "^lses: expected 1 to 128 states, got 0"),
        ({"lses": np.zeros((2, 2, 4, 1), np.float32)}, ValueError, "^lses: expected 3 states as outs, got 2"),
        (
            {"outs": np.zeros((2, 1, 4, 512), np.float32)},
            ValueError,
            r"^outs: expected shape \(num_states, batch, .*512\)",
        ),
        (
            {"lses": np.zeros((3, 8), np.float32)},
            ValueError,
            "^lses: expected 4 dimensions, the first over states, got 2",
        ),
        ({"lses": np.zeros((3, 2, 1, 4), np.float32)}, ValueError, r"^lses\[0\]: expected shape \(2, 4, 1\)"),
        ({"outs": [np.zeros((1, 4, 512), np.float32)]}, ValueError, r"^outs\[0\]: expected shape \(batch, seqlen_q"),
        ({"outs": np.zeros((3, 2, 1, 4, 576), np.float32)}, ValueError, r"^outs\[0\]: expected shape .*512\), got"),
        ({"outs": np.zeros((3, 2, 1, 4, 512))}, TypeError, r"^outs\[0\]: expected dtype bfloat16, float16 or float32"),
        ({"lses": np.zeros((3, 2, 4, 1))}, TypeError, r"^lses\[0\]: expected dtype float32, got float64"),
        ({"outs": 5}, TypeError, "^outs: expected an array of PyTorch, CuPy, JAX or NumPy, got int"),
        ({"outs": [None]}, TypeError, r"^outs\[0\]: expected an array of .*, got NoneType"),
        ({"lses": None}, TypeError, "^lses: expected an array of .*, got NoneType"),
        ({"out": [1]}, TypeError, "^out: expected an array of .*, got list"),
        ({"out": np.zeros((2, 1, 4, 512), np.float16)}, TypeError, "^out: expected dtype float32"),
        ({"out": np.zeros((2, 4, 1, 512), np.float32)}, ValueError, "^out: expected shape"),
        ({"lse": np.zeros((2, 1, 4), np.float32)}, ValueError, "^lse: expected shape"),
        ({"lse": np.zeros((2, 4, 1))}, TypeError, "^lse: expected dtype float32, got float64"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {name: array.astype(np.float32) for name, array in states_of().items()}
    merge_states(**good)
    with pytest.raises(error, match=message):
        merge_states(**good | change)


def test_refuses_results_inside_the_states() -> None:
    good = {name: array.astype(np.float32) for name, array in states_of().items()}
    with pytest.raises(ValueError, match=r"^out: expected memory apart from outs\[1\]"):
        merge_states(**good, out=good["outs"][1])
    with pytest.raises(ValueError, match=r"^lse: expected memory apart from lses\[2\]"):
        merge_states(**good, lse=good["lses"][2])
    frozen = np.zeros((2, 4, 1), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"^lse: .*read-only"):
        merge_states(**good, lse=frozen)


@pytest.mark.parametrize("name", ["outs", "lses", "out", "lse"])
@pytest.mark.parametrize("listed", [False, True])
def test_refuses_arrays_of_two_libraries(name: str, listed: bool) -> None:
    torch = pytest.importorskip("torch")
    arguments: dict[str, Any] = {n: array.astype(np.float32) for n, array in states_of().items()}
    if listed:
        arguments = {n: list(array) for n, array in arguments.items()}
    named, like, value = name, "outs[0]" if listed else "outs", torch.zeros(1)
    if listed and name in arguments:
        named, value = f"{name}[2]", [*arguments[name][:2], value]
    elif name == "outs":
        named, value = "lses", torch.zeros(3, 2, 1, 4, 512)
    message = f"{named}: expected an array of "
    with pytest.raises(TypeError) as caught:
        merge_states(**arguments | {name: value})
    assert str(caught.value).startswith(message)
    assert f" as {like}, got one of " in str(caught.value)


def fake_call(device: tuple[int, int], **changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of _C.merge_states without memory; `changes` says how one of the arrays is made."""
    arrays = {
        "outs": ((3, 2, 1, 4, 512), "bfloat16"),
        "lses": ((3, 2, 4, 1), "float32"),
        "out": ((2, 1, 4, 512), "bfloat16"),
        "lse": ((2, 4, 1), "float32"),
    }
    made = {name: {"shape": shape, "dtype": dtype, "device": device} for name, (shape, dtype) in arrays.items()}
    return {name: FakeArray(**options | changes.get(name, {})) for name, options in made.items()}


@pytest.mark.parametrize("device", [(CPU, 0), (CUDA, 0), (CUDA, 3)], ids=["cpu", "cuda:0", "cuda:3"])
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("outs", {"shape": (3, 2, 1, 4, 500)}, ValueError, r"^outs\[0\]: expected shape"),
        ("outs", {"shape": (2**40, 2, 1, 4, 512)}, ValueError, r"^outs: expected 1 to 128 states, got 1099511627776"),
        ("outs", {"shape": (3, 2, 512)}, ValueError, "^outs: expected 5 dimensions"),
        ("outs", {"shape": (3, 2**20, 2**10, 2**10, 512)}, ValueError, r"^outs\[0\]: .*rows at most"),
        ("outs", {"dtype": "int32"}, TypeError, r"^outs\[0\]: expected dtype bfloat16, float16 or float32, got int32"),
        ("outs", {"strides": (4096, 2048, 512, -512, 1)}, ValueError, r"^outs\[0\]: expected strides of at least 0"),
        ("outs", {"strides": (2**62, 2048, 2048, 512, 2)}, ValueError, r"^outs\[0\]: expected a contiguous last"),
        ("lses", {"shape": (3, 2, 1, 4)}, ValueError, r"^lses\[0\]: expected shape \(2, 4, 1\), got \(2, 1, 4\)"),
        ("lses", {"shape": (4, 2, 4, 1)}, ValueError, "^lses: expected 3 states as outs, got 4"),
        ("lses", {"dtype": "bfloat16"}, TypeError, r"^lses\[0\]: expected dtype float32, got bfloat16"),
        ("lses", {"device": (CUDA, 1)}, ValueError, r"^lses\[0\]: expected device .* as outs\[0\], got cuda:1"),
        ("out", {"dtype": "float16"}, TypeError, "^out: expected dtype bfloat16 as outs, or float32, got float16"),
        ("out", {"strides": (0, 2048, 512, 1)}, ValueError, "^out: expected strides that keep its elements apart"),
        ("out", {"device": (CUDA, 1)}, ValueError, r"^out: expected device .* as outs\[0\], got cuda:1"),
        ("out", {"flags": READ_ONLY}, ValueError, "^out: .*read-only"),
        ("lse", {"strides": (0, 1, 1)}, ValueError, "^lse: expected strides that keep its elements apart"),
        ("lse", {"offset": 2}, ValueError, "^lse: expected an address that is a multiple of 4"),
    ],
    ids=str,
)
def test_errors_come_before_anything_runs(
    device: tuple[int, int], name: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _C.merge_states(**fake_call(device, **{name: change}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("outs", {"strides": (4120, 2060, 2060, 515, 1)}, r"^outs\[0\]: expected strides that are multiples of 8"),
        ("outs", {"strides": (4100, 2048, 2048, 512, 1)}, r"^outs\[1\]: expected an address that is a multiple of 16"),
        ("outs", {"offset": 8}, r"^outs\[0\]: expected an address that is a multiple of 16"),
        ("out", {"offset": 8}, "^out: expected an address that is a multiple of 16"),
        ("out", {"strides": (2060, 2060, 515, 1)}, "^out: expected strides that are multiples of 8"),
    ],
    ids=str,
)
def test_vectors_on_a_gpu_are_aligned(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.merge_states(**fake_call((CUDA, 0), **{name: change}))


def test_lists_of_arrays_are_named_by_place() -> None:
    call = fake_call((CUDA, 0))
    one = {"shape": (2, 1, 4, 512), "dtype": "bfloat16"}
    call["outs"] = [FakeArray(**one), FakeArray(**one | {"dtype": "float16"}), FakeArray(**one)]
    with pytest.raises(TypeError, match=r"^outs\[1\]: expected dtype bfloat16 as outs\[0\], got float16"):
        _C.merge_states(**call)
    call["outs"] = [FakeArray(**one), FakeArray(**one), "no array"]
    with pytest.raises(TypeError, match=r"^outs\[2\]: expected an array that supports DLPack, got str"):
        _C.merge_states(**call)


def test_says_where_a_gpu_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"driver|device"):
        _C.merge_states(**fake_call((CUDA, 63)))
