"""Multi-head latent attention (MLA) decoding on NVIDIA Hopper GPUs, and on the CPU where there is none.

Arrays of PyTorch, CuPy, JAX and NumPy are taken as they are; the results are arrays of the same library, on the same
device. Importing this package imports none of them.
"""

from ._C import CudaError as CudaError
from ._C import Unsupported as Unsupported
from .decode import flash_mla_with_kvcache as flash_mla_with_kvcache
from .frameworks import take_note_of_torch as _take_note_of_torch
from .merge import merge_states as merge_states
from .plan import FlashMLASchedMeta as FlashMLASchedMeta
from .plan import get_mla_metadata as get_mla_metadata

_take_note_of_torch()

__version__: str

__all__ = [
    "CudaError",
    "FlashMLASchedMeta",
    "Unsupported",
    "__version__",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_states",
]


def __getattr__(name: str) -> str:
    """Look up ``__version__`` when it is asked for: reading package metadata takes longer than all other imports."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("flash-mla")
