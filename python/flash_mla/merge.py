"""Merging of attention over parts of the keys, such as the GPUs of a cache that is spread over several hold."""

from __future__ import annotations

from collections.abc import Sequence

from . import frameworks
from .calls import MAX_STATES, Array, MergeCall, States
from .frameworks import check_framework, framework_of


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
    captured in a CUDA graph. It can be called in functions that torch.compile, torch.export or jax.jit compile.

    There is no backward pass: PyTorch's results never require grad, and JAX raises on differentiation.

    Parameters
    ----------
    outs : array of bfloat16, float16 or float32, shape (num_states, batch, seqlen_q, num_heads_q, 512)
        Or a list or tuple of num_states arrays, each with strides of its own. 1 to 128 states. Last dimension
        contiguous; on a GPU the other strides are multiples of 16 bytes.
    lses : array of float32, shape (num_states, batch, num_heads_q, seqlen_q)
        Or a list or tuple. Natural logarithms; any strides.
    out : array of float32 or as outs, shape (batch, seqlen_q, num_heads_q, 512), optional
        Where the result goes; a new array like outs by default. (A tensor that requires grad is refused, unless grad is
        off.)
    lse : array of float32, shape (batch, num_heads_q, seqlen_q), optional
        Where the log-sum-exp goes; a new array by default, as for ``out``.

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
    call = MergeCall(_to_states("outs", outs), _to_states("lses", lses), out, lse)
    if not call.outs.arrays:
        raise ValueError(f"outs: expected 1 to {MAX_STATES} states, got 0")
    like = call.outs.names()[0]
    if frameworks.is_read_by_dynamo():
        from . import torch_library

        if torch_library.is_tensor(call.outs.arrays[0]):
            return torch_library.merge_states(call)
    frameworks.check_gradless(out, lse)
    framework = framework_of(call.outs.arrays[0], like)
    for states in (call.outs, call.lses):
        for name, array in zip(states.names(), states.arrays, strict=True):
            check_framework(framework, array, name, like)
    for name, array in (("out", out), ("lse", lse)):
        if array is not None:
            framework.check_output(array, name, like)
    return framework.merge_states(call)


def _to_states(name: str, value: Array | Sequence[Array]) -> States:
    is_list = isinstance(value, (list, tuple))
    return States(name, value if is_list else [value], is_list)
