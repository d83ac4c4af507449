"""Property-based tests: any legal call agrees with the oracle, whatever lies in the dead cells."""

from __future__ import annotations

from typing import Any

import pytest
from cases import LAYOUTS, Spec, make_case
from checks import check
from hypothesis import example, given, settings
from hypothesis import strategies as st


@st.composite
def specs(draw: st.DrawFn, page_sizes: tuple[int, ...], max_length: int, max_group: int) -> Spec:
    """Any legal call with requests of up to max_length tokens and max_group query heads per KV head."""
    page_size = draw(st.sampled_from(page_sizes))
    near_pages = st.integers(0, max_length // page_size).flatmap(
        lambda pages: st.integers(-1, 1).map(lambda beside: max(pages * page_size + beside, 0))
    )
    lengths = draw(st.lists(st.integers(0, max_length) | near_pages | st.just(0), min_size=1, max_size=6))
    num_heads_k = draw(st.integers(1, 3))
    softmax_scale = draw(st.none() | st.floats(0.001, 0.1))
    return Spec(
        lengths=tuple(lengths),
        seqlen_q=draw(st.integers(1, 4) | st.integers(5, 20)),
        num_heads_q=num_heads_k * draw(st.integers(1, max_group)),
        num_heads_k=num_heads_k,
        page_size=page_size,
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from(("bfloat16", "float16"))),
        layout=draw(st.sampled_from(LAYOUTS)),
        softmax_scale=softmax_scale,
        rising=draw(st.sampled_from((0.0, -30.0, 30.0))),
        spare_columns=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=100)
@given(specs(page_sizes=(1, 2, 16, 64, 128), max_length=200, max_group=6), st.booleans())
@example(Spec((0,), spare_columns=0), False)
@example(Spec((64, 128), 3, 3, 3, causal=True, spare_columns=0, layout="transposed"), True)
def test_any_call_on_cpu(spec: Spec, padded: bool) -> None:
    check(make_case(spec), padded)


@pytest.mark.gpu
@settings(max_examples=200)
@given(spec=specs(page_sizes=(16, 32, 64, 128, 256), max_length=1500, max_group=130), padded=st.booleans())
def test_any_call_on_gpu(torch: Any, spec: Spec, padded: bool) -> None:
    check(make_case(spec, "cuda"), padded)
