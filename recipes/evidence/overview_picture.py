"""The picture beside the overview: attack success against task kept, and over-refusal by the size of a ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from recipes.evidence.methods import METHODS
from recipes.files.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, PERCENT, PURPLE, SKY, YELLOW, drawn

_LOOKS = {
    "aligned": (BLACK, "s"),
    "none": (BLACK, "X"),
    "data_aware": (BLUE, "o"),
    "target_lab": (BLUE, "P"),
    "target_builtin": (SKY, "p"),
    "guard": (GREEN, "s"),
    "csulora": (ORANGE, "D"),
    "mixing": (PURPLE, "v"),
    "mixing_corrected": (PURPLE, "^"),
    "kl": (YELLOW, "<"),
    "kl_corrected": (YELLOW, ">"),
    "scaling": (GREY, "o"),
    "safe_lora_threshold": (GREY, "*"),
}
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
    for row in rows:
        if row["method"] not in _LOOKS:
            continue
        color, marker = _LOOKS[row["method"]]
        kept, success, refused = (row[name] for name in ("task kept", "attack success", "over-refusal"))
        at = kept["mean"], success["mean"]
        axis.plot(*at, marker=marker, color=color, linestyle="none", markersize=7, label=METHODS[row["method"]].label)
        axis.scatter(*at, s=_RING * refused["mean"], facecolors="none", edgecolors=color, linewidths=0.8, zorder=1)
        for value, line in ((kept, axis.hlines), (success, axis.vlines)):
            if value["low"] is not None:
                fixed = at[1] if value is kept else at[0]
                line(fixed, value["low"], value["high"], color=color, linewidth=1.0, alpha=0.5, zorder=1)
    axis.xaxis.set_major_formatter(PERCENT)
    axis.yaxis.set_major_formatter(PERCENT)
    axis.set_ylabel("attack success")
    axis.tick_params(labelbottom=True)
    axis.legend(fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
