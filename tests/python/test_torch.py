"""The short way that PyTorch's tensors take through the compiled module, and the long one beside it."""

from __future__ import annotations

import gc
import resource
import weakref
from importlib import import_module
from typing import Any

import pytest
from cases import Case, Spec, make_case
from checks import decode, plan, same_bits
from flash_mla import _C, flash_mla_with_kvcache, get_mla_metadata, merge_states
from flash_mla import decode as decode_module
from oracle import assert_close, decode_torch

torch_module = pytest.importorskip("torch")
is_short = hasattr(torch_module.Tensor, "__dlpack_c_exchange_api__")
needs_short_way = pytest.mark.skipif(not is_short, reason="needs PyTorch with DLPack's exchange table (2.11)")

SPEC = Spec(lengths=(0, 70, 129), seqlen_q=2, num_heads_q=6, num_heads_k=3, causal=True, dtype="float16")


@pytest.fixture
def case() -> Case:
    """A case as PyTorch tensors on the CPU."""
    host = make_case(SPEC)
    arrays = (torch_module.from_numpy(x) for x in (host.q, host.k_cache, host.block_table, host.cache_seqlens))
    case = Case(SPEC, *arrays)
    decode(case)  # the first tensor to come in makes the module look PyTorch up
    return case


@pytest.fixture
def placed(case: Case, device: str | None) -> Case:
    """The same kind of case, on the CPU or on the GPU."""
    return case if device is None else make_case(SPEC, device)


def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_dense_decode", "torch_plan_dense_decode"):
        monkeypatch.setattr(_C, name, lambda *_: None)


def ways_to_call(case: Case) -> list[tuple[Any, Any]]:
    """The results with each form of the metadata, and into the caller's arrays."""
    given = plan(case)
    meta, nothing = get_mla_metadata()
    metas = [decode(case, tile_scheduler_metadata=meta, num_splits=nothing) for _ in range(2)]
    out, lse = (x.new_full(x.shape, float("nan")) for x in metas[0])
    both = [decode(case, out=out), decode(case, lse=lse), decode(case, **given, out=out.clone(), lse=lse.clone())]
    assert both[0][0] is out
    assert both[1][1] is lse
    return [decode(case), decode(case, **given), *metas, *both]


def ways_to_write(case: Case) -> list[Any]:
    """Calls that take out and lse: ours, and PyTorch's own operations that they may become."""
    import_module("flash_mla.torch_library")  # registers these
    operations = torch_module.ops.flash_mla
    inputs = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    out, lse = decode(case)
    outs, lses = torch_module.stack([out, out]), torch_module.stack([lse, lse])
    return [
        lambda **results: decode(case, **results),
        lambda **results: merge_states(outs, lses, **results),
        lambda out=out, lse=lse: operations.dense_decode_into(*inputs, None, None, 0.04, True, out, lse),
        lambda out=out, lse=lse: operations.merge_states_into([*outs], [*lses], out, lse),
    ]


def test_both_ways_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ways_to_call(case)
    long_way(monkeypatch)
    for pair in zip(short, ways_to_call(case), strict=True):
        for a, b in zip(*pair, strict=True):
            assert same_bits(a, b)
            assert (a.dtype, a.device, a.stride()) == (b.dtype, b.device, b.stride())


@needs_short_way
def test_takes_the_short_way(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, _ = get_mla_metadata()
    decode(case, tile_scheduler_metadata=meta)
    monkeypatch.setattr(decode_module, "_decode", lambda *_: pytest.fail("the long way was taken"))
    decode(case)
    decode(case, **plan(case))
    decode(case, tile_scheduler_metadata=meta)
    decode(Case(SPEC, torch_module.nn.Parameter(case.q), case.k_cache, case.block_table, case.cache_seqlens))


def test_results_are_ordinary_tensors(placed: Case) -> None:
    parameter = torch_module.nn.Parameter(placed.q)
    for q in (placed.q, parameter):
        results = decode(Case(SPEC, q, placed.k_cache, placed.block_table, placed.cache_seqlens))
        for result in (*results, *plan(placed).values()):
            assert type(result) is torch_module.Tensor
            assert result.device == placed.q.device
            assert result.is_contiguous()
            assert result.is_leaf
            assert not result.requires_grad
            assert not result.is_inference()
            assert result._base is None
            assert result.storage_offset() == 0
            assert result.untyped_storage().nbytes() == result.numel() * result.element_size()
            assert result.untyped_storage().resizable()
    out, lse = decode(placed)
    out.requires_grad_()
    (out.sum() * lse[lse.isfinite()].sum()).backward()
    assert out.grad is not None


def test_results_under_inference_mode(placed: Case) -> None:
    with torch_module.inference_mode():
        assert all(result.is_inference() for result in decode(placed))


def test_tensors_are_read_as_they_are_now(placed: Case) -> None:
    """What a tensor's Python object stands for may be exchanged."""
    out, _ = decode(placed)
    other = placed.q.flip(-1).contiguous()
    expected, _ = decode(Case(SPEC, other, placed.k_cache, placed.block_table, placed.cache_seqlens))
    assert not same_bits(out, expected)
    originally = placed.q.clone()
    placed.q.data = other
    assert same_bits(decode(placed)[0], expected)
    torch_module.utils.swap_tensors(placed.q, originally)
    assert same_bits(decode(placed)[0], out)
    placed.q.set_(other.untyped_storage(), 0, other.shape, other.stride())
    assert same_bits(decode(placed)[0], expected)


@pytest.mark.parametrize("name", ["q", "k_cache", "cache_seqlens"])
def test_tensors_that_are_yet_to_be_negated(placed: Case, name: str) -> None:
    """As the imaginary part of a conjugate is: memory has the other sign."""
    arguments = placed.arguments()
    expected = flash_mla_with_kvcache(**arguments)
    negated = torch_module._neg_view(-arguments[name])
    assert negated.is_neg()
    got = flash_mla_with_kvcache(**arguments | {name: negated})
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["out", "lse"])
def test_results_that_are_yet_to_be_negated(placed: Case, name: str) -> None:
    out, lse = decode(placed)
    outs, lses = torch_module.stack([out, out]), torch_module.stack([lse, lse])
    got = merge_states(outs, torch_module._neg_view(-lses))
    assert all(same_bits(a, b) for a, b in zip(got, merge_states(outs, lses), strict=True))
    result = torch_module._neg_view(torch_module.zeros_like(out if name == "out" else lse))
    for call in (lambda: decode(placed, **{name: result}), lambda: merge_states(outs, lses, **{name: result})):
        with pytest.raises(TypeError, match=rf"^{name}: expected a tensor whose values lie in memory"):
            call()
    assert not result.any()


@pytest.mark.parametrize("mode", ["enable_grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["out", "lse"])
def test_autograd_notices_what_is_written(placed: Case, name: str, mode: str) -> None:
    for write in ways_to_write(placed):
        result = torch_module.zeros_like(decode(placed)[0 if name == "out" else 1])
        product = (torch_module.ones_like(result).requires_grad_() * result).sum()
        with getattr(torch_module, mode)():
            write(**{name: result})
            write(**{name: torch_module.zeros_like(result)})  # in inference mode one that has no version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_autograd_does_not_take_a_refused_call_for_a_write(placed: Case) -> None:
    out, lse = decode(placed)
    version = out._version
    with pytest.raises(TypeError, match=r"^lse: "):
        decode(placed, out=out, lse=lse.int())
    assert out._version == version


def test_what_pytorch_does_not_export_is_named(placed: Case) -> None:
    placed.k_cache = torch_module.empty(placed.k_cache.shape, dtype=torch_module.bits8, device=placed.k_cache.device)
    with pytest.raises(TypeError, match=r"^k_cache: cannot be read through DLPack: "):
        decode(placed)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_results_that_require_grad(placed: Case, name: str) -> None:
    result = torch_module.zeros_like(decode(placed)[0 if name == "out" else 1]).requires_grad_()
    compiled = torch_module.compile(lambda **results: decode(placed, **results), backend="eager")
    for write in (*ways_to_write(placed), compiled):
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor that does not require grad, got one that"):
            write(**{name: result})
        assert not result.any()
        with torch_module.no_grad():
            write(**{name: result})
            assert result.any()
            result.zero_()


def test_functionalised_calls(placed: Case) -> None:
    arrays = tuple(placed.arguments()[name] for name in ("q", "k_cache", "block_table", "cache_seqlens"))

    def step(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Any:
        metadata, num_splits = get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2] // 3, 3)
        out, lse = flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, 512, metadata, num_splits, causal=True
        )
        return merge_states(torch_module.stack([out, out]), torch_module.stack([lse, lse]))

    got = torch_module.func.functionalize(step)(*arrays)
    assert all(same_bits(a, b) for a, b in zip(got, step(*arrays), strict=True))


@needs_short_way
def test_only_tensors_pass_for_tensors(case: Case) -> None:
    class Impostor:
        __dlpack_c_exchange_api__ = torch_module.Tensor.__dlpack_c_exchange_api__
        __torch_dispatch__ = torch_module.Tensor.__torch_dispatch__

    assert _C.torch_can_read(case.q)
    assert not _C.torch_can_read(Impostor())
    with pytest.raises(TypeError, match=r"^k_cache: .*Impostor"):
        flash_mla_with_kvcache(**case.arguments() | {"k_cache": Impostor()})
    with pytest.raises(TypeError, match=r"^q: expected an array of .*, got dtype"):
        flash_mla_with_kvcache(**case.arguments() | {"q": torch_module.float16})


@needs_short_way
def test_what_it_knows_of_a_type_is_of_that_type(case: Case) -> None:
    """It goes by addresses, so a type that it has seen isn't freed, whose address another would get."""
    seen = type("Seen", (), {})
    assert not _C.torch_can_read(seen())
    reference = weakref.ref(seen)
    del seen
    gc.collect()
    assert reference() is not None


def test_results_are_freed(case: Case) -> None:
    empty = Spec(lengths=(0,) * 8, seqlen_q=2, num_heads_q=128, dtype="float16")
    host = make_case(empty)
    arrays = [torch_module.from_numpy(x) for x in (host.q, host.k_cache, host.block_table, host.cache_seqlens)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        flash_mla_with_kvcache(*arrays, 512)  # 2 MB of results
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_results_too_large(case: Case) -> None:
    """The error is PyTorch's own."""
    q = case.q[:1, :1, :1].expand(1 << 30, 1 << 11, 1 << 12, 576)
    others = case.block_table[:1, :1].expand(1 << 30, 1), case.cache_seqlens[:1].expand(1 << 30)
    with pytest.raises(RuntimeError, match=r"[Ss]torage|memory|numel"):
        flash_mla_with_kvcache(q, case.k_cache, *others, 512)


def test_sched_meta_of_another_step(case: Case) -> None:
    meta, _ = get_mla_metadata()
    decode(case, tile_scheduler_metadata=meta)
    fewer = Case(SPEC, case.q[:, :1], case.k_cache, case.block_table, case.cache_seqlens)
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata: .*\(3, 2, 6, 3\), got \(3, 1, 6, 3\)"):
        decode(fewer, tile_scheduler_metadata=meta)
    with pytest.raises(ValueError, match=r"^num_splits: expected None"):
        decode(case, tile_scheduler_metadata=meta, num_splits=meta.num_splits)


@pytest.mark.parametrize("short", [True, False], ids=["short way", "long way"])
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda x: x[0], ValueError, "shape"),
        ("q", lambda x: x.float(), TypeError, "dtype"),
        ("q", lambda x: x.numpy(), TypeError, "NumPy"),
        ("q", lambda x: x.tolist(), TypeError, "list"),
        ("k_cache", lambda x: x[0], ValueError, "shape"),
        ("k_cache", lambda x: x.bfloat16(), TypeError, "dtype"),
        ("k_cache", lambda x: x.numpy(), TypeError, "NumPy"),
        ("block_table", lambda x: x.long(), TypeError, "dtype"),
        ("block_table", lambda x: None, TypeError, "NoneType"),
        ("cache_seqlens", lambda x: x[1:], ValueError, "shape"),
    ],
)
def test_errors_name_the_argument(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Any,
    error: type[Exception],
    message: str,
    short: bool,
) -> None:
    if not short:
        long_way(monkeypatch)
    arguments = case.arguments()
    # Of arrays of two libraries, the one that isn't as q is named.
    named = "k_cache" if name == "q" and message == "NumPy" else name
    text = "PyTorch" if named != name else message
    with pytest.raises(error, match=rf"^{named}: .*{text}"):
        flash_mla_with_kvcache(**arguments | {name: change(arguments[name])})


@pytest.mark.gpu
def test_results_are_known_to_the_allocator(torch: Any) -> None:
    """A call leaves its two results behind and nothing else; record_stream keeps their memory from being reused."""
    case = make_case(Spec((300, 5), num_heads_q=16), "cuda")
    decode(case)
    before = torch.cuda.memory_allocated()
    out, lse = decode(case)
    rounded = sum(-(-x.numel() * x.element_size() // 512) * 512 for x in (out, lse))
    assert torch.cuda.memory_allocated() - before == rounded

    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
    address, shape = out.data_ptr(), out.shape
    out.record_stream(side)
    del out
    assert torch.empty(shape, dtype=torch.bfloat16, device="cuda").data_ptr() != address
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_the_workspace_is_the_allocators(torch: Any) -> None:
    """It counts as memory allocated during the call, and is as large as the library says."""
    case = make_case(Spec((300, 5), num_heads_q=128), "cuda")
    out, lse = decode(case)
    options = {"tile_scheduler_metadata": None, "num_splits": None, "softmax_scale": 1.0, "causal": False}
    arrays = (case.q, case.k_cache, case.block_table, case.cache_seqlens, out, lse)
    num_bytes = _C.dense_decode_workspace_size(*arrays, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode(case, out=out, lse=lse)
    assert torch.cuda.memory_allocated() == before
    slack = 1 << 21  # what the allocator may add to a block
    assert num_bytes <= torch.cuda.max_memory_allocated() - before < num_bytes + slack


@pytest.mark.gpu
def test_on_a_device_that_is_not_current(torch: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make_case(Spec((9000, 5), num_heads_q=16), "cuda:1")
    with torch.cuda.device(1):
        expected = decode(case)
    with torch.cuda.device(0):
        before = torch.cuda.memory_allocated(0)
        results = decode(case)
        assert torch.cuda.memory_allocated(0) == before
        assert torch.cuda.current_device() == 0
    for a, b in zip(results, expected, strict=True):
        assert a.device == case.q.device
        assert same_bits(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_layers_that_differ_in_addresses_only(torch: Any, num_heads_q: int) -> None:
    """In turn, with a call of another shape now and then: what the library remembers of a call must not show."""
    layers = [make_case(Spec((300, 0, 70), num_heads_q=num_heads_q, seed=seed), "cuda") for seed in range(3)]
    other = make_case(Spec((300, 70), num_heads_q=num_heads_q, page_size=16), "cuda")
    references = [decode_torch(case) for case in (*layers, other)]
    for order in ((0, 1, 2, 0, 1, 2), (3, 0, 3, 2, 1, 1)):
        for index in order:
            case = (*layers, other)[index]
            assert_close(*decode(case), *references[index], f"layer {index} of {order}")


@pytest.mark.gpu
def test_memory_short_on_the_gpu(torch: Any) -> None:
    """The error is PyTorch's own, which servers catch to shrink a batch."""
    case = make_case(Spec((5,), num_heads_q=16), "cuda")
    q = case.q[:, :1, :1].expand(1, 1 << 20, 1 << 10, 576)
    with pytest.raises(torch.OutOfMemoryError):
        flash_mla_with_kvcache(q, case.k_cache, case.block_table, case.cache_seqlens, 512)
