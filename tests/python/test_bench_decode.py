"""The benchmark's own work on CPU tensors: inputs, oracle, peers (fake modules), and whole runs with made-up times."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import flash_mla
import pytest
from flash_mla import _C
from flash_mla.benchmark import command, machine
from flash_mla.benchmark.shapes import SHAPES, Shape

torch = pytest.importorskip("torch", reason="needs PyTorch")

from flash_mla.benchmark import decode, oracle, peers, pool, sweep, timing  # noqa: E402
from flash_mla.benchmark import report as bench_report  # noqa: E402

SMALL = Shape("small", 3, 4, 2, 150, "us", std_seqlen_k=60, causal=True)
SHAPES_ON_CPU = (
    SMALL,
    Shape("one query", 2, 8, 1, 130, "us"),
    Shape("two KV heads", 2, 4, 3, 70, "us", causal=True, num_heads_k=2, page_size=32),
    Shape("not causal", 2, 2, 2, 64, "us", dtype="float16"),
    Shape("wide table", 2, 2, 1, 70, "us", std_seqlen_k=30, table_tokens=500),
)


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POOL_BYTES", 1e6)


def make_pool(shape: Shape) -> pool.Pool:
    return pool.Pool(shape, pool.Memory([SMALL if shape.dtype == "bfloat16" else shape, shape], device="cpu"))


def attend(p: pool.Pool, rotation: int) -> tuple[Any, Any]:
    """Float64 attention, request by request and row by row, sharing nothing with the oracle."""
    shape = p.shape
    out, lse = p.out.double(), p.lse.double()
    group = shape.num_heads_q // shape.num_heads_k
    for r, length in enumerate(p.lengths):
        tokens = p.k_cache(rotation)[p.block_table[r].long()].flatten(0, 1)[:length].double()
        for i in range(shape.seqlen_q):
            seen = length - shape.seqlen_q + 1 + i if shape.causal else length
            for head in range(shape.num_heads_q):
                keys = tokens[:seen, head // group]
                scores = keys @ p.q[r, i, head].double() / math.sqrt(576)
                lse[r, head, i] = scores.logsumexp(0)
                out[r, i, head] = scores.softmax(0) @ keys[:, :512]
    return out, lse


@pytest.mark.parametrize("shape", SHAPES_ON_CPU, ids=lambda shape: shape.name)
def test_pool_and_oracle(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_TOKENS_AT_A_TIME", 48)
    p = make_pool(shape)
    assert p.rotations > 1
    assert p.k_cache(0).data_ptr() != p.k_cache(1).data_ptr()
    assert p.block_table.shape[1] == -(-max(*p.lengths, shape.table_tokens) // shape.page_size)
    requests = list(range(shape.batch_size))
    assert p.some_requests(shape.batch_size) == requests
    for rotation in (0, p.rotations - 1):
        out, lse = attend(p, rotation)
        agreement = oracle.check(p, rotation, out, lse, requests)
        assert agreement.error_out < 1e-12
        assert agreement.error_lse is not None
        assert agreement.error_lse < 1e-12


def test_oracle_of_rows_without_keys() -> None:
    p = make_pool(SMALL)
    out, lse = oracle.decode(p.q[0], p.k_cache(0), p.block_table[0], 1, causal=True)
    assert bool((out[0] == 0).all())
    assert bool((lse[:, 0] == math.inf).all())
    assert bool(lse[:, 1].isfinite().all())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, lse: out[1].mul_(1.05), "of out is off"),
        (lambda out, lse: out[0, 0, 0].fill_(math.nan), "not finite"),
        (lambda out, lse: lse[1].add_(0.01), "of lse is off"),
    ],
)
def test_oracle_finds_wrong_results(spoil: Any, message: str) -> None:
    p = make_pool(SMALL)
    out, lse = attend(p, 0)
    spoil(out, lse)
    with pytest.raises(oracle.WrongResultError, match=message):
        oracle.check(p, 0, out, lse, [0, 1])


def test_wants_one_dtype() -> None:
    with pytest.raises(ValueError, match="one dtype, got bfloat16, float16"):
        pool.Memory([SMALL, replace(SMALL, dtype="float16")], device="cpu")


def fake_flash_mla() -> ModuleType:
    """DeepSeek's: ours, without out and lse of the caller's."""
    module = ModuleType("deepseek_flash_mla")
    module.get_mla_metadata = flash_mla.get_mla_metadata  # type: ignore[attr-defined]
    module.flash_mla_with_kvcache = flash_mla.flash_mla_with_kvcache  # type: ignore[attr-defined]
    return module


def fake_flashinfer() -> ModuleType:
    class BatchMLAPagedAttentionWrapper:
        def __init__(self, workspace: Any, backend: str) -> None:
            assert backend == "fa3"

        def plan(self, **options: Any) -> None:
            self.options = options

        def run(self, q_nope: Any, q_pe: Any, ckv_cache: Any, kpe_cache: Any, return_lse: bool) -> tuple[Any, Any]:
            o = self.options
            assert return_lse
            assert ckv_cache.shape[1:] == (o["page_size"], 512)
            assert kpe_cache.shape[1:] == (o["page_size"], 64)
            out = q_nope.new_empty(q_nope.shape)
            lse = torch.empty(q_nope.shape[:2])
            for r, length in enumerate(o["kv_len_arr"].tolist()):
                pages = o["kv_indices"][o["kv_indptr"][r] : o["kv_indptr"][r + 1]].long()
                ckv, kpe = (cache[pages].flatten(0, 1)[:length].double() for cache in (ckv_cache, kpe_cache))
                begin, end = o["qo_indptr"][r : r + 2].tolist()
                for row in range(begin, end):
                    seen = length - (end - 1 - row) if o["causal"] else length
                    scores = q_nope[row].double() @ ckv[:seen].T + q_pe[row].double() @ kpe[:seen].T
                    scores *= o["sm_scale"]
                    lse[row] = scores.logsumexp(-1) / math.log(2)
                    out[row] = (scores.softmax(-1) @ ckv[:seen]).to(out.dtype)
            return out, lse

    module = ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper  # type: ignore[attr-defined]
    return module


def fake_fa3() -> ModuleType:
    def get_scheduler_metadata(
        batch_size: int, seqlen_q: int, seqlen_k: int, heads_q: int, heads_k: int, headdim: int, *rest: Any, **o: Any
    ) -> str:
        assert headdim == 64
        assert o["headdim_v"] == 512
        return "metadata"

    def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, **o: Any) -> tuple[Any, Any, Any, Any]:
        assert o["scheduler_metadata"] == "metadata"
        out, lse = flash_mla.flash_mla_with_kvcache(
            torch.cat([o["qv"], q], -1),
            torch.cat([v_cache, k_cache], -1),
            o["page_table"],
            o["cache_seqlens"],
            512,
            softmax_scale=o["softmax_scale"],
            causal=o["causal"],
        )
        return out, lse, None, None

    module = ModuleType("flash_attn_interface")
    module.get_scheduler_metadata = get_scheduler_metadata  # type: ignore[attr-defined]
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return module


FAKES = {"deepseek_flash_mla": fake_flash_mla, "flashinfer.mla": fake_flashinfer, "flash_attn_interface": fake_fa3}


@pytest.fixture
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> list[peers.Peer]:
    for name, make in FAKES.items():
        monkeypatch.setitem(sys.modules, name, make())
    found, why_not = peers.chosen(None, "deepseek_flash_mla")
    assert not why_not
    assert [peer.name for peer in found] == list(command.PEER_NAMES)
    return found


@pytest.mark.parametrize("shape", SHAPES_ON_CPU, ids=lambda shape: shape.name)
def test_peers_run_on_the_same_inputs(shape: Shape, fake_peers: list[peers.Peer]) -> None:
    p = make_pool(shape)
    for peer in fake_peers:
        if peer.name == "flashinfer" and shape.num_heads_k > 1:
            with pytest.raises(peers.UnsuitedError, match="one KV head only"):
                peer.prepare(peer.load(), p)
            continue
        prepared = peer.prepare(peer.load(), p)
        for rotation in (0, p.rotations - 1):
            out, lse = prepared.results(prepared.call(rotation))
            oracle.check(p, rotation, out, lse, range(shape.batch_size))
            assert (lse is None) == (peer.name == "sdpa")


def test_says_why_a_peer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgl_kernel", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    found, why_not = peers.chosen(["flash_mla", "fa3", "sdpa"], None)
    assert [peer.name for peer in found] == ["sdpa"]
    assert "sgl_kernel" in why_not["FlashMLA"]
    assert "flash_attn_interface" in why_not["FA3"]


def test_finds_flash_mla_among_sglangs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_mla", fake_flash_mla())
    found, why_not = peers.chosen(["flash_mla"], None)
    assert [peer.title for peer in found] == ["FlashMLA"]
    assert not why_not


def test_tells_which_distribution_a_peer_is_of() -> None:
    sdpa, unknown = peers.PEERS[3], peers.Peer("x", "X", "no_such_module", peers.PEERS[3].prepare)
    assert sdpa.installed_as() == f"torch {importlib.metadata.version('torch')}"
    assert unknown.installed_as() is None


class FakeTimed:
    """Calls once where the GPU would be timed; made-up microseconds."""

    def __init__(self, call: timing.Call, rotations: int) -> None:
        call(rotations - 1)

    def hot_burst(self, seconds: float) -> tuple[list[float], tuple[float, float]]:
        return [20.0, 22.0, 24.0], (0.0, seconds)

    def cold_calls(self) -> float:
        return 18.0


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run go through on the CPU."""
    memory = pool.Memory
    for module in (decode, sweep):
        monkeypatch.setattr(module, "Memory", lambda shapes, min_bytes=0: memory(shapes, 0, "cpu"))
        monkeypatch.setattr(module, "Timed", FakeTimed)
    monkeypatch.setattr("flash_mla.benchmark.ceilings.Timed", FakeTimed)
    monkeypatch.setattr(machine, "missing", lambda: None)
    monkeypatch.setattr(machine, "describe", lambda: {"gpu": "NVIDIA H200", "driver": "580"})
    monkeypatch.setattr(machine.ClockMonitor, "__enter__", lambda self: self)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    monkeypatch.setattr(_C, "launch_hbm_read", lambda buffer, stream: 92_000_000)
    monkeypatch.setattr(_C, "launch_mma_mix", lambda operands, sink, iterations, stream: 16.6e9)


def run_command(folder: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*arguments, "--json", str(folder / "result.json")]))


@pytest.mark.usefixtures("fake_gpu", "fake_peers")
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = peers.PEERS[3].prepare

    def broken(module: Any, p: pool.Pool) -> peers.Prepared:
        prepared = right(module, p)
        return peers.Prepared(prepared.call, lambda result: (prepared.results(result)[0] * 1.1, None))

    wrong = peers.Peer("sdpa", "Wrong", "torch.nn.functional", broken)
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS[:3], wrong))
    monkeypatch.setattr(decode, "our_call", failing_for("custom_b3_h4_s1_90", decode.our_call))
    custom = ["--custom", "2,8,1,130", "--custom", "3,4,1,90", "--custom", "1,2,1,64"]
    assert run_command(tmp_path, *custom, "--flash-mla-module", "deepseek_flash_mla", "--planning") == 1
    result = json.loads((tmp_path / "result.json").read_text())

    assert [case["shape"]["batch_size"] for case in result["cases"]] == [2, 1]
    assert result["failures"] == [{"case": "custom_b3_h4_s1_90", "error": "RuntimeError: out of luck"}]
    assert result["ceilings"]["hbm_tbps"] == pytest.approx(92 / 22)
    assert result["ceilings"]["mma_tflops"] == pytest.approx(16.6e9 / 22e6)
    case = result["cases"][0]
    assert set(case["variants"]) == {decode.GIVEN, decode.LEFT_OUT, decode.INSIDE}
    assert case["hot"]["us"] == 22.0
    assert case["cold"]["us"] == 18.0
    assert set(case["hot"]) >= {"tflops", "tbps", "mma_percent", "hbm_percent", "sm_mhz", "watts"}
    assert set(case["ratio_to_peers"]) == {"FlashMLA", "FlashInfer fa3", "FA3"}
    assert case["ratio_to_peers"]["FA3"] == {"hot": 1.0, "cold": 1.0}
    assert result["peers_installed_as"]["FA3"] is None
    assert result["peers_installed_as"]["Wrong"].startswith("torch ")
    assert case["peers"]["FA3"]["check"]["error_lse"] < 1e-3
    assert case["peers"]["Wrong"]["error"].startswith("WrongResultError: ")
    assert "FAILED custom_b3_h4_s1_90" in capsys.readouterr().out


def failing_for(name: str, make_call: Any) -> Any:
    def make(p: pool.Pool, variant: str) -> Any:
        if p.shape.name == name:
            raise RuntimeError("out of luck\nand more")
        return make_call(p, variant)

    return make


@pytest.mark.usefixtures("fake_gpu")
def test_a_run_without_ceilings_uses_the_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise RuntimeError("no")

    monkeypatch.setattr(_C, "launch_hbm_read", fail)
    assert run_command(tmp_path, "--custom", "1,2,1,64", "--peers", "none") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ceilings"]["source"].startswith("recorded")
    assert result["failures"][0]["case"] == "ceilings"
    assert len(result["cases"]) == 1


@pytest.mark.usefixtures("fake_gpu")
def test_a_dead_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert run_command(tmp_path, "--custom", "1,2,1,64", "--custom", "1,2,1,70", "--peers", "none") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["cases"]) == 1
    assert "no longer answers" in result["failures"][0]["error"]


@pytest.mark.usefixtures("fake_gpu")
def test_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("context", (64, 128, 1 << 20)), ("batch_size", (1, 2)), ("num_heads_q", (2, 4))):
        monkeypatch.setitem(sweep._AXES, name, values)
    large, small = sweep.PLANES[1:3]
    planes = (
        replace(large, fixed={"num_heads_q": 4, "seqlen_q": 1}),
        replace(small, fixed={"batch_size": 64, "context": 64}),
    )
    monkeypatch.setattr(sweep, "PLANES", planes)
    assert run_command(tmp_path, "--sweep") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {skipped["reason"] for skipped in result["skipped"]} == {"memory"}
    assert len(result["points"]) + len(result["skipped"]) == len(sweep.points())
    for plane in result["planes"]:
        assert any(all(point[k] == v for k, v in plane["fixed"].items()) for point in result["points"])
    assert run_command(tmp_path, "--sweep", "--budget", "-1") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["points"] == []
    assert {skipped["reason"] for skipped in result["skipped"]} == {"memory", "time"}


def test_points_of_a_sweep() -> None:
    shapes = sweep.points()
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert {shape.mean_seqlen_k for shape in shapes} == {1 << i for i in range(10, 21)}
    assert {shape.batch_size for shape in shapes} == {1 << i for i in range(10)}
    assert {shape.num_heads_q for shape in shapes} == {8, 16, 32, 64, 128}
    assert {shape.seqlen_q for shape in shapes} == {1, 2, 4, 8}


def test_a_case_of_many_calls_takes_fewer_turns() -> None:
    plan = timing.Plan()
    assert plan.shared_by(2) == plan
    for num_calls in range(1, 8):
        shared = plan.shared_by(num_calls)
        seconds = num_calls * (shared.bursts * shared.burst_seconds + shared.rests * timing.REST_SECONDS)
        assert seconds < 8
    # The default peers, at their most, and all named cases: below two minutes, with about a second of checks a case.
    five = plan.shared_by(5)
    of_a_case = 5 * (five.bursts * five.burst_seconds + five.rests * timing.REST_SECONDS) + 1.5
    assert len(SHAPES) * of_a_case < 120


def test_progress_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with bench_report.Progress(2) as progress:
        progress.phase("one")
        progress.advance()
