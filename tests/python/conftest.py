"""The `gpu` marker, and fixtures that several test files use."""

from __future__ import annotations

import os
from typing import Any

import hopper
import pytest
from hypothesis import settings

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX takes most of a GPU's memory otherwise

settings.register_profile("flash_mla", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("flash_mla")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = hopper.missing() if marked else None
    for item in marked:
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch that sees the GPU."""
    module = pytest.importorskip("torch", reason="needs PyTorch")
    if not module.cuda.is_available():
        pytest.skip("needs PyTorch built with CUDA")
    return module


@pytest.fixture(params=[pytest.param(None, id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str | None:
    """Where make_case puts a case: NumPy arrays, or tensors on the GPU."""
    if request.param is not None:
        request.getfixturevalue("torch")
    return request.param  # type: ignore[no-any-return]
