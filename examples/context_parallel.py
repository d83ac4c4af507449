"""One request's cache spread over several GPUs: each decodes the tokens that it holds, and partial results merge.

torchrun --nproc-per-node 8 examples/context_parallel.py --tokens 131072 --graph    a Hopper GPU a rank; else on the CPU
python examples/context_parallel.py --in-turn 8 --tokens 131072                     the shards in turn, on one device

Every rank has the queries of all heads. Two ways of exchanging the partial results:

--exchange gather   every rank gets all of them and merges all heads
--exchange heads    every rank gets those of its part of the heads, and ends with that part: 1/N of the bytes

Checks the result against one device over the whole cache; exit code 1 if it is off. docs/context_parallel.md says more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flash_mla
import torch
import torch.distributed as dist
from flash_mla import flash_mla_with_kvcache, merge_states
from flash_mla.reference import LSE_ABSOLUTE, LSE_RELATIVE, OUT_ABSOLUTE, OUT_COSINE, OUT_RELATIVE

HEAD_DIM, HEAD_DIM_V = 576, 512
NUM_TIMES = 5  # timings of which the median counts
COLD_BYTES, MAX_LAYERS = 512e6, 64  # what timed calls work through in turn, so that L2 is cold

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since PyTorch 2.13


@dataclass
class Problem:
    """A step of decoding, with the whole cache."""

    q: torch.Tensor  # (batch, seqlen_q, num_heads, 576)
    k_cache: torch.Tensor  # (num_pages, page_size, 1, 576)
    block_table: torch.Tensor  # (batch, max_pages)
    cache_seqlens: torch.Tensor  # (batch,)
    causal: bool

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """On one device."""
        return flash_mla_with_kvcache(
            self.q, self.k_cache, self.block_table, self.cache_seqlens, HEAD_DIM_V, causal=self.causal
        )

    def layers(self, num_ranks: int) -> list[Problem]:
        """This one, and as many with caches elsewhere in a GPU's memory as keep a rank's part of them out of L2."""
        if not self.k_cache.is_cuda:
            return [self]
        part = self.k_cache.numel() * self.k_cache.element_size() / num_ranks
        copies = min(math.ceil(COLD_BYTES / max(part, 1)), MAX_LAYERS) - 1
        return [self, *(replace(self, k_cache=self.k_cache.clone()) for _ in range(copies))]


def make_problem(options: argparse.Namespace, device: torch.device) -> Problem:
    """The same on every rank. Pages of a request lie anywhere in the cache."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor(options.tokens * options.batch, dtype=torch.int32)
    pages = -(-lengths // options.page_size)
    order = torch.randperm(int(pages.sum()), generator=random, dtype=torch.int32)
    block_table = torch.zeros(len(lengths), int(pages.max()), dtype=torch.int32)
    for row, used in zip(block_table, order.split(pages.tolist()), strict=True):
        row[: len(used)] = used

    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def normal(std: float, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    return Problem(
        q=normal(5.0, len(lengths), options.queries, options.heads, HEAD_DIM),
        k_cache=normal(0.05, len(order), options.page_size, 1, HEAD_DIM),
        block_table=block_table.to(device),
        cache_seqlens=lengths.to(device),
        causal=options.causal,
    )


def tokens_on(rank: int, num_ranks: int, tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    """How many of a request's first `tokens` tokens a rank holds, where its page j lies on rank j % num_ranks.

    They are the first ones of those that the rank holds of the request.
    """
    whole_pages, rest = tokens // page_size, tokens % page_size
    own_pages = (whole_pages + num_ranks - 1 - rank) // num_ranks
    return own_pages * page_size + rest * (whole_pages % num_ranks == rank)


class Shard:
    """What one rank holds of the cache: of each request, every num_ranks-th page.

    A request that grows fills a page and goes on with one of the next rank, so nothing ever moves.
    """

    def __init__(self, problem: Problem, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._page_size = problem.k_cache.shape[1]
        # Causal, a query must not see the tokens after its own, and which ranks hold those differs between requests.
        # So each query becomes a request, that sees of each rank's tokens as many as lie before it.
        self._rows = problem.q.shape[1] if problem.causal else 1
        pages = problem.block_table[:, rank::num_ranks]
        self.k_cache = problem.k_cache[pages.flatten().long()]
        table = torch.arange(pages.numel(), dtype=torch.int32, device=pages.device).view(pages.shape)
        self.block_table = table.repeat_interleave(self._rows, 0)
        self.cache_seqlens = torch.empty(self.block_table.shape[0], dtype=torch.int32, device=pages.device)
        self.set_lengths(problem.cache_seqlens)

    def set_lengths(self, cache_seqlens: torch.Tensor) -> None:
        """New lengths of the whole requests: once a step, for all layers."""
        hidden = torch.arange(self._rows - 1, -1, -1, dtype=torch.int32, device=cache_seqlens.device)
        seen = (cache_seqlens[:, None] - hidden).clamp(min=0)
        self.cache_seqlens.copy_(tokens_on(self._rank, self._num_ranks, seen, self._page_size).flatten())

    def decode(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Writes out (batch, seqlen_q, num_heads, 512) and lse (batch, seqlen_q, num_heads)."""
        if self._rows > 1:
            q, out, lse = (x.flatten(0, 1)[:, None] for x in (q, out, lse))
        flash_mla_with_kvcache(
            q, self.k_cache, self.block_table, self.cache_seqlens, HEAD_DIM_V, out=out, lse=lse.transpose(1, 2)
        )


class States:
    """Room for partial results. Each is one piece of memory, so that one collective exchanges out and lse."""

    def __init__(self, num_states: int, batch: int, seqlen_q: int, num_heads: int, like: torch.Tensor) -> None:
        rows = (batch, seqlen_q, num_heads)
        out_bytes = batch * seqlen_q * num_heads * HEAD_DIM_V * like.element_size()
        lse_bytes = batch * seqlen_q * num_heads * 4
        padding = -lse_bytes % 16  # keeps the next state's out on 16 bytes
        self.bytes = like.new_zeros((num_states, out_bytes + lse_bytes + padding), dtype=torch.uint8)
        self.outs = self.bytes[:, :out_bytes].view(like.dtype).view(num_states, *rows, HEAD_DIM_V)
        self.lses = self.bytes[:, out_bytes : out_bytes + lse_bytes].view(torch.float32).view(num_states, *rows)

    def merge(self) -> tuple[torch.Tensor, torch.Tensor]:
        return merge_states(self.outs, self.lses.transpose(2, 3))


class Gather:
    """Every rank gets all partial results."""

    def __init__(self, q: torch.Tensor, num_ranks: int) -> None:
        self.mine = States(1, *q.shape[:3], like=q)
        self.received = States(num_ranks, *q.shape[:3], like=q)
        self.bytes_received = (num_ranks - 1) * self.mine.bytes.numel()

    def collective(self) -> None:
        all_gather(self.received.bytes, self.mine.bytes)

    def exchange(self) -> None:
        self.collective()


class Heads:
    """Every rank gets the partial results of its part of the heads."""

    def __init__(self, q: torch.Tensor, num_ranks: int) -> None:
        batch, seqlen_q, num_heads, _ = q.shape
        if num_heads % num_ranks != 0:
            raise SystemExit(f"--exchange heads: expected --heads that {num_ranks} ranks divide, got {num_heads}")
        self.mine = States(1, batch, seqlen_q, num_heads, like=q)
        self._sent, self.received = (
            States(num_ranks, batch, seqlen_q, num_heads // num_ranks, like=q) for _ in range(2)
        )
        self.bytes_received = (num_ranks - 1) * self._sent.bytes[0].numel()

    def collective(self) -> None:
        dist.all_to_all_single(self.received.bytes, self._sent.bytes)

    def exchange(self) -> None:
        for mine, sent in ((self.mine.outs[0], self._sent.outs), (self.mine.lses[0], self._sent.lses)):
            sent.copy_(mine.unflatten(2, (sent.shape[0], sent.shape[3])).movedim(2, 0))
        self.collective()


class Clock:
    """Times calls on a device, all of them in one CUDA graph if asked to; the slowest rank counts."""

    def __init__(self, device: torch.device, steps: int, graph: bool) -> None:
        self._device, self._steps, self._graph = device, steps, graph
        self.spans: list[tuple[float, float]] = []  # when each timing began and ended, of time.monotonic

    def microseconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one of the calls, which are made in turn."""

        def in_turn() -> None:
            for call in calls:
                call()

        repeat = self.capture(in_turn) if self._graph else in_turn
        rounds = math.ceil(self._steps / len(calls))
        times = torch.empty(NUM_TIMES, dtype=torch.float64)
        for i in range(NUM_TIMES):
            self._wait()
            if dist.is_initialized():
                dist.barrier()
            begin = time.monotonic()
            for _ in range(rounds):
                repeat()
            self._wait()
            self.spans.append((begin, time.monotonic()))
            times[i] = (self.spans[-1][1] - begin) / (rounds * len(calls)) * 1e6
        if dist.is_initialized():
            times = times.to(self._device)
            dist.all_reduce(times, dist.ReduceOp.MAX)
        return statistics.median(times.tolist())

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """A CUDA graph of a call. Its results lie where they lay when it was captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks for events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def run_ranks(options: argparse.Namespace, problem: Problem, clock: Clock) -> dict[str, Any]:
    """This process is one of the ranks."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    way = {"gather": Gather, "heads": Heads}[options.exchange](problem.q, num_ranks)
    layers = problem.layers(num_ranks)
    shards = [Shard(layer, rank, num_ranks) for layer in layers]

    def decode(shard: Shard) -> None:
        shard.decode(problem.q, way.mine.outs[0], way.mine.lses[0])

    def without_exchange(shard: Shard) -> None:
        decode(shard)
        way.received.merge()

    def step(shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        decode(shard)
        way.exchange()
        return way.received.merge()

    expected = problem.decode()
    if options.exchange == "heads":
        expected = expected[0].chunk(num_ranks, 2)[rank], expected[1].chunk(num_ranks, 1)[rank]
    report = compare(*run_step(partial(step, shards[0]), clock, options.graph, [way.mine, way.received]), *expected)
    calls: dict[str, list[Callable[[], object]]] = {
        "one_device": [layer.decode for layer in layers],
        "step": [partial(step, shard) for shard in shards],
        "without_exchange": [partial(without_exchange, shard) for shard in shards],
        "decode": [partial(decode, shard) for shard in shards],
        "exchange": [way.exchange] * len(shards),
        "collective": [way.collective] * len(shards),
        "merge": [way.received.merge] * len(shards),
    }
    times = {name: clock.microseconds(some) for name, some in calls.items()}
    return {
        **report,
        "ranks": num_ranks,
        "exchange": options.exchange,
        "bytes_received_per_rank": way.bytes_received,
        "microseconds": times,
        "speedup": times["one_device"] / times["step"],
        "exchange_share": times["exchange"] / times["step"],
    }


def run_in_turn(options: argparse.Namespace, problem: Problem, clock: Clock) -> dict[str, Any]:
    """All ranks' shards, one after the other, on this device; nothing is exchanged."""
    num_ranks = options.in_turn
    layers = problem.layers(num_ranks)
    shards = [[Shard(layer, rank, num_ranks) for rank in range(num_ranks)] for layer in layers]
    states = States(num_ranks, *problem.q.shape[:3], like=problem.q)

    def step(layer: Sequence[Shard]) -> tuple[torch.Tensor, torch.Tensor]:
        for shard, out, lse in zip(layer, states.outs, states.lses, strict=True):
            shard.decode(problem.q, out, lse)
        return states.merge()

    def decode(shard: Shard) -> None:
        shard.decode(problem.q, states.outs[0], states.lses[0])

    report = compare(*run_step(partial(step, shards[0]), clock, options.graph, [states]), *problem.decode())
    times = {
        "one_device": clock.microseconds([layer.decode for layer in layers]),
        "step": clock.microseconds([partial(step, layer) for layer in shards]),
        "decode": max(
            clock.microseconds([partial(decode, shard) for shard in part]) for part in zip(*shards, strict=True)
        ),
        "merge": clock.microseconds([states.merge]),
    }
    return {
        **report,
        "ranks": num_ranks,
        "exchange": None,
        "microseconds": times,
        "speedup_without_exchange": times["one_device"] / (times["decode"] + times["merge"]),
    }


def run_step(
    step: Callable[[], tuple[torch.Tensor, torch.Tensor]], clock: Clock, graph: bool, states: Sequence[States]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of a step, as a graph if asked to, from states and results that hold NaN before."""
    results: list[torch.Tensor] = []

    def call() -> None:
        results[:] = step()

    replay = clock.capture(call) if graph else call
    for state in states:
        state.bytes.fill_(255)  # NaN
    for result in results:
        result.fill_(float("nan"))
    replay()
    if graph:
        torch.cuda.synchronize()  # before the graph goes
    return results[0], results[1]


def compare(
    out: torch.Tensor, lse: torch.Tensor, expected_out: torch.Tensor, expected_lse: torch.Tensor
) -> dict[str, Any]:
    """Errors, and whether all ranks keep to the contract's tolerances.

    These are for one result against float64. Here are two, each rounded, so cosine differences add up.
    """
    out, lse, expected_out, expected_lse = (x.double() for x in (out, lse, expected_out, expected_lse))
    energy = (out * out + expected_out * expected_out).sum().clamp(min=1e-300)
    cosine = 1 - 2 * (out * expected_out).sum() / energy if out.any() or expected_out.any() else energy * 0
    error_out = (out - expected_out).abs()
    error_lse = (lse - expected_lse).abs().where(lse != expected_lse, 0.0)  # both may be +inf
    passed = (
        bool(((error_out <= OUT_ABSOLUTE) | (error_out <= OUT_RELATIVE * expected_out.abs())).all())
        and bool(((error_lse <= LSE_ABSOLUTE) | (error_lse / expected_lse.abs() <= LSE_RELATIVE)).all())
        and bool(cosine < 2 * OUT_COSINE)
    )
    worst = torch.stack([error_out.max(), error_lse.max(), cosine, torch.tensor(float(not passed), device=out.device)])
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    names = ("error_out", "error_lse", "cosine_difference", "failed")
    report = dict(zip(names, worst.tolist(), strict=True))
    return {"passed": report.pop("failed") == 0, **report}


def own_device(graph: bool) -> torch.device:
    """A Hopper GPU for each of this host's ranks; the CPU where there is none. Raises SystemExit for too few."""
    num_ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) == (9, 0)]
    if not gpus:
        if graph:
            raise SystemExit("--graph: needs a Hopper GPU")
        return torch.device("cpu")
    if num_ranks > len(gpus):
        raise SystemExit(
            f"--nproc-per-node: expected a Hopper GPU for each rank, of which there are {len(gpus)}, got {num_ranks}; "
            "with CUDA_VISIBLE_DEVICES= all run on the CPU"
        )
    device = torch.device("cuda", gpus[rank])
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Makes this process one of torchrun's ranks."""
    if "RANK" not in os.environ:
        raise SystemExit("expected to be started by torchrun (or, the example, with --in-turn N)")
    on_gpus = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    yield
    # Not after an error: others may wait in a collective, which would wait for them. torchrun ends them. The last
    # collective's tensor stays: PyTorch 2.6 may hang where a thread of gloo's drops the last reference to it meanwhile.
    last = torch.zeros((), device=device)
    dist.all_reduce(last)
    dist.destroy_process_group()
    del last


def print_report(report: dict[str, Any]) -> None:
    where = "in turn on" if report["exchange"] is None else f"exchanging by {report['exchange']}, on"
    print(f"{report['ranks']} ranks {where} {report['device']}")
    for name, microseconds in report["microseconds"].items():
        print(f"  {name:<12}{microseconds:10.1f} us")
    for name in ("speedup", "speedup_without_exchange", "exchange_share"):
        if name in report:
            print(f"  {name.replace('_', ' ')}: {report[name]:.2f}")
    if "bytes_received_per_rank" in report:
        print(f"  each rank receives {report['bytes_received_per_rank']:,} bytes a step")
    verdict = "agrees with" if report["passed"] else "is OFF from"
    print(f"  {verdict} one device: out within {report['error_out']:.1e}, lse within {report['error_lse']:.1e}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="tokens of each request")
    parser.add_argument("--batch", type=int, default=1, help="repeats those requests")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1, help="query tokens of a request")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--exchange", choices=("gather", "heads"), default="gather")
    parser.add_argument("--in-turn", type=int, metavar="N", help="N ranks' shards in turn, without torch.distributed")
    parser.add_argument("--graph", action="store_true", help="capture a step in a CUDA graph")
    parser.add_argument("--steps", type=int, default=100, help="steps of one timing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(arguments)


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """What of the options says what a step is."""
    return {key: value for key, value in vars(options).items() if key not in ("json", "in_turn", "exchange")}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = own_device(options.graph)
    with process_group(device) if options.in_turn is None else contextlib.nullcontext():
        clock = Clock(device, options.steps, options.graph)
        run = run_ranks if options.in_turn is None else run_in_turn
        result = run(options, make_problem(options, device), clock)
        is_first = not dist.is_initialized() or dist.get_rank() == 0
    report = {
        "version": flash_mla.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        **shape(options),
        **result,
    }
    if is_first:
        print_report(report)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
