"""CUDA graphs and streams of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import Case, Spec, make_case, varied_lengths
from checks import decode, plan, same_bits
from flash_mla import get_mla_metadata
from oracle import assert_close, decode_torch

pytestmark = pytest.mark.gpu

Results = tuple[Any, Any]
SPEC = Spec((500, 0, 1000, 3, 64, 65, 700, 1), 2, num_heads_q=16, causal=True)
CAPACITIES = (2000, 320)  # tokens that every request's block table row has pages for
REPLAYS = 8


@pytest.fixture(params=CAPACITIES)
def case(torch: Any, request: pytest.FixtureRequest) -> Case:
    """A case whose lengths may change up to a capacity: no cell of its cache is dead."""
    full = make_case(Spec((request.param,) * SPEC.batch_size, SPEC.seqlen_q, SPEC.num_heads_q, causal=True), "cuda")
    full.k_cache.nan_to_num_(nan=0.1)
    full.cache_seqlens.copy_(torch.tensor(SPEC.lengths).clamp(max=request.param))
    return full


def change(torch: Any, case: Case, step: int) -> None:
    """New lengths and a new order of the pages, in the same arrays."""
    rng = np.random.default_rng(step)
    capacity = case.spec.lengths[0]
    lengths = rng.integers(0, capacity + 1, SPEC.batch_size) * (rng.random(SPEC.batch_size) < 0.8)
    if step == 1:
        lengths[:] = 0
    case.cache_seqlens.copy_(torch.from_numpy(lengths.astype(np.int32)))
    used = -(-capacity // SPEC.page_size)
    pages = torch.from_numpy(rng.permutation(case.k_cache.shape[0])[:used].astype(np.int32))
    case.block_table[step % SPEC.batch_size, :used] = pages.cuda()


def capture(torch: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """(graph, what `call` returned under capture)"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def replay_with_changes(
    torch: Any, case: Case, graph: Any, results: list[Results], before: Callable[[], Any] = lambda: None
) -> None:
    """Replays on changed values, results poisoned; `before` runs between the change and the replay."""
    for step in range(REPLAYS):
        change(torch, case, step)
        before()
        for out, lse in results:
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
        graph.replay()
        reference = decode_torch(case)
        for out, lse in results:
            assert_close(out, lse, *reference, f"replay {step}")


def test_metadata_left_out(torch: Any, case: Case) -> None:
    graph, result = capture(torch, lambda: decode(case))
    replay_with_changes(torch, case, graph, [result])


def test_planned_inside_the_graph(torch: Any, case: Case) -> None:
    def step() -> list[Results]:
        planned = plan(case)
        return [decode(case, **planned) for _ in range(3)]

    graph, results = capture(torch, step)
    replay_with_changes(torch, case, graph, results)


def test_metadata_updated_in_place(torch: Any, case: Case) -> None:
    planned = plan(case)
    graph, result = capture(torch, lambda: decode(case, **planned))

    def update() -> None:
        for name, fresh in plan(case).items():
            planned[name].copy_(fresh)

    replay_with_changes(torch, case, graph, [result], update)


@pytest.mark.parametrize("lengths", [(9000, 70), (9000,)])
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_replayed_before_there_is_a_plan(torch: Any, num_heads_q: int, lengths: tuple[int, ...]) -> None:
    """Arrays that hold no plan yet give no result, where there are several requests, and leave nothing behind."""
    case = make_case(Spec(lengths, num_heads_q=num_heads_q), "cuda")
    planned = plan(case)
    good = {name: array.clone() for name, array in planned.items()}
    graph, (out, lse) = capture(torch, lambda: decode(case, **planned))
    reference = decode_torch(case)
    for step in range(20):
        for array in planned.values():
            array.zero_()
        graph.replay()
        if len(lengths) == 1:
            assert_close(out, lse, *reference, f"in step {step} without a plan")
        for name, array in planned.items():
            array.copy_(good[name])
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            assert_close(out, lse, *reference, f"after step {step} without a plan")


@pytest.mark.parametrize("lengths", [(200,), (1500,), (200, 300), (5000, 70, 900)])
@pytest.mark.parametrize("num_heads_q", [16, 128])
@pytest.mark.parametrize("planned", [False, True])
def test_replays_take_nothing_from_the_one_before(
    torch: Any, lengths: tuple[int, ...], num_heads_q: int, planned: bool
) -> None:
    """A replay launches with the same token again, and finds its own partial results in the workspace."""
    case = make_case(Spec(lengths, num_heads_q=num_heads_q, spare_columns=320), "cuda")
    given = plan(case) if planned else {}
    graph, (out, lse) = capture(torch, lambda: decode(case, **given))
    for step in range(8):
        case.k_cache.neg_()
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        assert_close(out, lse, *decode_torch(case), f"replay {step}")


def test_sched_meta_inside_the_graph(torch: Any, case: Case) -> None:
    def step() -> list[Results]:
        meta, num_splits = get_mla_metadata()
        return [decode(case, tile_scheduler_metadata=meta, num_splits=num_splits) for _ in range(3)]

    graph, results = capture(torch, step)
    replay_with_changes(torch, case, graph, results)


def test_sched_meta_is_reused_by_the_layers_of_a_step(torch: Any, case: Case) -> None:
    for step in range(REPLAYS):
        change(torch, case, step)
        meta, num_splits = get_mla_metadata()
        assert num_splits is None
        layers = [decode(case, tile_scheduler_metadata=meta, num_splits=num_splits) for _ in range(3)]
        reference = decode_torch(case)
        for out, lse in layers:
            assert_close(out, lse, *reference, f"step {step}")


def test_the_workspace_of_a_graph_is_nobody_elses(torch: Any) -> None:
    """Replays write to it: memory that is allocated after the capture must not be the same."""
    case = make_case(Spec((9000, 70), num_heads_q=128), "cuda")
    graph, (out, lse) = capture(torch, lambda: decode(case))
    others = [torch.full((1 << size,), 7, dtype=torch.uint8, device="cuda") for size in range(9, 27) for _ in range(4)]
    out.fill_(float("nan"))
    graph.replay()
    assert_close(out, lse, *decode_torch(case))
    assert all(bool((other == 7).all()) for other in others)


def test_results_given_to_a_graph(torch: Any, case: Case) -> None:
    out, lse = (torch.empty_like(x) for x in decode(case))
    graph, _ = capture(torch, lambda: decode(case, out=out, lse=lse))
    replay_with_changes(torch, case, graph, [(out, lse)])


def test_graph_of_many_calls_keeps_their_order(torch: Any, case: Case) -> None:
    other = make_case(Spec(varied_lengths(3, 300, seed=5), num_heads_q=128), "cuda")
    graph, results = capture(torch, lambda: [decode(c) for c in (case, other) * 10])
    graph.replay()
    references = decode_torch(case), decode_torch(other)
    for index, (out, lse) in enumerate(results):
        assert_close(out, lse, *references[index % 2], f"call {index}")


def test_two_streams_at_once(torch: Any) -> None:
    specs = Spec(varied_lengths(20, 800, seed=3), num_heads_q=128), Spec(varied_lengths(9, 2000, seed=4), 2)
    cases = [make_case(spec, "cuda") for spec in specs]
    alone = [decode(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results: list[list[Results]] = [[], []]
    for _ in range(200):
        for stream, case, kept in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(decode(case))
    torch.cuda.synchronize()
    for expected, kept in zip(alone, results, strict=True):
        for got in kept:
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("late", ["q", "k_cache", "block_table", "cache_seqlens"])
@pytest.mark.parametrize("own_stream", [False, True])
def test_ordered_behind_what_the_stream_still_does(torch: Any, late: str, own_stream: bool) -> None:
    """An input arrives late on the current stream, and the results are read there at once."""
    case = make_case(Spec((300, 0, 500, 64), num_heads_q=16), "cuda")
    expected = decode(case)
    arriving = getattr(case, late).clone()
    getattr(case, late).zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            torch.cuda._sleep(20_000_000)
            getattr(case, late).copy_(arriving)
            out, lse = decode(case)
            getattr(case, late).zero_()
            copies = out.clone(), lse.clone()
            assert all(same_bits(a, b) for a, b in zip(copies, expected, strict=True))


def test_a_call_waits_for_no_other_stream(torch: Any) -> None:
    """A call returns while another stream is still busy."""
    case = make_case(Spec((300,), num_heads_q=16), "cuda")
    busy, idle, done = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(idle):
        decode(case)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)
        done.record()
    with torch.cuda.stream(idle):
        decode(case)
        assert not done.query()
    torch.cuda.synchronize()
