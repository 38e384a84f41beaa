"""The figures of a report, each as an element of a page; numbers come in as shares, and are shown in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from csulora_callback.method.penalty import BLOCKS
from csulora_callback.reporting.inspection import BLOCK_NAMES
from csulora_callback.reporting.report.svg import GROUND, INK, drawing, new_figure, to_svg

# Of middle brightness, so that they show on white as on black.
RED, AMBER, SAND, BLUE, GREEN, GREY = "#d1495b", "#cf8a2e", "#b59a63", "#3f84c6", "#3d9a6b", "#85898f"
BLOCK_COLORS = {"aligned": RED, "output": AMBER, "input": SAND, "off": BLUE}


@dataclass(frozen=True)
class Curve:
    """One line: points ``(step, value)``, where a value may be ``None`` for one that was not a number."""

    label: str
    color: str
    points: Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Interval:
    """A share, with the ends of its interval where it was counted."""

    label: str
    share: float
    ends: tuple[float, float] | None


Cells = Mapping[tuple[str, str], float]


def draw_curves(name: str, title: str, curves: Sequence[Curve], unit: str, from_zero: bool) -> str:
    """Values over optimizer steps.

    Args:
        name: the figure's, unlike any other's on the page.
        title: what it shows, for those who listen.
        curves: at least one; their values are shares where the unit is a percentage.
        unit: of the values.
        from_zero: whether their axis begins there, unless some are below.
    """
    scale = 100 if unit.startswith("%") else 1
    with drawing(name):
        figure = new_figure(230)
        axes = figure.subplots()
        for curve in curves:
            steps = [step for step, _ in curve.points]
            values = [math.nan if value is None else scale * value for _, value in curve.points]
            marker = "o" if len(steps) < 12 else ""  # of few points each counts, and of one there is no line
            axes.plot(steps, values, color=curve.color, label=curve.label, marker=marker, markersize=3.5)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(True)
        none_below = all(value is None or value >= 0 for curve in curves for _, value in curve.points)
        if none_below and (from_zero or axes.get_ylim()[0] < 0):
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=len(curves), handlelength=1.2, columnspacing=1.4)
        return to_svg(figure, title)


def draw_blocks(name: str, title: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One bar each, of the shares of the four blocks."""
    with drawing(name):
        figure = new_figure(80 + 38 * len(bars))
        axes = figure.subplots()
        begins = dict.fromkeys(bars, 0.0)
        for block in BLOCKS:
            lengths = {bar: 100 * shares[block] for bar, shares in bars.items()}
            style = {"height": 0.62, "color": BLOCK_COLORS[block], "label": BLOCK_NAMES[block]}
            axes.barh(list(bars), list(lengths.values()), left=list(begins.values()), **style)
            begins = {bar: begins[bar] + lengths[bar] for bar in bars}
        axes.invert_yaxis()
        axes.set_xlim(0, max(100.0, *begins.values()))
        axes.set_xlabel("% of the trained update's energy")
        _without_axis(axes)
        figure.legend(loc="outside upper left", ncols=2, handlelength=0.9, handleheight=0.9, columnspacing=1.4)
        return to_svg(figure, title)


def draw_heat_maps(
    name: str, title: str, panels: Mapping[str, Cells], rows: Sequence[str], columns: Sequence[str], color: str
) -> str:
    """Maps of layers × kinds of module side by side, in one scale: the stronger the color, the larger the share.

    Where some shares are below 0 those are blue.
    """
    maps = {
        panel: np.array([[100 * cells.get((row, column), math.nan) for column in columns] for row in rows])
        for panel, cells in panels.items()
    }
    largest = max(np.nanmax(np.abs(values)) for values in maps.values()) or 1.0
    signed = any((values < 0).any() for values in maps.values())
    scale = {"vmin": -largest if signed else 0.0, "vmax": largest, "cmap": _ramp(color, signed)}
    with drawing(name):
        figure = new_figure(125 + min(26.0, max(9.0, 200.0 / len(rows))) * len(rows))
        panes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
        for axes, (panel, values) in zip(panes, maps.items(), strict=True):
            # Without interpolation: the page holds one pixel a cell, however large it is shown.
            shown = axes.imshow(values, aspect="auto", interpolation="none", **scale)
            _cells(axes, panel, rows, columns)
        panes[0].set_ylabel("layer")
        _key(figure.colorbar(shown, ax=list(panes), location="bottom", fraction=0.05, aspect=40, pad=0.02))
        return to_svg(figure, title)


def draw_intervals(name: str, title: str, intervals: Sequence[Interval], unit: str, color: str) -> str:
    """Shares as dots, each on the line of its interval, if it has one."""
    with drawing(name):
        figure = new_figure(60 + 24 * len(intervals))
        axes = figure.subplots()
        for place, interval in enumerate(intervals):
            if interval.ends is not None:
                ends = [100 * end for end in interval.ends]
                axes.plot(ends, [place, place], color=color, alpha=0.45, linewidth=5, solid_capstyle="butt")
            axes.plot([100 * interval.share], [place], "o", color=color, markersize=6)
        axes.set_yticks(range(len(intervals)), [interval.label for interval in intervals])
        axes.set_ylim(len(intervals) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel(unit)
        axes.grid(True, axis="x")
        _without_axis(axes)
        return to_svg(figure, title)


def _without_axis(axes: Axes) -> None:
    """Names alone on the left."""
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _cells(axes: Axes, panel: str, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_title(panel)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    every = 1 if len(rows) <= 16 else 4
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(True, which="minor", axis="both", color=GROUND, alpha=1.0, linewidth=1.0)
    axes.grid(False, which="major")
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set(visible=True, alpha=0.25, edgecolor=INK)


def _key(bar: Colorbar) -> None:
    bar.outline.set_visible(False)
    bar.solids.remove()  # hundreds of paths, in place of which one image of as many pixels will do
    shades = np.linspace(bar.vmin, bar.vmax, 128)[None]
    bar.ax.imshow(shades, cmap=bar.cmap, aspect="auto", interpolation="none", extent=(bar.vmin, bar.vmax, 0, 1))
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.set_label("%", labelpad=0)


def _ramp(color: str, signed: bool) -> Colormap:
    """From nothing, which is the page's ground in either scheme, to the color; below 0 from blue to nothing."""
    shades = [f"{color}08", f"{color}ff"]
    return LinearSegmentedColormap.from_list("ramp", [f"{BLUE}ff", f"{BLUE}08", *shades] if signed else shades)
