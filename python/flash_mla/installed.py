"""Where the C++ library lies that this package brings: headers, libraries, and the files by which builds find them."""

from __future__ import annotations

from pathlib import Path

from . import _C

_ROOT = Path(_C.__file__).resolve().parent


def include_dir() -> Path:
    """The folder to name with ``-I``."""
    return _ROOT / "include"


def library_dir() -> Path:
    """The folder of ``libflash_mla.so`` and ``libflash_mla.a``."""
    return _ROOT / "lib"


def cmake_dir() -> Path:
    """The folder for ``CMAKE_PREFIX_PATH`` or ``flash_mla_DIR``."""
    return library_dir() / "cmake" / "flash_mla"


def pkg_config_dir() -> Path:
    """The folder for ``PKG_CONFIG_PATH``."""
    return library_dir() / "pkgconfig"
