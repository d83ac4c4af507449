"""The modules for vLLM and SGLang: the calls that these engines make, on CPU tensors, and what install() replaces.

The engines are not installed: modules of their names stand in, with the functions' signatures as each version has
them.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import flash_mla
import pytest
from cases import HEAD_DIM_V, Case, Spec, make_case
from flash_mla import Unsupported
from flash_mla.integration import _shared, sglang, vllm
from oracle import assert_close, decode_reference, decode_torch

torch = pytest.importorskip("torch")

VLLM_BACKEND = "vllm.v1.attention.backends.mla.flashmla"
SGLANG_BACKEND = "sglang.srt.layers.attention.flashmla_backend"
SPEC = Spec(lengths=(0, 70, 129), seqlen_q=2, num_heads_q=16, causal=True)
ONE_QUERY = Spec(lengths=(0, 70, 129), num_heads_q=16, causal=True)
SCALE = 0.1147


def host_case(spec: Spec) -> tuple[Case, Case]:
    """The case as NumPy arrays, which the oracle reads, and as PyTorch tensors on the CPU."""
    host = make_case(Spec(**{**vars(spec), "dtype": "float16", "softmax_scale": SCALE}))
    arrays = (torch.from_numpy(x) for x in (host.q, host.k_cache, host.block_table, host.cache_seqlens))
    return host, Case(host.spec, *arrays)


def check(host: Case, out: Any, lse: Any) -> None:
    assert_close(out.numpy(), lse.numpy(), *decode_reference(host))


# How the engines' own functions are declared, version by version: (q, k_cache, ...) and what follows it.
def arrays_vllm_0_8(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
                    softmax_scale=None, causal=False): ...  # fmt: skip


def arrays_vllm_0_10_2(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
                       softmax_scale=None, causal=False, descale_q=None, descale_k=None): ...  # fmt: skip


def arrays_vllm_0_11(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
                     softmax_scale=None, causal=False, descale_q=None, descale_k=None, is_fp8_kvcache=False,
                     indices=None): ...  # fmt: skip


def newest_vllm(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
                softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None,
                extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None,
                extra_topk_length=None): ...  # fmt: skip


def fp8_vllm(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
             softmax_scale=None, causal=False, descale_q=None, descale_k=None): ...  # fmt: skip


def plan_vllm_0_8(cache_seqlens, num_heads_per_head_k, num_heads_k): ...
def plan_newer(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None, is_fp8_kvcache=False,
               topk=None): ...  # fmt: skip
def plan_fp8_vllm(cache_seqlens, num_q_tokens_per_head_k, num_heads_k): ...
def sparse_fwd(q, kv, indices, sm_scale, d_v=512): ...


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (_shared.decode_with_descales, arrays_vllm_0_8),
        (_shared.decode_with_descales, arrays_vllm_0_10_2),
        (_shared.decode_with_descales, arrays_vllm_0_11),
        (vllm.flash_mla_with_kvcache, arrays_vllm_0_8),
        (vllm.flash_mla_with_kvcache, newest_vllm),
        (vllm.flash_mla_with_kvcache_fp8, fp8_vllm),
        (vllm.get_mla_metadata, plan_newer),
        (vllm.get_mla_metadata_dense_fp8, plan_fp8_vllm),
        (vllm.flash_mla_sparse_fwd, sparse_fwd),
        (sglang.flash_mla_with_kvcache, arrays_vllm_0_11),
        (sglang.get_mla_metadata, plan_newer),
        (sglang.flash_mla_sparse_fwd, sparse_fwd),
        (flash_mla.get_mla_metadata, plan_newer),
    ],
    ids=lambda function: function.__qualname__,
)
def test_takes_whatever_their_function_takes(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Every argument of theirs by position and by name, in their order and with their defaults."""
    expected = list(inspect.signature(theirs).parameters.values())
    names = [parameter.name for parameter in expected]
    by_name = dict.fromkeys(names, 1)
    signature = inspect.signature(ours)
    assert signature.bind(*by_name.values()).arguments == by_name
    assert signature.bind(**by_name).arguments == by_name
    required = [parameter.name for parameter in expected if parameter.default is parameter.empty]
    signature.bind(**dict.fromkeys(required, 1))
    for parameter in expected:
        if parameter.default is not parameter.empty:
            assert signature.parameters[parameter.name].default == parameter.default


def test_the_older_name_of_planning() -> None:
    names = list(inspect.signature(plan_vllm_0_8).parameters)
    inspect.signature(flash_mla.get_mla_metadata).bind(**dict.fromkeys(names, 1))


# Calls as the engines' backends make them, word for word in their arguments.
def vllm_call(decode: Callable[..., Any], case: Case, **plan_and_more: Any) -> Any:
    return decode(
        q=case.q,
        k_cache=case.k_cache.squeeze(-2).unsqueeze(-2),
        block_table=case.block_table,
        cache_seqlens=case.cache_seqlens,
        head_dim_v=HEAD_DIM_V,
        softmax_scale=SCALE,
        causal=True,
        **plan_and_more,
    )


def copied(arrays: tuple[Any, Any], num_sms: int = 132) -> tuple[Any, Any]:
    """A plan as it is after the engines have copied it into larger buffers, which their CUDA graphs read."""
    metadata, num_splits = arrays
    metadata_buffer = torch.zeros((num_sms, 8), dtype=torch.int32)
    splits_buffer = torch.empty(64, dtype=torch.int32)
    metadata_buffer[: metadata.size(0)].copy_(metadata)
    splits_buffer[: num_splits.size(0)].copy_(num_splits)
    splits_buffer[num_splits.size(0) :].fill_(num_splits[-1])
    return metadata_buffer[: metadata.size(0)], splits_buffer[: num_splits.size(0)]


def fake_vllm(
    monkeypatch: pytest.MonkeyPatch,
    decode: Callable[..., Any],
    *,
    v1_ops: bool = False,
    names: tuple[str, ...] = ("flash_mla_with_kvcache", "get_mla_metadata"),
    check: str = "is_flashmla_dense_supported",
    capability: tuple[int, int] | None = (9, 0),
) -> ModuleType:
    """Modules of vLLM with functions that are nobody's; returns the backend."""
    ops = ModuleType("vllm.v1.attention.ops.flashmla" if v1_ops else "vllm.attention.ops.flashmla")
    backend = ModuleType(VLLM_BACKEND)
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(  # type: ignore[attr-defined]
        is_cuda=lambda: capability is not None, get_device_capability=lambda: capability
    )
    for name in {*names, "flash_mla_with_kvcache_fp8", "get_mla_metadata_dense_fp8", check}:
        value = decode if name == "flash_mla_with_kvcache" else object()
        setattr(ops, name, value)
        setattr(backend, name, value)
    for module in (ops, backend, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in (
        "vllm",
        "vllm.v1",
        "vllm.v1.attention",
        "vllm.v1.attention.backends",
        "vllm.v1.attention.backends.mla",
    ):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    return backend


@pytest.mark.parametrize("descales", [False, True])
def test_vllm_with_arrays(descales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.8 to 0.10.1, then 0.11 to 0.14."""
    backend = fake_vllm(monkeypatch, arrays_vllm_0_11 if descales else arrays_vllm_0_8, check="is_flashmla_supported")
    vllm.install()
    host, case = host_case(SPEC)
    metadata, num_splits = copied(backend.get_mla_metadata(case.cache_seqlens, 2 * 16, 1))
    more = {"descale_q": torch.ones(1), "descale_k": torch.ones(1)} if descales else {}
    out, lse = vllm_call(
        backend.flash_mla_with_kvcache, case, tile_scheduler_metadata=metadata, num_splits=num_splits, **more
    )
    check(host, out, lse)
    assert backend.is_flashmla_supported() == (True, None)
    assert not hasattr(backend, "is_flashmla_dense_supported")


def test_vllm_0_10_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results without the dimension of the one query."""
    backend = fake_vllm(monkeypatch, arrays_vllm_0_10_2, check="is_flashmla_supported")
    vllm.install()
    host, case = host_case(ONE_QUERY)
    metadata, num_splits = backend.get_mla_metadata(case.cache_seqlens, 16, 1)
    ones = torch.ones(1)
    out, lse = vllm_call(
        backend.flash_mla_with_kvcache,
        case,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        descale_q=ones,
        descale_k=ones,
    )
    assert (out.shape, lse.shape) == ((3, 16, HEAD_DIM_V), (3, 16))
    check(host, out.unsqueeze(1), lse.unsqueeze(-1))


def test_newest_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One FlashMLASchedMeta for all layers of a step, planned for by the first."""
    names = ("flash_mla_with_kvcache", "get_mla_metadata", "FlashMLASchedMeta")
    backend = fake_vllm(monkeypatch, newest_vllm, v1_ops=True, names=names)
    own = {name: getattr(backend, name) for name in ("flash_mla_with_kvcache_fp8", "get_mla_metadata_dense_fp8")}
    vllm.install()
    vllm.install()
    assert backend.FlashMLASchedMeta is flash_mla.FlashMLASchedMeta
    host, case = host_case(SPEC)
    scheduler_metadata, _ = backend.get_mla_metadata(case.cache_seqlens, 2 * 16, 1, is_fp8_kvcache=False)
    for _ in range(2):
        out, lse = vllm_call(
            backend.flash_mla_with_kvcache, case, tile_scheduler_metadata=scheduler_metadata, is_fp8_kvcache=False
        )
        check(host, out, lse)
    assert scheduler_metadata.have_initialized
    assert {name: getattr(backend, name) for name in own} == own
    # What vLLM does for a float8 cache, which stays with its own functions.
    scheduler_metadata, _ = backend.get_mla_metadata(case.cache_seqlens, 2 * 16, 1, is_fp8_kvcache=True)
    scheduler_metadata.tile_scheduler_metadata = scheduler_metadata.num_splits = object()


def test_vllm_asks_for_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, reason in (
        ((9, 0), None),
        ((10, 0), "flash_mla needs a Hopper GPU (compute capability 9.0), found 10.0"),
        ((8, 9), "flash_mla needs a Hopper GPU (compute capability 9.0), found 8.9"),
        (None, "flash_mla needs a CUDA device"),
    ):
        backend = fake_vllm(monkeypatch, newest_vllm, capability=capability)
        vllm.install()
        ops = sys.modules["vllm.attention.ops.flashmla"]
        assert backend.is_flashmla_dense_supported() == (reason is None, reason)
        assert ops.is_flashmla_dense_supported() == (reason is None, reason)  # type: ignore[attr-defined]
    assert vllm.is_flashmla_supported is vllm.is_flashmla_dense_supported
    assert vllm.is_flashmla_sparse_supported()[0] is False


def test_vllm_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left as it was, its checks included."""
    fake_vllm(monkeypatch, newest_vllm, names=("flash_mla_with_kvcache",))
    ops = sys.modules["vllm.attention.ops.flashmla"]
    before = dict(vars(ops))
    with pytest.raises(Unsupported, match=rf"^{VLLM_BACKEND}: expected it to have get_mla_metadata"):
        vllm.install()
    assert vars(ops) == before


@pytest.mark.parametrize("value", ["0", "", "1"])
def test_vllm_in_batch_invariant_mode(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fake_vllm(monkeypatch, arrays_vllm_0_11)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    if value == "1":
        with pytest.raises(Unsupported, match=r"^VLLM_BATCH_INVARIANT: expected 0, got 1"):
            vllm.install()
        assert backend.flash_mla_with_kvcache is arrays_vllm_0_11
    else:
        vllm.install()
        assert backend.flash_mla_with_kvcache is _shared.decode_with_descales


@pytest.mark.parametrize("install", [vllm.install, sglang.install], ids=lambda function: function.__module__)
def test_without_the_engine(install: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"vllm|sglang"):
        install()


def fake_sglang(monkeypatch: pytest.MonkeyPatch, *names: str) -> ModuleType:
    backend = ModuleType(SGLANG_BACKEND)
    for name in names:
        setattr(backend, name, object())
    parts = SGLANG_BACKEND.split(".")
    for length in range(1, len(parts)):
        package = ModuleType(".".join(parts[:length]))
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, SGLANG_BACKEND, backend)
    return backend


@pytest.mark.parametrize("draft_tokens", [1, 2])
def test_sglang(draft_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding and verification of drafts, planned with and without is_fp8_kvcache, from buffers of a CUDA graph."""
    backend = fake_sglang(monkeypatch, "flash_mla_with_kvcache", "get_mla_metadata")
    sglang.install()
    host, case = host_case(ONE_QUERY if draft_tokens == 1 else SPEC)
    batch_size = case.spec.batch_size
    for more in ({}, {"is_fp8_kvcache": False}):
        plan = backend.get_mla_metadata(case.cache_seqlens.to(torch.int32), draft_tokens * 16, 1, **more)
        metadata, num_splits = copied(plan)
        out, lse = backend.flash_mla_with_kvcache(
            q=case.q.view(batch_size, -1, 16, 576),
            k_cache=case.k_cache.view(-1, 64, 1, 576),
            block_table=case.block_table[:batch_size],
            cache_seqlens=case.cache_seqlens.to(torch.int32),
            head_dim_v=HEAD_DIM_V,
            tile_scheduler_metadata=metadata,
            num_splits=num_splits,
            softmax_scale=SCALE,
            causal=True,
        )
        check(host, out, lse)
    assert out.view(-1, 16 * HEAD_DIM_V).shape == (batch_size * draft_tokens, 16 * HEAD_DIM_V)


def test_sglang_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sglang(monkeypatch, "get_mla_metadata")
    with pytest.raises(Unsupported, match=rf"^{SGLANG_BACKEND}: expected it to have flash_mla_with_kvcache"):
        sglang.install()


def test_deepseek_callers_need_nothing() -> None:
    """SGLang until October 2025, and whoever else imports flash_mla itself."""
    host, case = host_case(SPEC)
    metadata, num_splits = flash_mla.get_mla_metadata(case.cache_seqlens, 2 * 16, 1)
    out, lse = vllm_call(
        flash_mla.flash_mla_with_kvcache, case, tile_scheduler_metadata=metadata, num_splits=num_splits
    )
    check(host, out, lse)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: vllm.flash_mla_with_kvcache_fp8(x, x, x, x, 512, x, x), "flash_mla_with_kvcache_fp8: only bfloat16"),
        (lambda x: vllm.get_mla_metadata_dense_fp8(x, 16, 1), "get_mla_metadata_dense_fp8: only bfloat16"),
        (lambda x: vllm.flash_mla_sparse_fwd(x, x, x, 0.1), "flash_mla_sparse_fwd: sparse attention"),
        (lambda x: vllm.get_mla_metadata(x, 16, 1, topk=64), "topk: only dense attention is supported, .* got 64"),
        (lambda x: vllm.flash_mla_with_kvcache(x, x, x, x, 512, None, indices=x), "indices: only dense attention"),
        (lambda x: sglang.flash_mla_sparse_fwd(x, x, x, 0.1), "flash_mla_sparse_fwd: sparse attention"),
        (lambda x: sglang.get_mla_metadata(x, 16, 1, is_fp8_kvcache=True), "is_fp8_kvcache: only bfloat16"),
        (lambda x: sglang.get_mla_metadata(x, 16, 1, topk=64), "topk: only dense attention"),
        (lambda x: sglang.flash_mla_with_kvcache(x, x, x, x, 512, x, x, indices=x), "indices: only dense attention"),
        (lambda x: sglang.flash_mla_with_kvcache(x, x, x, x, 512, x, x, is_fp8_kvcache=True), "is_fp8_kvcache: only"),
    ],
)  # fmt: skip
def test_what_is_not_supported(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(Unsupported, match=f"^{message}"):
        call(torch.zeros(1, dtype=torch.int32))


def test_float8_query_is_refused() -> None:
    _, case = host_case(ONE_QUERY)
    plan = sglang.get_mla_metadata(case.cache_seqlens, 16, 1)
    ones = torch.ones(1)
    q = case.q.to(torch.float8_e4m3fn)
    arrays = (case.k_cache, case.block_table, case.cache_seqlens)
    refused = r"^q: (expected dtype bfloat16 or float16, got float8_e4m3|cannot be read through DLPack: float8)"
    with pytest.raises(TypeError, match=refused):
        sglang.flash_mla_with_kvcache(q, *arrays, HEAD_DIM_V, *plan, descale_q=ones, descale_k=ones)


@pytest.mark.gpu
@pytest.mark.parametrize("newest", [False, True])
def test_a_captured_step_of_layers(newest: bool, request: pytest.FixtureRequest) -> None:
    """As the engines capture it: the plan copied into buffers before each replay, or made by the first layer."""
    request.getfixturevalue("torch")
    case = make_case(Spec((500, 0, 129), 2, num_heads_q=16, causal=True), "cuda")
    arrays = (case.q, case.k_cache, case.block_table, case.cache_seqlens, HEAD_DIM_V)
    plan = sglang.get_mla_metadata(case.cache_seqlens, 2 * 16, 1)

    def step() -> list[tuple[Any, Any]]:
        if newest:
            meta, _ = vllm.get_mla_metadata(case.cache_seqlens, 2 * 16, 1, is_fp8_kvcache=False)
            return [vllm.flash_mla_with_kvcache(*arrays, tile_scheduler_metadata=meta, causal=True) for _ in range(3)]
        return [sglang.flash_mla_with_kvcache(*arrays, *plan, causal=True) for _ in range(3)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = step()
    for lengths in ((500, 0, 129), (0, 0, 0), (3, 0, 64), (500, 0, 1)):
        case.cache_seqlens.copy_(torch.tensor(lengths))
        if not newest:
            for buffer, new in zip(plan, sglang.get_mla_metadata(case.cache_seqlens, 2 * 16, 1), strict=True):
                buffer.copy_(new)
        graph.replay()
        reference = decode_torch(case)
        for out, lse in layers:
            assert_close(out, lse, *reference, lengths)


def test_importing_them_imports_no_engine() -> None:
    script = (
        "import sys, flash_mla.integration.vllm, flash_mla.integration.sglang;"
        "print({'torch', 'vllm', 'sglang'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "set()"
