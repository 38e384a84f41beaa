"""The overview: which setting a row is of, what it says, and what the methods cost."""

import json
import re
from pathlib import Path

import pytest

from recipes.evidence import costs, overview
from recipes.evidence.frontier import Adapters
from recipes.evidence.overview import LABS, choose, make_rows, to_markdown
from recipes.evidence.toy_frontier import ToySubject
from recipes.files.recipe import load_recipe
from tests.recipes.test_toy_frontier import TINY

PAGE = Path("recipes/results/README.md")


def score(succeeded: int, over_refusal: float, loss: float) -> dict:
    return {"prompts": 100, "succeeded": succeeded, "side_effects": {"over-refusal": over_refusal}, "task_loss": loss}


def point(seed: int, method: str, strength: float | None, tuning: dict, held_out: dict | None = None, **more) -> dict:
    scores = {"tuning": {"chat": tuning}, "held_out": {"chat": held_out or tuning}}
    own = {"seed": seed, "poison": 0.1, "method": method, "strength": strength, "rank": None, "draw": None}
    return {**own, **more, "scores": scores}


def points_of(seed: int) -> list[dict]:
    return [
        point(seed, "aligned", None, score(10, 0.05, 3.0)),
        point(seed, "none", None, score(100, 0.0, 1.0)),
        point(seed, "guard", 1.0, score(40, 0.1, 1.2)),
        point(seed, "guard", 3.0, score(15, 0.15, 1.6), score(20 + seed, 0.25, 1.8)),  # at both margins
        point(seed, "guard", 10.0, score(8, 0.1, 2.5)),
        point(seed, "scaling", 2.0, score(30, 0.05, 1.5)),
        point(seed, "scaling", 5.0, score(16, 0.05, 2.5)),
        point(seed, "target_lab", 0.9, score(12, 0.3, 1.4), found={"strength": 7.123, "is_enough": True}),
    ]


def cost(method: str, strength: float | None, after: float) -> dict:
    own = {"seed": 0, "poison": 0.1, "method": method, "strength": strength, "rank": None, "draw": None}
    return {**own, "during": 0.0, "after": after}


SPENT = [
    *(cost("aligned", None, 0.0), cost("none", None, 0.0), cost("scaling", 2.0, 0.0)),
    *(cost("guard", 1.0, 0.02), cost("target_lab", 0.9, 30.0)),
]


def test_what_keeps_most_of_the_task_within_both_margins_is_taken_and_else_what_exceeds_them_least():
    mine = points_of(0)
    assert choose(mine, "guard")["strength"] == 3.0
    assert choose(mine, "scaling")["strength"] == 5.0
    mine[3]["scores"]["tuning"]["chat"]["side_effects"]["over-refusal"] = 0.16
    assert choose(mine, "guard")["strength"] == 10.0


def test_a_row_has_held_out_means_over_seeds_beside_the_aligned_model():
    rows = {row["method"]: row for row in make_rows(points_of(0) + points_of(2), SPENT, 200)}
    guard = rows["guard"]
    assert guard["strengths"] == [3.0, 3.0]
    assert guard["attack success"]["mean"] == pytest.approx(0.21)
    assert guard["attack success, over aligned"]["mean"] == pytest.approx(0.11)
    assert (guard["attack success"]["low"], guard["attack success"]["high"]) == (0.2, 0.22)
    assert guard["over-refusal, over aligned"]["mean"] == pytest.approx(0.2)
    assert guard["task kept"]["mean"] == pytest.approx(0.6)
    assert rows["target_lab"]["strengths"] == [7.123, 7.123]
    lines = to_markdown([rows[name] for name in ("aligned", "none", "target_lab")]).splitlines()
    assert (
        "| target, the lab's probes | 7.12, 7.12 | 12 [12, 12] | +2 [+2, +2] | 80 [80, 80] | 30 [30, 30] |" in lines[4]
    )
    assert lines[4].endswith("| 30 steps once |")
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| aligned model", "| raw LoRA"]


def test_costs_in_words():
    assert costs.in_words({"during": 50.0, "after": 8.0}, 200) == "+25% of the training, 8 steps once"
    assert costs.in_words({"during": 0.0, "after": 0.0}, 200) == "none"


def test_costs_are_measured_once_for_each_training(tmp_path):
    more = ["frontier.methods={scaling: [2, 3], data_aware: [1, 3], mixing: [0.25, 0.5], target_lab: [0.9]}"]
    recipe = load_recipe("recipes/frontier.yaml", [*TINY, *more])
    subject = ToySubject(recipe)
    adapters = Adapters(subject, tmp_path / "adapters", [])
    found = costs.measure(subject, recipe.frontier, 4, tmp_path)
    assert [(cost["method"], cost["strength"]) for cost in found] == [
        *(("aligned", None), ("none", None), ("scaling", 2.0), ("data_aware", 1.0)),
        *(("mixing", 0.25), ("mixing", 0.5), ("target_lab", 0.9)),
    ]
    kept = {(cost["method"], cost["strength"]): cost for cost in found}
    assert kept["data_aware", 1.0]["after"] > 0
    assert kept["target_lab", 0.9]["after"] > 0
    assert kept["mixing", 0.5]["during"] != 0
    assert all(cost["during"] == 0 for (name, _), cost in kept.items() if name != "mixing")
    assert adapters.seconds(0, 0.05) > 0
    before = (tmp_path / "costs.json").read_bytes()
    assert costs.measure(subject, recipe.frontier, 4, tmp_path) == found
    assert (tmp_path / "costs.json").read_bytes() == before


def test_the_page_has_the_tables_of_the_kept_results():
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"<!-- overview: (\w+) -->\n", text)
    assert named
    for name in named:
        assert f"<!-- overview: {name} -->\n{to_markdown(overview.read(PAGE.parent / name))}\n\n" in text


def test_marked_tables_are_replaced_and_nothing_else(tmp_path):
    folder = tmp_path / "frontier"
    folder.mkdir()
    points = [{**p, "poison": LABS["frontier"][1]} for p in points_of(0) + points_of(1)]
    (folder / "results.json").write_text(json.dumps({"points": points}))
    (folder / "costs.json").write_text(json.dumps({"training_steps": 200, "costs": SPENT}))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- overview: frontier -->\n| old |\n|---|\n\nafter | this |\n")
    overview.main([str(tmp_path), str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- overview: frontier -->\n| ")
    assert text.endswith("|\n\nafter | this |\n")
    assert "| old |" not in text
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    overview.main([str(tmp_path), str(page)])
    assert page.read_text() == text
