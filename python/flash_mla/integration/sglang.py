"""FlashMLA as SGLang's MLA backend calls it, with the signatures of ``sgl_kernel.flash_mla``.

Until October 2025 SGLang imported ``flash_mla`` itself: such a version needs none of this.
"""

from __future__ import annotations

from importlib import import_module

from ..plan import FlashMLASchedMeta as FlashMLASchedMeta
from ..plan import get_mla_metadata as get_mla_metadata
from ._shared import decode_with_descales as flash_mla_with_kvcache
from ._shared import flash_mla_sparse_fwd as flash_mla_sparse_fwd
from ._shared import replace

_BACKEND = "sglang.srt.layers.attention.flashmla_backend"


def install() -> None:
    """Put this library's dense decoding in place of sgl_kernel's, in this process; a second call changes nothing.

    Sparse attention stays with what SGLang has. A float8 cache is refused when it is planned for.

    Raises
    ------
    ImportError
        without SGLang.
    Unsupported
        where its backend has not the names that are to be replaced.
    """
    import_module(_BACKEND)
    replace(_BACKEND, {"flash_mla_with_kvcache": flash_mla_with_kvcache, "get_mla_metadata": get_mla_metadata})
