"""Heat maps of an update, layers × kinds of module: what they show, on a page and in trackers, and their pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import wrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from csulora_callback.inspection import Inspection
from csulora_callback.method.measure import Drift
from csulora_callback.reporting.inspection import short_kinds, short_layers
from csulora_callback.reporting.report.figures import AMBER, BLUE, GREEN, RED, HeatMap, heat_map_figure
from csulora_callback.reporting.report.svg import WIDTH, drawing
from csulora_callback.reporting.report.words import ratio

_INK, _GROUND = "#24292f", "#ffffff"  # trackers show images as they are, whatever their own scheme is
_RESOLUTION = 144  # dots per inch: twice as many as the figures have units
_LINE, _LETTERS = 13.0, 72  # height of a line of the caption, and how many letters fit in one


def heat_maps(raw: Inspection, corrected: Inspection) -> dict[str, HeatMap]:
    """What there is to see of an update before and after its correction, by a name that logs use too.

    Args:
        raw: of the update as it is trained.
        corrected: of the same modules.

    Example:
        >>> from csulora_callback.method.penalty import BLOCKS
        >>> drift = Drift(dict.fromkeys(BLOCKS, 1.0), dict.fromkeys(BLOCKS, 1.0), along=-1.0, displacement=4.0)
        >>> shown = heat_maps(Inspection({"layers.3.q_proj": drift}), Inspection({"layers.3.q_proj": drift}))
        >>> {name: shown.before for name, shown in shown.items()}["alignment_undone"]
        {('3', 'q_proj'): 0.25}
    """
    before, after = raw.by_layer_and_kind(), corrected.by_layer_and_kind()
    layers, kinds = short_layers(raw.by_layer()), short_kinds(raw.by_kind())
    whole = raw.together.total_energy

    def cells(drifts: Mapping[tuple[str, str], Drift], value: Callable) -> dict[tuple[str, str], float]:
        return {(layers[at[0]], kinds[at[1]]): value(drift, before[at], whole) for at, drift in drifts.items()}

    rows, columns = list(layers.values()), list(kinds.values())
    return {
        name: HeatMap(heading, caption, color, rows, columns, cells(before, value), cells(after, value))
        for name, (heading, caption, color, value) in _MAPS.items()
    }


def draw_pixels(shown: HeatMap) -> np.ndarray:
    """An image of a heat map under its heading and caption: ``(height, width, 3)``, 8 bits.

    It is drawn off screen; figures of the user, their style and their backend stay as they are.

    Example:
        >>> draw_pixels(HeatMap("Aligned", "Of all.", RED, ["0"], ["q"], {("0", "q"): 0.5}, {("0", "q"): 0.2})).shape
        (266, 680, 3)
    """
    lines = wrap(shown.caption, _LETTERS)
    above = 22 + _LINE * len(lines)
    with drawing("heat map", _INK, _GROUND):
        figure = heat_map_figure(shown, above)
        height = figure.get_figheight() * 72
        at = {"x": 8 / WIDTH, "va": "top"}
        figure.text(y=1 - 6 / height, s=f"{shown.heading}, before and after the correction", weight="bold", **at)
        figure.text(y=1 - 21 / height, s="\n".join(lines), fontsize=8.5, linespacing=1.25, **at)
        figure.set_dpi(_RESOLUTION)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _energy(*blocks: str) -> Callable[[Drift, Drift, float], float]:
    """Energy of some blocks, as a share of what was trained in the same place."""
    return lambda drift, trained, whole: ratio(sum(drift.energy[block] for block in blocks), trained.total_energy)


_IN_PLACE = "in % of the trained update's energy in each place."
_MAPS = {
    "aligned_energy": (
        "Aligned",
        f"Energy inside the safety subspace on both sides, {_IN_PLACE}",
        RED,
        _energy("aligned"),
    ),
    "partial_energy": (
        "Partially aligned",
        f"Energy inside the safety subspace on one side, {_IN_PLACE}",
        AMBER,
        _energy("output", "input"),
    ),
    "off_energy": (
        "Off the subspace",
        f"Energy outside the safety subspace on both sides, {_IN_PLACE}",
        BLUE,
        _energy("off"),
    ),
    "alignment_undone": (
        "Alignment undone",
        "How far the update goes back along what alignment changed there; blue where it goes on in its direction.",
        RED,
        lambda drift, trained, whole: drift.undone,
    ),
    "update_energy": (
        "Where the update is large",
        "Energy in each place, in % of the whole trained update's.",
        GREEN,
        lambda drift, trained, whole: ratio(drift.total_energy, whole),
    ),
}
