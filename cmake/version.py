"""The version of the Python package: CMakeLists.txt's, and the local part that FLASH_MLA_LOCAL_VERSION names, if any.

scikit-build-core calls this, as pyproject.toml says: with FLASH_MLA_LOCAL_VERSION=cu128, 0.1.0 becomes 0.1.0+cu128.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path


def dynamic_metadata(settings: Mapping[str, object], project: Mapping[str, object]) -> dict[str, str]:
    """The field ``version`` of the project's metadata; raises ValueError where it cannot be made."""
    cmake = Path(__file__).parent.parent / "CMakeLists.txt"
    match = re.search(r"project\(flash_mla VERSION ([0-9.]+)", cmake.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{cmake}: expected project(flash_mla VERSION ...)")
    local = os.environ.get("FLASH_MLA_LOCAL_VERSION", "")
    if not re.fullmatch(r"([a-z0-9]+(\.[a-z0-9]+)*)?", local):
        raise ValueError(f"FLASH_MLA_LOCAL_VERSION: expected small letters and digits, such as cu128, got {local!r}")
    return {"version": f"{match[1]}+{local}" if local else match[1]}
