"""Checks a built wheel: its tags, size, metadata, libraries, machine code and symbols. Needs no GPU.

    pip install -r .ci/wheel-requirements.txt
    python .ci/check_wheel.py [--glibc 2.28] WHEEL

Prints a line a check; exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import email
import io
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

MAX_BYTES = 15_000_000
SYSTEM_LIBRARIES = {
    *("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"),
    *("libgcc_s.so.1", "libstdc++.so.6"),
}
NEEDED_FILES = ("_C.pyi", "py.typed", "include/flash_mla/flash_mla.h", "lib/libflash_mla.a")


class Wheel(NamedTuple):
    path: Path
    glibc: tuple[int, int] | None

    def read(self, ending: str) -> bytes:
        with zipfile.ZipFile(self.path) as archive:
            found = [name for name in archive.namelist() if name.endswith(ending)]
            expect(len(found) == 1, f"expected one file that ends in {ending}, got {found}")
            return archive.read(found[0])

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return archive.namelist()

    def libraries(self) -> list[str]:
        return [name for name in self.names() if ".so" in Path(name).suffixes]


class CheckError(Exception):
    """A check failed; the message says what was found and what was expected."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def run(*command: str) -> str:
    """Return what a command prints; raises CheckError with all of it if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{command[0]} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def tool(name: str) -> str:
    """The path of a command that a requirement of this script brings."""
    return str(Path(sysconfig.get_path("scripts"), name))


def cuobjdump(option: str, library: Path) -> str:
    program = metadata.distribution("nvidia-cuda-cuobjdump").locate_file("nvidia/cu13/bin/cuobjdump")
    return run(str(program), option, str(library))


def tags(wheel: Wheel) -> str:
    python, abi, platforms = wheel.path.stem.split("-")[-3:]
    expect((python, abi) == ("cp310", "abi3"), f"expected cp310-abi3, got {python}-{abi}")
    for platform in platforms.split("."):
        expect(bool(re.fullmatch(r"(many)?linux(_\d+_\d+)?_x86_64", platform)), f"got the platform {platform}")
    return f"{python}-{abi}-{platforms}"


def size(wheel: Wheel) -> str:
    num_bytes = wheel.path.stat().st_size
    expect(num_bytes < MAX_BYTES, f"expected under {MAX_BYTES / 1e6:.0f} MB, got {num_bytes / 1e6:.1f} MB")
    return f"{num_bytes / 1e6:.1f} MB"


def dependencies(wheel: Wheel) -> str:
    fields = email.message_from_bytes(wheel.read(".dist-info/METADATA"))
    expect(fields["Requires-Python"] == ">=3.10", f"Requires-Python: expected >=3.10, got {fields['Requires-Python']}")
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    for line in required:
        expect(not re.match(r"torch|jax|cupy|cuda|nvidia", line), f"expected no framework and no CUDA, got {line}")
    return ", ".join(required)


def files(wheel: Wheel) -> str:
    names = wheel.names()
    for needed in NEEDED_FILES:
        expect(f"flash_mla/{needed}" in names, f"flash_mla/{needed} is missing")
    grafted = [name for name in names if name.startswith("flash_mla.libs/")]
    expect(not grafted, f"expected no libraries of others, got {grafted}")
    run(tool("check-wheel-contents"), str(wheel.path))
    return f"{len(names)}; check-wheel-contents finds nothing"


def needed_libraries(wheel: Wheel) -> str:
    found = set()
    own = {Path(name).name for name in wheel.libraries()}
    for name in wheel.libraries():
        dynamic = ELFFile(io.BytesIO(wheel.read(name))).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        expect(needed <= SYSTEM_LIBRARIES | own, f"{name} needs {sorted(needed - SYSTEM_LIBRARIES - own)}")
        found |= needed
    return " ".join(sorted(found))


def machine_code(wheel: Wheel) -> str:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libflash_mla.so")
        library.write_bytes(wheel.read("lib/libflash_mla.so"))
        elf = re.findall(r"ELF file .*\.(sm_\w+)\.cubin", cuobjdump("--list-elf", library))
        ptx = re.findall(r"PTX file +\d+.*", cuobjdump("--list-ptx", library))
    expect(set(elf) == {"sm_90a"}, f"expected sm_90a, got {sorted(set(elf))}")
    expect(not ptx, f"expected no PTX, got {ptx}")
    return f"{len(elf)} units for sm_90a, no PTX"


def abi3(wheel: Wheel) -> str:
    run(tool("abi3audit"), "--strict", "--report", str(wheel.path))
    return "abi3audit finds nothing"


def glibc(wheel: Wheel) -> str:
    shown = run(tool("auditwheel"), "show", str(wheel.path))
    match = re.search(r'platform tag:\s+"manylinux_(\d+)_(\d+)_x86_64"', shown)
    expect(match is not None, f"auditwheel finds no manylinux tag:\n{shown}")
    assert match is not None
    lowest = int(match[1]), int(match[2])
    if wheel.glibc is not None:
        expect(lowest <= wheel.glibc, f"expected to run with glibc {wheel.glibc}, but needs {lowest}:\n{shown}")
    return f"auditwheel says manylinux_{match[1]}_{match[2]}"


def description(wheel: Wheel) -> str:
    run(tool("twine"), "check", "--strict", str(wheel.path))
    return "twine finds nothing"


CHECKS = (tags, size, dependencies, files, needed_libraries, machine_code, abi3, glibc, description)


def passes(check: Callable[[Wheel], str], wheel: Wheel) -> bool:
    try:
        print(f"{check.__name__}: {check(wheel)}")
    except CheckError as error:
        print(f"{check.__name__}: FAILED: {error}")
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a built wheel.")
    parser.add_argument("--glibc", help="the oldest glibc that the wheel has to run with, such as 2.28")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args()
    oldest = None
    if options.glibc is not None:
        major, minor = map(int, options.glibc.split("."))
        oldest = major, minor
    print(options.wheel.name)
    wheel = Wheel(options.wheel, oldest)
    results = [passes(check, wheel) for check in CHECKS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
