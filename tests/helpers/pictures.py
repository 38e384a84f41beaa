"""What is in a picture, read from the figure that matplotlib was about to write."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on, in their order; the files are written as always."""
    kept, save = [], Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        kept.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def curves(axis: Axes) -> list:
    """The lines that are drawn of data, and not across the whole panel."""
    return [line for line in axis.get_lines() if line.get_transform() == axis.transData]


def assert_in_sight(axis: Axes) -> None:
    """A panel shows something, and all of it."""
    assert curves(axis)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for line in curves(axis):
        x, y = (np.asarray(side, dtype=float) for side in line.get_data())
        assert len(x)
        assert ((left <= x) & (x <= right) & (low <= y) & (y <= high)).all(), (axis.get_title(), x, y)
