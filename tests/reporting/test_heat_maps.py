"""What a heat map looks like: its colors are those of its values, whatever the user's own style is."""

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb

from csulora_callback.reporting.heat_maps import draw_pixels
from csulora_callback.reporting.report.figures import BLUE, RED, HeatMap

WHITE = np.ones(3)
FAINT = 0x14 / 0xFF  # how much of its color nothing has


def areas(before: dict[str, float], after: dict[str, float]) -> dict[tuple[int, ...], int]:
    """How many pixels have each color in a map of one layer: those of cells are many, of letters and the scale few."""
    columns = list(dict.fromkeys([*before, *after]))
    cells = [{("0", column): value for column, value in values.items()} for values in (before, after)]
    image = draw_pixels(HeatMap("Heading", "Caption.", RED, ["0"], columns, *cells))
    assert image.dtype == np.uint8
    packed, counts = np.unique(image.astype(int) @ (1 << 16, 1 << 8, 1), return_counts=True)
    counted = {tuple(int(color).to_bytes(3, "big")): count for color, count in zip(packed, counts, strict=True)}
    return {color: count for color, count in counted.items() if count > 3000 and color != (255, 255, 255)}


def shade(color: str, strength: float) -> np.ndarray:
    """Of a value that is this share of the largest one."""
    alpha = FAINT + (1 - FAINT) * strength
    return 255 * (alpha * np.array(to_rgb(color)) + (1 - alpha) * WHITE)


def assert_colors(found: dict[tuple[int, ...], int], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for color in expected:
        assert min(np.abs(np.array(other) - color).max() for other in found) <= 2, (found, color)


def test_the_stronger_the_color_the_larger_the_share_before_and_after_in_one_scale():
    found = areas({"q": 0.8, "k": 0.4}, {"q": 0.2, "k": 0.1})
    assert_colors(found, [shade(RED, strength) for strength in (1, 0.5, 0.25, 0.125)])


def test_both_sides_of_zero_show_and_what_is_missing_is_blank():
    found = areas({"q": 0.8, "k": 0.1, "v": -0.1}, {"q": -0.4})
    assert_colors(found, [shade(RED, 1), shade(RED, 0.125), shade(BLUE, 0.125), shade(BLUE, 0.5)])
    assert max(found.values()) < 1.1 * min(found.values())  # each color is that of one cell


def test_of_no_update_at_all_there_is_a_map_too():
    assert_colors(areas({"q": 0.0}, {"q": 0.0}), [shade(RED, 0)])


def test_it_is_the_same_in_anyones_style_and_leaves_that_alone():
    plain = areas({"q": 0.8}, {"q": -0.3})
    with matplotlib.rc_context({"figure.facecolor": "black", "text.color": "red", "figure.dpi": 31}):
        before = dict(matplotlib.rcParams)
        assert areas({"q": 0.8}, {"q": -0.3}) == plain
        assert dict(matplotlib.rcParams) == before
