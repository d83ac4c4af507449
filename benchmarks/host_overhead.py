"""Measures what a call of flash_mla_with_kvcache costs the host, with PyTorch tensors on a Hopper GPU.

The whole call counts, from Python to the launches. The shapes are tiny and bursts shorter than the GPU's queue, so that
no call waits for the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flash_mla import __version__, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.benchmark import machine, report
from flash_mla.benchmark.pool import Pool
from flash_mla.benchmark.shapes import Shape

HERE = Path(__file__).parent
TINY = Shape("tiny", 1, 16, 1, 64, "us")
CALLS = 100
REPEATS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help="where to write (default: <date>-<commit>-host.json in benchmarks/results)"
    )
    parser.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    options = parser.parse_args()

    times = {name: host_microseconds(call) for name, call in calls().items()}
    result = {
        "kind": "host_overhead",
        "date": report.now(),
        "commit": machine.commit(options.commit, HERE),
        "version": __version__,
        "machine": machine.describe(),
        "calls": times,
    }
    rows = [[name, *(f"{t[key]:.2f}" for key in ("median_us", "fastest_us"))] for name, t in times.items()]
    report.print_table(["host time of a call", "median us", "fastest us"], rows)
    print(f"\nwritten to {report.write(result, options.json, '-host', HERE / 'results')}")


def calls() -> dict[str, Callable[[], Any]]:
    arguments = Pool(TINY).arguments(0)
    out, lse = arguments.pop("out"), arguments.pop("lse")
    extents = arguments["cache_seqlens"], TINY.num_q_tokens_per_head_k, TINY.num_heads_k
    metadata, num_splits = get_mla_metadata(*extents)
    given = {"tile_scheduler_metadata": metadata, "num_splits": num_splits}
    meta, _ = get_mla_metadata()
    return {
        "metadata given": lambda: flash_mla_with_kvcache(**arguments, **given),
        "metadata given, out and lse given": lambda: flash_mla_with_kvcache(**arguments, **given, out=out, lse=lse),
        "metadata left out": lambda: flash_mla_with_kvcache(**arguments),
        "metadata left out, out and lse given": lambda: flash_mla_with_kvcache(**arguments, out=out, lse=lse),
        "FlashMLASchedMeta": lambda: flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=meta),
        "get_mla_metadata": lambda: get_mla_metadata(*extents),
        "torch.empty_like, for comparison": lambda: torch.empty_like(out),
    }


def host_microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Median and fastest over bursts, per call."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    torch.cuda.synchronize()
    return {"median_us": statistics.median(times), "fastest_us": min(times)}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("host_overhead.py needs a Hopper GPU and PyTorch built with CUDA")
    main()
