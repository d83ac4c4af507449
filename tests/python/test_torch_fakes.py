"""PyTorch's tensors that only stand for others, and modes that watch what is done with tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
from cases import Case, make_case
from flash_mla import Unsupported, flash_mla_with_kvcache, get_mla_metadata, merge_states
from ways import CPU_SPEC, Arrays, Results, arrays_of, left_out, plan_for, planned_inside

torch_module = pytest.importorskip("torch")

from test_torch_library import GPU_SPEC, assert_same, sched_meta_inside  # noqa: E402


@pytest.fixture
def case(device: str | None) -> Case:
    return make_case(GPU_SPEC, "cuda") if device else make_case(CPU_SPEC, "cpu")


def fake(mode: Any, case: Case, device: str) -> Arrays:
    with mode:
        return tuple(  # type: ignore[return-value]
            torch_module.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in arrays_of(case)
        )


def assert_like(got: Results, expected: Results, device: str) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, device)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_fake_tensors(device_type: str) -> None:
    """They tell the results' shapes, those of a GPU without one too."""
    case = make_case(CPU_SPEC, "cpu")
    symbols = import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv()
    mode = import_module("torch._subclasses").FakeTensorMode(shape_env=symbols)
    arrays = fake(mode, case, device_type)
    expected = left_out(*arrays_of(case))
    for way in (left_out, planned_inside, sched_meta_inside):
        with mode:
            assert_like(way(*arrays), expected, device_type)
    with mode:
        metadata, num_splits = plan_for(arrays[0], arrays[1], arrays[3])
    assert metadata.shape[1] == 8
    assert metadata.shape[0] == 1 if device_type == "cpu" else metadata.shape[0] >= 1
    assert num_splits.shape == (CPU_SPEC.batch_size + 1,)
    assert metadata.dtype == num_splits.dtype == torch_module.int32


@pytest.mark.gpu
@pytest.mark.parametrize("num_q_tokens", [1, 64, 65, 256])
def test_a_fake_plan_has_the_size_of_a_real_one(torch: Any, num_q_tokens: int) -> None:
    seqlens = torch.tensor([100, 200], dtype=torch.int32, device="cuda")
    real = get_mla_metadata(seqlens, num_q_tokens, 1)
    with import_module("torch._subclasses").FakeTensorMode() as mode:
        planned = get_mla_metadata(mode.from_tensor(seqlens), num_q_tokens, 1)
    assert [x.shape for x in planned] == [x.shape for x in real]


def test_meta_tensors() -> None:
    case = make_case(CPU_SPEC, "cpu")
    arrays = [x.to("meta") for x in arrays_of(case)]
    assert_like(left_out(*arrays), left_out(*arrays_of(case)), "meta")
    with pytest.raises(Unsupported, match=r"^cache_seqlens: expected a device"):
        planned_inside(*arrays)


def call_with_a_mistake(name: str, change: Callable[[Any], Any]) -> Results:
    """Decodes with a plan, or merges where the name is one of a merge, one of the tensors being another."""
    q, k_cache, block_table, cache_seqlens = arrays_of(make_case(CPU_SPEC, "cpu"))
    metadata, num_splits = plan_for(q, k_cache, cache_seqlens)
    out, lse = left_out(q, k_cache, block_table, cache_seqlens)
    if name in ("outs", "lses"):
        return merge_states(**{"outs": [out], "lses": [lse], name: [change(out if name == "outs" else lse)]})
    if name.startswith("merged "):
        name = name.removeprefix("merged ")
        return merge_states([out], [lse], **{name: change(out if name == "out" else lse)})
    call = {"q": q, "k_cache": k_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
    call |= {"tile_scheduler_metadata": metadata, "num_splits": num_splits, "out": out, "lse": lse}
    return flash_mla_with_kvcache(**call | {name: change(call[name])}, head_dim_v=512)


PLACED = ("k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out", "lse")


@pytest.mark.parametrize("name", [*PLACED, "lses", "merged out", "merged lse"])
def test_names_the_tensor_on_another_device(name: str) -> None:
    """Without memory there, or faked there: whatever looks at shapes alone would go on."""
    like = "outs[0]" if name in ("lses", "merged out", "merged lse") else "q"
    named = {"lses": "lses[0]"}.get(name, name.removeprefix("merged "))
    for mode, device in ((nullcontext(), "meta"), (import_module("torch._subclasses").FakeTensorMode(), "cuda:0")):

        def move(tensor: Any, device: str = device) -> Any:
            return torch_module.empty_like(tensor, device=device)

        with mode, pytest.raises(ValueError, match="expected device") as caught:
            call_with_a_mistake(name, move)
        assert str(caught.value) == f"{named}: expected device cpu as {like}, got {device}"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x.to_sparse(), "torch.sparse_coo"),
        (lambda x: torch_module.nested.nested_tensor(list(x)), "nested"),
        (lambda x: torch_module.quantize_per_tensor(x.float(), 0.1, 0, torch_module.qint8), "quantized"),
    ],
    ids=["sparse", "nested", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_names_the_tensor_that_is_not_dense(change: Callable[[Any], Any], kind: str) -> None:
    for name in ("q", *PLACED, "outs", "lses"):
        named = f"{name}[0]" if name in ("outs", "lses") else name
        with pytest.raises(TypeError) as caught:
            call_with_a_mistake(name, change)
        assert str(caught.value) == f"{named}: expected a dense tensor, got a {kind} one"
    with pytest.raises(TypeError, match=r"^cache_seqlens: expected a dense tensor"):
        get_mla_metadata(change(torch_module.zeros(2, 3)), 16, 1)


def test_states_without_dimensions() -> None:
    outs = torch_module.zeros((3, 2, 1, 4, 512), device="meta")
    with pytest.raises(ValueError, match=r"^lses: expected 1 to 5 dimensions, got 0"):
        merge_states(outs, torch_module.zeros((), device="meta"))


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda x: x[0], ValueError, "shape"),
        ("q", lambda x: x.float(), TypeError, "dtype"),
        ("q", lambda x: x.to(torch_module.float8_e4m3fn), TypeError, "(got float8_e4m3fn|float8 types)"),
        ("k_cache", lambda x: x[..., :512], ValueError, "shape"),
        ("block_table", lambda x: x.long(), TypeError, "dtype"),
        ("cache_seqlens", lambda x: x[1:], ValueError, "shape"),
    ],
)
def test_errors_come_while_tracing(name: str, change: Any, error: type[Exception], message: str) -> None:
    case = make_case(CPU_SPEC, "cpu")
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    mode = import_module("torch._subclasses").FakeTensorMode()
    arrays = dict(zip(names, fake(mode, case, "cpu"), strict=True))
    with mode:
        arrays[name] = change(arrays[name])
    with mode, pytest.raises(error, match=rf"^{name}: .*{message}"):
        left_out(**arrays)
    real = dict(zip(names, arrays_of(case), strict=True))
    real[name] = change(real[name])
    with pytest.raises(Exception, match=rf"{name}: .*{message}"):
        torch_module.compile(left_out, fullgraph=True)(**real)


def test_dispatch_modes_see_the_call(case: Case) -> None:
    seen = []

    class Watch(import_module("torch.utils._python_dispatch").TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        results = planned_inside(*arrays_of(case))
    assert "flash_mla.plan_dense_decode.default" in seen
    assert "flash_mla.dense_decode.default" in seen
    assert_same(results, left_out(*arrays_of(case)))
    seen.clear()
    left_out(*arrays_of(case))
    assert not seen


def test_make_fx_records_the_call(case: Case) -> None:
    arrays = arrays_of(case)
    traced = import_module("torch.fx.experimental.proxy_tensor").make_fx(left_out)(
        *(torch_module.zeros_like(x) for x in arrays)
    )
    assert_same(traced(*arrays), left_out(*arrays))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_calls_once_for_each(case: Case) -> None:
    q, *others = arrays_of(case)
    queries = torch_module.stack([q, q * 0.5])
    out, lse = torch_module.vmap(lambda q: left_out(q, *others))(queries)
    for index in range(2):
        assert_same((out[index], lse[index]), left_out(queries[index], *others))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "error", "message"),
    [
        ("out", (3,), "bfloat16", ValueError, r"^out: expected shape \(2, 1, 4, 512\), got \(3,\)"),
        ("out", (2, 1, 4, 512), "float16", TypeError, "^out: expected dtype bfloat16 as outs, or float32, got float16"),
        ("lse", (2, 1, 4), "float32", ValueError, r"^lse: expected shape \(2, 4, 1\), got \(2, 1, 4\)"),
        ("lse", (2, 4, 1), "int32", TypeError, "^lse: expected dtype float32, got int32"),
    ],
)
def test_results_of_a_merge_are_checked(
    name: str, shape: tuple[int, ...], dtype: str, error: type[Exception], message: str
) -> None:
    with torch_module.device("meta"):
        outs, lses = torch_module.empty(3, 2, 1, 4, 512, dtype=torch_module.bfloat16), torch_module.empty(3, 2, 4, 1)
        result = torch_module.empty(shape, dtype=getattr(torch_module, dtype))
    with pytest.raises(error, match=message):
        merge_states(outs, lses, **{name: result})


def test_no_states_on_meta() -> None:
    with (
        torch_module.device("meta"),
        pytest.raises(ValueError, match=r"^outs: expected 1 to 128 states, got 0"),
    ):
        merge_states(torch_module.empty(0, 2, 1, 4, 512), torch_module.empty(0, 2, 4, 1))
