"""drift.png: the loss, how the update drifts, and what each correction makes of it, over the steps of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from recipes.files.pictures import BLACK, GREY, PERCENT, drawn, looks

Logs = Mapping[str, Sequence[Mapping[str, float]]]
Curve = list[tuple[int, float]]

_FEW = 12  # points of a curve that are marked one by one
_HEIGHT = 2.05  # inches of a row of panels
_RAW = {
    "one": ("as trained: loss and raw update", {"color": BLACK, "linewidth": 3.4}),
    "several": ("as trained, where runs differ", {"color": GREY, "linestyle": "--"}),
}


@dataclass(frozen=True)
class Panel:
    """One quantity, and the keys that it is logged under.

    Attributes:
        title: what it is, with its unit.
        raw: keys of the update or of the model as they are trained, with the names written at the curves if several.
        corrected: key of what a correction makes of it.
        share: whether it is one, and shown in percent.
        ratio: whether it is one, and shown as a multiple on a logarithmic axis.
    """

    title: str
    raw: Mapping[str, str]
    corrected: str | None = None
    share: bool = False
    ratio: bool = False


PANELS = (
    Panel("Loss (nats per token)", {"loss": ""}, "eval_loss"),
    Panel("Alignment undone (%)", {"csulora/alignment_undone": ""}, "csulora/alignment_undone_corrected", share=True),
    Panel(
        "Energy over chance (×)",
        {
            "csulora/aligned_over_chance": "aligned",
            "csulora/partial_over_chance": "partial",
            "csulora/off_over_chance": "off",
        },
        ratio=True,
    ),
    Panel("Size of the update ‖Δ‖", {"csulora/update_norm": ""}),
    Panel("Change by the correction (% of ‖Δ‖)", {}, "csulora/relative_change", share=True),
    Panel("Attenuation by the correction (%)", {}, "csulora/attenuation", share=True),
    Panel("Truncation error (%)", {}, "csulora/truncation_error", share=True),
)


def plot(logs: Logs, path: Path) -> None:
    """Draw it.

    Black is what is trained, where all runs trained the same; every correction has a colour of its own in all panels.
    A run that trained differently, or whose subspace is another, has its own raw curves, dashed in its colour. Panels
    that would be empty are left out.

    Args:
        logs: records by run. One that was trained has a loss and drift at many steps; of a correction that was made
            from its checkpoints there may be a few, which are marked.
        path: a .png.
    """
    look = dict(zip(logs, looks(len(logs)), strict=True))
    panels = [panel for panel in PANELS if _has_something(panel, logs)]
    rows = math.ceil((len(panels) + 1) / 2)
    with drawn(path, height=_HEIGHT * rows + 0.5) as figure:
        axes = _axes(figure, panels)
        raw = set().union(*(_draw(axis, panel, logs, look) for axis, panel in zip(axes, panels, strict=True)))
        figure.legend(*_legend(look, raw), loc="outside upper left", ncols=3, fontsize=10.5)


def _axes(figure: Figure, panels: Sequence[Panel]) -> list[Axes]:
    """Two in a row; with an odd number the first one is as wide as both."""
    wide = len(panels) % 2
    grid = figure.add_gridspec(max(1, (len(panels) + wide) // 2), 2)
    places = [grid[0, :]] * wide + [grid[place // 2, place % 2] for place in range(2 * wide, len(panels) + wide)]
    axes = [figure.add_subplot(place) for place in places]
    for axis in axes[1:]:
        axis.sharex(axes[0])
    for axis in axes[wide:-2]:
        axis.tick_params(labelbottom=False)
    for axis in axes[-2:]:
        axis.set_xlabel("optimizer step")
    return axes


def _draw(axis: Axes, panel: Panel, logs: Logs, look: Mapping[str, dict]) -> set[str]:
    """All curves of a panel; which kinds of raw ones it has, of :data:`_RAW`."""
    axis.set_title(panel.title)
    kinds = set()
    for (key, name), style in zip(panel.raw.items(), ("-", "-.", ":"), strict=False):
        curves = distinct({run: _curve(records, key) for run, records in logs.items()})
        if panel.ratio:  # of an update of zero there is none
            curves = {run: [point for point in curve if point[1] > 0.0] for run, curve in curves.items()}
        for run, curve in curves.items():
            if len(curves) == 1:  # broad, as a correction may leave it where it is
                _line(axis, curve, color=BLACK, linestyle=style, marker=".", linewidth=3.4)
            else:
                _line(axis, curve, **look[run], linestyle="--" if style == "-" else style, alpha=0.8)
            kinds.add("one" if len(curves) == 1 else "several")
        ends = [curve[-1] for curve in curves.values() if curve]
        if name and ends:
            axis.annotate(name, ends[0], xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)
    if panel.corrected is not None:
        for run, records in logs.items():
            _line(axis, _curve(records, panel.corrected), **look[run])
    if panel.ratio:
        axis.set_yscale("log")
        axis.axhline(1.0, color=GREY, linewidth=1.0, zorder=1)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
        axis.minorticks_off()
    else:
        axis.axhline(0.0, color=GREY, linewidth=1.0, zorder=1)  # zero is in sight, below or above of what is drawn
    if panel.share:
        axis.yaxis.set_major_formatter(PERCENT)
    return kinds


def distinct(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Each curve once, under the name of the first run that has it; one that has points of another one is the same.

    Example:
        >>> distinct({"a": [(1, 0.5), (2, 0.25)], "b": [(2, 0.25)], "c": [(2, 0.75)], "d": []})
        {'a': [(1, 0.5), (2, 0.25)], 'c': [(2, 0.75)]}
    """
    found: dict[str, Curve] = {}
    for run, curve in sorted(curves.items(), key=lambda item: -len(item[1])):
        if curve and not any(_same(curve, other) for other in found.values()):
            found[run] = curve
    return {run: found[run] for run in curves if run in found}


def _same(curve: Curve, other: Curve) -> bool:
    at = dict(other)
    common = [(value, at[step]) for step, value in curve if step in at]
    return bool(common) and all(math.isclose(*pair, rel_tol=1e-6) for pair in common)


def _curve(records: Sequence[Mapping[str, float]], key: str) -> Curve:
    return [(record["step"], record[key]) for record in records if key in record]


def _line(axis: Axes, curve: Curve, marker: str, **style: object) -> None:
    if curve:
        axis.plot(*zip(*curve, strict=True), marker=marker if len(curve) <= _FEW else None, **style)


def _has_something(panel: Panel, logs: Logs) -> bool:
    keys = [*panel.raw, *([] if panel.corrected is None else [panel.corrected])]
    return any(value != 0.0 for records in logs.values() for key in keys for _, value in _curve(records, key))


def _legend(look: Mapping[str, dict], raw: set[str]) -> tuple[list[Line2D], list[str]]:
    lines = dict(line for kind, line in _RAW.items() if kind in raw)
    lines |= {f"corrected by {run}": style for run, style in look.items()}
    return [Line2D([], [], **style) for style in lines.values()], list(lines)
