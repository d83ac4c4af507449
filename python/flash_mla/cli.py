"""The command ``flash-mla``: ``demo`` decodes and checks a few batches, ``info`` says what is installed, ``bench``
measures. ``--cmake-dir`` and the like say where the C++ library lies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, cuda, installed
from .benchmark import command as command_line

_ARRAY_LIBRARIES = ("torch", "cupy", "jax", "numpy", "ml_dtypes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a failed check, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="flash-mla", description="MLA decoding on NVIDIA Hopper GPUs.")
    parser.add_argument("--version", action="version", version=f"flash-mla {__version__}")
    for option, folder, use in (
        ("--cmake-dir", installed.cmake_dir(), "CMake (CMAKE_PREFIX_PATH or flash_mla_DIR)"),
        ("--pkg-config-dir", installed.pkg_config_dir(), "pkg-config (PKG_CONFIG_PATH)"),
        ("--include-dir", installed.include_dir(), "the C++ compiler (-I)"),
        ("--library-dir", installed.library_dir(), "the linker (-L)"),
    ):
        parser.add_argument(option, action=_PrintFolder, folder=folder, help=f"print the folder for {use} and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("demo", _demo, "decode a paged batch and check it against a float64 oracle; exit code 1 if it is off"),
        ("info", _info, "say which version, GPUs and array libraries there are"),
    ):
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.add_argument("--json", action="store_true", help="print JSON")
        subparser.set_defaults(command=command)
    bench = commands.add_parser(
        "bench",
        help="measure decoding, beside the GPU's ceilings and other implementations; exit code 1 if a case failed",
        description=command_line.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_arguments(bench)
    bench.set_defaults(command=command_line.run)
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
    gpus = cuda.gpus()
    driver = cuda.driver_version()
    information = {
        "version": __version__,
        "python": sys.version.split()[0],
        "cuda_driver": None if driver is None else ".".join(map(str, driver)),
        "gpus": [{**asdict(gpu), "is_hopper": gpu.is_hopper} for gpu in gpus],
        "default_path": "hopper" if any(gpu.is_hopper for gpu in gpus) else "cpu",
        "libraries": {name: _version_of(name) for name in _ARRAY_LIBRARIES},
    }
    if options.json:
        _print_json(information)
    else:
        _print_info(information)
    return 0


def _print_info(information: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("flash-mla", information["version"])
    table.add_row("Python", information["python"])
    table.add_row("CUDA driver", f"CUDA {information['cuda_driver']}" if information["cuda_driver"] else "none")
    for gpu in information["gpus"]:
        capability = ".".join(map(str, gpu["compute_capability"]))
        verdict = "runs the kernels" if gpu["is_hopper"] else "not a Hopper GPU"
        table.add_row(f"GPU {gpu['index']}", f"{gpu['name']}, compute capability {capability}: {verdict}")
    if information["default_path"] == "cpu":
        table.add_row("runs on", "the CPU, as there is no Hopper GPU")
    for name, version in information["libraries"].items():
        table.add_row(name, version or "not installed")
    Console().print(table)


def _version_of(name: str) -> str | None:
    """The version of an installed library, found without importing it."""
    for distribution in metadata.packages_distributions().get(name, ()):
        return metadata.version(distribution)
    return None


def _print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
