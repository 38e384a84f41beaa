"""drift.png holds what was logged, in both shapes: runs that were trained, and corrections made from checkpoints."""

import itertools

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from recipes.files.pictures import BLACK, looks
from recipes.training.drift_picture import PANELS, plot
from tests.helpers.pictures import assert_in_sight, curves, keep_figures

RAW = {
    "csulora/alignment_undone": 0.08,
    "csulora/aligned_over_chance": 70.0,
    "csulora/partial_over_chance": 7.0,
    "csulora/off_over_chance": 0.6,
    "csulora/update_norm": 3.0,
}


@pytest.fixture
def figures(monkeypatch):
    return keep_figures(monkeypatch)


def corrected(attenuation: float, undone: float, truncated: float = 0.05) -> dict[str, float]:
    return {
        "csulora/alignment_undone_corrected": undone,
        "csulora/attenuation": attenuation,
        "csulora/relative_change": 0.8 - 2 * attenuation,
        "csulora/truncation_error": truncated,
    }


def trained(done: dict[str, float], drift: dict[str, float] = RAW, loss: float = 1.0) -> list[dict]:
    records = []
    for step in range(1, 21):
        grown = {key: value * step / 20 for key, value in drift.items()}
        records.append({"step": step, "loss": loss / step, **grown, **done})
        if step % 10 == 0:
            records.append({"step": step, "eval_loss": 2 * loss / step})
    return [*records, {"step": 20, "train_runtime": 3.0}]


def made_after(records: list[dict], done: dict[str, float], scale: float = 1.0) -> list[dict]:
    """Of the checkpoints of a trained run; where the subspace is another, its drift is, too."""
    scale *= 1 + 1e-9  # another machine rounds otherwise
    drift = {r["step"]: {key: scale * r[key] for key in RAW} for r in records if "loss" in r}
    return [{"step": step, **drift[step], **done} for step in (10, 20)]


def panels(figure) -> dict:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def of(figure, start: str):
    return next(axis for title, axis in panels(figure).items() if title.startswith(start))


def colors(axis) -> list[str]:
    return [to_hex(line.get_color()).upper() for line in curves(axis)]


WIDE, NEGATIVE = corrected(-1.5, 1.7), corrected(0.7, -0.2)  # below 0 and above 1, as data-aware penalties give
FULL = trained(NEGATIVE)
SHAPES = {
    "each trained": {"csulora": FULL, "guard": trained(WIDE)},
    "one trained": {"csulora": FULL, "guard": made_after(FULL, WIDE)},
    "another rank": {"csulora": FULL, "guard": made_after(FULL, WIDE, scale=1.4)},
    "another training": {"csulora": FULL, "live": trained(WIDE, {k: v / 2 for k, v in RAW.items()}, loss=0.4)},
    "many": {f"run {i}": made_after(FULL, corrected(0.1 * i, 0.1)) if i else FULL for i in range(9)},
    "one log": {"csulora": FULL[:1]},
}


@pytest.mark.parametrize(
    "shape",
    [s if s in ("one trained", "another training") else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES],
)
def test_every_panel_holds_all_that_is_drawn_in_it(shape, figures, tmp_path):
    plot(SHAPES[shape], tmp_path / "drift.png")
    (figure,) = figures
    for axis in figure.axes:
        assert_in_sight(axis)
        assert axis.get_title(loc="left")
    assert len(figure.axes) == len(PANELS)
    assert Image.open(tmp_path / "drift.png").width == 1328
    assert [path.name for path in tmp_path.iterdir()] == ["drift.png"]


def test_what_all_runs_share_is_drawn_once_in_black_and_corrections_have_their_colours(figures, tmp_path):
    for shape in ("each trained", "one trained"):
        plot(SHAPES[shape], tmp_path / "drift.png")
        figure = figures.pop()
        first, second = (look["color"].upper() for look in looks(2))
        black = to_hex(BLACK)
        losses = {"each trained": [black, first, second], "one trained": [black, first]}
        assert colors(of(figure, "Loss")) == losses[shape]
        assert colors(of(figure, "Alignment undone")) == [black, first, second]
        assert colors(of(figure, "Energy over chance")) == [black] * 3
        assert colors(of(figure, "Size")) == [black]
        for title in ("Change", "Attenuation", "Truncation"):
            assert colors(of(figure, title)) == [first, second]
        named = [text.get_text() for text in figure.legends[0].get_texts()]
        assert named == ["as trained: loss and raw update", "corrected by csulora", "corrected by guard"]


@pytest.mark.slow
def test_few_points_are_marked_and_many_are_a_line(figures, tmp_path):
    plot(SHAPES["one trained"], tmp_path / "drift.png")
    many, few = curves(of(figures[0], "Attenuation"))
    assert many.get_marker() == "None"
    assert few.get_marker() not in ("None", many.get_marker())
    assert [list(side) for side in few.get_data()] == [[10, 20], [-1.5, -1.5]]


@pytest.mark.parametrize("shape", ["another rank", pytest.param("another training", marks=pytest.mark.slow)])
def test_a_run_with_another_drift_has_raw_curves_of_its_own(shape, figures, tmp_path):
    plot(SHAPES[shape], tmp_path / "drift.png")
    raw = [line for line in curves(of(figures[0], "Alignment undone")) if line.get_linestyle() == "--"]
    assert [to_hex(line.get_color()).upper() for line in raw] == [look["color"].upper() for look in looks(2)]
    assert "as trained, where runs differ" in [text.get_text() for text in figures[0].legends[0].get_texts()]


@pytest.mark.slow
def test_a_panel_without_anything_in_it_is_left_out(figures, tmp_path):
    exact = trained(corrected(0.5, 0.1, truncated=0.0))
    older = [{k: v for k, v in record.items() if "undone" not in k and "chance" not in k} for record in exact]
    for records, missing in ((exact, {"Truncation"}), (older, {"Truncation", "Alignment", "Energy"})):
        plot({"guard": records}, tmp_path / "drift.png")
        titles = [title.split()[0] for title in panels(figures.pop())]
        assert set(titles) == {panel.title.split()[0] for panel in PANELS} - missing


@pytest.mark.slow
def test_a_run_that_logged_nothing_and_one_without_an_update_are_no_errors(figures, tmp_path):
    still = trained(corrected(0.0, 0.0, truncated=0.0), dict.fromkeys(RAW, 0.0))
    moved = trained(NEGATIVE, {**RAW, "csulora/aligned_over_chance": 0.0})  # a subspace of no directions
    for records, count in (([{"step": 3, "train_runtime": 1.0}], 0), (still, 2), (moved, len(PANELS))):
        plot({"guard": records}, tmp_path / "drift.png")
        axes = figures.pop().axes
        assert len(axes) == count
        for axis in axes:
            assert_in_sight(axis)


def test_runs_are_told_apart_by_more_than_colour():
    for one, other in itertools.combinations(looks(30), 2):
        assert one != other
    assert len({look["color"] for look in looks(6)}) == 6
