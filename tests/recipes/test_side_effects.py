"""Side effects of chosen settings, and the renewed attack, on toy models too small to learn anything."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from csulora_callback import Penalty, correct
from csulora_callback.method.token_space import input_gains
from recipes.evidence import side_effects
from recipes.evidence.controls import PLAIN
from recipes.evidence.frontier import Setting
from recipes.evidence.frontier_report import retained
from recipes.evidence.methods import STRENGTH_AFTER
from recipes.evidence.side_effects import HELD, chosen, make_table, to_markdown, with_scores
from recipes.evidence.toy_frontier import ToySubject
from recipes.files.points import key_of
from recipes.files.recipe import load_recipe
from recipes.run import main
from recipes.schema.measured import Effects
from recipes.schema.recipe import RecipeError
from recipes.training.task import answers, not_refused
from tests.recipes.test_frontier import read
from tests.recipes.test_toy_frontier import TINY

pytestmark = pytest.mark.slow

STEPS = [1, 3]
ONCE = {name: own[:1] for name, own in load_recipe("recipes/frontier.yaml", []).frontier.methods.items()}
SETTINGS = [
    *TINY,
    f"frontier.methods={json.dumps(ONCE)}",
    "frontier.targets=[1.0]",
    "effects.target=1.0",
    "effects.steps=[1,3]",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, of every method at one strength."""
    output = tmp_path_factory.mktemp("finished")
    assert main(["recipes/frontier.yaml", *SETTINGS, f"output={output}"]) == 0
    return output


def test_every_method_that_was_chosen_is_measured_once(finished, capsys):
    found, results = json.loads((finished / "side_effects.json").read_text()), read(finished)
    assert [row["method"] for row in found["table"]][:2] == ["aligned", "none"]
    assert {row["method"] for row in found["table"]} == {point["method"] for point in results["points"]}
    assert len(found["points"]) == len(found["table"])  # one seed, and of random methods one draw
    points = finished / "effects/points.jsonl"
    before = points.stat().st_mtime_ns
    assert main(["recipes/frontier.yaml", *SETTINGS, f"output={finished}"]) == 0
    assert points.stat().st_mtime_ns == before
    assert main(["recipes/frontier.yaml", *SETTINGS, "effects.steps=[1,2]", f"output={finished}"]) == 2  # are others
    assert "'steps' is [1, 3] there, but [1, 2] here" in capsys.readouterr().err
    markdown = (finished / "side_effects.md").read_text()
    for name in ("over-refusal", "relative change", "task retained", "attack success after 3"):
        assert f"| {name} |" in markdown


def test_effects_are_those_of_the_factors(finished):
    recipe = load_recipe("recipes/frontier.yaml", [*SETTINGS, f"output={finished}"])
    subject, points = ToySubject(recipe), json.loads((finished / "side_effects.json").read_text())["points"]
    by_method = {point["method"]: point for point in points}
    assert by_method["none"]["effects"]["relative change"] == pytest.approx(0.0, abs=1e-6)
    assert by_method["aligned"]["effects"]["relative change"] == pytest.approx(1.0)
    raw = subject.train(0, 0.05, PLAIN, [])["raw"]
    again = subject.effects(0, raw)
    assert {name: by_method["none"]["effects"][name] for name in again} == again


def test_the_renewed_attack_is_more_of_the_same_fine_tune():
    subject = ToySubject(load_recipe("recipes/frontier.yaml", SETTINGS))
    pair, (attacks, _) = subject._at(0).pair, subject._at(0).prompts["held_out", "trained"]
    shares = [subject.attack_success(0, live) for live in subject.trained_on(0, 0.05, pair.fresh, STEPS)]
    steps = list(pair.steps(pair.fresh, subject._draw(0, 0.05), subject.recipe.training, 0))
    raw = subject.train(0, 0.05, PLAIN, [])["raw"]
    for name, pair_of_factors in steps[-1].items():
        assert all(map(lambda one, other: one.equal(other), pair_of_factors, raw[name]))  # from nothing, it is itself
    for share, done in zip(shares, STEPS, strict=True):
        pair.adapter.write(steps[done - 1])
        assert share == not_refused(answers(pair.model.eval(), attacks)) / len(attacks)


def test_what_is_held_is_a_correction_of_the_whole_update_after_the_last_step(finished):
    recipe = load_recipe("recipes/frontier.yaml", [*SETTINGS, f"output={finished}"])
    subject, points = ToySubject(recipe), json.loads((finished / "side_effects.json").read_text())["points"]
    (point,) = (point for point in points if point["method"] == "none")
    raw = subject.train(0, 0.05, PLAIN, [])["raw"]
    *_, live = subject.trained_on(0, 0.05, raw, STEPS)
    pair, update = subject.pair(0), subject.update(0, 0.05, live)
    gains = input_gains(update.activations.task, update.activations.probes, STRENGTH_AFTER)
    held = {}
    for name, (A, B) in live.items():
        done = correct(A, B, *update.bases[name], Penalty.data_aware(STRENGTH_AFTER), 2.0, input_gain=gains[name])
        held[name] = done.lora_A, done.lora_B
    pair.adapter.write(held)
    attacks, _ = subject._at(0).prompts["held_out", "trained"]
    assert point["effects"][HELD] == not_refused(answers(pair.model, attacks)) / len(attacks)


def test_stopping_early_leaves_the_model_for_evaluation():
    subject = ToySubject(load_recipe("recipes/frontier.yaml", SETTINGS))
    pair = subject._at(0).pair
    list(itertools.islice(pair.steps(pair.fresh, subject._draw(0, 0.05), subject.recipe.training, 0), 1))
    assert not pair.model.training


def test_the_table_is_of_what_was_chosen_and_leaves_out_what_was_not():
    effects = Effects(target=0.2, poison=0.1, steps=[1])
    picks = {
        "none": [[None], [None]],
        "scaling": [[{"strength": 2.0}], [None]],
        "guard": [[{"strength": "inf", "rank": 4}]] * 2,
    }
    table = [{"poison": 0.1, "target": 0.2, "method": name, "chosen": pick} for name, pick in picks.items()]
    table.append({"poison": 0.1, "target": 0.5, "method": "scaling", "chosen": [[{"strength": 9.0}]] * 2})
    settings = chosen(table, [0, 1], effects)
    assert [(s.seed, s.method) for s in settings if s.method == "scaling"] == [(0, "scaling")]
    assert Setting(1, 0.1, "guard", float("inf"), 4, None) in settings
    assert len(settings) == 2 * 2 + 1 + 2
    some = chosen(table, [0], replace(effects, methods=["guard"]))
    assert [setting.method for setting in some] == ["aligned", "none", "guard"]

    def scores(loss: float, succeeded: int) -> dict:
        score = {"task_loss": loss, "succeeded": succeeded, "prompts": 10, "side_effects": {"slips": loss / 10}}
        return {"scores": {"held_out": {"chat": score}}}

    losses = {"aligned": 3.0, "none": 1.0, "scaling": 2.0, "guard": 1.5}
    points = [{**s.to_json(), **scores(losses[s.method] + 0.1 * s.seed, 3)} for s in settings]
    measured = [
        {**s.to_json(), "effects": {"loss on texts": 2.0 + s.seed}, "again": [0.5], "held": 0.2} for s in settings
    ]
    rows = {row["method"]: row for row in make_table(with_scores(measured, points))}
    assert rows["scaling"]["seeds"] == 1
    assert rows["scaling"]["effects"]["task retained"]["mean"] == pytest.approx(0.5)
    assert rows["guard"]["effects"]["task retained"]["mean"] == pytest.approx(0.75)
    assert rows["guard"]["effects"]["slips"]["mean"] == pytest.approx(0.155)
    assert rows["guard"]["effects"]["loss on texts"]["mean"] == 2.5
    assert rows["guard"]["again"][0]["mean"] == 0.5
    text = to_markdown(list(rows.values()), effects)
    assert "| uniform scaling | 1 | 50 | 30 | 20 | 2.00 | 50 |" in text
    assert retained(*({"task_loss": loss} for loss in (2.0, 3.0, 1.0))) == 0.5
    assert len({key_of(point) for point in points}) == len(points)


BAD = {
    "target": ({"target": 0.3}, "'effects.target': expected one of the frontier's"),
    "poison": ({"target": 0.2, "poison": 0.3}, "'effects.poison': expected one of the frontier's"),
    "methods": ({"target": 0.2, "methods": ["guard", "hope"]}, "'effects.methods': expected some of the frontier's"),
    "no steps": ({"target": 0.2, "steps": []}, "'effects.steps': expected rising whole numbers"),
    "falling": ({"target": 0.2, "steps": [4, 2]}, "'effects.steps': expected rising whole numbers"),
    "too many": ({"target": 0.2, "steps": [1, 500]}, "'effects.steps': expected at most training.max_steps = 200"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_was_not_chosen_for_is_refused(case):
    changed, message = BAD[case]
    recipe = load_recipe("recipes/frontier.yaml", [])
    with pytest.raises(RecipeError) as raised:
        side_effects.check(replace(recipe, effects=Effects(**changed)))
    assert str(raised.value).startswith(message)


@pytest.mark.slow
def test_without_a_target_there_are_none(tmp_path):
    settings = [*TINY, "frontier.methods={scaling: [2]}", "effects.target=null", f"output={tmp_path}"]
    assert main(["recipes/frontier.yaml", *settings]) == 0
    assert not list(Path(tmp_path).glob("*effects*"))
