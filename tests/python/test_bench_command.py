"""`flash-mla bench` where there is neither a GPU nor PyTorch: command line, shapes, rates, tables and plots."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hopper
import pytest
from flash_mla import cli
from flash_mla.benchmark import command, machine, plots, report
from flash_mla.benchmark.roofline import RECORDED, Ceilings, cold_rates, hot_rates, ratios
from flash_mla.benchmark.shapes import QUICK, SHAPES, Shape, custom, named

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
CEILINGS = Ceilings(4.6, 830.0, 4.7, 1000.0, "measured in this run")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def decode_result(shapes: tuple[Shape, ...] = SHAPES) -> dict[str, Any]:
    """A result as a run writes it, of made-up times; FA3 failed in the first case."""
    cases: list[dict[str, Any]] = []
    for index, shape in enumerate(shapes):
        us = max(shape.flops / 550e6, shape.bytes_moved / 4.1e6, 10.0)
        clock = {"sm_mhz": 1400.0, "watts": None}
        hot, cold = {**hot_rates(shape, us, CEILINGS), **clock}, cold_rates(shape, 0.9 * us, CEILINGS)
        peers: dict[str, Any] = {"FA3": {"error": "RuntimeError: [no] such shape"}}
        if index > 0:
            peers["FA3"] = {
                "hot": {**hot_rates(shape, 1.1 * us, CEILINGS), **clock},
                "cold": cold_rates(shape, us, CEILINGS),
            }
        cases.append(
            {
                "shape": asdict(shape),
                "hot": hot,
                "cold": cold,
                "ratio_to_reference": ratios(shape, hot, cold),
                "variants": {"metadata given": {"hot_us": us, "cold_us": us}},
                "peers": peers,
                "ratio_to_peers": {"FA3": {"hot": 1.1, "cold": 1.1}} if index > 0 else {},
            }
        )
    return {
        "kind": "decode",
        "date": "2026-11-24T00:00:00+00:00",
        "commit": "abc1234",
        "machine": {"gpu": "NVIDIA H200", "driver": "580"},
        "ceilings": asdict(CEILINGS),
        "reference": "FlashMLA",
        "peers_installed_as": {"FA3": "fa3 1.0"},
        "peers_missing": {"FlashInfer fa3": "ModuleNotFoundError: No module named 'flashinfer'"},
        "cases": cases,
        "failures": [{"case": "varlen", "error": "OutOfMemoryError: [full]"}],
    }


def sweep_result() -> dict[str, Any]:
    plane = {"title": "16 heads", "x": "context", "y": "batch_size", "fixed": {"num_heads_q": 16, "seqlen_q": 1}}
    rows = {"title": "batch 1", "x": "num_heads_q", "y": "seqlen_q", "fixed": {"batch_size": 1, "context": 1024}}
    cells = [(1, 1024, 10.0, 5.0), (2, 1024, 12.0, 9.0), (1, 1 << 20, 270.0, 88.0)]
    return {
        **{key: decode_result()[key] for key in ("date", "commit", "machine", "ceilings")},
        "kind": "sweep",
        "planes": [plane, rows],
        "points": [
            {
                "batch_size": batch,
                "context": context,
                "num_heads_q": 16,
                "seqlen_q": 1,
                "us": us,
                "ceiling_percent": percent,
            }
            for batch, context, us, percent in cells
        ],
        "skipped": [{"point": "b512", "reason": "memory"}, {"point": "b1", "reason": "time"}],
        "failures": [],
    }


def ranks_result(num_ranks: int = 2) -> dict[str, Any]:
    """A result of several GPUs: a case that gains, one that loses much, and one whose result was off."""
    parts = ("one_device", "step", "decode", "exchange", "collective", "merge", "without_exchange")
    cases: list[dict[str, Any]] = []
    for name, tokens, times in (
        ("long", [1048576], (470.0, 250.0, 235.0, 12.0, 10.0, 3.0, 237.0)),
        ("short", [64, 0, 20000], (8.0, 40.0, 8.0, 15.0, 13.0, 3.0, 11.0)),
        ("wrong", [64], (8.0, 30.0, 8.0, 15.0, 13.0, 3.0, 11.0)),
    ):
        microseconds = dict(zip(parts, times, strict=True))
        cases.append(
            {
                "name": name,
                "tokens": tokens,
                "batch": 16 if name == "long" else 1,
                "queries": 2 if name == "short" else 1,
                "causal": name == "short",
                "graph": name != "wrong",
                "exchange": "gather",
                "passed": name != "wrong",
                "error_out": 3e-5,
                "error_lse": 5e-7,
                "bytes_received_per_rank": 131584,
                "microseconds": microseconds,
                "speedup": microseconds["one_device"] / microseconds["step"],
                "exchange_share": microseconds["exchange"] / microseconds["step"],
            }
        )
    machine = {"gpu": "NVIDIA H200", "driver": "580", "backend": "nccl", "nccl": "2.28.9", "NCCL_NVLS_ENABLE": "0"}
    return {
        **{key: decode_result()[key] for key in ("date", "commit")},
        "kind": "context_parallel",
        "machine": machine,
        "ranks": num_ranks,
        "empty_exchange_us": {"gather": 9.0, "heads": 8.5},
        "cases": cases,
    }


def test_takes_all_cases_or_those_that_are_named() -> None:
    assert [s.name for s in command.chosen_shapes(options())] == [s.name for s in SHAPES]
    assert [s.name for s in command.chosen_shapes(options("--quick"))] == list(QUICK)
    chosen = command.chosen_shapes(
        options("lat_b1_h128_1k", "--custom", "2,16,1,100", "--custom", "3,8,2,50", "--causal", "--page-size", "128")
    )
    assert [s.name for s in chosen] == ["lat_b1_h128_1k", "custom_b2_h16_s1_100", "custom_b3_h8_s2_50"]
    assert [s.causal for s in chosen] == [False, True, True]
    assert {s.page_size for s in chosen} == {128}
    assert {s.table_tokens for s in chosen} == {0}
    assert command.chosen_shapes(options("lat_b1_h128_1k", "--table-tokens", "4096"))[0].table_tokens == 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no case nothing"),
        (["--custom", "1,2,3"], "--custom: expected BATCH,HEADS,S_Q,TOKENS, got '1,2,3'"),
        (["--custom", "1,2,0,4"], "--custom: expected four numbers of at least 1"),
        (["--page-size", "48"], "--page-size: expected a power of two, got 48"),
        (["--table-tokens", "-1"], "--table-tokens: expected at least 65536, as lat_b1_h128_64k has, got -1"),
        (["lat_b1_h128_1k", "--table-tokens", "1000"], "--table-tokens: expected at least 1024, as lat_b1_h128_1k"),
        (["--sweep", "--table-tokens", "64"], "--sweep: expected no --table-tokens"),
        (["--sweep", "--quick"], "--sweep: expected no --quick"),
        (["--sweep", "--bursts", "3"], "--sweep: expected no --bursts"),
        (["--sweep", "--peers", "none"], "--sweep: expected no --peers"),
        (["--std", "-1"], "--std: expected at least 0, got -1"),
        (["--peers", "fa3,fa4"], "--peers: .*got 'fa4'"),
        (["--sweep", "compute_s1_4k"], "--sweep: expected no cases"),
        (["--plot", "/nowhere.json"], "No such file"),
        (["--plot", __file__], "--plot: expected a result's JSON, got .*test_bench_command.py: "),
    ],
    ids=str,
)
def test_refuses_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(hopper.missing() is None, reason="with a Hopper GPU the benchmark would run")
def test_says_that_there_is_no_hopper_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err


def test_names_of_peers() -> None:
    assert command.chosen_peers(None) == ["flash_mla", "flashinfer", "fa3", "sdpa"]
    assert command.chosen_peers("sdpa") == ["sdpa"]
    assert command.chosen_peers("none") == []


def test_the_command_line_starts_without_numpy_and_torch() -> None:
    script = (
        "import sys, flash_mla.cli; flash_mla.cli.main(['info', '--json']);"
        "print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "set()"


def test_lengths_of_a_shape() -> None:
    assert custom("3,16,2,1").lengths() == [2, 2, 2]  # a request holds its own queries
    varied = named(["varlen_h16"])[0].lengths()
    assert len(varied) == 64
    assert len(set(varied)) > 32


def test_rates_and_ratios() -> None:
    shape = named(["compute_s1_4k"])[0]
    hot, cold = hot_rates(shape, 273.0, CEILINGS), cold_rates(shape, 235.0, CEILINGS)
    assert hot["tflops"] == pytest.approx(534, abs=1)
    assert hot["mma_percent"] == pytest.approx(100 * hot["tflops"] / 830)
    assert cold["mma_percent"] == pytest.approx(100 * cold["tflops"] / 1000)
    assert ratios(shape, hot, cold)["hot"] == pytest.approx(hot["tflops"] / 533)
    latency = named(["lat_b1_h128_1k"])[0]
    assert ratios(latency, hot_rates(latency, 6.8, RECORDED), {})["hot"] == pytest.approx(2.0)


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    assert machine.commit("given", REPOSITORY) == "given"
    assert machine.commit(None) == machine.commit(None, tmp_path) == "unknown"
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "named")
    assert machine.commit(None) == "named"


def test_prints_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_decode(decode_result())
    printed = capsys.readouterr().out
    for shape in SHAPES:
        assert shape.name in printed
    for text in (
        "HBM 4.60 (4.70) TB/s",
        "RuntimeError: [no]",
        "1.10 (1.10)",
        "FAILED varlen",
        "FlashInfer fa3 was not",
    ):
        assert text in printed


def test_prints_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_sweep(sweep_result())
    assert "3 points measured, 1 skipped for memory, 1 for time" in capsys.readouterr().out


def test_prints_what_several_gpus_take(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_context_parallel(ranks_result())
    printed = capsys.readouterr().out
    assert "2 ranks on NVIDIA H200" in printed
    assert re.search(r"long +470.0 +250.0 +235.0 +12.0 +10.0 +3.0 +237.0 +1.88 +5 +132 +3e-05", printed)
    assert "OFF wrong: out by 3.0e-05" in printed
    assert "OFF long" not in printed


def test_tables_of_several_gpus() -> None:
    old, new = ranks_result(2), ranks_result(2)
    old["cases"] = []
    right = ranks_result(8)
    right["cases"].pop()
    text = readme_table().context_parallel_tables([old, right, new])
    of_two, of_eight = text.split("\n\n| case |")
    assert "| long | 470.0 | 250.0 | 235.0 | 12.0 | 3.0 | 1.88 | 5 % | 132 |" in of_two
    assert "OFF from one GPU's result: wrong." in of_two
    assert "All results agreed with one GPU's: out within 3e-05." in of_eight
    assert "on 8 NVIDIA H200" in of_eight
    tried_out, on_the_cpu = ranks_result(8), ranks_result(8)
    tried_out["cases"][0]["name"] = "--tokens 5000"
    on_the_cpu["machine"]["gpu"] = "CPU"
    assert readme_table().context_parallel_tables([old, right, new, tried_out, on_the_cpu]) == text
    assert readme_table().context_parallel_tables([]) == ""


def test_writes_and_finds_results(tmp_path: Path) -> None:
    old, new = decode_result(), {**decode_result(), "date": "2026-12-01T00:00:00+00:00"}
    assert report.write(old, None, folder=tmp_path).name == "2026-11-24-abc1234.json"
    report.write(new, tmp_path / "deeper" / "new.json")
    assert report.newest("decode", tmp_path) == old
    assert report.newest("decode", tmp_path / "deeper") == new
    assert report.newest("sweep", tmp_path) is None


def readme_table() -> Any:
    return load_script("readme_table")


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def profiler_output(cases: int) -> str:
    """What ncu prints of so many cases, the program's own lines among it."""
    script = load_script("profile_decode")
    barrier = f"{script.STALLS}barrier_per_issue_active.ratio"
    header = ["ID", "Kernel Name", *script.METRICS.values(), script.NO_INSTRUCTION, barrier]
    values = [["0", "decode_kernel<64>", *["1,250.5"] * len(script.METRICS), "1.0", "3.0"]] * cases
    rows = [header, [""] * len(header), *values]
    lines = ["==PROF== Connected", 'machine {"gpu": "NVIDIA H200"}', *(f"case c{i}" for i in range(cases))]
    return "\n".join([*lines, *(",".join(f'"{cell}"' for cell in row) for row in rows)])


@pytest.mark.skipif(hopper.missing() is None, reason="with a Hopper GPU it would run")
def test_profiles_nothing_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_decode.py"])
    with pytest.raises(SystemExit, match=r"profile_decode\.py: needs a Hopper GPU"):
        load_script("profile_decode").main()


def test_reads_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("profile_decode")
    printed = tmp_path / "ncu.csv"
    printed.write_text(profiler_output(2))
    path = tmp_path / "profile.json"
    monkeypatch.setattr(
        sys, "argv", ["profile_decode.py", "--read", str(printed), "--json", str(path), "--commit", "abc1234"]
    )
    script.main()
    result = json.loads(path.read_text())
    assert (result["kind"], result["commit"], result["machine"]) == ("profile", "abc1234", {"gpu": "NVIDIA H200"})
    assert [case["name"] for case in result["cases"]] == ["c0", "c1"]
    assert result["cases"][1]["hbm_bytes"] == 1250.5
    assert result["cases"][1]["no_instruction_percent"] == 25.0
    assert "| c1 | 1250 | 1250 |" in readme_table().kernel_tables({**decode_result(), "skeleton": []}, result)
    with pytest.raises(SystemExit, match="got 2 kernels and 1 cases"):
        script.read(profiler_output(2).replace("case c1", ""))
    with pytest.raises(SystemExit, match="got 0 kernels and 0 cases"):
        script.read("")


def test_ratios_are_held_against_the_skeleton() -> None:
    """A GPU that gives the skeleton a tenth more has won nothing by it."""
    case = {
        "shape": {"name": "compute", "unit": "TFLOP/s"},
        "ratio_to_reference": {"hot": 1.1, "cold": 1.21},
    }
    latency = {"shape": {"name": "short", "unit": "us"}, "ratio_to_reference": {"hot": 1.5, "cold": None}}
    here = {"hot": 1.1 * 531, "cold": 1.1 * 655}
    run = {"commit": "abc1234", "cases": [case, latency], "skeleton": [here]}
    text = readme_table().kernel_tables(run, None)
    assert "| compute | 1.10 (1.21) | 1.00 (1.10) |" in text
    assert "short" not in text
    before = {"commit": "before", "cases": [], "skeleton": [{"hot": 531, "cold": 655}]}
    lines = readme_table().kernel_tables(run, None, [before, run]).splitlines()
    assert lines[-2:] == ["| abc1234 | 584 (721) | 1.00 (1.10) |", "| before | 531 (655) | - |"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_readme_table_reads_every_result(path: Path) -> None:
    result = json.loads(path.read_text())
    module = readme_table()
    tables = {
        "decode": lambda: module.table(result),
        "context_parallel": lambda: module.context_parallel_tables([result]),
        "profile": lambda: module.profile_table(result),
    }
    if result["kind"] not in tables:
        pytest.skip("a result without a table")
    table = tables[result["kind"]]()
    rows = [line for line in table.splitlines() if re.match(r"\| (?!case \||percent \|)", line)]
    assert len(rows) == len(result["cases"])


def test_tells_of_random_steps() -> None:
    steps = [{"ratio": ratio} for ratio in (1.5, 0.98, 1.2, 1.1, 1.3)]
    result = {"commit": "abc1234", "machine": {"gpu": "H200"}, "seed": 7, "peer": "peer 1", "steps": steps}
    text = readme_table().random_steps(result)
    assert "Of 5 random steps" in text
    assert "seed 7) on one H200 at commit abc1234, hot, 1 took longer than FlashMLA's (peer 1)" in text
    assert "0.98 at least, 0.98 or more in nine of ten, and 1.20 in the median" in text
    assert "none took longer" in readme_table().random_steps({**result, "steps": steps[2:]})


def test_draws_the_same_steps_again() -> None:
    pytest.importorskip("torch")
    module = load_script("random_steps")
    first, again = ([module.draw(rng) for _ in range(200)] for rng in (random.Random(3), random.Random(3)))
    assert first == again
    for step in first:
        assert len(step.lengths()) == step.batch_size
        assert step.seqlen_q <= min(step.lengths()) <= max(step.lengths()) <= module.MAX_LENGTH
    assert {step.batch_size for step in first} == set(module.BATCHES)


def test_prints_the_ratios_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    ratios = {1: (2.0, 3.0, 2.5), 200: (1.25, 1.5)}
    steps = [
        {"step": f"b{batch}", "batch_size": batch, "num_heads_q": 16, "us": 10.0, "peer_us": 10 * ratio, "ratio": ratio}
        for batch, some in ratios.items()
        for ratio in some
    ]
    load_script("random_steps").print_ratios("peer", steps)
    printed = capsys.readouterr().out
    assert re.search(r"all +5 +1.25 +1.25 +2.00 +3.00", printed)
    assert re.search(r"batch 1 +3 +2.00 +2.00 +2.50 +3.00", printed)
    assert re.search(r"batch 133 to 512 +2 +1.25", printed)
    assert "batch 2 to 16" not in printed
    assert "1.250 b200: 10.0 us, peer 12.5" in printed


def test_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["readme_table.py", "--check"])
    readme_table().main()


def test_takes_no_tables_from_a_part_of_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.json").write_text(json.dumps(decode_result(SHAPES[1:])))
    monkeypatch.setattr(sys, "argv", ["readme_table.py", "--check", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no result of bench_decode\.py with all named cases"):
        readme_table().main()


def test_sees_tables_that_are_not_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = readme_table()
    page = tmp_path / "page.md"
    page.write_text(module.replaced(module.CONTEXT_PARALLEL.read_text(), "| old |"))
    monkeypatch.setattr(sys, "argv", ["readme_table.py", "--check", "--context-parallel", str(page)])
    with pytest.raises(SystemExit, match=r"page\.md is not up to date"):
        module.main()
    monkeypatch.setattr(sys, "argv", ["readme_table.py", "--context-parallel", str(page), "--readme", str(page)])
    module.main()
    assert page.read_text() == module.CONTEXT_PARALLEL.read_text()


def test_readme_table_reads_a_new_result() -> None:
    text = readme_table().tables([decode_result()], None)
    assert f"| {SHAPES[0].name} | 128, 128, 1, 4096 |" in text
    assert "| to FA3, hot (cold) |" in text
    assert "% MMA | - |" in text
    assert "% MMA | 1.10 (1.10) |" in text
    assert "relative to FA3 (fa3 1.0), in turn" in text


def test_readme_tells_of_wide_tables_in_short_cases() -> None:
    module = readme_table()
    wide = decode_result((SHAPES[0], SHAPES[-1]))
    assert module.table_tokens(wide) == 0
    for case in wide["cases"]:
        case["shape"]["table_tokens"] = 163840
        case["ratio_to_peers"] = {"FlashMLA": {"hot": 2.0, "cold": 1.6}}
    assert module.table_tokens(wide) == 163840
    text = module.tables([decode_result()], None, wide)
    assert "Where tables have room for 163,840 tokens a request" in text
    last = wide["cases"][-1]
    assert f"abc1234: {SHAPES[-1].name} {last['hot']['us']:.1f} us, 0.50 of FlashMLA's time." in text


def test_table_beside_flash_mla() -> None:
    """Of runs that measured it only, the latest first: speed, and where latency counts the share of its time."""
    result = decode_result((SHAPES[0], SHAPES[-1]))
    result["cases"][0]["ratio_to_peers"] = {"FlashMLA": {"hot": 1.1, "cold": 1.2}}
    result["cases"][1]["ratio_to_peers"] = {"FlashMLA": {"hot": 2.0, "cold": 1.6}}
    text = readme_table().beside_flash_mla_table([result, decode_result(), {**result, "commit": "newer12"}])
    assert "| H200, 4.60 TB/s, at newer12 | H200, 4.60 TB/s, at abc1234 |" in text
    assert f"| {SHAPES[0].name}, our speed over its | 1.10 (1.20) | 1.10 (1.20) |" in text
    assert f"| {SHAPES[-1].name}, our share of its time | 0.50 (0.62) | 0.50 (0.62) |" in text


def test_readme_table_of_a_result_without_peers() -> None:
    result = decode_result(SHAPES[:1])
    result["cases"][0] |= {"peers": {}, "ratio_to_peers": {}}
    text = readme_table().table(result)
    assert "| to FlashMLA, hot (cold) |" in text
    assert "relative to FlashMLA." in text


@pytest.mark.parametrize("make_result", [decode_result, sweep_result, ranks_result])
def test_draws_a_result(make_result: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / "result.json"
    path.write_text(json.dumps(make_result()))
    assert cli.main(["bench", "--plot", str(path)]) == 0
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "result.png" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["decode", "context_parallel"])
def test_draws_old_results(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    newest = report.newest(kind, RESULTS)
    assert newest is not None
    plots.draw(newest, tmp_path / "old.png")


def test_says_what_it_cannot_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(plots.NothingToDrawError, match="got 'host_overhead'"):
        plots.draw({"kind": "host_overhead"}, tmp_path / "x.png")
    with pytest.raises(plots.NothingToDrawError, match="no measured case"):
        plots.draw({"kind": "decode", "cases": []}, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.draw(decode_result(), tmp_path / "x.png")


def test_spreads_labels() -> None:
    assert plots.spread([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert plots.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert plots.spread([0.1, 0.48, 0.52], 0.1) == pytest.approx([0.1, 0.45, 0.55])


def test_groups_points_of_one_intensity() -> None:
    points = [plots.Point(str(x), x, 1.0) for x in (240.0, 30.0, 60.0, 229.0, 31.0)]
    assert [[p.intensity for p in group] for group in plots.groups(points)] == [[30, 31], [60], [229, 240]]


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (6.54, "6.5 us"),
        (99.96, "100 us"),
        (999.0, "999 us"),
        (1234.0, "1.23 ms"),
        (18900.0, "18.9 ms"),
        (2e6, "2.00 s"),
    ],
)
def test_durations(microseconds: float, text: str) -> None:
    assert plots.duration(microseconds) == text
