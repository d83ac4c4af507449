"""The arguments of calls, as they are handed from the functions that users call to an array library's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# An array of any of the libraries: they share no base class.
Array = Any

HEAD_DIM_V = 512
METADATA_SIZE = 8  # int32 values of a row of tile_scheduler_metadata
MAX_STATES = 128


class DecodeCall(NamedTuple):
    """The arguments of a call as ``flash_mla_with_kvcache`` names them, the plan as its two arrays."""

    q: Array
    k_cache: Array
    block_table: Array
    cache_seqlens: Array
    out: Array | None
    lse: Array | None
    tile_scheduler_metadata: Array | None
    num_splits: Array | None
    softmax_scale: float
    causal: bool

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """All but the two options. (PyTorch 2.6 can't always compile a slice.)"""
        return (
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            self.out,
            self.lse,
            self.tile_scheduler_metadata,
            self.num_splits,
        )

    def with_plan(self, tile_scheduler_metadata: Array | None, num_splits: Array | None) -> DecodeCall:
        """The same call with another plan. (PyTorch before 2.7 can't compile ``_replace``.)"""
        return DecodeCall(
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            self.out,
            self.lse,
            tile_scheduler_metadata,
            num_splits,
            self.softmax_scale,
            self.causal,
        )

    def map_arrays(self, function: Callable[[Array], Any]) -> DecodeCall:
        """The same call on what the function makes of each array."""
        arrays = (None if array is None else function(array) for array in self.arrays)
        return DecodeCall._make((*arrays, self.softmax_scale, self.causal))

    def result_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of out and lse.

        Raises
        ------
        ValueError
            where q has another number of dimensions than 4.
        """
        if len(self.q.shape) != 4:
            raise ValueError(f"q: expected shape (batch, seqlen_q, num_heads_q, 576), got {tuple(self.q.shape)}")
        batch_size, seqlen_q, num_heads_q, _ = self.q.shape
        return (batch_size, seqlen_q, num_heads_q, HEAD_DIM_V), (batch_size, num_heads_q, seqlen_q)


class States(NamedTuple):
    """An argument of ``merge_states``: a list with an array for each state, or one array that holds all."""

    name: str
    arrays: Sequence[Array]
    is_list: bool

    def names(self) -> list[str]:
        """What errors call the arrays."""
        return [f"{self.name}[{index}]" for index in range(len(self.arrays))] if self.is_list else [self.name]

    def regroup(self, arrays: Sequence[Any]) -> Any:
        """Other forms of the same arrays, as the argument was: a list, or one."""
        return list(arrays) if self.is_list else arrays[0]

    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each state's array."""
        if self.is_list:
            return [tuple(array.shape) for array in self.arrays]
        shape = tuple(self.arrays[0].shape)
        if not shape:
            raise ValueError(f"{self.name}: expected 1 to 5 dimensions, got {len(shape)}")
        return [shape[1:]] * shape[0]


class MergeCall(NamedTuple):
    """The arguments of ``merge_states``."""

    outs: States
    lses: States
    out: Array | None
    lse: Array | None

    def states(self) -> list[Array]:
        """All arrays of outs, then all of lses."""
        return [*self.outs.arrays, *self.lses.arrays]

    def result_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of out and lse.

        Raises
        ------
        ValueError
            where the first of outs has a wrong number of dimensions.
        """
        shape = tuple(self.outs.arrays[0].shape)
        if len(shape) != (4 if self.outs.is_list else 5):
            expected = f"{'' if self.outs.is_list else 'num_states, '}batch, seqlen_q, num_heads_q, {HEAD_DIM_V}"
            raise ValueError(f"{self.outs.names()[0]}: expected shape ({expected}), got {shape}")
        batch_size, seqlen_q, num_heads_q, _ = shape[-4:]
        return (batch_size, seqlen_q, num_heads_q, HEAD_DIM_V), (batch_size, num_heads_q, seqlen_q)

    def check_shapes(self, dtype_name: Callable[[Array], str]) -> None:
        """Raises for shapes and dtypes that don't agree: for compilers, before there are values."""
        out_shape, lse_shape = self.result_shapes()
        outs, lses = self.outs.shapes(), self.lses.shapes()
        if not 1 <= len(outs) <= MAX_STATES:
            raise ValueError(f"outs: expected 1 to {MAX_STATES} states, got {len(outs)}")
        if len(lses) != len(outs):
            raise ValueError(f"lses: expected {len(outs)} states as outs, got {len(lses)}")
        for name, shapes, expected in (("outs", outs, out_shape), ("lses", lses, lse_shape)):
            for index, shape in enumerate(shapes):
                if shape != expected:
                    raise ValueError(f"{name}[{index}]: expected shape {expected}, got {shape}")
        dtype = dtype_name(self.outs.arrays[0])
        if dtype not in ("bfloat16", "float16", "float32"):
            raise TypeError(f"outs[0]: expected dtype bfloat16, float16 or float32, got {dtype}")
        for states, expected_dtype in ((self.outs, dtype), (self.lses, "float32")):
            for index, array in enumerate(states.arrays):
                if dtype_name(array) != expected_dtype:
                    raise TypeError(f"{states.name}[{index}]: expected dtype {expected_dtype}, got {dtype_name(array)}")
        for name, result, expected in (("out", self.out, out_shape), ("lse", self.lse, lse_shape)):
            if result is not None and tuple(result.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(result.shape)}")
        if self.out is not None and dtype_name(self.out) not in (dtype, "float32"):
            raise TypeError(f"out: expected dtype {dtype} as outs, or float32, got {dtype_name(self.out)}")
        if self.lse is not None and dtype_name(self.lse) != "float32":
            raise TypeError(f"lse: expected dtype float32, got {dtype_name(self.lse)}")
