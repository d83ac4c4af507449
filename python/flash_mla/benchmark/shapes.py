"""The named cases, each with FlashMLA's figure for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from ..calls import HEAD_DIM_V as HEAD_DIM_V

REFERENCE_SOURCE = "FlashMLA, hopper measurements of 2026-11-23 on another H200"
REFERENCE_SKELETON = {"hot": 531, "cold": 655}  # what skew_skeleton gave on that GPU at 128 heads, TFLOP/s
HEAD_DIM_QK = 576
FLASH_MLA_MODULE = "sgl_kernel.flash_mla"  # where SGLang's kernels bring DeepSeek's FlashMLA


@dataclass(frozen=True)
class Reference:
    """FlashMLA's figure for a case, in the case's unit."""

    hot: float
    cold: float | None = None


@dataclass(frozen=True)
class Shape:
    """A step of decoding. `unit` is what counts for it: "TFLOP/s", "TB/s" or "us".

    The block table has room for `table_tokens` tokens a request, or for the longest request if that is more.
    """

    name: str
    batch_size: int
    num_heads_q: int
    seqlen_q: int
    mean_seqlen_k: int
    unit: str
    reference: Reference | None = None
    std_seqlen_k: int = 0
    causal: bool = False
    num_heads_k: int = 1
    page_size: int = 64
    dtype: str = "bfloat16"
    table_tokens: int = 0

    def lengths(self) -> list[int]:
        """Tokens of each request: the mean, or normally distributed around it."""
        if self.std_seqlen_k == 0:
            return [max(self.mean_seqlen_k, self.seqlen_q)] * self.batch_size
        import numpy as np  # here, so that a command line that names shapes starts fast

        rng = np.random.default_rng(0)
        drawn = rng.normal(self.mean_seqlen_k, self.std_seqlen_k, self.batch_size).tolist()
        return [max(int(length), self.seqlen_q) for length in drawn]

    @property
    def tokens(self) -> int:
        """Of all requests."""
        return sum(self.lengths())

    @property
    def num_q_tokens_per_head_k(self) -> int:
        return self.seqlen_q * self.num_heads_q // self.num_heads_k

    @property
    def flops(self) -> float:
        return 2.0 * self.seqlen_q * self.num_heads_q * self.tokens * (HEAD_DIM_QK + HEAD_DIM_V)

    @property
    def kv_bytes(self) -> float:
        return 2.0 * self.tokens * self.num_heads_k * HEAD_DIM_QK

    @property
    def bytes_moved(self) -> float:
        """KV once, q and out."""
        rows = self.batch_size * self.seqlen_q * self.num_heads_q
        return self.kv_bytes + 2.0 * rows * (HEAD_DIM_QK + HEAD_DIM_V)


SHAPES = (
    Shape("compute_s1_4k", 128, 128, 1, 4096, "TFLOP/s", Reference(533, 640)),
    Shape("compute_s2_8k", 64, 128, 2, 8192, "TFLOP/s", Reference(582, 688), causal=True),
    Shape("compute_s1_16k", 64, 128, 1, 16384, "TFLOP/s", Reference(547, 645)),
    Shape("tp2_h64_8k", 128, 64, 1, 8192, "TB/s", Reference(3.87, 4.25)),
    Shape("tp4_h32_8k", 128, 32, 1, 8192, "TB/s", Reference(4.01, 4.25)),
    Shape("tp8_h16_8k", 128, 16, 1, 8192, "TB/s", Reference(4.05, 4.25)),
    Shape("tp8_h16_s2_8k", 128, 16, 2, 8192, "TB/s", Reference(4.01), causal=True),
    Shape("varlen_h128", 128, 128, 1, 8192, "TFLOP/s", Reference(540), std_seqlen_k=4096),
    Shape("varlen_h16", 64, 16, 1, 8192, "TB/s", Reference(3.83), std_seqlen_k=4096),
    Shape("lat_b1_h128_1k", 1, 128, 1, 1024, "us", Reference(13.6)),
    Shape("lat_b1_h128_8k", 1, 128, 1, 8192, "us", Reference(25.0)),
    Shape("lat_b1_h128_64k", 1, 128, 1, 65536, "us", Reference(51.4)),
    Shape("lat_b4_h16_4k", 4, 16, 1, 4096, "us", Reference(18.6)),
    Shape("lat_b16_h16_2k", 16, 16, 1, 2048, "us", Reference(20.4)),
)
QUICK = ("compute_s1_4k", "tp2_h64_8k", "tp8_h16_8k", "varlen_h128", "lat_b1_h128_8k")


def custom(text: str, std_seqlen_k: int = 0, causal: bool = False) -> Shape:
    """The shape "BATCH,HEADS,S_Q,TOKENS". Raises ValueError for another text."""
    try:
        batch_size, num_heads_q, seqlen_q, tokens = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected BATCH,HEADS,S_Q,TOKENS, got {text!r}") from None
    if min(batch_size, num_heads_q, seqlen_q, tokens) < 1:
        raise ValueError(f"expected four numbers of at least 1, got {text!r}")
    name = f"custom_b{batch_size}_h{num_heads_q}_s{seqlen_q}_{tokens}"
    return Shape(name, batch_size, num_heads_q, seqlen_q, tokens, "us", None, std_seqlen_k=std_seqlen_k, causal=causal)


def named(names: list[str]) -> list[Shape]:
    """The shapes of these names. Raises ValueError for a name that no shape has."""
    known = {shape.name: shape for shape in SHAPES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names]
