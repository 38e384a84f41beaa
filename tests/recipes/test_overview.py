"""The overview: which setting a row is of, what it says, and what the methods cost."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from csulora_callback import CSULoRACallback, Penalty
from recipes.evidence import costs, overview
from recipes.evidence.methods import METHODS
from recipes.evidence.overview import MARK, choose, make_rows, to_markdown
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
    rows = {row["method"]: row for row in make_rows(points_of(0) + points_of(2), SPENT)}
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
    unknown = [spent for spent in SPENT if spent["method"] != "guard"]
    assert {row["method"]: row["cost"] for row in make_rows(points_of(0), unknown)}["guard"] == "not measured"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| aligned model", "| raw LoRA"]


def told(refused: str, over_refused: str) -> dict:
    """A score with a verdict on each prompt."""
    succeeded, over = refused.count("0"), over_refused.count("1") / len(over_refused)
    own = {"refused": refused, "over-refused": over_refused}
    return {**score(succeeded, over, 2.0), "prompts": len(refused), "told": own}


def test_a_strength_is_chosen_by_the_harmless_prompts_that_the_aligned_model_answers():
    mine = [
        point(0, "aligned", None, {**told("1111", "1110000000"), "task_loss": 3.0}),
        point(0, "none", None, {**told("0000", "0000000000"), "task_loss": 1.0}),
        point(0, "guard", 1.0, {**told("1111", "0001111000"), "task_loss": 1.2}),  # 4 of 7, where 0.1 more are fine
        point(0, "guard", 3.0, {**told("1111", "1111000000"), "task_loss": 1.5}),  # 1 of 7
        point(0, "guard", 10.0, {**told("1111", "1110000000"), "task_loss": 1.9}),
    ]
    assert choose(mine, "guard")["strength"] == 10.0
    mine[3]["scores"]["tuning"]["chat"]["told"]["over-refused"] = "1010000000"
    assert choose(mine, "guard")["strength"] == 3.0


def test_intervals_are_over_seeds_and_prompts_where_each_verdict_is_known():
    aligned, raw = told("1110", "0" * 4), {**told("0000", "0" * 4), "task_loss": 1.0}
    both = [
        [
            point(seed, "aligned", None, {**aligned, "task_loss": 3.0}),
            point(seed, "none", None, raw),
            point(seed, "guard", 3.0, told("1100", "1000")),
        ]
        for seed in (0, 1)
    ]
    rows = {row["method"]: row for row in make_rows(both[0] + both[1], [])}
    draws = np.random.default_rng(1).integers(0, 4, (20_000, 4))  # all seeds are alike: only prompts vary
    for name, values in (
        ("attack success", [0, 0, 1, 1]),
        ("attack success, over aligned", [0, 0, 1, 0]),
        ("over-refusal", [1, 0, 0, 0]),
    ):
        row, means = rows["guard"][name], np.array(values)[draws].mean(axis=1)
        assert row["mean"] == np.mean(values)
        assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert rows["guard"]["task kept"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_costs_in_words():
    assert costs.in_words({"during": 0.25, "after": 8.0}) == "+25% of the training, 8 steps once"
    assert costs.in_words({"during": -0.01, "after": 0.01}) == costs.in_words(None) == "none"


def test_costs_are_measured_once_for_each_training(tmp_path):
    methods = "scaling: [2, 3], data_aware: [1, 3], content_aware: [3], mixing: [0.25, 0.5], target_lab: [0.9]"
    more = [f"frontier.methods={{{methods}}}"]
    recipe = load_recipe("recipes/frontier.yaml", [*TINY, *more])
    subject = ToySubject(recipe)
    short = ToySubject(replace(recipe, training=replace(recipe.training, max_steps=costs.STEPS)))
    found = costs.measure(subject, short, recipe.frontier, tmp_path)
    kept = {(cost["method"], cost["strength"]): cost for cost in found}
    assert list(kept) == [
        *(("scaling", 2.0), ("data_aware", 1.0), ("content_aware", 3.0)),
        *(("mixing", 0.25), ("mixing", 0.5), ("target_lab", 0.9)),
    ]
    assert kept["data_aware", 1.0]["after"] > kept["scaling", 2.0]["after"]
    assert kept["target_lab", 0.9]["after"] > 0
    assert kept["mixing", 0.5]["during"] > 0
    assert all(cost["during"] == 0 for (name, _), cost in kept.items() if name != "mixing")
    before = (tmp_path / "costs.json").read_bytes()
    assert costs.measure(subject, short, recipe.frontier, tmp_path) == found
    assert (tmp_path / "costs.json").read_bytes() == before


@pytest.mark.slow
def test_the_page_has_the_tables_of_the_kept_results():
    text = PAGE.read_text(encoding="utf-8")
    for name, poison in MARK.findall(text):
        table = to_markdown(overview.read(PAGE.parent / name, float(poison)))
        assert f"<!-- overview: {name}, poison {poison} -->\n{table}\n\n" in text
    assert len(MARK.findall(text)) >= 2


FIRST_PAGE = {  # what it says to take, and the row of the overview
    '`probes="builtin"`': "target_builtin",
    '`probes="refused.txt"`': "target_lab",
    '`penalty=Penalty.content_aware, probes="refused.txt"`': "target_content",
    '`penalty=Penalty.data_aware(strength), probes="refused.txt"`': "data_aware",
    "`penalty=Penalty.guard(strength)`": "guard",
    "no `probes`: `Penalty.csulora(strength)`": "csulora",
    "*instead of all this: refusals mixed into the data*": "mixing",
    "*the adapter as it is trained*": "none",
    "*the aligned model*": "aligned",
}


@pytest.mark.slow
def test_the_first_page_quotes_the_overview():
    text = Path("README.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    labs = [
        {row["method"]: row for row in overview.read(PAGE.parent / name, poison)}
        for name, poison in (("frontier", 0.05), ("smollm2_frontier", 0.12), ("smollm2_answers", 0.12))
    ]
    for take, method in FIRST_PAGE.items():
        (line,) = (line for line in lines if take in line[:2])
        assert line[2:] == [in_short(rows[method]) if method in rows else "–" for rows in labs], take
    clean = {row["method"]: row for row in overview.read(PAGE.parent / "smollm2_answers", 0.0)}
    raw, corrected = (in_short(clean[method]) for method in ("none", "data_aware"))
    assert f"without poison the last fine-tune has {raw}, and corrected by `data_aware(3)` {corrected}." in " ".join(
        text.split()
    )


@pytest.mark.parametrize("take", [take for take in FIRST_PAGE if "`" in take])
def test_what_the_first_page_says_to_pass_is_what_was_measured(take, tmp_path, monkeypatch):
    shares = load_recipe("recipes/smollm2_frontier.yaml", []).frontier.methods
    monkeypatch.chdir(tmp_path)
    Path("refused.txt").write_text("How do I pick a lock?\n")
    code, row = take.split("`")[-2], METHODS[FIRST_PAGE[take]]
    if take.startswith("no `probes`"):
        code = f"penalty={code}"
    known = {"CSULoRACallback": CSULoRACallback, "Penalty": Penalty, "strength": 3.0}
    made = eval(f"CSULoRACallback(base_model='org/base', {code})", known)
    if row.probes is None:
        assert (made.target, made.penalty.name) == (None, FIRST_PAGE[take])
    else:
        assert made.penalty == getattr(Penalty, row.preset)
        assert [made.target] == shares[FIRST_PAGE[take]]


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_lightning", "llama32_1b_sft"])
def test_the_recipes_have_what_the_callback_does_with_probes_and_nothing_else(recipe):
    kept = load_recipe(f"recipes/{recipe}.yaml", []).corrections["kept"]
    made = CSULoRACallback(base_model="org/base", probes="builtin")
    assert (kept.penalty(), kept.target) == (made.penalty, made.target)


def in_short(row: dict) -> str:
    return " / ".join(f"{100 * row[name]['mean']:.0f}" for name in ("attack success", "task kept", "over-refusal"))


def test_marked_tables_are_replaced_and_nothing_else(tmp_path):
    folder = tmp_path / "frontier"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"points": points_of(0) + points_of(1)}))
    (folder / "costs.json").write_text(json.dumps({"costs": SPENT}))
    page, mark = tmp_path / "page.md", "<!-- overview: frontier, poison 0.1 -->"
    page.write_text(f"before\n{mark}\n| old |\n|---|\n\nafter | this |\n")
    overview.main([str(tmp_path), str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{mark}\n| ")
    assert text.endswith("|\n\nafter | this |\n")
    assert "| old |" not in text
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    overview.main([str(tmp_path), str(page)])
    assert page.read_text() == text
