"""The pictures of a frontier: all that was measured is in sight, named, and of the right size."""

import itertools
import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from recipes.evidence import frontier_picture
from recipes.evidence.frontier_picture import IN_ALL, MAIN, PANELS, plot, spots_of
from recipes.evidence.methods import METHODS
from tests.helpers.pictures import assert_in_sight, curves, keep_figures

KEPT = {"frontier": [0, 5, 20], "smollm2_frontier": [12]}


@pytest.fixture
def figures(monkeypatch):
    return keep_figures(monkeypatch)


def results(name: str) -> dict:
    return json.loads((Path("recipes/results") / name / "results.json").read_text())


def test_every_method_has_a_place_and_no_two_in_a_panel_look_alike():
    assert set(IN_ALL).union(*PANELS.values()) == set(METHODS)
    repeated = [m for m, other in itertools.combinations(itertools.chain(*PANELS.values()), 2) if m == other]
    assert set(repeated) <= set(PANELS[MAIN])  # a method stands beside its own controls again
    for methods in PANELS.values():
        looks = [frontier_picture._LOOKS[method] for method in methods]
        for side in (0, 1):
            assert len({look[side] for look in looks}) == len(methods)


@pytest.mark.parametrize("name", [pytest.param("frontier", marks=pytest.mark.slow), "smollm2_frontier"])
def test_the_pictures_that_are_kept_show_all_that_was_measured(name, figures, tmp_path):
    kept = results(name)
    paths = plot(kept["points"], kept["grid"]["targets"], tmp_path)
    assert [path.name for path in paths] == [f"frontier_poison{share}.png" for share in KEPT[name]]
    for path, figure in zip(paths, figures, strict=True):
        assert Image.open(path).width == Image.open(Path("recipes/results") / name / path.name).width == 1328
        measured = {point["method"] for point in kept["points"]}
        assert measured <= {method for axis in figure.axes for method in PANELS[axis.get_title(loc="left")]} | {
            *IN_ALL
        }
        for axis in figure.axes:
            assert_in_sight(axis)
            named = {text.get_text() for text in axis.get_legend().get_texts()}
            there = measured.intersection(PANELS[axis.get_title(loc="left")])
            assert {METHODS[method].label for method in there} <= named
            lines = sorted(line.get_ydata()[0] for line in set(axis.get_lines()) - set(curves(axis)))
            assert lines == sorted(target for target in kept["grid"]["targets"] if target <= axis.get_ylim()[1])


@pytest.mark.slow
def test_a_method_has_one_colour_in_all_pictures(figures, tmp_path):
    plot(results("frontier")["points"], [0.2], tmp_path)
    colors = defaultdict(set)
    for axis in (axis for figure in figures for axis in figure.axes):
        for handle, text in zip(axis.get_legend().get_lines(), axis.get_legend().get_texts(), strict=True):
            colors[text.get_text()].add(to_hex(handle.get_color()))
    assert {label for label, found in colors.items() if len(found) > 1} == set()


def test_spots_are_means_over_seeds_of_means_over_draws_between_their_ends():
    points = [point for point in results("frontier")["points"] if point["poison"] == 0.05]
    spots = spots_of(points)
    wanted = [p for p in points if (p["method"], p["rank"], p["strength"]) == ("guard_random", 16, 10.0)]
    by_seed = defaultdict(list)
    for point in wanted:
        score = point["scores"]["held_out"]["trained"]
        by_seed[point["seed"]].append(score["succeeded"] / score["prompts"])
    assert [len(draws) for draws in by_seed.values()] == [3] * 5
    spot = spots["guard_random", 16][1]
    assert spot.success["mean"] == pytest.approx(mean(map(mean, by_seed.values())))
    assert spot.success["low"] <= spot.success["mean"] <= spot.success["high"]
    (raw,), (aligned,) = spots["none", None], spots["aligned", None]
    assert (raw.retained["mean"], aligned.retained["mean"]) == (1.0, 0.0)


def test_what_was_not_measured_has_no_panel_and_no_name(figures, tmp_path):
    some = ("aligned", "none", "scaling", "guard", "safe_lora_threshold")
    points = [p for p in results("frontier")["points"] if p["method"] in some and p["poison"] == 0.05]
    plot([point for point in points if point["seed"] == 0], [0.2], tmp_path)
    main, published = figures[0].axes
    assert published.get_title(loc="left") == "Published, and other training"
    assert [text.get_text() for text in published.get_legend().get_texts()] == ["Safe LoRA, by threshold"]
    assert "csulora" not in [text.get_text() for text in main.get_legend().get_texts()]
    assert "of one seed" in figures[0].get_suptitle()


@pytest.mark.slow
def test_pictures_are_redrawn_from_the_results_alone(tmp_path, capsys):
    shutil.copy("recipes/results/smollm2_frontier/results.json", tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    frontier_picture.main([str(tmp_path)])
    assert (tmp_path / "frontier_poison12.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.json").read_bytes() == before
    assert capsys.readouterr().out == f"{tmp_path / 'frontier_poison12.png'}\n"
