"""Measures what a call of flash_mla_with_kvcache costs the host, with PyTorch tensors on a Hopper GPU.

The whole call counts, from Python to the launches, in the form that the README shows. The shapes are tiny and bursts
shorter than the GPU's queue, so that no call waits for the GPU. With --cpp, the C++ benchmark's figures go into the
result too; what no call can go below is the bare launch there.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flash_mla import _C, __version__, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.benchmark import machine, report
from flash_mla.benchmark.pool import Pool
from flash_mla.benchmark.shapes import HEAD_DIM_V, Shape

HERE = Path(__file__).parent
TINY = Shape("tiny", 1, 16, 1, 64, "us")
CALLS = 100
REPEATS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help="where to write (default: <date>-<commit>-host.json in benchmarks/results)"
    )
    parser.add_argument("--cpp", type=Path, help="flash_mla_host_overhead, built with -DFLASH_MLA_BUILD_BENCHMARKS=ON")
    parser.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("host_overhead.py needs a Hopper GPU and PyTorch built with CUDA")

    times = {name: host_microseconds(call) for name, call in calls().items()}
    pieces = {name: host_microseconds(call) for name, call in pieces_of_a_call().items()}
    if options.cpp is not None:
        pieces |= {f"C++: {name}": figures for name, figures in cpp_microseconds(options.cpp).items()}
    result = {
        "kind": "host_overhead",
        "date": report.now(),
        "commit": machine.commit(options.commit, HERE),
        "version": __version__,
        "machine": machine.describe(),
        "calls": times,
        "pieces": pieces,
    }
    for heading, group in (("host time of a call", times), ("of its pieces, and of others", pieces)):
        rows = [[name, *(f"{t[key]:.2f}" for key in ("median_us", "fastest_us"))] for name, t in group.items()]
        report.print_table([heading, "median us", "fastest us"], rows)
        print()
    print(f"written to {report.write(result, options.json, '-host', HERE / 'results')}")


def calls() -> dict[str, Callable[[], Any]]:
    q, k_cache, block_table, cache_seqlens, out, lse = arrays()
    extents = TINY.num_q_tokens_per_head_k, TINY.num_heads_k
    metadata, splits = get_mla_metadata(cache_seqlens, *extents)
    meta, _ = get_mla_metadata()
    decode = flash_mla_with_kvcache
    return {
        "metadata given": lambda: decode(
            q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, metadata, splits, causal=False
        ),
        "metadata given, out and lse given": lambda: decode(
            q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, metadata, splits, causal=False, out=out, lse=lse
        ),
        "metadata left out": lambda: decode(q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, causal=False),
        "metadata left out, out and lse given": lambda: decode(
            q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, causal=False, out=out, lse=lse
        ),
        "FlashMLASchedMeta": lambda: decode(
            q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, meta, None, causal=False
        ),
        "get_mla_metadata": lambda: get_mla_metadata(cache_seqlens, *extents),
        "torch.empty_like, for comparison": lambda: torch.empty_like(out),
    }


def pieces_of_a_call() -> dict[str, Callable[[], Any]]:
    q, k_cache, block_table, cache_seqlens, out, lse = arrays()
    metadata, splits = get_mla_metadata(cache_seqlens, TINY.num_q_tokens_per_head_k, TINY.num_heads_k)
    decode, scale = _C.torch_dense_decode, 576**-0.5
    num_bytes = _C.dense_decode_workspace_size(
        q, k_cache, block_table, cache_seqlens, out, lse, metadata, splits, scale, False
    )
    allocate, free = torch._C._cuda_cudaCachingAllocator_raw_alloc, torch._C._cuda_cudaCachingAllocator_raw_delete
    stream = torch.cuda.current_stream().cuda_stream
    return {
        "compiled module, metadata given": lambda: decode(
            q, k_cache, block_table, cache_seqlens, None, None, metadata, splits, scale, False, None
        ),
        "compiled module, metadata given, out and lse given": lambda: decode(
            q, k_cache, block_table, cache_seqlens, out, lse, metadata, splits, scale, False, None
        ),
        "a launch by PyTorch (torch.cuda._sleep)": lambda: torch.cuda._sleep(0),
        "a torch.empty of the workspace, made and freed": lambda: torch.empty(
            num_bytes, dtype=torch.uint8, device="cuda"
        ),
        "the workspace's bytes without a tensor, likewise": lambda: free(allocate(num_bytes, stream)),
    }


def arrays() -> tuple[Any, ...]:
    """q, k_cache, block_table, cache_seqlens, out and lse of the tiny call."""
    arguments = Pool(TINY).arguments(0)
    return tuple(arguments[name] for name in ("q", "k_cache", "block_table", "cache_seqlens", "out", "lse"))


def cpp_microseconds(program: Path) -> dict[str, dict[str, float]]:
    """What the C++ benchmark prints: a heading, then a line for each name, its median and its fastest."""
    torch.cuda.synchronize()
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [line.rsplit(maxsplit=2) for line in lines[1:]]
    return {name.strip(): {"median_us": float(median), "fastest_us": float(best)} for name, median, best in rows}


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
    main()
