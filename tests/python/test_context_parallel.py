"""examples/context_parallel.py: a cache spread over ranks gives what one device gives, and float64."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Spec, make_case
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_close, decode_numpy, decode_torch

torch = pytest.importorskip("torch")
EXAMPLE = Path(__file__).parents[2] / "examples" / "context_parallel.py"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_context_parallel.py"
LENGTHS = (700, 0, 64, 1, 129, 65, 63)  # with 8 ranks, most have nothing of most of them
RANKS_TIMES = {"one_device", "step", "without_exchange", "decode", "exchange", "collective", "merge"}
SECONDS = 240  # for processes to start and end on a busy machine


@pytest.fixture(scope="module")
def example() -> Any:
    return load("context_parallel", EXAMPLE)


def load(name: str, path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclass looks there
    specification.loader.exec_module(module)
    return module


@given(st.integers(1, 9), st.sampled_from((1, 16, 64)), st.lists(st.integers(0, 700), min_size=1, max_size=8))
def test_each_token_is_on_one_rank(example: Any, num_ranks: int, page_size: int, tokens: list[int]) -> None:
    lengths = torch.tensor(tokens, dtype=torch.int32)
    for rank in range(num_ranks):
        counts = example.tokens_on(rank, num_ranks, lengths, page_size)
        expected = [sum(token // page_size % num_ranks == rank for token in range(length)) for length in tokens]
        assert counts.dtype == torch.int32
        assert counts.tolist() == expected


def decode_in_turn(example: Any, case: Any, num_ranks: int) -> tuple[Any, Any]:
    """A case of PyTorch tensors, its cache spread over ranks."""
    problem = example.Problem(case.q, case.k_cache, case.block_table.clamp(min=0), case.cache_seqlens, case.spec.causal)
    problem.block_table.remainder_(case.k_cache.shape[0])  # entries that are not used are copied all the same
    states = example.States(num_ranks, *case.q.shape[:3], like=case.q)
    for rank in range(num_ranks):
        shard = example.Shard(problem, rank, num_ranks)
        shard.decode(case.q, states.outs[rank], states.lses[rank])
    return states.merge()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 20])
@pytest.mark.parametrize(
    ("seqlen_q", "causal"), [(1, False), (1, True), (2, False), (2, True), (5, True), (70, True)], ids=str
)
def test_in_turn(device: str | None, example: Any, seqlen_q: int, causal: bool, num_ranks: int) -> None:
    """Against float64. With 5 and 70 causal queries, their own tokens lie on one rank, on two, on more."""
    spec = Spec(LENGTHS, seqlen_q, num_heads_q=4, causal=causal, dtype="float16")
    case = make_case(spec, device or "cpu")
    reference = decode_torch(case) if device else tuple(torch.from_numpy(x) for x in decode_numpy(to_numpy(case)))
    assert_close(*decode_in_turn(example, case, num_ranks), *reference, f"{num_ranks} ranks, {spec}")


@pytest.mark.parametrize("tokens", [(64,), (0, 0)], ids=str)
def test_ranks_without_a_page(device: str | None, example: Any, tokens: tuple[int, ...]) -> None:
    """A rank that holds nothing of any request has a cache of no pages, and a block table of no columns."""
    options = argparse.Namespace(
        tokens=tokens, batch=1, queries=1, heads=128, page_size=64, dtype="bfloat16", causal=False
    )
    problem = example.make_problem(options, torch.device(device or "cpu"))
    assert example.Shard(problem, 2, 3).k_cache.shape[0] == 0
    states = example.States(3, *problem.q.shape[:3], like=problem.q)
    for rank in range(3):
        example.Shard(problem, rank, 3).decode(problem.q, states.outs[rank], states.lses[rank])
    assert example.compare(*states.merge(), *problem.decode())["passed"]


def to_numpy(case: Any) -> Any:
    arrays = (x.numpy() for x in (case.q, case.k_cache, case.block_table, case.cache_seqlens))
    return type(case)(case.spec, *arrays)


@pytest.mark.gpu
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize(("num_heads_q", "seqlen_q"), [(128, 1), (128, 2), (16, 4)])
def test_in_turn_with_long_requests(example: Any, num_heads_q: int, seqlen_q: int, num_ranks: int) -> None:
    case = make_case(Spec((32768, 5000, 0, 777), seqlen_q, num_heads_q, causal=True), "cuda")
    assert_close(*decode_in_turn(example, case, num_ranks), *decode_torch(case), f"{num_ranks} ranks")


@pytest.mark.gpu
@pytest.mark.usefixtures("torch")
def test_a_graph_follows_new_lengths(example: Any) -> None:
    """Lengths are set between replays, once for all shards; pages stay where they are."""
    num_ranks, capacity = 4, 2000
    case = make_case(Spec((capacity,) * 3, 2, num_heads_q=16, causal=True, spare_columns=0), "cuda")
    problem = example.Problem(case.q, case.k_cache, case.block_table, case.cache_seqlens, causal=True)
    shards = [example.Shard(problem, rank, num_ranks) for rank in range(num_ranks)]
    states = example.States(num_ranks, *case.q.shape[:3], like=case.q)
    results: list[Any] = []

    def step() -> None:
        for shard, out, lse in zip(shards, states.outs, states.lses, strict=True):
            shard.decode(case.q, out, lse)
        results[:] = states.merge()

    replay = example.Clock(torch.device("cuda"), 1, graph=True).capture(step)
    rng = np.random.default_rng(0)
    for number in range(6):
        lengths = rng.integers(0, capacity + 1, 3) * (rng.random(3) < 0.8)
        case.cache_seqlens.copy_(torch.from_numpy(lengths.astype(np.int32)))
        for shard in shards:
            shard.set_lengths(case.cache_seqlens)
        for result in results:
            result.fill_(math.nan)
        replay()
        assert_close(*results, *decode_torch(case), f"replay {number}: {lengths}")


def run(
    tmp_path: Path, ranks: int | None, *arguments: str, on_cpu: bool = True, script: Path = EXAMPLE
) -> tuple[int, str, dict[str, Any]]:
    """(exit code, what was printed, the report) of a script: of `ranks` processes, or of one that isn't a rank."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    report = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "FLASH_MLA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, str(script), "--json", str(report), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    text = done.stdout + done.stderr
    return done.returncode, text, json.loads(report.read_text()) if report.exists() else {}


SMALL = ("--tokens", *map(str, LENGTHS), "--heads", "8", "--steps", "1")


@pytest.mark.parametrize(
    ("ranks", "exchange", "queries"),
    [(2, "gather", 1), (4, "heads", 2), (8, "gather", 2), (8, "heads", 1)],
)
def test_ranks_on_the_cpu(tmp_path: Path, ranks: int, exchange: str, queries: int) -> None:
    causal = ("--causal",) if queries > 1 else ()
    code, text, report = run(tmp_path, ranks, *SMALL, "--exchange", exchange, "--queries", str(queries), *causal)
    assert code == 0, text
    assert report["passed"]
    assert report["device"] == "CPU"
    assert (report["ranks"], report["exchange"]) == (ranks, exchange)
    assert set(report["microseconds"]) == RANKS_TIMES
    assert all(value > 0 for value in report["microseconds"].values())
    rows = len(LENGTHS) * queries * 8 // (ranks if exchange == "heads" else 1)
    state = rows * (512 * 2 + 4)
    assert report["bytes_received_per_rank"] == (ranks - 1) * (state + -state % 16)
    assert text.count("agrees with one device") == 1


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is no rank and sees no GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_gpu")
def test_in_turn_from_the_command_line(tmp_path: Path, example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    options = ("--in-turn", "3", "--queries", "2", "--causal", "--batch", "2", "--json", str(path))
    assert example.main([*SMALL, *options]) == 0
    report = json.loads(path.read_text())
    assert report["passed"]
    assert (report["ranks"], report["exchange"], report["batch"]) == (3, None, 2)
    assert set(report["microseconds"]) == {"one_device", "step", "decode", "merge"}
    assert "3 ranks in turn on CPU" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_says_what_is_wrong(example: Any) -> None:
    with pytest.raises(SystemExit, match=r"started by torchrun .*--in-turn N"):
        example.main(SMALL)
    with pytest.raises(SystemExit, match="--graph: needs a Hopper GPU"):
        example.main([*SMALL, "--in-turn", "2", "--graph"])
    with pytest.raises(SystemExit, match=r"--exchange heads: expected --heads that 3 ranks divide, got 8"):
        example.Heads(torch.zeros(1, 1, 8, 576), 3)


def test_too_few_gpus(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken where there is no Hopper GPU, never where there are too few."""
    devices: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0) if index == 0 else (9, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert example.own_device(graph=True) == torch.device("cuda", 2)
    assert devices == [torch.device("cuda", 2)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit, match=r"--nproc-per-node: expected a Hopper GPU .* there are 2, got 4"):
        example.own_device(graph=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert example.own_device(graph=False) == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
def test_exit_code_of_a_wrong_result(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_first_two(states: Any) -> Any:
        return example.merge_states(states.outs[:2], states.lses[:2].transpose(2, 3))

    monkeypatch.setattr(example.States, "merge", merge_first_two)
    assert example.main([*SMALL, "--in-turn", "3"]) == 1
    assert example.main([*SMALL, "--in-turn", "2"]) == 0


def test_sees_what_is_off(example: Any) -> None:
    options = argparse.Namespace(
        tokens=[700, 0], batch=1, queries=1, heads=4, page_size=64, dtype="bfloat16", causal=False
    )
    problem = example.make_problem(options, torch.device("cpu"))
    out, lse = problem.decode()
    assert example.compare(out, lse, out, lse)["passed"]
    assert math.isinf(lse[1, 0, 0])
    for spoil in (
        lambda out, lse: out.mul_(1.02),
        lambda out, lse: out[0, 0, 1].mul_(-1),
        lambda out, lse: out[0, 0, 1].fill_(math.nan),
        lambda out, lse: lse[0, 2].add_(0.01),
        lambda out, lse: lse[0, 2].fill_(math.inf),
        lambda out, lse: lse[1, 2].fill_(0.0),
    ):
        wrong = out.clone(), lse.clone()
        spoil(*wrong)
        assert not example.compare(*wrong, out, lse)["passed"]


def test_benchmark_on_the_cpu(tmp_path: Path) -> None:
    shapes = (
        "--tokens 200 0 --heads 4 --exchange gather",
        "--tokens 64 --heads 4 --queries 2 --causal --exchange heads",
    )
    code, text, result = run(tmp_path, 2, "--steps", "1", *(f"--custom={shape}" for shape in shapes), script=BENCHMARK)
    assert code == 0, text
    assert (result["kind"], result["ranks"]) == ("context_parallel", 2)
    assert [case["name"] for case in result["cases"]] == list(shapes)
    assert [case["exchange"] for case in result["cases"]] == ["gather", "heads"]
    assert all(case["passed"] for case in result["cases"])


@pytest.fixture
def benchmark(example: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark in this process, which is the only rank, on the CPU."""
    module = load("bench_context_parallel", BENCHMARK)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    return module


def test_exit_code_of_the_benchmark(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--steps", "1", "--custom=--tokens 700 --heads 2", "--json", str(tmp_path / "result.json"))
    assert benchmark.main(options) == 0
    merge = benchmark.example.States.merge
    monkeypatch.setattr(benchmark.example.States, "merge", lambda states: [1.05 * part for part in merge(states)])
    assert benchmark.main(options) == 1
    assert not json.loads((tmp_path / "result.json").read_text())["cases"][0]["passed"]


def test_cases_of_the_benchmark(benchmark: Any) -> None:
    cases = benchmark.chosen_cases(benchmark.parse([]))
    assert list(cases) == list(benchmark.CASES)
    assert {1048576, 131072} <= {case.tokens[0] for case in cases.values()}
    assert {case.exchange for case in cases.values()} == {"gather", "heads"}
    assert {case.steps for case in cases.values()} == {200}
    assert len(benchmark.chosen_cases(benchmark.parse(["--cases", "b1_1m_heads", "--custom=--tokens 5"]))) == 2


@pytest.mark.usefixtures("no_gpu")
def test_benchmark_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, message in (
        (["--cases", "b1_128k_heads"], "--graph: needs a Hopper GPU"),
        (["--custom=--tokens 64"], "started by torchrun"),
        (["--custom=--in-turn 2"], "--custom: expected neither --in-turn nor --json"),
    ):
        code, text, result = run(tmp_path, None, *arguments, script=BENCHMARK)
        assert code != 0
        assert message in text
        assert result == {}


@pytest.mark.gpu
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_ranks_on_gpus(tmp_path: Path, exchange: str, graph: bool) -> None:
    """As many ranks as there are GPUs, up to 8: one is enough for NCCL to have its part in a graph."""
    ranks = 2 ** min(int(math.log2(torch.cuda.device_count())), 3)
    options = ("--tokens", "20000", "0", "64", "--queries", "2", "--causal", "--exchange", exchange)
    code, text, report = run(tmp_path, ranks, *options, *(["--graph"] if graph else []), on_cpu=False)
    assert code == 0, text
    assert report["passed"]
    assert "H" in report["device"]
    assert report["ranks"] == ranks


@pytest.mark.gpu
@pytest.mark.usefixtures("torch")
def test_benchmark_on_gpus(tmp_path: Path) -> None:
    """With one GPU or several: the shortest cases, where ranks are empty."""
    ranks = 2 ** min(int(math.log2(torch.cuda.device_count())), 3)
    names = ("empty_ranks_gather", "empty_ranks_heads", "one_page_heads")
    code, text, result = run(tmp_path, ranks, "--cases", *names, "--steps", "20", on_cpu=False, script=BENCHMARK)
    assert code == 0, text
    assert [(case["name"], case["passed"], case["graph"]) for case in result["cases"]] == [
        (name, True, True) for name in names
    ]
    assert (result["ranks"], result["machine"]["backend"]) == (ranks, "nccl")
    assert result["machine"]["nccl"].startswith("2.")


@pytest.mark.gpu
@pytest.mark.usefixtures("torch")
def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    """It says so at once, and does not run on the CPU."""
    ranks = torch.cuda.device_count() + 1
    code, text, report = run(tmp_path, ranks, *SMALL, on_cpu=False)
    assert code != 0
    assert f"got {ranks}; with CUDA_VISIBLE_DEVICES= all run on the CPU" in text
    assert report == {}


@pytest.mark.gpu
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("graph", [False, True])
def test_in_turn_from_the_command_line_on_a_gpu(tmp_path: Path, graph: bool) -> None:
    options = ("--tokens", "131072", "--in-turn", "8", *(["--graph"] if graph else []))
    code, text, report = run(tmp_path, None, *options, on_cpu=False)
    assert code == 0, text
    assert report["passed"]
    assert report["device"] != "CPU"
