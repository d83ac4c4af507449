"""The module in which DeepSeek's FlashMLA has its calls, for code that imports them from there."""

from .decode import flash_mla_with_kvcache as flash_mla_with_kvcache
from .plan import FlashMLASchedMeta as FlashMLASchedMeta
from .plan import get_mla_metadata as get_mla_metadata

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]
