"""Measures dense decode from the source tree: `flash-mla bench`, with results in benchmarks/results.

python benchmarks/bench_decode.py                      all named cases
python benchmarks/bench_decode.py compute_s1_4k        some of them
python benchmarks/bench_decode.py --custom 32,128,1,4096
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from typing import Any

from flash_mla.benchmark import command

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    parser.add_argument("--skeleton", type=Path, help="a compiled skew_skeleton, run beside the cases as a yardstick")
    options = parser.parse_args()
    extra = None if options.skeleton is None else lambda: {"skeleton": run_skeleton(options.skeleton)}
    return command.run(options, folder=HERE / "results", tree=HERE, extra=extra)


def run_skeleton(path: Path) -> list[dict[str, Any]]:
    """Hot and cold TFLOP/s of each line that the skeleton prints."""
    printed = subprocess.run([str(path.resolve())], capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^(.+?)\s+cold\s+([\d.]+) TFLOP/s.*\|\s+hot\s+([\d.]+) TFLOP/s", re.MULTILINE)
    lines = [{"name": name, "cold": float(cold), "hot": float(hot)} for name, cold, hot in pattern.findall(printed)]
    if not lines:
        raise ValueError(f"--skeleton: {path} printed no line with cold and hot TFLOP/s")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
