"""Measures steps of random shapes in turn with FlashMLA: whether any is slower, and how the ratios are spread.

python benchmarks/random_steps.py                  for a minute
python benchmarks/random_steps.py --seconds 240 --seed 2

Batch 1 to 512, 8 to 128 heads, 1 to 4 queries, 256 to 90k tokens on average: equal, normally or log-normally
distributed, or one long request among short ones; every second block table is as wide as a server's. Hot, L2 being
cold; the longest request of each step is held against the float64 oracle first. Exit code 1 where one is off.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flash_mla.benchmark import decode, machine, oracle, peers, report
from flash_mla.benchmark.pool import Memory, Pool
from flash_mla.benchmark.shapes import Shape
from flash_mla.benchmark.timing import Plan, Timed, time_hot

BATCHES = (1, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)
HEADS = (8, 16, 16, 32, 64, 64, 128, 128, 128)
QUERIES = (1, 1, 1, 1, 2, 2, 4)
MEAN_LOG2 = (8.0, 16.5)
MAX_TOKENS, MAX_LENGTH = 3_000_000, 163840
KINDS = ("equal", "normal", "log-normal", "one long")
BATCHES_OF_ROWS = ((1, 1), (2, 16), (17, 66), (67, 132), (133, 512))  # of the table
MAX_RELATIVE_ERROR = 4e-3  # root mean square of out, bfloat16 having 8 bits
MAX_ERROR_LSE = 1e-4
PLAN = Plan(burst_seconds=0.06, bursts=2)


@dataclass(frozen=True)
class Step(Shape):
    """A shape whose lengths are drawn."""

    drawn: tuple[int, ...] = ()

    def lengths(self) -> list[int]:
        return list(self.drawn)


def draw(rng: random.Random) -> Step:
    heads, queries = rng.choice(HEADS), rng.choice(QUERIES)
    batch, mean = MAX_TOKENS, MAX_TOKENS
    while 2 * batch * mean > MAX_TOKENS:
        batch, mean = rng.choice(BATCHES), int(2 ** rng.uniform(*MEAN_LOG2))
    kind = rng.choice(KINDS) if batch > 1 else KINDS[0]
    factors = {
        "equal": lambda: 1.0,
        "normal": lambda: rng.gauss(1.0, 0.5),
        "log-normal": lambda: math.exp(rng.gauss(-0.5, 1.0)),
        "one long": lambda: rng.uniform(0.2, 1.8),
    }
    lengths = [min(max(int(mean * factors[kind]()), queries), MAX_LENGTH) for _ in range(batch)]
    if kind == "one long":
        lengths[rng.randrange(batch)] = min(16 * mean, MAX_LENGTH)
    wide = rng.random() < 0.5
    name = f"b{batch}_h{heads}_s{queries}_{mean}_{kind}{'_wide' if wide else ''}".replace(" ", "_")
    return Step(
        name=name,
        batch_size=batch,
        num_heads_q=heads,
        seqlen_q=queries,
        mean_seqlen_k=max(sum(lengths) // batch, 1),
        unit="us",
        causal=queries > 1,
        table_tokens=MAX_LENGTH if wide else 0,
        drawn=tuple(lengths),
    )


def check(pool: Pool, out: Any, lse: Any) -> None:
    """Hold the longest request against the oracle. (Short ones round to more than the bounds of long ones.)"""
    (request,) = pool.some_requests(1)
    expected_out, expected_lse = oracle.decode(
        pool.q[request], pool.k_cache(0), pool.block_table[request], pool.lengths[request], pool.shape.causal
    )
    error = float((out[request].double() - expected_out).norm() / expected_out.norm())
    error_lse = float((lse[request].double() - expected_lse).abs().max())
    if not (error <= MAX_RELATIVE_ERROR and error_lse <= MAX_ERROR_LSE):
        raise oracle.WrongResultError(f"out is off by {error:.2g} of its size, lse by {error_lse:.2g}")


def measure(step: Step, memory: Memory, peer: peers.Peer, monitor: machine.ClockMonitor) -> dict[str, Any]:
    pool = Pool(step, memory)
    call = decode.our_call(pool, decode.GIVEN)
    pool.poison_results()
    call(0)
    check(pool, pool.out, pool.lse)
    prepared = peer.prepare(peer.load(), pool)
    hot = time_hot({"ours": Timed(call, pool.rotations), "peer": Timed(prepared.call, pool.rotations)}, PLAN)
    ours, theirs = hot["ours"].microseconds, hot["peer"].microseconds
    return {
        "step": step.name,
        "batch_size": step.batch_size,
        "num_heads_q": step.num_heads_q,
        "seqlen_q": step.seqlen_q,
        "tokens": step.tokens,
        "longest": max(step.drawn),
        "table_tokens": step.table_tokens,
        "us": ours,
        "peer_us": theirs,
        "ratio": theirs / ours,
        **monitor.during(hot["ours"].bursts),
    }


def print_ratios(title: str, steps: Sequence[dict[str, Any]]) -> None:
    def row(name: str, some: Sequence[dict[str, Any]]) -> list[str]:
        figures = report.spread(step["ratio"] for step in some)
        return [name, str(len(some)), *(f"{figure:.2f}" for figure in figures)]

    groups = [("all", list(steps))]
    for low, high in BATCHES_OF_ROWS:
        name = f"batch {low} to {high}" if low < high else f"batch {low}"
        groups.append((name, [step for step in steps if low <= step["batch_size"] <= high]))
    groups += [(f"{heads} heads", [s for s in steps if s["num_heads_q"] == heads]) for heads in sorted(set(HEADS))]
    header = (f"speed over {title}", "steps", "least", "nine of ten", "median", "most")
    report.print_table(header, [row(name, some) for name, some in groups if some])
    for step in sorted(steps, key=lambda step: float(step["ratio"]))[:5]:
        print(f"{step['ratio']:.3f} {step['step']}: {step['us']:.1f} us, {title} {step['peer_us']:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flash-mla-module", metavar="MODULE", help="where DeepSeek's flash_mla is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: <date>-<commit>-random.json in results")
    parser.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    options = parser.parse_args()
    found, missing = peers.chosen(["flash_mla"], options.flash_mla_module)
    if not found:
        sys.exit(f"there is no FlashMLA to compare with: {missing}")
    (peer,) = found
    rng = random.Random(options.seed)
    drawn = [draw(rng) for _ in range(int(8 * options.seconds))]
    memory = Memory(drawn)
    result: dict[str, Any] = {
        "kind": "random_steps",
        "date": report.now(),
        "commit": machine.commit(options.commit, Path(__file__).parents[1]),
        "machine": machine.describe(),
        "seed": options.seed,
        "peer": peer.installed_as(),
        "steps": [],
        "failures": [],
    }
    begin = time.monotonic()
    with machine.ClockMonitor() as monitor:
        for step in drawn:
            if time.monotonic() - begin > options.seconds:
                break
            try:
                result["steps"].append(measure(step, memory, peer, monitor))
            except Exception as error:
                result["failures"].append({"step": step.name, "error": f"{type(error).__name__}: {error}"})
                print(result["failures"][-1], flush=True)
            torch.cuda.synchronize()
    if result["steps"]:
        print_ratios(peer.title, result["steps"])
    print(report.write(result, options.json, "-random", Path(__file__).parent / "results"))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
