"""How pictures are drawn: legible at the width of a page, in colours that people who see fewer of them tell apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: recipes run where there is no screen
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

WIDTH = 8.3  # inches, in which a page of 830 pixels shows the sizes of type below as they are meant
BLACK, GREY = "black", "0.45"
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW)  # Okabe and Ito's
MARKERS = "osD^v"
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")

_STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,  # sharp on screens with more than a dot a pixel
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
}


@contextmanager
def drawn(path: Path, height: float) -> Iterator[Figure]:
    """An empty figure to draw in, of ``height`` inches; its file appears whole, or not at all, at the end.

    What is drawn in it is laid out when it is written, so that labels and legends get the room that they need.
    """
    unfinished = path.with_name(f".{path.name}.part")
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
        try:
            yield figure
            figure.savefig(unfinished, format="png")
            os.replace(unfinished, path)
        finally:
            plt.close(figure)


def looks(count: int) -> list[dict[str, str]]:
    """A colour and a marker for each of ``count`` things, the same in every picture; they repeat after 30.

    Example:
        >>> looks(2)
        [{'color': '#0072B2', 'marker': 'o'}, {'color': '#D55E00', 'marker': 's'}]
    """
    pairs = zip(cycle(COLORS), cycle(MARKERS), strict=False)  # six and five of them
    return [{"color": color, "marker": marker} for color, marker in islice(pairs, count)]
