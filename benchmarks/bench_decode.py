"""Measures dense decode on a Hopper GPU, hot and cold, and checks each case against the float64 oracle.

python benchmarks/bench_decode.py                      all named cases
python benchmarks/bench_decode.py compute_s1_4k        some of them
python benchmarks/bench_decode.py --custom 32,128,1,4096
"""

from __future__ import annotations

import argparse
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import machine
import report
import torch
from flash_mla import __version__, flash_mla_with_kvcache, get_mla_metadata
from pool import Pool
from roofline import HBM_TBPS, MMA_TFLOPS, rates, ratios
from shapes import QUICK, REFERENCE_SOURCE, SHAPES, Shape, named
from timing import Call, Plan, Timed, time_cold, time_hot

GIVEN = "metadata given"
LEFT_OUT = "metadata left out"
INSIDE = "planned in each call"
QUICK_PLAN = Plan(burst_seconds=0.15, bursts=1, rests=2)


def main() -> None:
    options = parse()
    plan = QUICK_PLAN if options.quick else Plan()
    result: dict[str, Any] = {
        "kind": "decode",
        "date": report.now(),
        "commit": machine.commit(options.commit),
        "version": __version__,
        "machine": machine.describe(),
        "ceilings": {"hbm_tbps": HBM_TBPS, "mma_tflops": MMA_TFLOPS},
        "reference": REFERENCE_SOURCE,
        "timing": asdict(plan),
    }
    if options.skeleton:
        result["skeleton"] = run_skeleton(options.skeleton)
    variants = [GIVEN, LEFT_OUT, INSIDE] if options.planning else [GIVEN]
    with machine.ClockMonitor() as monitor:
        result["cases"] = [measure(shape, variants, plan, monitor) for shape in chosen_shapes(options)]
    show(result)
    print(f"\nwritten to {report.write(result, options.json)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(shape.name for shape in SHAPES)}; default: all")
    parser.add_argument("--custom", metavar="BATCH,HEADS,S_Q,TOKENS", help="another shape")
    parser.add_argument("--std", type=int, default=0, help="of the custom shape's lengths (default: all the same)")
    parser.add_argument("--causal", action="store_true", help="the custom shape is causal")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help=f"one short burst; without cases: {', '.join(QUICK)}")
    parser.add_argument("--planning", action="store_true", help="also time calls that plan, in turn with the others")
    parser.add_argument("--skeleton", type=Path, help="a compiled skew_skeleton, run first as a yardstick")
    parser.add_argument(
        "--json", type=Path, help="where to write (default: <date>-<commit>.json in benchmarks/results)"
    )
    parser.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    return parser.parse_args()


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    if options.custom:
        batch_size, num_heads_q, seqlen_q, tokens = (int(x) for x in options.custom.split(","))
        custom = Shape(
            f"custom_b{batch_size}_h{num_heads_q}_s{seqlen_q}_{tokens}",
            *(batch_size, num_heads_q, seqlen_q, tokens),
            unit="us",
            std_seqlen_k=options.std,
            causal=options.causal,
        )
        shapes = [custom]
    else:
        default = list(QUICK) if options.quick else [shape.name for shape in SHAPES]
        shapes = named(options.cases or default)
    return [replace(shape, dtype=options.dtype, page_size=options.page_size) for shape in shapes]


def measure(shape: Shape, variants: list[str], plan: Plan, monitor: machine.ClockMonitor) -> dict[str, Any]:
    """Checks a case and times it; the first variant is the one that counts, the others are reported beside it."""
    pool = Pool(shape)
    calls = {variant: make_call(pool, variant) for variant in variants}
    for call in calls.values():
        for rotation in {0, pool.rotations - 1}:
            pool.poison_results()
            call(rotation)
            pool.check_results(rotation)
    timed = {variant: Timed(call, pool.rotations) for variant, call in calls.items()}
    cold_us = time_cold(timed, plan)
    hot_us = time_hot(timed, plan)
    pool.check_results(pool.rotations - 1)
    hot = rates(shape, hot_us[variants[0]].microseconds)
    cold = rates(shape, cold_us[variants[0]])
    print(f"{shape.name}: {hot['us']:.1f} us hot, {cold['us']:.1f} us cold", flush=True)
    return {
        "shape": asdict(shape),
        "tokens": sum(shape.lengths()),
        "rotations": pool.rotations,
        "hot": {**hot, **monitor.during(hot_us[variants[0]].bursts)},
        "cold": cold,
        "ratio_to_reference": ratios(shape, hot, cold),
        "variants": {v: {"hot_us": hot_us[v].microseconds, "cold_us": cold_us[v]} for v in variants},
    }


def make_call(pool: Pool, variant: str) -> Call:
    shape = pool.shape

    def plan() -> dict[str, Any]:
        metadata, num_splits = get_mla_metadata(pool.cache_seqlens, shape.num_q_tokens_per_head_k, shape.num_heads_k)
        return {"tile_scheduler_metadata": metadata, "num_splits": num_splits}

    if variant == LEFT_OUT:
        return lambda rotation: flash_mla_with_kvcache(**pool.arguments(rotation))
    if variant == INSIDE:
        return lambda rotation: flash_mla_with_kvcache(**pool.arguments(rotation), **plan())
    given = plan()
    return lambda rotation: flash_mla_with_kvcache(**pool.arguments(rotation), **given)


def run_skeleton(path: Path) -> list[dict[str, Any]]:
    """Hot and cold TFLOP/s of each line that the skeleton prints."""
    printed = subprocess.run([str(path.resolve())], capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^(.+?)\s+cold\s+([\d.]+) TFLOP/s.*\|\s+hot\s+([\d.]+) TFLOP/s", re.MULTILINE)
    lines = [{"name": name, "cold": float(cold), "hot": float(hot)} for name, cold, hot in pattern.findall(printed)]
    if not lines:
        raise ValueError(f"--skeleton: {path} printed no line with cold and hot TFLOP/s")
    return lines


def show(result: dict[str, Any]) -> None:
    gpu = result["machine"]
    print(f"\n{gpu['gpu']}, driver {gpu['driver']}, {result['date']}, commit {result['commit']}")
    print(f"ratio: speed relative to {result['reference']}\n")
    header = ["case", "hot us", "cold us", "TFLOP/s", "cold", "% MMA", "TB/s", "cold", "% HBM", "ratio", "cold"]
    header += ["MHz", "watts"]
    rows = []
    for case in result["cases"]:
        hot, cold, ratio = case["hot"], case["cold"], case["ratio_to_reference"]
        cells = [(hot["us"], 1), (cold["us"], 1), (hot["tflops"], 0), (cold["tflops"], 0), (hot["mma_percent"], 0)]
        cells += [(hot["tbps"], 2), (cold["tbps"], 2), (hot["hbm_percent"], 0), (ratio["hot"], 2), (ratio["cold"], 2)]
        cells += [(hot["sm_mhz"], 0), (hot["watts"], 0)]
        rows.append([case["shape"]["name"], *(report.number(*cell) for cell in cells)])
    report.print_table(header, rows)
    if len(result["cases"][0]["variants"]) > 1:
        show_variants(result)
    for line in result.get("skeleton", []):
        print(f"skeleton, {line['name']}: {line['hot']:.0f} TFLOP/s hot, {line['cold']:.0f} cold")


def show_variants(result: dict[str, Any]) -> None:
    variants = list(result["cases"][0]["variants"])
    print("\nus per call, hot (cold)")
    rows = []
    for case in result["cases"]:
        times = [case["variants"][variant] for variant in variants]
        rows.append([case["shape"]["name"], *(f"{t['hot_us']:.1f} ({t['cold_us']:.1f})" for t in times)])
    report.print_table(["case", *variants], rows)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("bench_decode.py needs a Hopper GPU and PyTorch built with CUDA")
    main()
