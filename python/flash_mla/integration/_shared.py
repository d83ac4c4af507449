"""What the engines' modules have in common."""

from __future__ import annotations

import sys
from typing import NoReturn

from .. import _C
from ..calls import Array
from ..decode import flash_mla_with_kvcache
from ..plan import FlashMLASchedMeta


def decode_with_descales(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    head_dim_v: int,
    tile_scheduler_metadata: Array | FlashMLASchedMeta | None,
    num_splits: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: Array | None = None,
    descale_k: Array | None = None,
    is_fp8_kvcache: bool = False,
    indices: Array | None = None,
) -> tuple[Array, Array]:
    """``flash_mla.flash_mla_with_kvcache`` with the two more arguments that vLLM 0.10.2 to 0.14 and SGLang have.

    ``descale_q`` and ``descale_k`` belong to float8 arrays: vLLM passes them with every call, and beside bfloat16 and
    float16 they have no effect.
    """
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        is_fp8_kvcache,
        indices,
    )


def flash_mla_sparse_fwd(
    q: Array,
    kv: Array,
    indices: Array,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Array | None = None,
    topk_length: Array | None = None,
) -> NoReturn:
    """Sparse prefill: raises ``Unsupported``."""
    raise _C.Unsupported("flash_mla_sparse_fwd: sparse attention is not supported")


def replace(module_name: str, replacements: dict[str, object]) -> None:
    """Sets names of a module that is imported already.

    Raises
    ------
    Unsupported
        where the module lacks one of them: another version of the engine than those that are known.
    """
    module = sys.modules[module_name]
    missing = [name for name in replacements if not hasattr(module, name)]
    if missing:
        raise _C.Unsupported(f"{module_name}: expected it to have {', '.join(missing)}; this version is not known")
    for name, value in replacements.items():
        setattr(module, name, value)
