"""Profiles one call of each named case with Nsight Compute: what limits it.

ncu --clock-control none --profile-from-start off -k regex:decode --section WarpStateStats --metrics METRICS \\
    --page raw --csv python benchmarks/profile_decode.py > FILE      runs the cases; METRICS: see --metrics
python benchmarks/profile_decode.py --metrics                        prints METRICS
python benchmarks/profile_decode.py --read FILE                      writes the JSON of what ncu printed

Runs need a Hopper GPU whose counters ncu may read; reading needs none.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from flash_mla.benchmark import machine, report
from flash_mla.benchmark.shapes import SHAPES, named

HERE = Path(__file__).parent
METRICS = {  # by name in the JSON
    "tensor_percent": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "shared_read_percent": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "shared_write_percent": "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    "hbm_percent": "dram__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "hbm_bytes": "dram__bytes_read.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "cycles": "sm__cycles_elapsed.max",
    "ns": "gpu__time_duration.sum",
}
STALLS = "smsp__average_warps_issue_stalled_"
NO_INSTRUCTION = f"{STALLS}no_instruction_per_issue_active.ratio"
MACHINE_MARK = "machine "
CASE_MARK = "case "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(shape.name for shape in SHAPES)}")
    parser.add_argument("--metrics", action="store_true", help="print the metrics that ncu is to count")
    parser.add_argument("--read", type=Path, metavar="FILE", help="what ncu printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: <date>-<commit>-profile.json in results")
    parser.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(METRICS.values()))
    elif options.read is not None:
        result = {
            "kind": "profile",
            "date": report.now(),
            "commit": machine.commit(options.commit, HERE),
            **read(options.read.read_text()),
        }
        print(f"written to {report.write(result, options.json, '-profile', HERE / 'results')}")
    elif (missing := machine.missing()) is not None:
        raise SystemExit(f"profile_decode.py: {missing}")
    else:
        run(options.cases)


def run(names: list[str]) -> None:
    """One call of each case, the second one, between the marks of CUDA's profiler."""
    import torch
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    from flash_mla.benchmark.pool import Pool

    print(f"{MACHINE_MARK}{json.dumps(machine.describe())}", flush=True)
    for shape in named(names) if names else SHAPES:
        pool = Pool(shape)
        plan = get_mla_metadata(pool.cache_seqlens, shape.num_q_tokens_per_head_k, shape.num_heads_k)
        for rotation in range(2):
            if rotation == 1:
                torch.cuda.profiler.start()
            call = pool.arguments(rotation % pool.rotations)
            flash_mla_with_kvcache(**call, tile_scheduler_metadata=plan[0], num_splits=plan[1])
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"{CASE_MARK}{shape.name}", flush=True)


def read(text: str) -> dict[str, Any]:
    """The machine, if it is told, and the cases of what ncu printed. Raises SystemExit where not each has a kernel."""
    lines = text.splitlines()
    machines = [json.loads(line.removeprefix(MACHINE_MARK)) for line in lines if line.startswith(MACHINE_MARK)]
    names = [line.removeprefix(CASE_MARK).strip() for line in lines if line.startswith(CASE_MARK)]
    table = list(csv.DictReader(line for line in lines if line.startswith('"')))[1:]  # the first has units
    if not names or len(names) != len(table):
        raise SystemExit(f"--read: expected a kernel for each case, got {len(table)} kernels and {len(names)} cases")
    cases = [{"name": n, "kernel": row["Kernel Name"], **counters(row)} for n, row in zip(names, table, strict=True)]
    return {"machine": machines[0] if machines else None, "cases": cases}


def counters(row: dict[str, str]) -> dict[str, float]:
    values = {name: float(row[metric].replace(",", "")) for name, metric in METRICS.items()}
    stalls = sum(
        float(value.replace(",", ""))
        for metric, value in row.items()
        if metric.startswith(STALLS) and metric.endswith("_per_issue_active.ratio")
    )
    return {**values, "no_instruction_percent": 100 * float(row[NO_INSTRUCTION].replace(",", "")) / stalls}


if __name__ == "__main__":
    main()
