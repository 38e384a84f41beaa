"""The figures of a report, each as an element of a page; numbers come in as shares, and are shown in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from csulora_callback.method.penalty import BLOCKS
from csulora_callback.reporting.inspection import BLOCK_NAMES
from csulora_callback.reporting.report.svg import add_axes, drawing, new_axes, to_svg, width_of

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


@dataclass(frozen=True)
class HeatMap:
    """Shares by layer and kind of module, before the correction and after it.

    Attributes:
        heading: what it shows.
        caption: how to read it.
        color: of shares above 0.
        rows: names of the layers.
        columns: names of the kinds.
        before: shares by row and column; there need not be one of every cell.
        after: the same.
    """

    heading: str
    caption: str
    color: str
    rows: Sequence[str]
    columns: Sequence[str]
    before: Cells
    after: Cells


_LONGEST = 24  # letters of a name beside an axis


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
        axes = new_axes(left=52, bottom=36, height=165, top=26)
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
        _legend(axes, columns=len(curves), handlelength=1.2)
        return to_svg(axes.figure, title)


def draw_blocks(name: str, title: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One bar each, of the shares of the four blocks."""
    with drawing(name):
        axes = new_axes(left=8 + width_of(bars), bottom=36, height=34 * len(bars), top=44)
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
        _legend(axes, columns=2, handlelength=0.9, handleheight=0.9)
        return to_svg(axes.figure, title)


def draw_heat_map(name: str, title: str, shown: HeatMap) -> str:
    """Two maps in one scale: the stronger the color, the larger the share. Where some are below 0 those are blue."""
    with drawing(name):
        return to_svg(heat_map_figure(shown), title)


def heat_map_figure(shown: HeatMap, above: float = 0.0) -> Figure:
    """The figure of :func:`draw_heat_map`; drawn inside of :func:`~csulora_callback.reporting.report.svg.drawing`.

    Args:
        shown: what it shows.
        above: pixels to be left empty at the top.
    """
    rows, columns = shown.rows, shown.columns
    gap = np.full((len(rows), 1), math.nan)
    values = np.hstack([_table(shown.before, rows, columns), gap, _table(shown.after, rows, columns)])
    largest = np.nanmax(np.abs(values)) or 1.0
    least = -largest if (values < 0).any() else 0.0
    shades = _ramp(shown.color, signed=least < 0)
    # Without interpolation: the page holds one pixel a cell, however large it is shown.
    as_cells = {"aspect": "auto", "interpolation": "none", "vmin": least, "vmax": largest, "cmap": shades}
    left, height = 26 + width_of(rows), min(26.0, max(9.0, 200.0 / len(rows))) * len(rows)
    axes = new_axes(left, bottom=46 + width_of(columns), height=height, top=20 + above)
    axes.imshow(values, **as_cells)
    _label_cells(axes, rows, columns)
    key = add_axes(axes.figure, left, bottom=32, height=7)
    key.imshow(np.linspace(least, largest, 128)[None], extent=(least, largest, 0, 1), **as_cells)
    key.set_yticks([])
    key.xaxis.set_major_locator(MaxNLocator(5))
    key.spines[:].set_visible(False)
    key.set_xlabel("%", labelpad=0)
    return axes.figure


def draw_intervals(name: str, title: str, intervals: Sequence[Interval], unit: str, color: str) -> str:
    """Shares as dots, each on the line of its interval, if it has one."""
    labels = [x.label if len(x.label) <= _LONGEST else f"{x.label[: _LONGEST - 1]}…" for x in intervals]
    with drawing(name):
        axes = new_axes(left=8 + width_of(labels), bottom=36, height=24 * len(intervals), top=4)
        for place, interval in enumerate(intervals):
            if interval.ends is not None:
                ends = [100 * end for end in interval.ends]
                axes.plot(ends, [place, place], color=color, alpha=0.45, linewidth=5, solid_capstyle="butt")
            axes.plot([100 * interval.share], [place], "o", color=color, markersize=6)
        axes.set_yticks(range(len(intervals)), labels)
        axes.set_ylim(len(intervals) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel(unit)
        axes.grid(True, axis="x")
        _without_axis(axes)
        return to_svg(axes.figure, title)


def _legend(axes: Axes, columns: int, **handles: float) -> None:
    place = {"loc": "upper left", "borderaxespad": 0.2, "borderpad": 0.2}
    axes.figure.legend(**place, ncols=columns, columnspacing=1.4, **handles)


def _without_axis(axes: Axes) -> None:
    """Names alone on the left."""
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _table(cells: Cells, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    return np.array([[100 * cells.get((row, column), math.nan) for column in columns] for row in rows])


def _label_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    count, begins = len(columns), (0, len(columns) + 1)
    axes.set_xticks([begin + place for begin in begins for place in range(count)], [*columns, *columns], rotation=90)
    every = 1 if len(rows) <= 16 else 4
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for begin, name in zip(begins, ("before", "after"), strict=True):
        middle = begin + (count - 1) / 2
        axes.annotate(name, (middle, -0.5), xytext=(0, 5), textcoords="offset points", ha="center")
        across = [[(begin - 0.5, y - 0.5), (begin + count - 0.5, y - 0.5)] for y in range(len(rows) + 1)]
        down = [[(begin + x - 0.5, -0.5), (begin + x - 0.5, len(rows) - 0.5)] for x in range(count + 1)]
        ground, ink = rcParams["figure.facecolor"], rcParams["text.color"]
        _draw_lines(axes, [*across[1:-1], *down[1:-1]], color=ground, linewidth=1.0)
        _draw_lines(axes, [across[0], across[-1], down[0], down[-1]], color=ink, alpha=0.25, linewidth=0.6)


def _draw_lines(axes: Axes, lines: Sequence[Sequence[tuple[float, float]]], **style: object) -> None:
    """As one path with gaps, which is quicker and shorter than as many lines."""
    points = [point for line in lines for point in (*line, (math.nan, math.nan))]
    axes.plot(*np.array(points).reshape(-1, 2).T, clip_on=False, scalex=False, scaley=False, **style)


def _ramp(color: str, signed: bool) -> Colormap:
    """From nearly nothing, on the ground of either scheme, to the color; below 0 from blue to nearly nothing."""
    faint, full = f"{color}14", f"{color}ff"
    if not signed:
        return LinearSegmentedColormap.from_list("ramp", [faint, full])
    # Both sides meet at 0: what is small has a color, too.
    shades = [(0.0, f"{BLUE}ff"), (0.5, f"{BLUE}14"), (0.5, faint), (1.0, full)]
    return LinearSegmentedColormap.from_list("ramp", shades)
