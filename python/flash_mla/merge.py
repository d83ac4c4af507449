"""Merging of attention over parts of the keys, such as the GPUs of a cache that is spread over several hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _C
from .frameworks import Array, Framework, check_framework, framework_of

_HEAD_DIM_V = 512
_SHAPE = "batch, seqlen_q, num_heads_q, 512)"


def merge_states(
    outs: Array | Sequence[Array],
    lses: Array | Sequence[Array],
    *,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Array, Array]:
    """Merge what attention over parts of the keys gave into attention over all of them.

    A state is a pair (out, lse) as ``flash_mla_with_kvcache`` returns it. With weights w = exp(lse - lse'), the merged
    lse' is log(sum of exp(lse)) and the merged out the sum of w * out, computed in float32 in the order of the states:
    the same bits for the same inputs. A row of a part without keys has lse +inf, as ``flash_mla_with_kvcache`` gives
    it, or -inf, as others do: it counts for nothing, whatever its out holds. NaN stays NaN.

    All arrays belong to one library (PyTorch, CuPy, JAX or NumPy) and lie on one device: a Hopper GPU, or the CPU. On
    a GPU the work is queued on the library's current stream of that device and the call returns at once; it can be
    captured in a CUDA graph. JAX arrays must be concrete, and the call then returns when the results are there.

    Parameters
    ----------
    outs : array of bfloat16, float16 or float32, shape (num_states, batch, seqlen_q, num_heads_q, 512)
        Or a list or tuple of num_states arrays, each with strides of its own. 1 to 128 states. Last dimension
        contiguous; on a GPU the other strides are multiples of 16 bytes.
    lses : array of float32, shape (num_states, batch, num_heads_q, seqlen_q)
        Or a list or tuple. Natural logarithms; any strides.
    out : array of float32 or as outs, shape (batch, seqlen_q, num_heads_q, 512), optional
        Where the result goes; a new array like outs by default.
    lse : array of float32, shape (batch, num_heads_q, seqlen_q), optional
        Where the log-sum-exp goes; a new array by default.

    Returns
    -------
    out : array, shape (batch, seqlen_q, num_heads_q, 512)
        Rows for which no state has a key are 0.
    lse : array of float32, shape (batch, num_heads_q, seqlen_q)
        +inf for rows for which no state has a key.

    Raises
    ------
    ValueError, TypeError
        for a wrong argument, which the message names.
    Unsupported
        a RuntimeError: a GPU that is not a Hopper.
    CudaError
        a RuntimeError: a call of CUDA failed.
    """
    states = _Arrays("outs", outs), _Arrays("lses", lses)
    if not states[0].arrays:
        raise ValueError("outs: expected 1 to 128 states, got 0")
    like, first = states[0].names[0], states[0].arrays[0]
    framework = framework_of(first, like)
    for argument in states:
        for name, array in zip(argument.names, argument.arrays, strict=True):
            check_framework(framework, array, name, like)
    out, lse = _outputs(framework, states[0], out, lse)

    def launch(*arrays: Any) -> None:
        """Hands lists over where the caller gave lists."""
        *given, out, lse, stream = arrays
        split = len(states[0].arrays)
        _C.merge_states(states[0].regroup(given[:split]), states[1].regroup(given[split:]), out, lse, stream)

    framework.call(launch, (*states[0].arrays, *states[1].arrays, out, lse), framework.stream(first))
    framework.finish(first)
    return out, lse


class _Arrays:
    """The arrays of an argument: one for each state, or one that holds all; and the names that errors give them."""

    def __init__(self, name: str, value: Array | Sequence[Array]) -> None:
        self.is_list = isinstance(value, (list, tuple))
        self.arrays: list[Array] = list(value) if self.is_list else [value]
        self.names = [f"{name}[{index}]" for index in range(len(self.arrays))] if self.is_list else [name]

    def regroup(self, arrays: list[Any]) -> Any:
        """Other forms of the same arrays, as the argument was: a list, or one."""
        return arrays if self.is_list else arrays[0]


def _outputs(framework: Framework, outs: _Arrays, out: Array | None, lse: Array | None) -> tuple[Array, Array]:
    """The caller's arrays, or new ones. Their shapes are checked by the library."""
    like, first = outs.names[0], outs.arrays[0]
    for name, array in (("out", out), ("lse", lse)):
        if array is not None:
            framework.check_output(array, name, like)
    if out is not None and lse is not None:
        return out, lse
    extents = tuple(first.shape)
    if len(extents) != (4 if outs.is_list else 5):
        raise ValueError(f"{like}: expected shape {'(' if outs.is_list else '(num_states, '}{_SHAPE}, got {extents}")
    batch_size, seqlen_q, num_heads_q, _ = extents[-4:]
    if out is None:
        out = framework.empty(first, (batch_size, seqlen_q, num_heads_q, _HEAD_DIM_V))
    if lse is None:
        lse = framework.empty(first, (batch_size, num_heads_q, seqlen_q), "float32")
    return out, lse
