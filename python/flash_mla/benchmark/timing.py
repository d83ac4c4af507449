"""Times calls on the GPU as CUDA graphs: hot (bursts under the power limit) and cold (a few calls after a rest).

A call takes its number, so that calls in a row can work on different memory and find L2 cold.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ._torch import torch

Call = Callable[[int], object]

GRAPH_SECONDS = 5e-3  # one graph launch between many calls costs little
COLD_SECONDS = 6e-4  # counted calls after a rest
REST_SECONDS = 0.25
SETTLING = 0.25  # share of a burst in which the clock still falls


@dataclass(frozen=True)
class Plan:
    """How long to measure each call of a case."""

    burst_seconds: float = 0.3
    bursts: int = 3
    rests: int = 4

    def shared_by(self, num_calls: int) -> Plan:
        """The same for a case of so many calls, with fewer turns each, so that it takes about 6 seconds at most."""
        if num_calls <= 2:
            return self
        return replace(self, bursts=min(self.bursts, 2), rests=min(self.rests, 3 if num_calls == 3 else 2))


QUICK_PLAN = Plan(burst_seconds=0.15, bursts=1, rests=2)


@dataclass
class Hot:
    """Microseconds per call, and when (time.monotonic) each burst began and ended."""

    microseconds: float
    bursts: list[tuple[float, float]]


class Timed:
    """A call captured in graphs that run through `rotations` pieces of memory."""

    def __init__(self, call: Call, rotations: int) -> None:
        self._call = call
        self._rotations = rotations
        self._memory = torch.cuda.graph_pool_handle()  # the graphs never run at the same time
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for index in range(3):
                call(index % rotations)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

        self._first = self._capture(0, 1)
        estimate = _seconds(self._first, 1)
        if estimate < GRAPH_SECONDS:
            estimate = max(_seconds(self._first, 5) / 5, 1e-6)
        self._cold_calls = max(2, math.ceil(COLD_SECONDS / estimate))
        self._cold: Any = None
        rounds = max(1, math.ceil(GRAPH_SECONDS / estimate / rotations))
        self._hot_calls = rounds * rotations
        self._hot = self._capture(0, self._hot_calls)
        self._hot_seconds = _seconds(self._hot, 1)

    def hot_burst(self, seconds: float) -> tuple[list[float], tuple[float, float]]:
        """(microseconds per call of each graph launch once the clock has settled, begin and end)"""
        replays = max(3, math.ceil(seconds / self._hot_seconds))
        events = [_event() for _ in range(replays + 1)]
        begin = time.monotonic()
        events[0].record()
        for event in events[1:]:
            self._hot.replay()
            event.record()
        torch.cuda.synchronize()
        end = time.monotonic()
        times = [_microseconds(events[i], events[i + 1]) / self._hot_calls for i in range(replays)]
        return times[int(len(times) * SETTLING) :], (begin + (end - begin) * SETTLING, end)

    def cold_calls(self) -> float:
        """Microseconds per call of a few calls after a rest. The first one after it is not counted."""
        if self._cold is None:
            self._cold = self._capture(1, self._cold_calls)
        torch.cuda.synchronize()
        time.sleep(REST_SECONDS)
        begin, end = _event(), _event()
        self._first.replay()
        begin.record()
        self._cold.replay()
        end.record()
        torch.cuda.synchronize()
        return _microseconds(begin, end) / self._cold_calls

    def _capture(self, start: int, count: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            for index in range(start, start + count):
                self._call(index % self._rotations)
        graph.replay()
        torch.cuda.synchronize()
        return graph


def _seconds(graph: Any, replays: int) -> float:
    begin, end = _event(), _event()
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return _microseconds(begin, end) / 1e6


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _microseconds(begin: Any, end: Any) -> float:
    return float(begin.elapsed_time(end)) * 1e3


def time_hot(calls: dict[str, Timed], plan: Plan) -> dict[str, Hot]:
    """The median per call over bursts, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    bursts: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(plan.bursts):
        for name, timed in calls.items():
            some, span = timed.hot_burst(plan.burst_seconds)
            times[name] += some
            bursts[name].append(span)
    return {name: Hot(statistics.median(times[name]), bursts[name]) for name in calls}


def time_cold(calls: dict[str, Timed], plan: Plan) -> dict[str, float]:
    """The median per call over rests, in microseconds, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(plan.rests):
        for name, timed in calls.items():
            times[name].append(timed.cold_calls())
    return {name: statistics.median(some) for name, some in times.items()}
