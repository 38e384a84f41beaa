"""The picture of a benchmark: what a start and a correction cost beside the other ways, and how costs grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes

from recipes.benchmarks.goals import seconds
from recipes.benchmarks.growth import AXES, MEASURED
from recipes.benchmarks.timing import spread
from recipes.files.pictures import BLUE, GREY, drawn, looks

_LABELS = {"side": "sides of the weights", "rank": "rank", "modules": "modules"}


def plot(results: Mapping, path: Path) -> None:
    """Draw it into one file."""
    with drawn(path, height=6.4) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        _bars(above.subplots(), results)
        panels = below.subplots(1, len(AXES), sharey=True)
        for axes, axis in zip(panels, AXES, strict=True):
            _growth(axes, results["growth"]["points"], axis)
        panels[0].set_ylabel("seconds")
        panels[0].legend(fontsize=9)


def _bars(axes: Axes, results: Mapping) -> None:
    start, correction = results["start"]["times"], results["correction"]["times"]
    bars = {
        "reading both checkpoints": (start["reading"], GREY),
        "estimation": (start["estimate"], BLUE),
        "second start": (start["again"], BLUE),
        "exact SVD, counted": (start["svd"], GREY),
        "the dense way, counted": (start["dense"], GREY),
        "correction": (correction["csulora"], BLUE),
        "dense correction, counted": (correction["dense"], GREY),
        "drift at a log": (correction["log"], BLUE),
        "a training step": ([{"seconds": run["step"]} for run in results["training"]["with"]], GREY),
    }
    for place, (series, color) in enumerate(bars.values()):
        values = spread(seconds(series))
        error = [[values["median"] - values["low"]], [values["high"] - values["median"]]]
        axes.barh(place, values["median"], color=color, xerr=error, error_kw={"capsize": 2, "linewidth": 1})
    axes.set_yticks(range(len(bars)), bars)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds, median and range")
    axes.set_title(f"{results['benchmark']['name']}'s shapes, {results['model']['modules']} modules")


def _growth(axes: Axes, points: list[dict], axis: str) -> None:
    """The points that differ from another one in this axis alone."""
    keys = {"side": ("factor", ("rank", "layers")), "rank": ("rank", ("factor", "layers"))}
    of, same = keys.get(axis, ("modules", ("factor", "rank")))
    groups: dict[tuple, list[dict]] = {}
    for point in points:
        groups.setdefault(tuple(point[key] for key in same), []).append(point)
    some = sorted(max(groups.values(), key=len), key=lambda point: point[of])
    for name, look in zip(MEASURED, looks(len(MEASURED)), strict=True):
        axes.plot([point[of] for point in some], [median(point[name]) for point in some], label=name, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([point[of] for point in some], [f"{point[of]:g}" for point in some])
    axes.minorticks_off()
    axes.set_xlabel(_LABELS[axis])
