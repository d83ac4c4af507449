"""FlashMLA as vLLM's dense MLA backend calls it, with the signatures of vLLM's own module ``ops/flashmla.py``.

Three forms are known: that of vLLM up to 0.14 (arrays of a plan), that of 0.10.2 (the same, results without the
dimension of one query), and that of 0.15 and newer (a ``FlashMLASchedMeta``, which a step's first layer fills). The
functions below have the newest form; ``install()`` finds out which one is needed.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from inspect import signature
from typing import Any, NoReturn

from .. import _C
from ..calls import Array
from ..decode import flash_mla_with_kvcache as flash_mla_with_kvcache
from ..plan import FlashMLASchedMeta as FlashMLASchedMeta
from ..plan import get_mla_metadata as _plan
from ._shared import decode_with_descales, replace
from ._shared import flash_mla_sparse_fwd as flash_mla_sparse_fwd

_BACKEND = "vllm.v1.attention.backends.mla.flashmla"
_OPS = ("vllm.v1.attention.ops.flashmla", "vllm.attention.ops.flashmla")
_BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"


def get_mla_metadata(
    cache_seqlens: Array | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[FlashMLASchedMeta, None]:
    """A plan for one step, empty: the first layer's call fills it.

    ``is_fp8_kvcache`` has no effect here: what decodes a float8 cache brings its own plan.
    """
    if topk is not None:
        raise _C.Unsupported(f"topk: only dense attention is supported, expected None, got {topk}")
    return FlashMLASchedMeta(), None


def get_mla_metadata_dense_fp8(
    cache_seqlens: Array, num_q_tokens_per_head_k: int, num_heads_k: int
) -> tuple[Array, Array]:
    """Plans decoding of a float8 cache: raises ``Unsupported``."""
    _refuse_fp8("get_mla_metadata_dense_fp8")


def flash_mla_with_kvcache_fp8(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    head_dim_v: int,
    tile_scheduler_metadata: Array,
    num_splits: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: Array | None = None,
    descale_k: Array | None = None,
) -> tuple[Array, Array]:
    """Decodes a float8 cache: raises ``Unsupported``."""
    _refuse_fp8("flash_mla_with_kvcache_fp8")


def is_flashmla_dense_supported() -> tuple[bool, str | None]:
    """(whether dense decoding runs on this machine's GPU, why not).

    Asks vLLM's platform, which does not initialise CUDA: a process that has cannot fork its workers any more.
    """
    platform = import_module("vllm.platforms").current_platform
    capability = platform.get_device_capability() if platform.is_cuda() else None
    if capability is None:
        return False, "flash_mla needs a CUDA device"
    if tuple(capability) != (9, 0):
        return False, f"flash_mla needs a Hopper GPU (compute capability 9.0), found {capability[0]}.{capability[1]}"
    return True, None


is_flashmla_supported = is_flashmla_dense_supported
"""The name up to vLLM 0.11.0."""


def is_flashmla_sparse_supported() -> tuple[bool, str | None]:
    """(False, why)."""
    return False, "flash_mla has no sparse attention"


def install() -> None:
    """Put this library's dense decoding in place of vLLM's own, in this process; a second call changes nothing.

    Float8 caches and sparse attention stay with what vLLM has.

    Raises
    ------
    ImportError
        without vLLM, or with one that has no FlashMLA backend.
    Unsupported
        where its backend has not the names that are to be replaced, and in vLLM's batch-invariant mode, whose plans
        vLLM makes by hand.
    """
    if os.environ.get(_BATCH_INVARIANT, "0") not in ("", "0"):
        raise _C.Unsupported(
            f"{_BATCH_INVARIANT}: expected 0, got {os.environ[_BATCH_INVARIANT]}: vLLM's batch-invariant mode makes "
            "plans of its own, which this library does not take"
        )
    backend = import_module(_BACKEND)  # which imports the module that defines the functions
    ops_name = next(name for name in _OPS if name in sys.modules)
    ops = sys.modules[ops_name]
    checks: dict[str, object] = {
        name: is_flashmla_dense_supported
        for name in ("is_flashmla_dense_supported", "is_flashmla_supported")
        if hasattr(ops, name)
    }
    in_backend = {name: check for name, check in checks.items() if hasattr(backend, name)}
    replace(_BACKEND, {**_functions(backend, ops), **in_backend})
    replace(ops_name, checks)  # last: a backend that is not known leaves all as it was


def _functions(backend: Any, ops: Any) -> dict[str, object]:
    """What decodes and plans, in the form that this backend calls."""
    if hasattr(backend, "FlashMLASchedMeta"):
        return {
            "FlashMLASchedMeta": FlashMLASchedMeta,
            "flash_mla_with_kvcache": flash_mla_with_kvcache,
            "get_mla_metadata": get_mla_metadata,
        }
    parameters = signature(ops.flash_mla_with_kvcache).parameters
    one_query = "descale_q" in parameters and "is_fp8_kvcache" not in parameters
    decode = _decode_one_query if one_query else decode_with_descales
    return {"flash_mla_with_kvcache": decode, "get_mla_metadata": _plan}


def _decode_one_query(*arguments: Any, **options: Any) -> tuple[Array, Array]:
    """(batch, heads, 512) and (batch, heads), for vLLM 0.10.2, whose requests have one query each."""
    out, lse = decode_with_descales(*arguments, **options)
    return out.squeeze(1), lse.squeeze(-1)


def _refuse_fp8(name: str) -> NoReturn:
    raise _C.Unsupported(f"{name}: only bfloat16 and float16 caches are supported")
