"""What a result was measured on: GPU, driver, clocks, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import cuda

COMMIT_VARIABLE = "FLASH_MLA_COMMIT"
SAMPLE_MILLISECONDS = 20


def missing() -> str | None:
    """What a benchmark lacks on this machine, or None. Makes the first Hopper GPU PyTorch's current device."""
    gpus = cuda.gpus()
    hopper = next((gpu for gpu in gpus if gpu.is_hopper), None)
    if hopper is None:
        found = ", ".join(gpu.name for gpu in gpus) or ("no CUDA driver" if cuda.driver_version() is None else "none")
        return f"needs a Hopper GPU (compute capability 9.0); found: {found}"
    try:
        from ._torch import torch
    except ImportError:
        return "needs PyTorch built with CUDA: pip install torch"
    if not torch.cuda.is_available():
        return f"needs PyTorch built with CUDA; found {torch.__version__}, which sees no GPU"
    torch.cuda.set_device(hopper.index)
    return None


def describe() -> dict[str, Any]:
    """The machine, in the words of PyTorch and nvidia-smi."""
    from ._torch import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "num_sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "driver": _query("driver_version"),
        "power_limit_watts": _number(_query("power.limit")),
        "max_sm_mhz": _number(_query("clocks.max.sm")),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def commit(given: str | None, tree: Path | None = None) -> str:
    """The commit that was measured: as given, from the environment, or from the git tree; else "unknown"."""
    named = given or os.environ.get(COMMIT_VARIABLE)
    if named or tree is None:
        return named or "unknown"
    try:
        command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class ClockMonitor:
    """Samples SM clock and power while it is entered. Without nvidia-smi it knows nothing."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ClockMonitor:
        command = [*_nvidia_smi("clocks.sm,power.draw.instant"), "-lms", str(SAMPLE_MILLISECONDS)]
        reader, writer = os.openpty()  # a terminal, so that no line waits in a buffer
        try:
            self._process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL)
        except OSError:
            os.close(reader)
            return self
        finally:
            os.close(writer)
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._thread is not None:
            self._thread.join()

    def during(self, spans: list[tuple[float, float]]) -> dict[str, float | None]:
        """Medians over spans of time.monotonic."""
        inside = [sample for sample in self._samples if any(begin <= sample[0] <= end for begin, end in spans)]
        return {
            "sm_mhz": statistics.median(mhz for _, mhz, _ in inside) if inside else None,
            "watts": statistics.median(watts for _, _, watts in inside) if inside else None,
        }

    def _read(self, reader: int) -> None:
        with open(reader) as lines, contextlib.suppress(OSError):  # EIO: the other end is closed
            for line in lines:
                values = [_number(field) for field in line.split(",")]
                if len(values) == 2 and values[0] is not None and values[1] is not None:
                    self._samples.append((time.monotonic(), values[0], values[1]))


def _nvidia_smi(fields: str) -> list[str]:
    from ._torch import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    which = "0" if uuid is None else f"GPU-{uuid}"
    return ["nvidia-smi", "-i", which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def _query(field: str) -> str | None:
    try:
        return subprocess.run(_nvidia_smi(field), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
