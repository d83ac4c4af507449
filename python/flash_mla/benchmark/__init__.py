"""Measures decoding on a Hopper GPU: what ``flash-mla bench`` and ``benchmarks/`` run.

Nothing here is imported by ``import flash_mla``. Modules that need PyTorch take it from ``_torch``, the one that draws
imports matplotlib when it draws.
"""
