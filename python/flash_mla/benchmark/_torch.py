"""PyTorch, untyped: the package is checked and installed without it."""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

torch: Any = importlib.import_module("torch")
Tensor: TypeAlias = Any
