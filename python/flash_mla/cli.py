"""The command ``flash-mla``: ``demo`` decodes and checks a few batches, ``info`` says what is installed, ``bench``
measures. ``--cmake-dir`` and the like say where the C++ library lies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, info, installed
from .benchmark import command as command_line

_DEMO = "decode a paged batch and check it against a float64 oracle"
_INFO = "say how this was built, which driver, GPUs and array libraries there are, and why the kernels run here or not"
_EXIT_CODES = "exit code: 0 where all went well, 1 where {}, 2 where {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a failed check, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="flash-mla",
        description="MLA decoding on NVIDIA Hopper GPUs.",
        epilog=_EXIT_CODES.format("a check or a measurement failed", "the command line is wrong"),
    )
    parser.add_argument("--version", action="version", version=f"flash-mla {__version__}")
    for option, folder, use in (
        ("--cmake-dir", installed.cmake_dir(), "CMake (CMAKE_PREFIX_PATH or flash_mla_DIR)"),
        ("--pkg-config-dir", installed.pkg_config_dir(), "pkg-config (PKG_CONFIG_PATH)"),
        ("--include-dir", installed.include_dir(), "the C++ compiler (-I)"),
        ("--library-dir", installed.library_dir(), "the linker (-L)"),
    ):
        parser.add_argument(option, action=_PrintFolder, folder=folder, help=f"print the folder for {use} and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = _add(commands, "demo", _demo, _DEMO, "a case is off")
    demo.add_argument("--json", action="store_true", help="print JSON")
    info_parser = _add(commands, "info", _info, _INFO, "the kernels do not run here and --require-gpu is given")
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    info_parser.add_argument("--require-gpu", action="store_true", help="fail where the kernels do not run")
    bench = _add(
        commands,
        "bench",
        command_line.run,
        "measure decoding, beside the GPU's ceilings and other implementations",
        "a case failed",
        "the command line is wrong, or this machine cannot run it",
    )
    bench.description = command_line.DESCRIPTION
    bench.formatter_class = argparse.RawDescriptionHelpFormatter
    command_line.add_arguments(bench)
    options = parser.parse_args(arguments)
    exit_code: int = options.command(options)
    return exit_code


class _PrintFolder(argparse.Action):
    """Prints a folder and ends the command, as ``--version`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, folder: Path, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self._folder = folder

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self._folder)
        parser.exit()


def _add(
    commands: Any,
    name: str,
    command: Callable[[argparse.Namespace], int],
    text: str,
    failure: str,
    refusal: str = "the command line is wrong",
) -> argparse.ArgumentParser:
    """Adds a command: what it does, when it exits with 1, when with 2."""
    epilog = _EXIT_CODES.format(failure, refusal)
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.set_defaults(command=command)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    report = run()
    if options.json:
        _print_json(report.as_dict())
    else:
        _print_demo(report)
    return 0 if report.passed else 1


def _print_demo(report: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"MLA decoding on {report.runs_on}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("case", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("lengths", "heads", "out error", "lse error", "ms", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in report.results:
        case = result.case
        table.add_row(
            case.name,
            case.dtype,
            f"{min(case.seqlens_k)}-{max(case.seqlens_k)}",
            f"{case.num_heads_q}/{case.num_heads_k}",
            f"{result.error_out:.0e}",
            f"{result.error_lse:.0e}",
            f"{result.milliseconds:.2f}",
            "[green]ok[/]" if result.passed else "[red]OFF[/]",
        )
    console = Console()
    console.print(table)
    num_passed = sum(result.passed for result in report.results)
    console.print(f"{num_passed} of {len(report.results)} cases agree with the float64 oracle.", highlight=False)


def _info(options: argparse.Namespace) -> int:
    information = info.collect()
    if options.json:
        _print_json(information)
    else:
        info.show(information)
    return 1 if options.require_gpu and information["why_not_gpu"] is not None else 0


def _print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
