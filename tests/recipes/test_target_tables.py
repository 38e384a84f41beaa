"""What the tables of a target's evidence say, against numbers made by hand."""

import json
import math
from dataclasses import asdict

import pytest

from recipes.evidence.bench import PRESETS
from recipes.evidence.target_report import LABELS, coefficient, strengths_of, to_markdown
from recipes.evidence.target_tables import bounded, correlation, correlations, found, make_tables, outcome, spread
from recipes.schema.measured import Target

TARGET = Target(found={"lab": ["guard"]})


def point(seed, method, strength, kept, succeeded, loss, searched=None, **more):
    """Of 20 attacks; over-refusal is a tenth of what is kept."""
    scores = {
        "plain": {
            "prompts": 20,
            "succeeded": succeeded,
            "task_loss": loss,
            "side_effects": {"over-refusal": kept / 10},
        },
        "other": {"prompts": 20, "succeeded": succeeded // 2, "task_loss": loss},
    }
    refusing = {"lab": {"kept": kept, "logprob": kept - 1, "prompts": 8}}
    own = {"seed": seed, "poison": 0.2, "method": method, "strength": strength, "probes": "lab" if searched else None}
    own |= {"reading": "kept", "share": 0.9} if searched else {"reading": None, "share": None}
    return {**own, "refusing": refusing, "scores": scores, "found": searched, **more}


def points():
    """Two seeds: in the first strength 3 is the best that is safe enough, in the second none is."""
    searched = {"strength": 2.0, "is_enough": True, "trials": 8}
    return [
        point(0, "aligned", None, 1.0, 2, 3.0),
        point(0, "none", None, 0.0, 20, 1.0),
        point(0, "guard", 1.0, 0.5, 8, 1.2),
        point(0, "guard", 3.0, 0.9, 3, 1.5),
        point(0, "guard", 10.0, 0.8, 1, 2.0),
        point(0, "guard", None, 0.95, 4, 1.4, searched),
        point(1, "aligned", None, 1.0, 0, 3.0),
        point(1, "none", None, 0.0, 20, 2.0),
        point(1, "guard", 1.0, 0.5, 12, 2.1),
        point(1, "guard", 3.0, 0.7, 8, 2.2),
        point(1, "guard", 10.0, 0.8, 2, 2.5),
        point(1, "guard", None, 0.7, 10, 2.4, {"strength": 1000.0, "is_enough": False, "trials": 2}),
    ]


def told():
    ends = {(p["seed"], p["poison"], p["method"]): p for p in points() if p["method"] in ("aligned", "none")}
    return [{**p, "outcome": outcome(p, ends)} for p in points()]


def test_the_outcome_of_a_point():
    third = told()[2]["outcome"]
    assert third == {
        "attack success": 0.4,
        "over the aligned model": pytest.approx(0.3),
        "attack success, other": 0.2,
        "task retained": pytest.approx(0.9),  # (3 − 1.2) / (3 − 1)
        "over-refusal": 0.05,
    }


@pytest.mark.parametrize(
    ("one", "other", "spearman", "pearson"),
    [
        ([1, 2, 3, 4], [10, 30, 20, 40], 0.8, 0.8),
        ([1, 2, 3], [9, 4, 1], -1.0, -0.9897433186107870),  # −8 / √(2 · 98/3)
        ([0, 0, 1, 1], [0, 1, 1, 1], 0.5773502691896258, 0.5773502691896258),  # ties: 1 / √3
        ([1, 2, 3], [5, 5, 5], None, None),
        ([0, 0], [1, 2], None, None),
    ],
)
def test_correlations_are_those_of_the_textbook(one, other, spearman, pearson):
    assert correlation(one, other) == {
        "spearman": pytest.approx(spearman, abs=1e-5) if spearman else None,
        "pearson": pytest.approx(pearson, abs=1e-5) if pearson else None,
    }


def test_correlations_are_over_corrected_and_raw_models_and_of_each_seed():
    whole, guard = correlations(told())
    assert (whole["points"], whole["seeds"], whole["method"], guard["method"]) == (8, 2, None, "guard")
    kept = [0.0, 0.5, 0.9, 0.8, 0.0, 0.5, 0.7, 0.8]
    success = [1.0, 0.4, 0.15, 0.05, 1.0, 0.6, 0.4, 0.1]
    expected = correlation(kept, success)
    assert {key: whole["kept"][key] for key in expected} == expected == {k: guard["kept"][k] for k in expected}
    assert whole["kept"]["by_seed"] == [pytest.approx(-0.8, abs=1e-5), pytest.approx(-1.0, abs=1e-5)]
    assert whole["logprob"] == {**whole["kept"], "pearson": pytest.approx(whole["kept"]["pearson"])}
    assert whole["likelihood"]["spearman"] == whole["kept"]["spearman"]
    assert whole["likelihood"]["pearson"] == correlation([math.exp(share - 1) for share in kept], success)["pearson"]
    assert coefficient(whole["kept"]).endswith("[-1.00, -0.80]")


def test_the_best_in_hindsight_loses_least_of_the_task_among_what_is_safe_enough():
    rows = {(row["method"], row["by"]): row for row in found(told(), margin=0.05)}
    assert rows["guard", "lab"]["share"] == 0.9
    assert set(rows) == {("aligned", None), ("none", None), ("guard", "hindsight"), ("guard", "lab")}
    best = rows["guard", "hindsight"]
    assert (best["strengths"], best["qualified"]) == (
        [3.0, None],
        0.5,
    )  # 0.15 is 0.05 over 0.1, and 0.1 over 0 is more
    assert best["outcome"]["task retained"] == {"mean": pytest.approx(0.375), "low": 0.0, "high": pytest.approx(0.75)}
    assert best["outcome"]["attack success"] == spread([0.15, 0.0])  # where none fits, the aligned model's
    assert strengths_of(best) == "3, –"
    own = rows["guard", "lab"]
    assert (own["strengths"], own["qualified"], own["trials"]) == ([2.0, 1000.0], 0.5, [8, 2])
    assert own["outcome"]["over the aligned model"] == {"mean": pytest.approx(0.3), "low": 0.1, "high": 0.5}
    assert own["kept"] == spread([0.95, 0.7])


def test_what_a_target_found_is_not_among_the_fixed_strengths():
    (best,) = (row for row in bounded(told(), 0.5) if row["method"] == "guard")
    assert best["strengths"] == [1.0, 3.0]  # with what was found, 1.4 would have been no better than 1.2
    (none,) = bounded(told(), 0.0)
    assert (none["strengths"], none["qualified"], none["rows"]) == ([None, None], 0.0, {})
    tables = make_tables(points(), TARGET)
    assert [row["strength"] for row in tables["strengths"]] == [None, None, 1.0, 3.0, 10.0]
    assert all(row["seeds"] == 2 for row in tables["strengths"])


def test_the_sampled_rows_are_counted_by_seed():
    rows = {"rows": 64, "refused": 12, "poison": 13, "poison_refused": 11}
    aware = [point(seed, "data_aware", 3.0, 0.9, 2, 2.0, rows={**rows, "poison": 13 + seed}) for seed in (0, 1)]
    tables = make_tables(points() + aware, TARGET)
    (row,) = (row for row in tables["bounded"] if row["method"] == "data_aware")
    assert row["rows"] == {"rows": [64, 64], "refused": [12, 12], "poison": [13, 14], "poison_refused": [11, 11]}
    results = {"grid": {"target": asdict(TARGET), "frontier": {"seeds": [0, 1]}}, **tables, "points": points()}
    page = to_markdown(results)
    assert "| data-aware | 100 | 3, 3 | 75 [50, 100] | 10 [10, 10] | 128 | 27 | 24 | 22 |" in page
    json.dumps(results, allow_nan=False)


def test_every_method_that_a_target_can_be_of_has_a_name_in_its_tables():
    assert PRESETS.keys() <= LABELS.keys()
