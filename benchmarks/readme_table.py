"""Writes the tables of measured figures in README and in pages of docs from the newest JSONs in results.

python benchmarks/readme_table.py            rewrites what is between the two markers
python benchmarks/readme_table.py --check    fails where a table is not up to date
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash_mla.benchmark import report
from flash_mla.benchmark.shapes import REFERENCE_SKELETON, SHAPES

README = Path(__file__).parents[1] / "README.md"
CONTEXT_PARALLEL = Path(__file__).parents[1] / "docs" / "context_parallel.md"
KERNELS = Path(__file__).parents[1] / "docs" / "kernels" / "dense_decode.md"
RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
RUNS = 5  # that the page of the kernel compares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where README is not up to date")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--context-parallel", type=Path, default=CONTEXT_PARALLEL)
    parser.add_argument("--kernels", type=Path, default=KERNELS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    every_run = report.of_kind("decode", options.results)
    all_runs = [run for run in every_run if not table_tokens(run) and has_named_cases(run)]
    if not all_runs:
        raise SystemExit(f"no result of bench_decode.py with all named cases in {options.results}")
    by_gpu = {run["machine"]["gpu"]: run for run in all_runs}
    decodes = [by_gpu[gpu] for gpu in sorted(by_gpu, reverse=True)]
    several = report.of_kind("context_parallel", options.results)
    wide = next((run for run in reversed(every_run) if table_tokens(run) and is_same_gpu(run, decodes[0])), None)
    host, steps = (report.newest(kind, options.results) for kind in ("host_overhead", "random_steps"))
    update(options.readme, tables(decodes, host, wide, steps), options.check)
    update(options.context_parallel, context_parallel_tables(several), options.check)
    runs = [run for run in all_runs if run.get("skeleton") and is_same_gpu(run, decodes[0])]
    profile = report.newest("profile", options.results)
    text = kernel_tables(decodes[0], profile, runs[-RUNS:])
    update(options.kernels, f"{text}\n\n{beside_flash_mla_table(all_runs)}", options.check)


def update(page: Path, text: str, check: bool) -> None:
    """Puts `text` between the page's markers, or raises SystemExit if it is not there and this is a check."""
    old = page.read_text()
    new = replaced(old, text)
    if check and new != old:
        raise SystemExit(f"{page} is not up to date: run benchmarks/readme_table.py")
    if not check:
        page.write_text(new)


def replaced(page: str, text: str) -> str:
    """The page with `text` between its markers. Raises SystemExit where there is not one pair of them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise SystemExit(f"the page needs one {BEGIN} and one {END} after it")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def table_tokens(decode: dict[str, Any]) -> int:
    """The tokens that block tables were given room for, or 0 where they were as wide as the longest request needs."""
    return max((case["shape"].get("table_tokens", 0) for case in decode["cases"]), default=0)


def has_named_cases(decode: dict[str, Any]) -> bool:
    """Whether all were measured: tables are not of what somebody tried out."""
    return {case["shape"]["name"] for case in decode["cases"]} >= {shape.name for shape in SHAPES}


def is_same_gpu(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["machine"]["gpu"] == other["machine"]["gpu"])


def tables(
    decodes: Sequence[dict[str, Any]],
    host: dict[str, Any] | None,
    wide: dict[str, Any] | None = None,
    steps: dict[str, Any] | None = None,
) -> str:
    """A table for each GPU's result, what words mean, and what the short cases of `wide` and random `steps` take."""
    parts = [table(decode) for decode in decodes]
    parts.append(
        "As CUDA graphs, with L2 cold and the plan given. Hot: bursts under the power limit; cold: a few calls after a "
        "rest. Block tables are as wide as the longest request needs."
    )
    if wide is not None:
        times = (
            f"{case['shape']['name']} {case['hot']['us']:.1f} us{share_of_flash_mla(case)}"
            for case in wide["cases"]
            if case["shape"]["unit"] == "us"
        )
        parts[-1] += (
            f"\nWhere tables have room for {table_tokens(wide):,} tokens a request, hot, on one "
            f"{wide['machine']['gpu']} at commit {wide['commit']}: {'; '.join(times)}."
        )
    if steps is not None:
        parts[-1] += f"\n{random_steps(steps)}"
    if host is not None:
        given, left_out, empty = (
            host["calls"][name]["median_us"]
            for name in ("metadata given", "metadata left out", "torch.empty_like, for comparison")
        )
        parts[-1] += (
            f"\nA call costs the host {given:.1f} us with the plan given and {left_out:.1f} us with it left out, "
            f"on a host that takes {empty:.1f} us for one of the call's two torch.empty_like."
        )
    return "\n\n".join(parts)


def random_steps(result: dict[str, Any]) -> str:
    ratios = [step["ratio"] for step in result["steps"]]
    least, nine_of_ten, median, _ = report.spread(ratios)
    num_slower = sum(ratio < 1 for ratio in ratios)
    return (
        f"Of {len(ratios)} random steps (`benchmarks/random_steps.py`, seed {result['seed']}) on one "
        f"{result['machine']['gpu']} at commit {result['commit']}, hot, {num_slower or 'none'} took longer than "
        f"FlashMLA's ({result['peer']}): the speed relative to it is {least:.2f} at least, "
        f"{nine_of_ten:.2f} or more in nine of ten, and {median:.2f} in the median."
    )


def table(decode: dict[str, Any]) -> str:
    """Rates of each case, and how they compare with peers of the same run, or where there are none with a reference."""
    gpu = decode["machine"]
    peers = list(dict.fromkeys(title for case in decode["cases"] for title in case.get("ratio_to_peers", {})))
    titles = peers or ["FlashMLA"]
    lines = [
        f"**{gpu['gpu']}**",
        "",
        "| case | batch, heads, s_q, tokens | hot | cold | of the ceiling, hot "
        + "".join(f"| to {title}, hot (cold) " for title in titles)
        + "|",
        "|---" * (5 + len(titles)) + "|",
        *(row(case, peers) for case in decode["cases"]),
        "",
        f"Measured {decode['date'][:10]} on one of these (driver {gpu['driver']}) at commit {decode['commit']}. "
        f"Ceilings: {decode['ceilings']['hbm_tbps']:.2f} TB/s and {decode['ceilings']['mma_tflops']:.0f} TFLOP/s.",
    ]
    if peers:
        lines.append(
            f"The last columns are the speed relative to {' and '.join(report.of_distributions(decode, peers))}, "
            "in turn with ours in the same run, on the same inputs."
        )
    else:
        lines.append(f"The last column is the speed relative to {decode['reference']}.")
    if decode.get("skeleton") and not peers:
        here, there = decode["skeleton"][0], REFERENCE_SKELETON
        lines.append(
            f"GPUs differ: a fixed yardstick at 128 heads gave {here['hot']:.0f} TFLOP/s ({here['cold']:.0f}) in this "
            f"run, {there['hot']} ({there['cold']}) beside FlashMLA."
        )
    return "\n".join(lines)


def kernel_tables(decode: dict[str, Any], profile: dict[str, Any] | None, runs: Sequence[dict[str, Any]] = ()) -> str:
    """Ratios to FlashMLA held against the yardstick, the same of `runs`, and what a profile says of each case."""
    tables = []
    if decode.get("skeleton"):
        here, there = decode["skeleton"][0], REFERENCE_SKELETON
        lines = ["| case | to the reference, hot (cold) | held against the skeleton |", "|---|---|---|"]
        held = held_ratios(decode)
        for case in decode["cases"]:
            if (name := case["shape"]["name"]) in held:
                lines.append(f"| {name} | {pair(case['ratio_to_reference'])} | {pair(held[name])} |")
        lines += [
            "",
            f"At {decode['commit']}; the skeleton gave {here['hot']:.0f} TFLOP/s ({here['cold']:.0f}) in this run, "
            f"{there['hot']} ({there['cold']}) beside FlashMLA, the reference.",
        ]
        tables.append("\n".join(lines))
    if runs:
        tables.append(runs_table(runs))
    if profile is not None:
        tables.append(profile_table(profile))
    return "\n\n".join(tables)


def held_ratios(decode: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each case limited by the tensor cores would be to FlashMLA, had the GPU given the skeleton what the
    reference's gave it.
    """
    here, there = decode["skeleton"][0], REFERENCE_SKELETON
    return {
        case["shape"]["name"]: {
            state: case["ratio_to_reference"][state] * there[state] / here[state] for state in ("hot", "cold")
        }
        for case in decode["cases"]
        if case["shape"]["unit"] == "TFLOP/s" and case["ratio_to_reference"]["cold"] is not None
    }


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Held ratios of each run, the latest first, on GPUs that differ."""
    held = [held_ratios(run) for run in reversed(runs)]
    names = list(held[0])
    lines = [f"| held, at commit | skeleton, TFLOP/s | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for run, ratios in zip(reversed(runs), held, strict=True):
        skeleton = run["skeleton"][0]
        cells = (pair(ratios[name]) if name in ratios else "-" for name in names)
        lines.append(f"| {run['commit']} | {skeleton['hot']:.0f} ({skeleton['cold']:.0f}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_flash_mla_table(runs: Sequence[dict[str, Any]]) -> str:
    """FlashMLA's time over ours, and ours over FlashMLA's where latency counts, of each run that measured both."""
    title = "FlashMLA"
    both = [run for run in reversed(runs) if any(title in case.get("ratio_to_peers", {}) for case in run["cases"])]
    heads = (
        f"{run['machine']['gpu'].split()[1]}, {run['ceilings']['hbm_tbps']:.2f} TB/s, at {run['commit']}"
        for run in both
    )
    lines = [f"| FlashMLA in turn, hot (cold) | {' | '.join(heads)} |", "|---" * (len(both) + 1) + "|"]
    ratios = [{case["shape"]["name"]: case["ratio_to_peers"].get(title) for case in run["cases"]} for run in both]
    for shape in (case["shape"] for case in (both[0]["cases"] if both else [])):
        is_share = shape["unit"] == "us"
        cells = (
            "-" if (ratio := of_run.get(shape["name"])) is None else pair(inverse(ratio) if is_share else ratio)
            for of_run in ratios
        )
        words = "our share of its time" if is_share else "our speed over its"
        lines.append(f"| {shape['name']}, {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_of_flash_mla(case: dict[str, Any]) -> str:
    ratio = case.get("ratio_to_peers", {}).get("FlashMLA")
    return "" if ratio is None else f", {inverse(ratio)['hot']:.2f} of FlashMLA's time"


def inverse(ratio: dict[str, float]) -> dict[str, float]:
    return {state: 1 / value for state, value in ratio.items()}


def pair(ratio: dict[str, float]) -> str:
    return f"{ratio['hot']:.2f} ({ratio['cold']:.2f})"


def profile_table(profile: dict[str, Any]) -> str:
    percents = ("tensor", "shared_read", "shared_write", "hbm", "l2", "issue", "no_instruction")
    titles = ("tensor pipe", "shared memory reads", "writes", "HBM busy", "L2 sectors", "issue slots", "misses")
    lines = [
        f"| percent | {' | '.join(titles)} | from HBM, MB | through L2, MB |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for case in profile["cases"]:
        values = [f"{case[f'{name}_percent']:.0f}" for name in percents]
        values += [f"{case[name] / 1e6:.0f}" for name in ("hbm_bytes", "l2_bytes")]
        lines.append(f"| {case['name']} | {' | '.join(values)} |")
    lines += ["", f"Single calls at {profile['commit']}, profiled by ncu on one {profile['machine']['gpu']}."]
    return "\n".join(lines)


def context_parallel_tables(results: list[dict[str, Any]]) -> str:
    """A table for each number of ranks: of the newest result on GPUs, of named cases."""
    newest = {
        result["ranks"]: result
        for result in results
        if result["machine"]["gpu"] != "CPU" and not any(case["name"].startswith("-") for case in result["cases"])
    }
    return "\n\n".join(context_parallel_table(newest[ranks]) for ranks in sorted(newest))


def context_parallel_table(result: dict[str, Any]) -> str:
    gpu, empty = result["machine"], result["empty_exchange_us"]
    lines = [
        "| case | one GPU, us | step | decode | exchange | merge | faster | exchange of the step | KB a rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        names = ("one_device", "step", "decode", "exchange", "merge")
        times = " | ".join(f"{case['microseconds'][name]:.1f}" for name in names)
        lines.append(
            f"| {case['name']} | {times} | {case['speedup']:.2f} | {100 * case['exchange_share']:.0f} % "
            f"| {case['bytes_received_per_rank'] / 1e3:.0f} |"
        )
    worst = max((case["error_out"] for case in result["cases"]), default=0.0)
    off = [case["name"] for case in result["cases"] if not case["passed"]]
    verdict = f"All results agreed with one GPU's: out within {worst:.0e}."
    if off:
        verdict = f"OFF from one GPU's result: {', '.join(off)}."
    lines += [
        "",
        f"Measured {result['date'][:10]} on {result['ranks']} {gpu['gpu']} of one host (driver {gpu['driver']}, NCCL "
        f"{gpu['nccl']}, NVLink multicast {'off' if gpu['NCCL_NVLS_ENABLE'] == '0' else 'as NCCL chooses'}) at commit "
        f"{result['commit']}, the slowest rank's time. {verdict} "
        f"Exchanging 16 bytes takes {empty['gather']:.1f} us (gather) and {empty['heads']:.1f} us (heads).",
    ]
    return "\n".join(lines)


def row(case: dict[str, Any], peers: Sequence[str]) -> str:
    shape, hot, cold = case["shape"], case["hot"], case["cold"]
    spread = shape["std_seqlen_k"]
    tokens = f"normal({shape['mean_seqlen_k']}, {spread})" if spread else str(shape["mean_seqlen_k"])
    seqlen_q = f"{shape['seqlen_q']} causal" if shape["causal"] else str(shape["seqlen_q"])
    ceiling, kind = max((hot["mma_percent"], "MMA"), (hot["hbm_percent"], "HBM"))
    ratios = [case["ratio_to_peers"].get(title) for title in peers] or [case["ratio_to_reference"]]
    return (
        f"| {shape['name']} | {shape['batch_size']}, {shape['num_heads_q']}, {seqlen_q}, {tokens} "
        f"| {measured(shape, hot)} | {measured(shape, cold)} | {ceiling:.0f} % {kind} "
        f"{''.join(f'| {against(ratio)} ' for ratio in ratios)}|"
    )


def against(ratio: dict[str, float | None] | None) -> str:
    """ "hot (cold)", or what there is of it."""
    if ratio is None or ratio["hot"] is None:
        return "-"
    return f"{ratio['hot']:.2f}" + ("" if ratio["cold"] is None else f" ({ratio['cold']:.2f})")


def measured(shape: dict[str, Any], rates: dict[str, float]) -> str:
    """The time, and the rate in the shape's unit where that is one."""
    rate = {"TFLOP/s": f", {rates['tflops']:.0f} TFLOP/s", "TB/s": f", {rates['tbps']:.2f} TB/s"}
    return f"{rates['us']:.1f} us{rate.get(shape['unit'], '')}"


if __name__ == "__main__":
    main()
