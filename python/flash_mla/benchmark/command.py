"""The command line of ``flash-mla bench`` and ``benchmarks/bench_decode.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import machine
from .shapes import FLASH_MLA_MODULE, QUICK, SHAPES, Shape, custom, named

PEER_NAMES = ("flash_mla", "flashinfer", "fa3", "sdpa")
_NOT_OF_A_SWEEP = ("std", "causal", "table_tokens", "quick", "bursts", "rests", "peers", "flash_mla_module", "planning")
DESCRIPTION = """\
Measures decoding on a Hopper GPU, hot (bursts under the power limit) and cold (a few calls after a rest), as CUDA
graphs with L2 cold, in turn with the peers that are installed. Each is checked against a float64 oracle first. HBM and
tensor core ceilings are measured in the same run. Writes a table, a JSON and a roofline plot (with matplotlib)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(s.name for s in SHAPES)}; default: all"
    )
    shapes = parser.add_argument_group("other shapes")
    shapes.add_argument(
        "--custom", action="append", default=[], metavar="BATCH,HEADS,S_Q,TOKENS", help="a shape; may be repeated"
    )
    shapes.add_argument("--std", type=int, default=0, help="of the custom shapes' lengths (default: all the same)")
    shapes.add_argument("--causal", action="store_true", help="the custom shapes are causal")
    shapes.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    shapes.add_argument("--page-size", type=int, default=64)
    shapes.add_argument(
        "--table-tokens",
        type=int,
        default=0,
        metavar="TOKENS",
        help="room of the block table for each request, as in engines with one table for all lengths (default: what "
        "the case's longest request needs)",
    )
    shapes.add_argument("--sweep", action="store_true", help="instead of cases: planes of context, batch, heads, s_q")
    timing = parser.add_argument_group("time spent")
    timing.add_argument("--quick", action="store_true", help=f"one short burst; without cases: {', '.join(QUICK)}")
    timing.add_argument("--burst", type=float, metavar="SECONDS", help="length of a hot burst")
    timing.add_argument("--bursts", type=int, help="hot bursts of each call of a case")
    timing.add_argument("--rests", type=int, help="cold samples of each call of a case")
    timing.add_argument("--budget", type=float, metavar="SECONDS", help="what a sweep may take")
    peers = parser.add_argument_group("peers")
    peers.add_argument(
        "--peers", metavar="NAMES", help=f"of {','.join(PEER_NAMES)}, or none (default: those that are installed)"
    )
    peers.add_argument(
        "--flash-mla-module",
        metavar="MODULE",
        help=f"the name under which DeepSeek's is installed (default: {FLASH_MLA_MODULE}, of SGLang's kernels)",
    )
    peers.add_argument("--planning", action="store_true", help="also time our calls that plan, in turn with the others")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="PATH", help="where to write (default: <date>-<commit>.json)")
    output.add_argument("--png", type=Path, metavar="PATH", help="where to draw (default: beside the JSON)")
    output.add_argument("--commit", help=f"what is measured (default: ${machine.COMMIT_VARIABLE}, then git)")
    output.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing, draw a result; needs no GPU")


def run(
    options: argparse.Namespace,
    folder: Path = Path(),
    tree: Path | None = None,
    extra: Callable[[], Mapping[str, Any]] | None = None,
) -> int:
    """Run the command.

    Parameters
    ----------
    folder : where results go by default
    tree : the git tree that the commit is asked of
    extra : measures what else goes into a result

    Returns
    -------
    The exit code: 0, 1 where a case failed, 2 for a wrong command line or a machine that cannot run it.
    """
    try:
        if options.plot is not None:
            return _draw(options.plot, options.png)
        shapes = chosen_shapes(options)
        peer_names = chosen_peers(options.peers)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    missing = machine.missing()
    if missing is not None:
        return _refuse(missing)
    commit = machine.commit(options.commit, tree)
    result = _sweep(options, commit) if options.sweep else _decode(options, shapes, peer_names, commit)
    if extra is not None:
        result |= extra()
    return _publish(result, options, folder)


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    """What the command line names. Raises ValueError for what there is not."""
    if options.page_size < 1 or options.page_size & (options.page_size - 1):
        raise ValueError(f"--page-size: expected a power of two, got {options.page_size}")
    if options.std < 0:
        raise ValueError(f"--std: expected at least 0, got {options.std}")
    if options.sweep and (options.cases or options.custom):
        raise ValueError("--sweep: expected no cases beside it")
    for name in _NOT_OF_A_SWEEP:
        if options.sweep and getattr(options, name) not in (None, False, 0):
            raise ValueError(f"--sweep: expected no --{name.replace('_', '-')} beside it")
    shapes = named(options.cases)
    try:
        shapes += [custom(text, options.std, options.causal) for text in options.custom]
    except ValueError as error:
        raise ValueError(f"--custom: {error}") from None
    shapes = shapes or named(list(QUICK) if options.quick else [shape.name for shape in SHAPES])
    if options.table_tokens:
        longest, name = max((max(shape.lengths()), shape.name) for shape in shapes)
        if options.table_tokens < longest:
            raise ValueError(f"--table-tokens: expected at least {longest}, as {name} has, got {options.table_tokens}")
    common = {"dtype": options.dtype, "page_size": options.page_size, "table_tokens": options.table_tokens}
    return [replace(shape, **common) for shape in shapes]


def chosen_peers(text: str | None) -> list[str]:
    """Names of peers, by default all. Raises ValueError for an unknown."""
    if text is None:
        return list(PEER_NAMES)
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in PEER_NAMES:
            raise ValueError(f"--peers: expected none or some of {','.join(PEER_NAMES)}, got {name!r}")
    return names


def _decode(options: argparse.Namespace, shapes: list[Shape], peer_names: list[str], commit: str) -> dict[str, Any]:
    from . import decode, peers, report
    from .timing import QUICK_PLAN, Plan

    found, why_not = peers.chosen(peer_names, options.flash_mla_module)
    plan = _adjusted(QUICK_PLAN if options.quick else Plan(), options)
    variants = [decode.GIVEN, decode.LEFT_OUT, decode.INSIDE] if options.planning else [decode.GIVEN]
    settings = decode.Settings(shapes, found, why_not, variants, plan, commit)
    with report.Progress(len(shapes) + 1) as progress:
        return decode.run(settings, progress)


def _sweep(options: argparse.Namespace, commit: str) -> dict[str, Any]:
    from . import report, sweep
    from .timing import Plan

    plan = _adjusted(Plan(sweep.BURST_SECONDS, bursts=2, rests=2), options)
    shapes = sweep.points(options.dtype, options.page_size)
    with report.Progress(len(shapes) + 1) as progress:
        return sweep.run(shapes, plan, options.budget or sweep.BUDGET_SECONDS, commit, progress)


def _adjusted(plan: Any, options: argparse.Namespace) -> Any:
    given = {"burst_seconds": options.burst, "bursts": options.bursts, "rests": options.rests}
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def _publish(result: dict[str, Any], options: argparse.Namespace, folder: Path) -> int:
    from . import plots, report

    is_sweep = result["kind"] == "sweep"
    suffix = "-sweep" if is_sweep else "-wide-table" if options.table_tokens else ""
    path = report.write(result, options.json, suffix, folder)
    (report.show_sweep if is_sweep else report.show_decode)(result)
    print(f"\nwritten to {path}")
    try:
        print(f"drawn to {plots.draw(result, options.png or path.with_suffix('.png'))}")
    except (plots.NothingToDrawError, ImportError) as error:
        print(f"not drawn: {error}; later: flash-mla bench --plot {path}")
    return 1 if result["failures"] else 0


def _draw(path: Path, png: Path | None) -> int:
    from . import plots

    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        return _refuse(f"--plot: expected a result's JSON, got {path}: {error}")
    if not isinstance(result, dict):
        return _refuse(f"--plot: expected a result's JSON, got {path}, which holds a {type(result).__name__}")
    try:
        print(f"drawn to {plots.draw(result, png or path.with_suffix('.png'))}")
    except (plots.NothingToDrawError, ImportError) as error:
        return _refuse(f"--plot: {error}")
    return 0


def _refuse(message: str) -> int:
    print(f"flash-mla bench: {message}", file=sys.stderr)
    return 2
