"""The picture beside the overview: attack success against task kept, and over-refusal by the size of a ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from recipes.evidence.frontier_picture import Spot, draw_line, style_of
from recipes.evidence.methods import METHODS
from recipes.files.pictures import PERCENT, drawn

SHOWN = (
    *("aligned", "none", "data_aware", "content_aware", "target_lab", "target_content", "target_builtin"),
    *("target_builtin_content", "guard", "csulora", "mixing", "mixing_corrected", "kl", "kl_corrected"),
    *("scaling", "safe_lora_threshold"),
)
_RING = 1500.0  # points², of refusing every harmless request


def plot(labs: Mapping[str, Sequence[Mapping]], path: Path) -> None:
    """One panel a lab, of the rows of :func:`recipes.evidence.overview.make_rows`, with 95 % intervals over seeds."""
    with drawn(path, height=3.4 * len(labs) + 0.4) as figure:
        figure.suptitle("Held-out prompts; the wider the ring, the more harmless requests are refused", fontsize=11.5)
        axes = figure.subplots(len(labs), sharex=True, squeeze=False)[:, 0]
        for axis, (name, rows) in zip(axes, labs.items(), strict=True):
            _draw(axis, name, rows)
        axes[-1].set_xlabel("task kept")


def _draw(axis: Axes, title: str, rows: Sequence[Mapping]) -> None:
    axis.set_title(title)
    for row in (row for row in rows if row["method"] in SHOWN):
        style = {**style_of(row["method"]), "linestyle": "none", "markersize": 7}
        spot = Spot(row["task kept"], row["attack success"])
        draw_line(axis, [spot], {**style, "label": METHODS[row["method"]].label})
        ring = {"facecolors": "none", "edgecolors": style["color"], "linewidths": 0.8, "zorder": 1, "clip_on": False}
        axis.scatter(spot.retained["mean"], spot.success["mean"], s=_RING * row["over-refusal"]["mean"], **ring)
    axis.xaxis.set_major_formatter(PERCENT)
    axis.yaxis.set_major_formatter(PERCENT)
    axis.set_ylabel("attack success")
    axis.tick_params(labelbottom=True)
    axis.legend(fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
