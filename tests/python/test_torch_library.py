"""torch.ops.flash_mla: calls that torch.compile and torch.export compile, and tensors that only stand for others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cases import Case, Spec, make_case
from checks import same_bits
from flash_mla import flash_mla_with_kvcache, get_mla_metadata, merge_states
from ways import CPU_SPEC, Results, arrays_of, left_out, plan_for, planned_inside

torch_module = pytest.importorskip("torch")

GPU_SPEC = Spec(lengths=(700, 0, 64, 1500, 1), seqlen_q=2, num_heads_q=32, causal=True)
DECODE = "flash_mla::dense_decode"
WORKER_TIMEOUT = 300


@pytest.fixture
def where(device: str | None) -> str:
    """The device of a case's tensors."""
    return device or "cpu"


@pytest.fixture
def case(where: str) -> Case:
    return make_case(GPU_SPEC if where == "cuda" else CPU_SPEC, where)


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch_module.compiler.reset()


def sched_meta_inside(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    meta, num_splits = get_mla_metadata()
    for _ in range(2):
        results = flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, 512, meta, num_splits, softmax_scale=0.05, causal=True
        )
    return results


def surrounded(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    """Work of the compiler's own before and after."""
    out, lse = left_out(q * 2, k_cache, block_table, cache_seqlens + 0)
    return out + 1, lse * 2


def merged(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
    """What a step over a cache that is spread over GPUs does: a list of states, and stacked ones."""
    states = [left_out(q * scale, k_cache, block_table, cache_seqlens) for scale in (1, 2)]
    outs, lses = [out for out, _ in states], [lse for _, lse in states]
    twice = [merge_states(outs, lses), merge_states(torch_module.stack(outs), torch_module.stack(lses))]
    own = torch_module.zeros_like(outs[0], dtype=torch_module.float32)
    out, lse = merge_states([out for out, _ in twice], [lse for _, lse in twice], out=own)
    return out.to(q.dtype), lse


WAYS: list[Callable[..., Results]] = [left_out, planned_inside, sched_meta_inside, surrounded, merged]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


class Layer(torch_module.nn.Module):
    def __init__(self, way: Callable[..., Results]) -> None:
        super().__init__()
        self.way = way

    def forward(self, q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Results:
        return self.way(q, k_cache, block_table, cache_seqlens)


def assert_same(got: Results, expected: Results) -> None:
    for a, b in zip(got, expected, strict=True):
        assert type(a) is torch_module.Tensor
        assert (a.dtype, a.device, a.stride()) == (b.dtype, b.device, b.stride())
        assert same_bits(a, b)


# torch.compile


@every_way
def test_compiles_as_one_graph(case: Case, way: Callable[..., Results]) -> None:
    assert_same(torch_module.compile(way, fullgraph=True)(*arrays_of(case)), way(*arrays_of(case)))


def test_compiles_with_a_given_plan(case: Case) -> None:
    def decode(metadata: Any, num_splits: Any, *arrays: Any) -> Results:
        return flash_mla_with_kvcache(*arrays, 512, metadata, num_splits, causal=True)

    plan = plan_for(case.q, case.k_cache, case.cache_seqlens)
    compiled = torch_module.compile(decode, fullgraph=True)
    assert_same(compiled(*plan, *arrays_of(case)), decode(*plan, *arrays_of(case)))


def test_a_compilers_error_tells_ours() -> None:
    q, k_cache, block_table, cache_seqlens = arrays_of(make_case(CPU_SPEC, "cpu"))
    with pytest.raises(RuntimeError, match="cache_seqlens: expected dtype int32, got int64"):
        torch_module.compile(left_out, backend="eager")(q, k_cache, block_table, cache_seqlens.long())


def test_compiles_with_a_sched_meta_of_the_callers(case: Case) -> None:
    """The first layer fills it, as without a compiler, and others take what it holds."""

    def decode(meta: Any, *arrays: Any) -> Results:
        return flash_mla_with_kvcache(*arrays, 512, meta, None, causal=True)

    compiled = torch_module.compile(decode, fullgraph=True)
    expected = left_out(*arrays_of(case))
    for _ in range(2):
        meta, _ = get_mla_metadata()
        for _ in range(3):
            assert_same(compiled(meta, *arrays_of(case)), expected)
            spec = case.spec
            assert meta.have_initialized
            assert meta.config == (spec.batch_size, spec.seqlen_q, spec.num_heads_q, spec.num_heads_k)
        for held, fresh in zip(
            (meta.tile_scheduler_metadata, meta.num_splits),
            plan_for(case.q, case.k_cache, case.cache_seqlens),
            strict=True,
        ):
            assert same_bits(held, fresh)


@pytest.mark.parametrize("given", [("out",), ("lse",), ("out", "lse")], ids="+".join)
def test_compiled_calls_write_the_callers_results(case: Case, given: tuple[str, ...]) -> None:
    def decode(own: dict[str, Any], *arrays: Any) -> Results:
        return flash_mla_with_kvcache(*arrays, 512, causal=True, **own)

    expected = dict(zip(("out", "lse"), left_out(*arrays_of(case)), strict=True))
    own = {name: torch_module.full_like(expected[name], float("nan")) for name in given}
    results = torch_module.compile(decode, fullgraph=True)(own, *arrays_of(case))
    for name, result in zip(("out", "lse"), results, strict=True):
        assert same_bits(result, expected[name])
        if name in given:
            assert result is own[name]


def test_one_graph_serves_every_batch(where: str) -> None:
    """Of extents that differ from each other: for equal ones, PyTorch takes a guard."""
    counter = import_module("torch._dynamo.testing").CompileCounterWithBackend("inductor")
    compiled = torch_module.compile(planned_inside, fullgraph=True, dynamic=True, backend=counter)
    for batch_size in (4, 5, 7):
        spec = Spec(lengths=(70,) * batch_size, seqlen_q=2, num_heads_q=6, num_heads_k=3, spare_columns=19)
        arrays = [x.clone() for x in arrays_of(make_case(spec, where))]
        assert_same(compiled(*arrays), planned_inside(*arrays))
    assert counter.frame_count == 1


def test_compiled_under_inference_mode(case: Case) -> None:
    with torch_module.inference_mode():
        results = torch_module.compile(left_out, fullgraph=True)(*arrays_of(case))
        assert all(result.is_inference() for result in results)
    assert_same(tuple(result.clone() for result in results), left_out(*arrays_of(case)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_results_have_no_gradient(case: Case, compiled: bool) -> None:
    q, *others = arrays_of(case)
    call = torch_module.compile(left_out, fullgraph=True) if compiled else left_out
    out, lse = call(q.clone().requires_grad_(), *others)
    assert not out.requires_grad
    assert not lse.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()


def run_in_a_process_of_its_own(code: str, *arguments: str) -> None:
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments], capture_output=True, text=True, timeout=WORKER_TIMEOUT
    )
    assert done.returncode == 0, done.stderr


def test_the_first_call_of_a_process_is_a_compiled_one() -> None:
    """With flash_mla imported before PyTorch: it registers its operations while the function is traced."""
    run_in_a_process_of_its_own(
        """
import flash_mla
assert "torch" not in sys.modules
import torch
from cases import make_case
from test_torch_library import assert_same
from ways import CPU_SPEC, arrays_of, left_out, planned_inside
case = make_case(CPU_SPEC, "cpu")
got = torch.compile(planned_inside, fullgraph=True)(*arrays_of(case))
assert_same(got, left_out(*arrays_of(case)))
"""
    )


def test_operations_are_there_after_both_imports() -> None:
    run_in_a_process_of_its_own("import torch, flash_mla; torch.ops.flash_mla.dense_decode.default")


# torch.export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@every_way
def test_exports_with_any_batch(case: Case, way: Callable[..., Results], strict: bool) -> None:
    batch = torch_module.export.Dim("batch")
    q, k_cache, block_table, cache_seqlens = arrays_of(case)
    program = torch_module.export.export(
        Layer(way),
        (q, k_cache, block_table, cache_seqlens),
        dynamic_shapes={"q": {0: batch}, "k_cache": None, "block_table": {0: batch}, "cache_seqlens": {0: batch}},
        strict=strict,
    )
    assert DECODE.replace("::", ".") in str(program.graph)
    for batch_size in (case.spec.batch_size, 2):
        arrays = q[:batch_size], k_cache, block_table[:batch_size], cache_seqlens[:batch_size]
        assert_same(program.module()(*arrays), way(*arrays))


def test_a_plan_of_a_trace_ends_with_it(case: Case) -> None:
    meta, num_splits = get_mla_metadata()

    def planned_outside(*arrays: Any) -> Results:
        for _ in range(2):
            results = flash_mla_with_kvcache(*arrays, 512, meta, num_splits, causal=True)
        return results

    arrays = arrays_of(case)
    for _ in range(2):
        program = torch_module.export.export(Layer(planned_outside), arrays, strict=False)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("flash_mla.plan_dense_decode.default") == 1
        assert targets.count("flash_mla.dense_decode.default") == 2
        results = planned_outside(*arrays)
        assert type(results[0]) is type(case.q)
        assert_same(results, left_out(*arrays))
        assert_same(program.module()(*arrays), results)


def test_a_saved_program_runs_in_another_process(tmp_path: Path) -> None:
    case = make_case(CPU_SPEC, "cpu")
    program = torch_module.export.export(Layer(planned_inside), arrays_of(case))
    torch_module.export.save(program, tmp_path / "layer.pt2")
    torch_module.save((*arrays_of(case), *left_out(*arrays_of(case))), tmp_path / "tensors.pt")
    run_in_a_process_of_its_own(
        """
import torch, flash_mla
program = torch.export.load(sys.argv[1])
*arrays, out, lse = torch.load(sys.argv[2])
got_out, got_lse = program.module()(*arrays)
assert torch.equal(got_out, out) and torch.equal(got_lse, lse)
""",
        str(tmp_path / "layer.pt2"),
        str(tmp_path / "tensors.pt"),
    )


# The operations themselves


def operation_arguments(case: Case) -> dict[str, tuple[Any, ...]]:
    plan = plan_for(case.q, case.k_cache, case.cache_seqlens)
    out, lse = left_out(*arrays_of(case))
    num_q_tokens = case.num_q_tokens_per_head_k
    return {
        "dense_decode": (*arrays_of(case), None, None, 0.04, True),
        "dense_decode with a plan": (*arrays_of(case), *plan, 0.04, False),
        "dense_decode_into": (*arrays_of(case), None, None, 0.04, True, out, lse),
        "plan_dense_decode": (case.cache_seqlens, num_q_tokens, case.spec.num_heads_k),
        "merge_states": ([out, out * 2], [lse, lse + 1]),
        "merge_states_into": ([out, out * 2], [lse, lse + 1], out.float(), lse.clone()),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("dense_decode", "dense_decode with a plan", "dense_decode_into", "plan_dense_decode"),
        *("merge_states", "merge_states_into"),
    ],
)
def test_operations_are_what_they_say(where: str, name: str) -> None:
    """PyTorch's own checks, of finite values: the schema, fake results, what ahead-of-time compilers make of them."""
    spec = Spec(lengths=(70, 129, 64), seqlen_q=2, num_heads_q=6, num_heads_k=3, causal=True)
    case = make_case(spec, where)
    case.k_cache.nan_to_num_(nan=0.1)
    import_module("flash_mla.torch_library")  # registers them, whatever other tests have needed before
    operation = getattr(torch_module.ops.flash_mla, name.partition(" ")[0]).default
    torch_module.library.opcheck(operation, operation_arguments(case)[name])


# On GPUs


@pytest.mark.gpu
@every_way
def test_cuda_graph_trees(torch: Any, way: Callable[..., Results]) -> None:
    """mode="reduce-overhead" records the call in a CUDA graph, which follows new values."""
    case = make_case(GPU_SPEC, "cuda")
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(way, fullgraph=True, mode="reduce-overhead")
    for step in range(6):
        lengths = torch.tensor([700 - step, step, 64, 1500, 1], dtype=torch.int32, device="cuda")
        arrays = case.q * (1 + step), case.k_cache, case.block_table, lengths
        torch.compiler.cudagraph_mark_step_begin()
        got = tuple(result.clone() for result in compiled(*arrays))
        assert_same(got, way(*arrays))  # type: ignore[arg-type]
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@every_way
def test_compiled_calls_run_on_the_current_stream(torch: Any, way: Callable[..., Results]) -> None:
    case = make_case(GPU_SPEC, "cuda")
    expected = way(*arrays_of(case))
    compiled = torch.compile(way, fullgraph=True)
    compiled(*arrays_of(case))
    q = torch.zeros_like(case.q)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        q.copy_(case.q)
        out, lse = compiled(q, *arrays_of(case)[1:])
        q.zero_()
        results = out.clone(), lse.clone()
    torch.cuda.synchronize()
    assert_same(results, expected)


@pytest.mark.gpu
def test_compiled_calls_on_another_device(torch: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make_case(GPU_SPEC, "cuda:1")
    for way in (left_out, planned_inside):
        results = torch.compile(way, fullgraph=True)(*arrays_of(case))
        assert all(result.device.index == 1 for result in results)
        assert_same(results, way(*arrays_of(case)))
    assert torch.cuda.current_device() == 0
