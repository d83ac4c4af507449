"""What ``flash-mla info`` says: the build, the driver, the GPUs, and whether the kernels run here."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

from . import _C, cuda

_ARRAY_LIBRARIES = ("torch", "cupy", "jax", "numpy", "ml_dtypes")
_FIRST_RELEASE = {12: "R525", 13: "R580"}  # of the driver, for each major version of CUDA


def collect() -> dict[str, Any]:
    """Everything, ready for JSON. Imports no array library."""
    build = _C.build_info()
    version = cuda.driver_version()
    gpus = cuda.gpus()
    reason = why_not(build["cuda"])
    return {
        "version": metadata.version("flash-mla"),
        "python": sys.version.split()[0],
        "build": build,
        "driver": {"cuda": None if version is None else _dotted(version), "release": cuda.driver_release()},
        "gpus": [{**asdict(gpu), "is_hopper": gpu.is_hopper} for gpu in gpus],
        "runs_on": "gpu" if reason is None else "cpu",
        "why_not_gpu": reason,
        "libraries": _array_libraries(),
    }


def why_not(cuda_of_build: str) -> str | None:
    """Why the kernels do not run on this machine, None where they do.

    Parameters
    ----------
    cuda_of_build : str
        The CUDA version that the library was built with, such as "13.0".
    """
    version = cuda.driver_version()
    needed = int(cuda_of_build.split(".")[0])
    if version is not None and version[0] < needed:
        release = _FIRST_RELEASE.get(needed, f"one for CUDA {needed}")
        return (
            f"the driver is too old: it runs CUDA {_dotted(version)}, and this build of CUDA {cuda_of_build} "
            f"needs {release} or newer"
        )
    problem = cuda.start_error()
    if problem is not None:
        return problem + _hidden()
    gpus = cuda.gpus()
    if not gpus:
        return "the CUDA driver sees no GPU" + _hidden()
    if not any(gpu.is_hopper for gpu in gpus):
        found = ", ".join(sorted({f"{gpu.name} ({_dotted(gpu.compute_capability)})" for gpu in gpus}))
        return f"the kernels need a Hopper GPU (compute capability 9.0), found {found}"
    return None


def show(information: dict[str, Any]) -> None:
    """Print it as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    build, driver, why_not_gpu = (information[key] for key in ("build", "driver", "why_not_gpu"))
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("flash-mla", f"{information['version']}, commit {build['commit']}")
    table.add_row("built with", f"CUDA {build['cuda']} (nvcc {build['nvcc']}), {build['compiler']}")
    table.add_row("built for", build["architectures"])
    table.add_row("driver", _driver_text(driver))
    for gpu in information["gpus"]:
        verdict = "runs the kernels" if gpu["is_hopper"] and why_not_gpu is None else "does not run the kernels"
        capability = _dotted(gpu["compute_capability"])
        table.add_row(f"GPU {gpu['index']}", f"{gpu['name']}, compute capability {capability}: {verdict}")
    table.add_row("kernels", "run here" if why_not_gpu is None else f"do not run here: {why_not_gpu}")
    table.add_row("Python", information["python"])
    for name, version in information["libraries"].items():
        table.add_row(name, version or "not installed")
    Console().print(table, markup=False, highlight=False)


def _driver_text(driver: dict[str, str | None]) -> str:
    parts = [driver["release"], driver["cuda"] and f"runs CUDA {driver['cuda']}"]
    return ", ".join(part for part in parts if part) or "none"


def _hidden() -> str:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if devices is None else f" (CUDA_VISIBLE_DEVICES is {devices!r})"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _array_libraries() -> dict[str, str | None]:
    """Versions of the libraries that are installed, found without importing them."""
    distributions = metadata.packages_distributions()
    found = {name: distributions.get(name, []) for name in _ARRAY_LIBRARIES}
    return {name: metadata.version(names[0]) if names else None for name, names in found.items()}
