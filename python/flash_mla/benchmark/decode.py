"""Measures dense decode: checks each case against the float64 oracle, then times it in turn with its peers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import __version__, flash_mla_with_kvcache, get_mla_metadata
from . import ceilings as measured_ceilings
from . import machine, oracle
from ._torch import torch
from .peers import Peer
from .pool import Memory, Pool
from .report import Progress, now
from .roofline import RECORDED, Ceilings, cold_rates, hot_rates, ratios
from .shapes import REFERENCE_SKELETON, REFERENCE_SOURCE, Shape
from .timing import Call, Hot, Plan, Timed, time_cold, time_hot

GIVEN = "metadata given"
LEFT_OUT = "metadata left out"
INSIDE = "planned in each call"
MEMORY_BYTES = 4e9  # what the HBM ceiling is read from, at least


@dataclass(frozen=True)
class Settings:
    """What to measure. The first variant is the one that counts."""

    shapes: Sequence[Shape]
    peers: Sequence[Peer] = ()
    peers_missing: Mapping[str, str] = field(default_factory=dict[str, str])
    variants: Sequence[str] = (GIVEN,)
    plan: Plan = field(default_factory=Plan)
    commit: str = "unknown"


@dataclass(frozen=True)
class Bench:
    """What all cases of a run share."""

    settings: Settings
    memory: Memory
    ceilings: Ceilings
    monitor: machine.ClockMonitor
    progress: Progress


def run(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Measure all cases. One that fails, and a run that is interrupted, leaves the others in the result."""
    result: dict[str, Any] = {
        "kind": "decode",
        "date": now(),
        "commit": settings.commit,
        "version": __version__,
        "machine": machine.describe(),
        "ceilings": {},
        "reference": REFERENCE_SOURCE,
        "reference_skeleton": REFERENCE_SKELETON,
        "timing": asdict(settings.plan.shared_by(len(settings.variants) + len(settings.peers))),
        "peers_installed_as": {peer.title: peer.installed_as() for peer in settings.peers},
        "peers_missing": dict(settings.peers_missing),
        "cases": [],
        "failures": [],
    }
    progress.phase("random data")
    memory = Memory(settings.shapes, MEMORY_BYTES)
    with machine.ClockMonitor() as monitor:
        ceilings = measure_ceilings(memory, settings.plan, monitor, progress, result)
        bench = Bench(settings, memory, ceilings, monitor, progress)
        try:
            for shape in settings.shapes:
                if not _try_case(bench, shape, result):
                    break
                progress.advance()
        except KeyboardInterrupt:
            result["failures"].append({"case": "", "error": "interrupted; later cases were not measured"})
    return result


def measure_ceilings(
    memory: Memory, plan: Plan, monitor: machine.ClockMonitor, progress: Progress, result: dict[str, Any]
) -> Ceilings:
    """This GPU's ceilings, noted in the result; the recorded ones where they cannot be measured."""
    progress.phase("ceilings")
    clocks: dict[str, Any] = {}
    try:
        ceilings, clocks = measured_ceilings.measure(memory.cache, plan, monitor)
    except Exception as error:
        result["failures"].append({"case": "ceilings", "error": _text(error)})
        ceilings = RECORDED
    result["ceilings"] = {**asdict(ceilings), "clocks": clocks}
    progress.advance()
    return ceilings


def _try_case(bench: Bench, shape: Shape, result: dict[str, Any]) -> bool:
    """Measure a case and note how it went. False where the GPU no longer answers."""
    try:
        result["cases"].append(_measure(bench, shape))
    except Exception as error:
        result["failures"].append({"case": shape.name, "error": _text(error)})
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        failure = f"the GPU no longer answers, later cases were not measured: {_text(error)}"
        result["failures"].append({"case": shape.name, "error": failure})
        return False
    return True


def _measure(bench: Bench, shape: Shape) -> dict[str, Any]:
    settings, progress = bench.settings, bench.progress
    progress.phase(f"{shape.name}: check")
    pool = Pool(shape, bench.memory)
    requests = pool.some_requests()
    calls: dict[str, Call] = {variant: our_call(pool, variant) for variant in settings.variants}
    agreements = [_check_ours(pool, call, requests) for call in calls.values()]
    timed = {variant: Timed(call, pool.rotations) for variant, call in calls.items()}
    peers: dict[str, dict[str, Any]] = {}
    for peer in settings.peers:
        progress.phase(f"{shape.name}: check {peer.title}")
        peers[peer.title] = {}
        try:
            timed[peer.title], peers[peer.title]["check"] = _prepare_peer(peer, pool, requests)
        except Exception as error:
            peers[peer.title]["error"] = _text(error)

    plan = settings.plan.shared_by(len(timed))
    progress.phase(f"{shape.name}: cold")
    cold_us = time_cold(timed, plan)
    progress.phase(f"{shape.name}: hot")
    hot = time_hot(timed, plan)
    oracle.check(pool, pool.rotations - 1, pool.out, pool.lse, requests)  # what the last hot call left
    return _case(bench, shape, pool.rotations, hot, cold_us, peers) | {"check": asdict(agreements[0])}


def _check_ours(pool: Pool, call: Call, requests: Sequence[int]) -> oracle.Agreement:
    agreements: list[oracle.Agreement] = []
    for rotation in {0, pool.rotations - 1}:
        pool.poison_results()
        call(rotation)
        agreements.append(oracle.check(pool, rotation, pool.out, pool.lse, requests))
    return max(agreements, key=lambda a: a.cosine_difference)


def _prepare_peer(peer: Peer, pool: Pool, requests: Sequence[int]) -> tuple[Timed, dict[str, Any]]:
    prepared = peer.prepare(peer.load(), pool)
    out, lse = prepared.results(prepared.call(pool.rotations - 1))
    agreement = oracle.check(pool, pool.rotations - 1, out, lse, requests)
    return Timed(prepared.call, pool.rotations), asdict(agreement)


def _case(
    bench: Bench,
    shape: Shape,
    rotations: int,
    hot: dict[str, Hot],
    cold_us: dict[str, float],
    peers: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """A case as the JSON has it."""

    def rates_of(name: str) -> tuple[dict[str, Any], dict[str, float]]:
        hot_part = hot_rates(shape, hot[name].microseconds, bench.ceilings)
        clock = bench.monitor.during(hot[name].bursts)
        return {**hot_part, **clock}, cold_rates(shape, cold_us[name], bench.ceilings)

    first, *_ = bench.settings.variants
    ours_hot, ours_cold = rates_of(first)
    ratio_to_peers: dict[str, dict[str, float]] = {}
    for title, peer in peers.items():
        if title in hot:
            peer["hot"], peer["cold"] = rates_of(title)
            ratio_to_peers[title] = {
                "hot": peer["hot"]["us"] / ours_hot["us"],
                "cold": peer["cold"]["us"] / ours_cold["us"],
            }
    return {
        "shape": asdict(shape),
        "tokens": shape.tokens,
        "flop_per_byte": shape.flops / shape.bytes_moved,
        "rotations": rotations,
        "hot": ours_hot,
        "cold": ours_cold,
        "ratio_to_reference": ratios(shape, ours_hot, ours_cold),
        "variants": {v: {"hot_us": hot[v].microseconds, "cold_us": cold_us[v]} for v in bench.settings.variants},
        "peers": peers,
        "ratio_to_peers": ratio_to_peers,
    }


def our_call(pool: Pool, variant: str) -> Callable[[int], object]:
    """A call of flash_mla_with_kvcache that takes a rotation and writes the pool's out and lse."""
    shape = pool.shape

    def plan() -> dict[str, Any]:
        metadata, num_splits = get_mla_metadata(pool.cache_seqlens, shape.num_q_tokens_per_head_k, shape.num_heads_k)
        return {"tile_scheduler_metadata": metadata, "num_splits": num_splits}

    if variant == LEFT_OUT:
        return lambda rotation: flash_mla_with_kvcache(**pool.arguments(rotation))
    if variant == INSIDE:
        return lambda rotation: flash_mla_with_kvcache(**pool.arguments(rotation), **plan())
    given = plan()
    return lambda rotation: flash_mla_with_kvcache(**pool.arguments(rotation), **given)


def _text(error: Exception) -> str:
    """The first line of an error, at most."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
