"""Measures one cache spread over several GPUs: examples/context_parallel.py in many cases, in one process group.

torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py                          all named cases
torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py --cases b1_128k_heads    some of them
torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py --custom="--tokens 5000 --exchange heads --graph"

Each case is held against one device first. Times are of one layer, L2 being cold; the slowest rank counts. Exit code 1
where a result is off.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flash_mla
import torch
import torch.distributed as dist
from flash_mla.benchmark import machine, report

HERE = Path(__file__).parent
CASES = {  # in the words of the example's command line
    "b1_128k_gather": "--tokens 131072 --exchange gather --graph",
    "b1_128k_heads": "--tokens 131072 --exchange heads --graph",
    "b1_128k_heads_eager": "--tokens 131072 --exchange heads",
    "b1_1m_gather": "--tokens 1048576 --exchange gather --graph",
    "b1_1m_heads": "--tokens 1048576 --exchange heads --graph",
    "b16_128k_gather": "--tokens 131072 --batch 16 --exchange gather --graph",
    "b16_128k_heads": "--tokens 131072 --batch 16 --exchange heads --graph",
    "b1_128k_s2_heads": "--tokens 131072 --queries 2 --causal --exchange heads --graph",
    "uneven_s2_gather": "--tokens 131072 64 0 20000 1 --queries 2 --causal --exchange gather --graph",
    "empty_ranks_gather": "--tokens 64 0 20000 --exchange gather --graph",
    "empty_ranks_heads": "--tokens 64 0 20000 --exchange heads --graph",
    "one_page_heads": "--tokens 64 --exchange heads --graph",
}
NCCL_VARIABLES = ("NCCL_NVLS_ENABLE", "NCCL_ALGO", "NCCL_PROTO")
EMPTY_BYTES = 16  # a message of this size takes what an exchange takes at least


sys.path.insert(0, str(HERE.parent / "examples"))
example: Any = importlib.import_module("context_parallel")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--custom", action="append", default=[], metavar="OPTIONS", help="of the example; may repeat")
    parser.add_argument("--steps", type=int, default=200, help="steps of one timing, of which there are five")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: <date>-<commit>-cpN.json in results")
    parser.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    return parser.parse_args(arguments)


def chosen_cases(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The example's options by the names of the cases. Raises SystemExit for those that it does not take."""
    texts = {name: CASES[name] for name in options.cases or (() if options.custom else CASES)}
    cases = {
        name: example.parse(shlex.split(text)) for name, text in [*texts.items(), *((t, t) for t in options.custom)]
    }
    for case in cases.values():
        if case.in_turn is not None or case.json is not None:
            raise SystemExit("--custom: expected neither --in-turn nor --json")
        case.steps = options.steps
    return cases


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and what the ranks exchange through."""
    on_gpus = device.type == "cuda"
    return {
        **(machine.describe() if on_gpus else {"gpu": "CPU", "driver": None, "torch": torch.__version__}),
        "num_gpus": torch.cuda.device_count(),
        "backend": dist.get_backend(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpus else None,
        "peer_access": torch.cuda.can_device_access_peer(0, 1) if torch.cuda.device_count() > 1 else None,
        **{name: os.environ.get(name) for name in NCCL_VARIABLES},
    }


def empty_exchanges(device: torch.device, steps: int) -> dict[str, float]:
    """Microseconds of exchanging next to nothing."""
    num_ranks = dist.get_world_size()
    clock = example.Clock(device, steps, graph=device.type == "cuda")
    mine, all_of_them, received = (
        torch.zeros(count, EMPTY_BYTES, dtype=torch.uint8, device=device) for count in (1, num_ranks, num_ranks)
    )
    return {
        "gather": clock.microseconds([lambda: example.all_gather(received, mine)]),
        "heads": clock.microseconds([lambda: dist.all_to_all_single(received, all_of_them)]),
    }


def measure(name: str, options: argparse.Namespace, device: torch.device, monitor: Any) -> dict[str, Any]:
    clock = example.Clock(device, options.steps, options.graph)
    result = example.run_ranks(options, example.make_problem(options, device), clock)
    clocks = {} if monitor is None else monitor.during(clock.spans)
    return {"name": name, **example.shape(options), **result, **clocks}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cases = chosen_cases(options)
    device = example.own_device(graph=any(case.graph for case in cases.values()))
    with example.process_group(device):
        is_first = dist.get_rank() == 0
        facts = describe(device) if is_first else {}
        monitored = is_first and device.type == "cuda"
        with machine.ClockMonitor() if monitored else contextlib.nullcontext() as monitor:
            empty = empty_exchanges(device, options.steps)
            measured = [measure(name, case, device, monitor) for name, case in cases.items()]
        result = {
            "kind": "context_parallel",
            "date": report.now(),
            "commit": machine.commit(options.commit, HERE),
            "version": flash_mla.__version__,
            "machine": facts,
            "ranks": dist.get_world_size(),
            "empty_exchange_us": empty,
            "cases": measured,
        }
    if is_first:
        report.show_context_parallel(result)
        path = report.write(result, options.json, f"-cp{result['ranks']}", HERE / "results")
        print(f"written to {path}")
    return 0 if all(case["passed"] for case in measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())
