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

_LABELS = {"side": "sides, in those above", "rank": "rank", "modules": "modules"}


def plot(results: Mapping, path: Path) -> None:
    """Draw it into one file."""
    with drawn(path, height=6.4) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        _bars(above.subplots(), results)
        panels = below.subplots(1, len(AXES), sharey=True)
        for axes, (axis, along) in zip(panels, AXES.items(), strict=True):
            _growth(axes, results["growth"]["axes"][axis], along)
            axes.set_xlabel(_LABELS[axis])
        panels[0].set_ylabel("seconds")
        below.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(MEASURED))


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


def _growth(axes: Axes, points: list[dict], along: str) -> None:
    places = [point[along] for point in points]
    for name, look in zip(MEASURED, looks(len(MEASURED)), strict=True):
        axes.plot(places, [median(point[name]) for point in points], label=name, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
