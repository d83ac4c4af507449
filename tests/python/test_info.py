"""``flash-mla info``: what it says of the build, the driver and the GPUs; exit codes. The driver is made up."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hopper
import pytest
from flash_mla import _C, cli, cuda, info

H200 = ("NVIDIA H200", (9, 0))
B200 = ("NVIDIA B200", (10, 0))
A100 = ("NVIDIA A100", (8, 0))
ERRORS = {100: b"no CUDA-capable device is detected", 803: b"system has unsupported display driver / cuda driver"}


@dataclass
class FakeDriver:
    """The functions of libcuda that cuda.py calls."""

    version: int = 13000
    devices: list[tuple[str, tuple[int, int]]] = field(default_factory=lambda: [H200])
    init_code: int = 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init_code

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:  # noqa: N802
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: ctypes.c_int) -> int:  # noqa: N802
        name.value = self.devices[handle.value][0].encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = self.devices[handle.value][1][attribute - 75]
        return 0

    def cuGetErrorString(self, code: int, message: Any) -> int:  # noqa: N802
        message._obj.value = ERRORS.get(code)
        return 0


def forget() -> None:
    for function in (cuda._library, cuda.start_error):
        function.cache_clear()


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found of the real driver is forgotten before and after; the build is of CUDA 13.0."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    build = {**_C.build_info(), "cuda": "13.0"}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    forget()
    yield
    forget()


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    def load(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (FakeDriver(), None),
        (FakeDriver(devices=[A100, H200]), None),
        (FakeDriver(version=13010), None),
        (None, "there is no CUDA driver: libcuda.so.1 is not found"),
        (FakeDriver(version=12080), "the driver is too old: it runs CUDA 12.8, and this build of CUDA 13.0 needs R580"),
        (FakeDriver(init_code=100), "cuInit failed with 100: no CUDA-capable device is detected"),
        (FakeDriver(init_code=803), "cuInit failed with 803: system has unsupported"),
        (FakeDriver(init_code=999), "cuInit failed with 999: unknown error"),
        (FakeDriver(devices=[]), "the CUDA driver sees no GPU"),
        (
            FakeDriver(devices=[B200, A100, A100]),
            "need a Hopper GPU (compute capability 9.0), found NVIDIA A100 (8.0), NVIDIA B200 (10.0)",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_reasons_and_exit_codes(
    driver: FakeDriver | None, reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, driver)
    assert cli.main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    if reason is None:
        assert said["why_not_gpu"] is None
    else:
        assert reason in said["why_not_gpu"]
    assert said["runs_on"] == ("gpu" if reason is None else "cpu")
    assert cli.main(["info", "--require-gpu"]) == (0 if reason is None else 1)
    words = " ".join(capsys.readouterr().out.split())
    assert ("run here" if reason is None else f"do not run here: {said['why_not_gpu']}") in words


def test_a_build_of_cuda_12_takes_a_driver_of_cuda_12(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(version=12040))
    assert info.why_not("12.8") is None
    assert "R580" in str(info.why_not("13.0"))
    assert "one for CUDA 14" in str(info.why_not("14.1"))


@pytest.mark.parametrize("driver", [FakeDriver(devices=[]), FakeDriver(init_code=100)], ids=str)
def test_says_that_gpus_may_be_hidden(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert str(info.why_not("13.0")).endswith(" (CUDA_VISIBLE_DEVICES is '-1')")


def test_gpus_and_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, FakeDriver(version=13010, devices=[A100, H200]))
    release = tmp_path / "version"
    release.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC 12\n")
    monkeypatch.setattr(cuda, "_RELEASE_FILE", release)
    said = info.collect()
    assert said["driver"] == {"cuda": "13.1", "release": "580.159.04"}
    assert said["gpus"] == [
        {"index": 0, "name": "NVIDIA A100", "compute_capability": (8, 0), "is_hopper": False},
        {"index": 1, "name": "NVIDIA H200", "compute_capability": (9, 0), "is_hopper": True},
    ]
    info.show(said)
    words = " ".join(capsys.readouterr().out.split())
    for text in (
        "driver 580.159.04, runs CUDA 13.1",
        "GPU 0 NVIDIA A100, compute capability 8.0: does not run",
        "GPU 1 NVIDIA H200, compute capability 9.0: runs the kernels",
        "jax",
    ):
        assert text in words


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n", "535.183.01"),
        ("something else\n", None),
        (None, None),
    ],
)
def test_release_of_the_driver(
    text: str | None, release: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(cuda, "_RELEASE_FILE", path)
    assert cuda.driver_release() == release


def test_nothing_is_asked_of_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(init_code=803))
    assert cuda.driver_version() == (13, 0)
    assert cuda.gpus() == []


def test_build() -> None:
    build = info.collect()["build"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", build["version"])
    assert re.fullmatch(r"unknown|[0-9a-f]{7,40}(-dirty)?", build["commit"])
    assert build["architectures"] == "sm_90a"
    assert re.fullmatch(r"\d+\.\d+\.\d+", build["nvcc"])
    assert all(build.values())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", "--help"], ["demo", "--help"], ["bench", "--help"]], ids=str
)
def test_help_names_the_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    words = " ".join(capsys.readouterr().out.split())
    assert re.search(r"exit code: 0 where all went well, 1 where \w.*, 2 where the command line is wrong", words)


@pytest.mark.parametrize("arguments", [["info", "--nothing"], ["demo", "more"], []], ids=str)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: flash-mla" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_hopper_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--require-gpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert any(gpu["is_hopper"] for gpu in said["gpus"])
    assert said["driver"]["cuda"] is not None


@pytest.mark.skipif(hopper.missing() is None, reason="with a Hopper GPU the kernels run")
def test_on_a_machine_without_a_hopper_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--require-gpu"]) == 1
    assert "do not run here" in " ".join(capsys.readouterr().out.split())
