"""Calls the library on a case and checks everything that a call promises about its results."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import HEAD_DIM_V, Case
from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from oracle import assert_close, decode_reference

SENTINELS = {2: 0x5A5A, 4: 0x5A5A5A5A}  # by size of an element
GUARD = 64  # elements around a contiguous result


def decode(case: Case, **more: Any) -> tuple[Any, Any]:
    """flash_mla_with_kvcache on the case's arrays."""
    result: tuple[Any, Any] = flash_mla_with_kvcache(**case.arguments(), **more)
    return result


def plan(case: Case) -> dict[str, Any]:
    """get_mla_metadata for the case, as keyword arguments of flash_mla_with_kvcache."""
    metadata, num_splits = get_mla_metadata(case.cache_seqlens, case.num_q_tokens_per_head_k, case.spec.num_heads_k)
    return {"tile_scheduler_metadata": metadata, "num_splits": num_splits}


def check(case: Case, padded: bool = False) -> None:
    """Right against the oracle with and without metadata, the same bits twice, and nothing written beside the results.

    `padded`: the caller's own results have gaps between rows, heads and tokens.
    """
    reference = decode_reference(case)
    out, lse = Guarded.like_out(case, padded), Guarded.like_lse(case, padded)
    decode(case, out=out.view, lse=lse.view)
    out.check(f"out: {case.spec}")
    lse.check(f"lse: {case.spec}")
    assert_close(out.view, lse.view, *reference, case.spec)

    again_out, again_lse = decode(case)
    assert same_bits(out.view, again_out), f"not the same bits of out twice: {case.spec}"
    assert same_bits(lse.view, again_lse), f"not the same bits of lse twice: {case.spec}"

    assert_close(*decode(case, **plan(case)), *reference, f"with metadata: {case.spec}")


def bits(x: Any) -> Any:
    """The array's bits as integers."""
    if isinstance(x, np.ndarray):
        return x.view(f"i{x.itemsize}")
    import torch

    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool((bits(a) == bits(b)).all())


class Guarded:
    """A NaN-filled result (`view`) inside a larger buffer that must not change."""

    def __init__(self, like: Any, shape: tuple[int, ...], padded: bool) -> None:
        """`like`: an array that has the framework, the dtype and the device."""
        self._shape = shape
        if padded:
            self._inside = (*(slice(1, -1) for _ in shape[:-1]), slice(8, -8))
            self._buffer = _sentinels(like, (*(extent + 2 for extent in shape[:-1]), shape[-1] + 16))
        else:
            self._inside = (slice(GUARD, -GUARD),)
            self._buffer = _sentinels(like, (math.prod(shape) + 2 * GUARD,))
        self._buffer[self._inside] = math.nan

    @property
    def view(self) -> Any:
        return self._buffer[self._inside].reshape(self._shape)

    @classmethod
    def like_out(cls, case: Case, padded: bool) -> Guarded:
        spec = case.spec
        return cls(case.q, (spec.batch_size, spec.seqlen_q, spec.num_heads_q, HEAD_DIM_V), padded)

    @classmethod
    def like_lse(cls, case: Case, padded: bool) -> Guarded:
        spec = case.spec
        single = case.q[:0].astype(np.float32) if isinstance(case.q, np.ndarray) else case.q[:0].float()
        return cls(single, (spec.batch_size, spec.num_heads_q, spec.seqlen_q), padded)

    def check(self, what: object) -> None:
        """Blots out a copy's result; the rest must be as it was."""
        untouched = _sentinels(self._buffer, tuple(self._buffer.shape))
        rest = self._buffer.copy() if isinstance(self._buffer, np.ndarray) else self._buffer.clone()
        rest[self._inside] = untouched[self._inside]
        assert same_bits(rest, untouched), f"written beside {what}"


def _sentinels(like: Any, shape: tuple[int, ...]) -> Any:
    """An array of SENTINELS, with the dtype and the device of another one."""
    if isinstance(like, np.ndarray):
        return np.full(shape, SENTINELS[like.itemsize], f"i{like.itemsize}").view(like.dtype)
    return bits(like.new_empty(0)).new_full(shape, SENTINELS[like.element_size()]).view(like.dtype)


def turns_during(function: Callable[..., object], *arguments: object) -> int:
    """How often this thread has its turn during one call in another thread: hardly ever, if the call keeps the GIL."""
    thread = threading.Thread(target=function, args=arguments)
    interval = sys.getswitchinterval()
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(interval)
        num_turns += 1
    return num_turns
