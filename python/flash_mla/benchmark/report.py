"""Results as tables on the terminal and as JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

_WIDTH_OF_A_FILE = 160  # columns where the output is no terminal


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def file_name(result: dict[str, Any], suffix: str = "") -> str:
    """The name that a result's JSON has by default."""
    return f"{result['date'][:10]}-{result['commit']}{suffix}.json"


def write(result: dict[str, Any], path: Path | None, suffix: str = "", folder: Path = Path()) -> Path:
    """Write a result, which has "date" and "commit", to the path or to <date>-<commit><suffix>.json in the folder."""
    target = path or folder / file_name(result, suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return target


def newest(kind: str, folder: Path) -> dict[str, Any] | None:
    """The latest result of a kind ("decode", "host_overhead", "sweep") in a folder, if there is one."""
    return next(reversed(of_kind(kind, folder)), None)


def of_kind(kind: str, folder: Path) -> list[dict[str, Any]]:
    """All results of a kind in a folder, the latest last."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted((r for r in results if r["kind"] == kind), key=lambda r: str(r["date"]))


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def spread(values: Iterable[float]) -> tuple[float, float, float, float]:
    """The least of some values, what nine of ten reach, the median and the largest."""
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 10], statistics.median(ordered), ordered[-1]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    console().print(_table("", header, rows))


def console() -> Console:
    """Standard output, wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)


class Progress:
    """A bar on standard error: how many steps are done, and what is being done now."""

    def __init__(self, num_steps: int) -> None:
        columns = (
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=num_steps)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, text: str) -> None:
        """Say what comes next."""
        self._bar.update(self._task, description=text)

    def advance(self) -> None:
        """A step is done."""
        self._bar.advance(self._task)


def show_decode(result: dict[str, Any]) -> None:
    """Print a result of kind "decode": rates of each case, then the peers and the variants where there are some."""
    out = console()
    gpu, ceilings = result["machine"], result["ceilings"]
    out.print(f"{gpu['gpu']}, driver {gpu['driver']}, {result['date']}, commit {result['commit']}", highlight=False)
    out.print(
        f"ceilings, hot (cold), {ceilings['source']}: HBM {ceilings['hbm_tbps']:.2f} "
        f"({ceilings['hbm_tbps_cold']:.2f}) TB/s, tensor cores {ceilings['mma_tflops']:.0f} "
        f"({ceilings['mma_tflops_cold']:.0f}) TFLOP/s",
        highlight=False,
    )
    if result["cases"]:
        out.print(_rates_table(result))
        out.print(f"vs reference: speed relative to {result['reference']}", highlight=False)
        titles = list(result["cases"][0]["peers"])
        if titles:
            out.print(_peers_table(result, titles))
            out.print(f"peers: {', '.join(of_distributions(result, titles))}", highlight=False, markup=False)
        if len(result["cases"][0]["variants"]) > 1:
            out.print(_variants_table(result))
    for title, why in result["peers_missing"].items():
        out.print(f"{title} was not measured: {why}", highlight=False, markup=False)
    _show_failures(out, result)


def of_distributions(result: dict[str, Any], titles: Sequence[str]) -> list[str]:
    """These titles of peers, each with the distribution that it came from, where the result tells."""
    installed = result.get("peers_installed_as", {})
    return [f"{title} ({installed[title]})" if installed.get(title) else title for title in titles]


def show_sweep(result: dict[str, Any]) -> None:
    """Print what a sweep has measured, skipped and failed at; its numbers are in the JSON and the plot."""
    out = console()
    gpu, ceilings = result["machine"], result["ceilings"]
    out.print(f"{gpu['gpu']}, driver {gpu['driver']}, {result['date']}, commit {result['commit']}", highlight=False)
    reasons = [skipped["reason"] for skipped in result["skipped"]]
    out.print(
        f"{len(result['points'])} points measured, {reasons.count('memory')} skipped for memory, "
        f"{reasons.count('time')} for time; ceilings {ceilings['hbm_tbps']:.2f} TB/s and "
        f"{ceilings['mma_tflops']:.0f} TFLOP/s, {ceilings['source']}",
        highlight=False,
    )
    _show_failures(out, result)


def show_context_parallel(result: dict[str, Any]) -> None:
    """Print a result of kind "context_parallel": what the parts of each case take, and whether its result is right."""
    out = console()
    gpu, empty = result["machine"], result["empty_exchange_us"]
    out.print(
        f"{result['ranks']} ranks on {gpu['gpu']}, driver {gpu['driver']}, {gpu['backend']} {gpu['nccl'] or ''}, "
        f"{result['date']}, commit {result['commit']}; exchanging nothing takes {empty['gather']:.1f} us (gather), "
        f"{empty['heads']:.1f} us (heads)",
        highlight=False,
    )
    names = ("one_device", "step", "decode", "exchange", "collective", "merge", "without_exchange")
    header = ["us", *(name.replace("_", " ") for name in names), "speedup", "exchange %", "KB", "error"]
    rows: list[list[str]] = []
    for case in result["cases"]:
        times = [number(case["microseconds"][name], 1) for name in names]
        share, received = 100 * case["exchange_share"], case["bytes_received_per_rank"] / 1e3
        error = f"{case['error_out']:.0e}" if case["passed"] else "OFF"
        rows.append([case["name"], *times, number(case["speedup"], 2), number(share, 0), number(received, 0), error])
    out.print(_table("", header, rows))
    for case in result["cases"]:
        if not case["passed"]:
            off = f"out by {case['error_out']:.1e}, lse by {case['error_lse']:.1e}"
            out.print(f"OFF {case['name']}: {off}", style="red", highlight=False, markup=False)


def _show_failures(out: Console, result: dict[str, Any]) -> None:
    for failure in result["failures"]:
        out.print(f"FAILED {failure['case']}: {failure['error']}", style="red", highlight=False, markup=False)


def _rates_table(result: dict[str, Any]) -> Table:
    header = ["case", "us", "TFLOP/s", "% MMA", "TB/s", "% HBM", "vs reference", "MHz", "watts"]
    rows: list[list[str]] = []
    for case in result["cases"]:
        hot, cold, ratio = case["hot"], case["cold"], case["ratio_to_reference"]
        cells = [_pair(hot["us"], cold["us"], 1), _pair(hot["tflops"], cold["tflops"], 0)]
        cells += [_pair(hot["mma_percent"], cold["mma_percent"], 0), _pair(hot["tbps"], cold["tbps"], 2)]
        cells += [_pair(hot["hbm_percent"], cold["hbm_percent"], 0), _pair(ratio["hot"], ratio["cold"], 2)]
        rows.append([case["shape"]["name"], *cells, number(hot["sm_mhz"], 0), number(hot["watts"], 0)])
    return _table("hot (cold)", header, rows)


def _peers_table(result: dict[str, Any], titles: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    for case in result["cases"]:
        cells: list[str] = []
        for title in titles:
            peer, ratio = case["peers"][title], case["ratio_to_peers"].get(title)
            if ratio is None:
                cells += [peer["error"][:40], "-"]
            else:
                speedup = f"{ratio['hot']:.2f} ({ratio['cold']:.2f})"
                cells += [_pair(peer["hot"]["us"], peer["cold"]["us"], 1), speedup]
        rows.append([case["shape"]["name"], _pair(case["hot"]["us"], case["cold"]["us"], 1), *cells])
    header = ["case", "flash_mla us", *(text for title in titles for text in (f"{title} us", "speedup"))]
    return _table("peers in this run, hot (cold); speedup: their time over ours", header, rows)


def _variants_table(result: dict[str, Any]) -> Table:
    variants = list(result["cases"][0]["variants"])
    rows: list[list[str]] = []
    for case in result["cases"]:
        times = [case["variants"][variant] for variant in variants]
        rows.append([case["shape"]["name"], *(_pair(t["hot_us"], t["cold_us"], 1) for t in times)])
    return _table("us per call, hot (cold)", ["case", *variants], rows)


def _pair(hot: float | None, cold: float | None, digits: int) -> str:
    """ "hot (cold)", or what there is of it."""
    if cold is None:
        return number(hot, digits)
    return f"{number(hot, digits)} ({number(cold, digits)})"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    for index, heading in enumerate(header):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
