"""Draws a result from its JSON: a roofline of cases and peers, heat maps of a sweep, or how a step over several GPUs
compares with one. Needs no GPU and no PyTorch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "flash_mla"
_OUR_COLOUR = "#c1272d"
_PEER_STYLES = (("#0b5394", "s"), ("#3d8b37", "^"), ("#e08e0b", "D"), ("#6a6a6a", "v"), ("#7b4fa3", "P"))
_SAME_INTENSITY = 1.13  # nearer points share a column of labels
_DODGE = 1.035  # peers are drawn beside our point, not on it
_LABEL_GAP = 0.034  # between labels, of the axes' height
_MOST_PERCENT = 500.0  # what of a bar is drawn
_UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "us"))


class NothingToDrawError(ValueError):
    """A result without anything that has a plot."""


@dataclass(frozen=True)
class Point:
    """A measured case."""

    label: str
    intensity: float
    tflops: float


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a result of kind "decode", "sweep" or "context_parallel" as PNG.

    Raises
    ------
    NothingToDrawError
        for another kind, and where nothing was measured.
    ImportError
        where matplotlib is missing.
    """
    drawings = {"decode": _roofline, "sweep": _sweep, "context_parallel": _context_parallel}
    drawing = drawings.get(result.get("kind", ""))
    if drawing is None:
        kinds = ", ".join(f'"{kind}"' for kind in drawings)
        raise NothingToDrawError(f"expected a result of a kind of {kinds}, got {result.get('kind')!r}")
    if not result["points" if result["kind"] == "sweep" else "cases"]:
        raise NothingToDrawError("the result holds no measured case")
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ImportError("matplotlib is missing: pip install matplotlib") from None
    figure = drawing(result, figure_module)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    return path


def series(result: dict[str, Any]) -> dict[str, list[Point]]:
    """Our points and those of each peer, hot, by title; ours first."""
    points: dict[str, list[Point]] = {OURS: []}
    for case in result["cases"]:
        name, intensity = case["shape"]["name"], _intensity(case)
        points[OURS].append(Point(name, intensity, case["hot"]["tflops"]))
        for title, peer in case.get("peers", {}).items():
            if "hot" in peer:
                points.setdefault(title, []).append(Point(name, intensity, peer["hot"]["tflops"]))
    return points


def _intensity(case: dict[str, Any]) -> float:
    """FLOP per byte of HBM that a case has to move: KV once, q and out."""
    return float(case["hot"]["tflops"] / case["hot"]["tbps"])


def _roofline(result: dict[str, Any], figure_module: Any) -> Any:
    figure = figure_module.Figure(figsize=(11, 7.2), layout="constrained")
    axes = figure.subplots()
    points = series(result)
    every = [point for some in points.values() for point in some]
    ceilings = result["ceilings"]
    ridge = ceilings["mma_tflops"] / ceilings["hbm_tbps"]
    left = min(0.6 * min(p.intensity for p in every), 0.25 * ridge)
    right = 2.4 * max(*(p.intensity for p in every), ridge)
    bottom = 0.6 * min(p.tflops for p in every)
    top = 1.7 * max(ceilings["mma_tflops"], ceilings.get("mma_tflops_cold", 0.0))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.grid(True, which="major", color="#d0d0d0", linewidth=0.6)
    axes.grid(True, which="minor", color="#ececec", linewidth=0.4)
    axes.set_axisbelow(True)
    _draw_roofs(axes, ceilings, left, right)
    for index, (title, some) in enumerate(points.items()):
        colour, marker = (_OUR_COLOUR, "o") if index == 0 else _PEER_STYLES[(index - 1) % len(_PEER_STYLES)]
        axes.plot(
            [point.intensity * _DODGE**index for point in some],
            [point.tflops for point in some],
            marker,
            color=colour,
            markersize=8 if index == 0 else 5.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=title,
            zorder=5 if index == 0 else 4,
        )
    _finish(axes, result, len(points))
    figure.draw_without_rendering()  # lays out the axes, which the places of labels depend on
    _draw_slope_label(axes, ceilings["hbm_tbps"])
    _draw_labels(axes, points[OURS], len(points), ceilings)
    return figure


def _draw_roofs(axes: Any, ceilings: dict[str, Any], left: float, right: float) -> None:
    """The measured slope and roof, hot; above them those after a rest, where they were measured."""
    kinds = [("hot", "", left, "black", 1.8, "-")]
    if ceilings.get("mma_tflops_cold", 0.0) > 1.01 * ceilings["mma_tflops"]:
        begin = ceilings["mma_tflops"] / ceilings["hbm_tbps_cold"]
        kinds.append(("after a rest", "_cold", begin, "#8a8a8a", 1.0, "--"))
    for kind, suffix, begin, colour, width, style in kinds:
        tbps, tflops = ceilings[f"hbm_tbps{suffix}"], ceilings[f"mma_tflops{suffix}"]
        xs, ys = [begin, tflops / tbps, right], [begin * tbps, tflops, tflops]
        axes.plot(xs, ys, style, color=colour, linewidth=width, zorder=2)
        axes.annotate(
            f"tensor cores, MLA's MMAs, {kind}: {tflops:.0f} TFLOP/s",
            (right, tflops),
            xytext=(-6, -4 if kind == "hot" else 3),  # hot is the lower line
            textcoords="offset points",
            ha="right",
            va="top" if kind == "hot" else "bottom",
            color=colour,
            fontsize=9,
        )


def _draw_slope_label(axes: Any, tbps: float) -> None:
    left = axes.get_xlim()[0]
    start = axes.transData.transform((left, left * tbps))
    end = axes.transData.transform((2 * left, 2 * left * tbps))
    axes.annotate(
        f"HBM read: {tbps:.2f} TB/s",
        (left * 1.08, left * 1.08 * tbps),
        xytext=(0, 5),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(end[1] - start[1], end[0] - start[0])),
        rotation_mode="anchor",
        fontsize=9,
    )


def _draw_labels(axes: Any, points: Sequence[Point], num_series: int, ceilings: dict[str, Any]) -> None:
    """Name our points: a column of labels to the right of each group of about one intensity, none over another, the
    roof, its label or the slope.
    """
    to_axes = axes.transAxes.inverted()

    def height(tflops: float) -> float:
        return float(to_axes.transform(axes.transData.transform((1.0, tflops)))[1])

    under_roof = height(ceilings["mma_tflops"]) - 1.5 * _LABEL_GAP
    for group in groups(points):
        group.sort(key=lambda point: point.tflops)
        at = [height(point.tflops) for point in group]
        column = max(point.intensity for point in group) * _DODGE ** (num_series + 0.5)
        x = float(to_axes.transform(axes.transData.transform((column, 1.0)))[0])
        highest = min(under_roof, height(column * ceilings["hbm_tbps"]) - 0.7 * _LABEL_GAP)
        ys = spread(at, _LABEL_GAP)
        for above, i in enumerate(reversed(range(len(ys)))):
            ys[i] = min(ys[i], highest - above * _LABEL_GAP)
        for point, y in zip(group, ys, strict=True):
            axes.annotate(
                point.label,
                (point.intensity, point.tflops),
                xytext=(x, y),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                zorder=3,
                arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.7, "shrinkA": 1},
            )


def groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points by intensity, those that are near their neighbour together."""
    found: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.intensity):
        if found and point.intensity < found[-1][-1].intensity * _SAME_INTENSITY:
            found[-1].append(point)
        else:
            found.append([point])
    return found


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places, moved as little as is simple so that neighbours are `gap` apart: clusters stay centred."""
    clusters: list[tuple[float, int]] = []  # centre, members
    for place in places:
        clusters.append((place, 1))
        while len(clusters) > 1:
            (centre_a, count_a), (centre_b, count_b) = clusters[-2:]
            if centre_b - centre_a >= gap * (count_a + count_b) / 2:
                break
            total = count_a + count_b
            clusters[-2:] = [((centre_a * count_a + centre_b * count_b) / total, total)]
    return [centre + (i - (count - 1) / 2) * gap for centre, count in clusters for i in range(count)]


def _finish(axes: Any, result: dict[str, Any], num_series: int) -> None:
    gpu = result["machine"]
    axes.set_xlabel("arithmetic intensity, FLOP per byte of KV, q and out")
    axes.set_ylabel("TFLOP/s, hot, L2 cold")
    axes.set_title(
        f"MLA decode on {gpu['gpu']}, {result['date'][:10]}, commit {result['commit']}", loc="left", fontsize=11
    )
    for (low, high), set_ticks in ((axes.get_xlim(), axes.set_xticks), (axes.get_ylim(), axes.set_yticks)):
        ticks = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    if num_series > 1:
        axes.legend(loc="lower right", title="markers of one case stand side by side", title_fontsize=8, fontsize=9)


def _sweep(result: dict[str, Any], figure_module: Any) -> Any:
    planes = [plane for plane in result["planes"] if _of_plane(plane, result["points"])]
    large = [plane for plane in planes if plane["x"] == "context"]
    small = [plane for plane in planes if plane["x"] != "context"]
    figure = figure_module.Figure(figsize=(13, 5.2 * len(large) + (3.4 if small else 0)), layout="constrained")
    heights = [5.2] * len(large) + ([2.9] if small else [])
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    image: Any = None
    for row, plane in zip(rows, large, strict=False):
        image = _heat_map(row.subplots(), plane, result["points"])
    if small:
        for axes, plane in zip(rows[-1].subplots(1, len(small), squeeze=False)[0], small, strict=True):
            image = _heat_map(axes, plane, result["points"])
    for row in rows:
        row.colorbar(image, ax=row.axes, label="% of the nearer ceiling", pad=0.01)
    ceilings, gpu = result["ceilings"], result["machine"]
    figure.suptitle(
        f"Time of a decode call, hot, on {gpu['gpu']}, {result['date'][:10]}, commit {result['commit']} (ceilings: "
        f"{ceilings['hbm_tbps']:.2f} TB/s, {ceilings['mma_tflops']:.0f} TFLOP/s)",
        fontsize=12,
    )
    return figure


def _of_plane(plane: dict[str, Any], points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for point in points if all(point[name] == value for name, value in plane["fixed"].items())]


def _heat_map(axes: Any, plane: dict[str, Any], points: Sequence[dict[str, Any]]) -> Any:
    """Cells coloured by the share of the ceiling, with the time written in; nothing where nothing was measured."""
    cells = {(point[plane["x"]], point[plane["y"]]): point for point in _of_plane(plane, points)}
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    grid = [[cells[x, y]["ceiling_percent"] if (x, y) in cells else math.nan for x in xs] for y in ys]
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=100)
    for (x, y), point in cells.items():
        colour = "white" if point["ceiling_percent"] < 60 else "black"
        axes.text(xs.index(x), ys.index(y), duration(point["us"]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(xs)), [_power(x) for x in xs])
    axes.set_yticks(range(len(ys)), [_power(y) for y in ys])
    names = {"context": "tokens of each request", "batch_size": "batch", "num_heads_q": "heads", "seqlen_q": "queries"}
    axes.set_xlabel(names[plane["x"]])
    axes.set_ylabel(names[plane["y"]])
    axes.set_title(plane["title"], loc="left", fontsize=10)
    return image


def _context_parallel(result: dict[str, Any], figure_module: Any) -> Any:
    """A bar for each case, of what a step's parts take alone, in percent of one device's time; a mark for the whole."""
    cases = result["cases"]
    figure = figure_module.Figure(figsize=(10, 1.8 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    places = range(len(cases) - 1, -1, -1)
    left = [0.0] * len(cases)
    for part, colour in (("decode", "#4477aa"), ("exchange", "#ee9944"), ("merge", "#88bb77")):
        widths = [100 * case["microseconds"][part] / case["microseconds"]["one_device"] for case in cases]
        axes.barh(places, widths, 0.6, left, color=colour, label=f"{part}, alone")
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    wholes = [100 * case["microseconds"]["step"] / case["microseconds"]["one_device"] for case in cases]
    axes.plot(wholes, places, "d", color="black", label="the whole step")
    for case, place, end in zip(cases, places, map(max, left, wholes), strict=True):
        times = case["microseconds"]
        axes.annotate(
            f"{duration(times['step'])}; one GPU {duration(times['one_device'])}",
            (min(end, _MOST_PERCENT), place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the line at 100
        )
    axes.axvline(100, color="#808080", linewidth=1, linestyle="--", label="one GPU", zorder=2)
    axes.axvline(100 / result["ranks"], color="#808080", linewidth=1, linestyle=":", label="one GPU / ranks")
    axes.set(xlim=(0, 1.35 * min(max(*left, *wholes, 100), _MOST_PERCENT)), xlabel="% of one GPU's time")
    axes.set_yticks(places, [case["name"] for case in cases])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, fontsize=8, frameon=False)  # above: bars are long
    gpu = result["machine"]
    axes.set_title(
        f"One cache over {result['ranks']} x {gpu['gpu']}, {result['date'][:10]}, commit {result['commit']}",
        loc="left",
        fontsize=11,
        pad=24,
    )
    return figure


def duration(microseconds: float) -> str:
    """Three digits or so and a unit: "9.8 us", "1.23 ms"."""
    size, unit = next((size, unit) for size, unit in _UNITS if microseconds >= size or size == 1.0)
    value = microseconds / size
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 or unit == "us" else 2
    return f"{value:.{digits}f} {unit}"


def _power(value: int) -> str:
    """1024 as "1k"."""
    if value >= 1 << 20:
        return f"{value >> 20}M"
    return f"{value >> 10}k" if value >= 1 << 10 else str(value)
