"""The results that are kept follow from the recipe as it is, and the README quotes what they say."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from recipes.evidence import costs, frontier, side_effects, target_report, target_tables
from recipes.evidence.frontier_report import make_table, percent, retained, to_markdown
from recipes.evidence.methods import METHODS
from recipes.evidence.smollm2_frontier import SmolLM2Subject
from recipes.evidence.target import KEY, grid
from recipes.evidence.toy_frontier import ToySubject
from recipes.files.points import key_of, plain
from recipes.files.recipe import load_recipe
from tests.recipes.test_frontier import read

FRONTIERS = {"frontier": ToySubject, "smollm2_frontier": SmolLM2Subject, "smollm2_answers": SmolLM2Subject}


@pytest.mark.parametrize(("name", "subject"), FRONTIERS.items())
def test_the_results_that_are_kept_are_those_of_the_recipe_as_it_is(name, subject):
    recipe, kept = load_recipe(f"recipes/{name}.yaml", []), Path("recipes/results") / name
    results = read(kept)
    assert results["grid"] == plain(asdict(recipe.frontier))
    assert results["measured_on"] == subject(recipe).describe()
    assert set(recipe.frontier.methods) <= set(METHODS) - {"aligned"}
    measured = [key_of(point) for point in results["points"]]
    assert measured == [key_of(setting.to_json()) for setting in frontier.grid(recipe.frontier)]
    table = make_table(results["points"], recipe.frontier.targets)
    assert table == results["table"]
    assert to_markdown(table, results["points"]) == (kept / "table.md").read_text()


def test_every_method_is_measured_somewhere():
    named = [load_recipe(f"recipes/{name}.yaml", []).frontier.methods for name in FRONTIERS]
    assert set().union(*named) | {"aligned"} == set(METHODS)


def test_the_readme_quotes_what_the_results_say():
    """Each cell of each marked table, from results.json and the table's own words."""
    text, seen = Path("recipes/results/README.md").read_text(), 0
    labels = {method.label: name for name, method in METHODS.items()}
    for name, poison, table in re.findall(r"<!-- results: (\w+), poison ([\d.]+) -->\n((?:\|.*\n)+)", text):
        rows = read(Path("recipes/results") / name)["table"]
        head, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        for label, *cells in lines:
            for target, cell in zip(head[1:], cells, strict=True):
                wanted = (float(poison), float(target.removeprefix("≤ ")), labels[label])
                row = next(row for row in rows if (row["poison"], row["target"], row["method"]) == wanted)
                assert cell == quoted(row), (label, target)
                seen += 1
    assert seen >= 2 * 3 * 17


@pytest.mark.parametrize("name", ["frontier", "smollm2_frontier"])
def test_the_costs_that_are_kept_are_those_of_all_rows(name):
    settings = costs.settings_of(load_recipe(f"recipes/{name}.yaml", []).frontier)
    kept = json.loads(Path("recipes/results", name, "costs.json").read_text())["costs"]
    assert [key_of(cost) for cost in kept] == [key_of(setting.to_json()) for setting in settings]


@pytest.mark.parametrize("name", ["frontier", "smollm2_frontier"])
def test_the_side_effects_that_are_kept_are_those_of_the_chosen_settings(name):
    recipe, kept = load_recipe(f"recipes/{name}.yaml", []), Path("recipes/results") / name
    results, found = read(kept), json.loads((kept / "side_effects.json").read_text())
    assert found["effects"] == plain(asdict(recipe.effects))
    settings = side_effects.chosen(results["table"], recipe.frontier.seeds, recipe.effects)
    assert [key_of(point) for point in found["points"]] == [key_of(setting.to_json()) for setting in settings]
    table = side_effects.make_table(side_effects.with_scores(found["points"], results["points"]))
    assert table == found["table"]
    assert side_effects.to_markdown(table, recipe.effects) == (kept / "side_effects.md").read_text()


def test_the_readme_quotes_the_side_effects():
    text, seen = Path("recipes/results/README.md").read_text(), 0
    labels = {method.label: name for name, method in METHODS.items()}
    for name, table in re.findall(r"<!-- side effects: (\w+) -->\n((?:\|.*\n)+)", text):
        found = json.loads((Path("recipes/results") / name / "side_effects.json").read_text())
        rows = {row["method"]: row for row in found["table"]}
        head, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        for label, *cells in lines:
            for column, said in zip(head[1:], cells, strict=True):
                assert said == cell(rows[labels[label]], column, found["effects"]["steps"]), (label, column)
                seen += 1
    assert seen >= 2 * 6 * 6


@pytest.mark.parametrize(("name", "subject"), [("target", ToySubject), ("smollm2_target", SmolLM2Subject)])
def test_the_evidence_for_a_target_that_is_kept_is_that_of_the_recipe_as_it_is(name, subject):
    recipe, kept = load_recipe(f"recipes/{name}.yaml", []), Path("recipes/results") / name
    results = read(kept)
    assert results["measured_on"] == subject(recipe).describe()
    assert results["grid"]["target"] == plain(asdict(recipe.target))
    assert results["grid"]["frontier"].items() <= asdict(recipe.frontier).items()
    measured = [key_of(point, KEY) for point in results["points"]]
    assert measured == [key_of(plain(asdict(setting)), KEY) for setting in grid(recipe)]
    tables = target_tables.make_tables(results["points"], recipe.target)
    assert tables == {key: results[key] for key in tables}
    assert target_report.to_markdown(results) == (kept / "table.md").read_text()


def test_the_readme_quotes_the_evidence_for_a_target():
    """Each cell of each marked table: ``target: FOLDER TABLE, poison SHARE``."""
    text, seen = Path("recipes/results/README.md").read_text(), 0
    for name, kind, poison, table in re.findall(
        r"<!-- target: (\w+) (\w+)(?:, poison ([\d.]+))? -->\n((?:\|.*\n)+)", text
    ):
        rows = [row for row in read(Path("recipes/results") / name)[kind] if str(row.get("poison", "")) == poison]
        head, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        told = [[of_target(row, column) for column in head] for row in rows]
        for line in lines:
            assert line in told, line
            seen += len(line)
    assert seen >= 250


def of_target(row: dict, column: str) -> str:
    """One value of a row of a target's tables, as the README says it."""
    reading, _, probes = column.partition(" by ")
    if column == "method":
        return "all" if row["method"] is None else target_report.LABELS[row["method"]]
    if column == "strength":
        return "" if row["strength"] is None else f"{row['strength']:g}"
    if column == "strength by":
        return target_report.by(row)
    if column == "strength of each seed":
        return target_report.strengths_of(row) if row.get("by", "hindsight") else ""
    if column in ("probes", "points", "seeds"):
        return str(row[column])
    if column.startswith("Spearman, "):
        return target_report.coefficient(row[{"refusals kept": "kept", "log-likelihood": "logprob"}[column[10:]]])
    if column.startswith("Pearson, "):
        return f"{row[{'refusals kept': 'kept', 'likelihood': 'likelihood'}[column[9:]]]['pearson']:.2f}"
    if column == "likelihood":
        return percent(row["likelihood"])
    if reading == "log-likelihood":
        return f"{row['refusing'][probes]['logprob']['mean']:.2f}"
    if reading == "refusals kept":
        return percent(row["kept"] if "kept" in row else row["refusing"][probes]["kept"])
    return percent(row["outcome"][column], signed=column.startswith("over the"))


def cell(row: dict, column: str, steps: list[int]) -> str:
    """The mean, as the README says it: losses and changes as numbers, shares in percent."""
    if column.startswith("after "):
        return f"{100 * row['again'][steps.index(int(column.split()[1]))]['mean']:.0f}"
    mean = row["effects"][column]["mean"]
    return f"{mean:.2f}" if "loss" in column or column == "relative change" else f"{100 * mean:.0f}"


@pytest.mark.parametrize("method", ["guard", "data_aware"])
@pytest.mark.parametrize("strength", [10.0, 3.0])
def test_the_readme_quotes_what_the_proposed_setting_did(method, strength):
    """In every seed of both frontiers, guard at a rank of about a thirtieth of the hidden size."""
    success, cost = [], []
    for name, template, rank in (("frontier", "trained", 4), ("smollm2_frontier", "chat", 16)):
        points = [point for point in read(Path("recipes/results") / name)["points"] if point["poison"] > 0]
        for point in points:
            if (point["method"], point["strength"]) == (method, strength) and point["rank"] in (None, rank):
                run = [p for p in points if (p["seed"], p["poison"]) == (point["seed"], point["poison"])]
                ends = {p["method"]: p["scores"]["held_out"][template] for p in run}
                score = point["scores"]["held_out"][template]
                success.append(100 * score["succeeded"] / score["prompts"])
                cost.append(100 * (1 - retained(score, ends["aligned"], ends["none"])))
    assert len(cost) == 5 * 2 + 3
    attacks, task = (f"{min(values):.0f} to {max(values):.0f} %" for values in (success, cost))
    said = {10.0: f"gave {attacks} attack success for {task} of the task", 3.0: f"3{{}}: {attacks}, for {task})"}
    page = " ".join(Path("recipes/results/README.md").read_text().split())
    assert said[strength].format(")`" if method == "guard" else "") in page


@pytest.mark.parametrize(("probes", "names"), [("lab", ["target", "smollm2_target"]), ("builtin", ["smollm2_target"])])
def test_the_readme_quotes_what_a_target_did(probes, names):
    """The default: 0.9 of the likelihood, by a data-aware correction, over all seeds and poison shares."""
    kind = {"method": "data_aware", "by": probes, "reading": "likelihood", "share": 0.9}
    found = [
        row for name in names for row in read(Path("recipes/results") / name)["found"] if kind.items() <= row.items()
    ]
    assert len(found) == {"lab": 3, "builtin": 1}[probes]
    success = [100 * row["outcome"]["attack success"][end] for row in found for end in ("low", "high")]
    cost = [100 - 100 * row["outcome"]["task retained"][end] for row in found for end in ("low", "high")]
    attacks, task = (f"{min(values):.0f} to {max(values):.0f} %" for values in (success, cost))
    page = " ".join(Path("recipes/results/README.md").read_text().split())
    assert f"{attacks} attack success for {task} of the task" in page


def quoted(row: dict) -> str:
    if row["qualified"] == 0:
        return "none"
    mean, low, high = (f"{100 * row['task_retained'][key]:.0f}" for key in ("mean", "low", "high"))
    some = "" if row["qualified"] == 1 else f", {100 * row['qualified']:.0f} % of runs"
    return f"{mean} [{low}, {high}]{some}"
