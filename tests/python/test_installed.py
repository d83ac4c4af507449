"""What the package brings for C++: the folders it names, and a program built with what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from flash_mla import cli, installed

REPOSITORY = Path(__file__).resolve().parents[2]
CONSUMER = REPOSITORY / "tests" / "cpp" / "consumer"


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; raises with all that it said if it fails."""
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("--cmake-dir", "flash_mlaConfig.cmake"),
        ("--pkg-config-dir", "flash_mla.pc"),
        ("--include-dir", "flash_mla/c_api.h"),
        ("--library-dir", "libflash_mla.so"),
    ],
)
def test_names_the_folder_of_a_file(option: str, file: str) -> None:
    printed = run(sys.executable, "-m", "flash_mla", option)
    folder = Path(printed.removesuffix("\n"))
    assert folder.is_absolute()
    assert (folder / file).is_file()


def test_a_folder_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--include-dir", "info"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"{installed.include_dir()}\n"


def test_the_module_is_the_command() -> None:
    assert run(sys.executable, "-m", "flash_mla", "--version") == f"flash-mla {metadata.version('flash-mla')}\n"
    failed = subprocess.run([sys.executable, "-m", "flash_mla"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "COMMAND" in failed.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_c_program_built_with_its_folders(tmp_path: Path) -> None:
    libraries = installed.library_dir()
    program = tmp_path / "program"
    run(
        *("gcc", "-std=c99", CONSUMER / "main.c", f"-I{installed.include_dir()}", "-o", program),
        *(f"-L{libraries}", "-lflash_mla", "-lm", f"-Wl,-rpath,{libraries}"),
    )
    assert "0 failures" in run(program)


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++")
@pytest.mark.parametrize("variable", ["CMAKE_PREFIX_PATH", "flash_mla_DIR"])
def test_cmake_finds_the_library(tmp_path: Path, variable: str) -> None:
    run("cmake", "-S", CONSUMER, "-B", tmp_path, f"-D{variable}={installed.cmake_dir()}")
    run("cmake", "--build", tmp_path)
    run("ctest", "--test-dir", tmp_path, "--output-on-failure", "--no-tests=error")


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("cmake", "g++", "nvcc")), reason="needs cmake, g++ and nvcc"
)
def test_as_part_of_another_project_it_leaves_the_build_type(tmp_path: Path) -> None:
    project = f'project(parent LANGUAGES CXX)\nadd_subdirectory("{REPOSITORY}" flash_mla)\n'
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.25)\n{project}")
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build")
    assert "CMAKE_BUILD_TYPE:STRING=\n" in (tmp_path / "build" / "CMakeCache.txt").read_text()


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("pkg-config", "gcc", "g++", "readelf")),
    reason="needs pkg-config, gcc, g++ and readelf",
)
def test_pkg_config_finds_the_library(tmp_path: Path) -> None:
    run("sh", CONSUMER / "pkg_config.sh", installed.pkg_config_dir(), tmp_path / "programs")
