"""How the cost of a call grows: short hot bursts for each point of a few planes of (context, batch, heads, s_q)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from . import machine, oracle
from ._torch import torch
from .decode import GIVEN, measure_ceilings, our_call
from .pool import Memory, Pool, cache_values, num_rotations
from .report import Progress, now
from .roofline import Ceilings, hot_rates
from .shapes import Shape
from .timing import Plan, Timed, time_hot

MEMORY_SHARE = 0.7  # of what is free, for caches
BURST_SECONDS = 0.2
BUDGET_SECONDS = 150.0
MAX_FAILURES = 5  # with more, as where the GPU no longer answers, there is no use in going on
CONTEXTS = tuple(1 << i for i in range(10, 21))
BATCHES = tuple(1 << i for i in range(10))
HEADS = (8, 16, 32, 64, 128)
QUERIES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plane:
    """Two extents of a step that vary, and the two that stay."""

    name: str
    title: str
    x: str
    y: str
    fixed: dict[str, int]


PLANES = (
    Plane("context_h128", "128 heads, 1 query", "context", "batch_size", {"num_heads_q": 128, "seqlen_q": 1}),
    Plane("context_h16", "16 heads, 1 query", "context", "batch_size", {"num_heads_q": 16, "seqlen_q": 1}),
    Plane("rows_b64", "batch 64, 8k tokens", "num_heads_q", "seqlen_q", {"batch_size": 64, "context": 8192}),
    Plane("rows_b1", "batch 1, 64k tokens", "num_heads_q", "seqlen_q", {"batch_size": 1, "context": 65536}),
)
_AXES = {"context": CONTEXTS, "batch_size": BATCHES, "num_heads_q": HEADS, "seqlen_q": QUERIES}


def points(dtype: str = "bfloat16", page_size: int = 64) -> list[Shape]:
    """The shapes of all planes, each once; coarse ones first, so that a run cut short leaves a whole picture."""
    found: dict[tuple[int, ...], Shape] = {}
    for plane in PLANES:
        for extents in _extents(plane):
            key = (extents["batch_size"], extents["num_heads_q"], extents["seqlen_q"], extents["context"])
            name = "b{}_h{}_s{}_{}".format(*key)
            shape = Shape(name, *key, "us", causal=key[2] > 1, dtype=dtype, page_size=page_size)
            found.setdefault(key, shape)
    return sorted(found.values(), key=_fineness)


def _extents(plane: Plane) -> Iterator[dict[str, int]]:
    for x in _AXES[plane.x]:
        for y in _AXES[plane.y]:
            yield {plane.x: x, plane.y: y, **plane.fixed}


def _fineness(shape: Shape) -> int:
    """How many of the two large extents are between powers of 4."""
    return sum(int(math.log2(extent)) % 2 for extent in (shape.batch_size, shape.mean_seqlen_k))


def split_by_memory(shapes: list[Shape], num_bytes: float) -> tuple[list[Shape], list[Shape]]:
    """Those whose caches fit, and the others."""
    sizes = [2 * cache_values(shape, num_rotations(shape)) for shape in shapes]
    fitting = [shape for shape, size in zip(shapes, sizes, strict=True) if size <= num_bytes]
    return fitting, [shape for shape, size in zip(shapes, sizes, strict=True) if size > num_bytes]


def run(shapes: list[Shape], plan: Plan, budget_seconds: float, commit: str, progress: Progress) -> dict[str, Any]:
    """Measure the points that fit into memory and, one after another, into the time."""
    begin = time.monotonic()
    free = torch.cuda.mem_get_info()[0]
    fitting, too_large = split_by_memory(shapes, MEMORY_SHARE * free)
    result: dict[str, Any] = {
        "kind": "sweep",
        "date": now(),
        "commit": commit,
        "version": __version__,
        "machine": machine.describe(),
        "ceilings": {},
        "timing": asdict(plan),
        "planes": [asdict(plane) for plane in PLANES],
        "points": [],
        "skipped": [{"point": shape.name, "reason": "memory"} for shape in too_large],
        "failures": [],
    }
    progress.phase("random data")
    memory = Memory(fitting)
    with machine.ClockMonitor() as monitor:
        ceilings = measure_ceilings(memory, plan, monitor, progress, result)
        try:
            for index, shape in enumerate(fitting):
                late = time.monotonic() - begin > budget_seconds
                if late or len(result["failures"]) > MAX_FAILURES:
                    reason = "time" if late else "failures"
                    result["skipped"] += [{"point": left.name, "reason": reason} for left in fitting[index:]]
                    break
                progress.phase(shape.name)
                _try_point(shape, memory, plan, ceilings, result)
                progress.advance()
        except KeyboardInterrupt:
            result["failures"].append({"case": "", "error": "interrupted; later points were not measured"})
    return result


def _try_point(shape: Shape, memory: Memory, plan: Plan, ceilings: Ceilings, result: dict[str, Any]) -> None:
    try:
        result["points"].append(_measure(shape, memory, plan, ceilings))
    except Exception as error:
        result["failures"].append({"case": shape.name, "error": f"{type(error).__name__}: {error}"})


def _measure(shape: Shape, memory: Memory, plan: Plan, ceilings: Ceilings) -> dict[str, Any]:
    pool = Pool(shape, memory)
    call = our_call(pool, GIVEN)
    pool.poison_results()
    call(0)
    oracle.check(pool, 0, pool.out, pool.lse, pool.some_requests(1))
    hot = time_hot({GIVEN: Timed(call, pool.rotations)}, plan)[GIVEN]
    rates = hot_rates(shape, hot.microseconds, ceilings)
    return {
        "batch_size": shape.batch_size,
        "num_heads_q": shape.num_heads_q,
        "seqlen_q": shape.seqlen_q,
        "context": shape.mean_seqlen_k,
        **rates,
        "ceiling_percent": max(rates["mma_percent"], rates["hbm_percent"]),
    }
