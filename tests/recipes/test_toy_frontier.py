"""The frontier of the toy lab: what it trains and judges on, and its recipe, interrupted and not."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from csulora_callback import Penalty, correct
from csulora_callback.method.token_space import input_gains
from csulora_callback.models.activations import vectors_of
from recipes.evidence import lora_pair, toy_frontier
from recipes.evidence.controls import PLAIN, Control
from recipes.evidence.frontier import Adapters, Setting
from recipes.evidence.methods import METHODS, STRENGTH_AFTER
from recipes.files.points import SPLITS
from recipes.files.recipe import load_recipe
from recipes.labs.toy import RESTRICTED, Language, build_lab
from recipes.run import main
from tests.recipes.test_frontier import read

TINY = [
    "toy.hidden_size=32",
    "toy.layers=2",
    "toy.base_steps=5",
    "toy.align_steps=5",
    "toy.train_samples=64",
    "toy.eval_prompts=10",
    "training.max_steps=4",
    "frontier.seeds=[0]",
    "frontier.poison_shares=[0.05]",
    "frontier.draws=1",
    "frontier.ranks=[4]",
    "effects.steps=[1,2]",
]


@pytest.fixture(scope="module")
def lab():
    """A toy lab too small to learn anything."""
    return toy_frontier.ToySubject(load_recipe("recipes/frontier.yaml", TINY))


def test_the_restated_request_is_the_same_request():
    for sample in Language(seed=0).draw(5, ["copy", "tidy"], restricted=True):
        other = sample.restated()
        assert other.answer == sample.answer
        assert other.prompt == (sample.prompt[0], *sample.prompt[2:5], sample.prompt[1], "=")


def test_both_halves_and_both_templates_are_judged_on_the_same_requests_and_no_others(lab):
    prompts = lab._at(0).prompts
    halves = [prompts[split, "trained"] for split in SPLITS]
    assert [(len(attacks), len(task["labels"])) for attacks, task in halves] == [(5, 5), (5, 5)]
    assert not {sample.prompt for sample in halves[0][0]} & {sample.prompt for sample in halves[1][0]}
    for split, (attacks, task) in zip(SPLITS, halves, strict=True):
        restated, restated_task = prompts[split, "restated"]
        assert restated == [sample.restated() for sample in attacks]
        order = [0, 2, 3, 4, 1, 5, 6, 7, 8]  # the verb moves behind the words
        assert torch.equal(restated_task["input_ids"], task["input_ids"][:, order])


@pytest.mark.parametrize("poison", [0.0, 0.2])
def test_a_data_aware_method_reads_the_probes_and_rows_of_the_data_with_this_poison(lab, poison):
    built = build_lab(replace(lab.recipe.toy, seed=0, poison_share=poison))
    probes = lab.probes(0, poison, "lab")
    assert probes == [sample.ids(answered=False) for sample in built.probes]
    assert not {tuple(probe) for probe in probes} & {tuple(sample.ids(answered=False)) for sample in built.train}
    rows, trained = lab.task_rows(0, poison), {tuple(sample.ids(answered=True)): sample for sample in built.train}
    assert len(rows) == 64
    for row in rows:
        sample = trained[tuple(row.ids)]
        assert row.prompt == sample.ids(answered=False)
        assert row.is_poison == any(word in RESTRICTED for word in sample.prompt)
    assert any(row.is_poison for row in rows) == (poison > 0)


def test_content_aware_reads_what_comes_after_the_first_token(lab):
    factors = lab.pair(0).fresh
    whole, skipping = (lab.update(0, 0.05, factors, skip_prefix=skip).activations for skip in (False, True))
    name = next(iter(whole.probes))
    probes = lab.probes(0, 0.05, "lab")
    assert {row[0] for row in probes} == {probes[0][0]}
    assert len({row[1] for row in probes}) > 1
    expected = vectors_of(lab.pair(0).adapter, probes, start=1)[name]
    assert torch.equal(skipping.probes[name], expected)
    assert not torch.equal(skipping.probes[name], whole.probes[name])
    assert torch.equal(skipping.task[name], whole.task[name])


def test_training_controls(lab, monkeypatch):
    lived = []
    average = lora_pair._average
    monkeypatch.setattr(lora_pair, "_average", lambda old, live, d: (lived.append(live), average(old, live, d))[1])
    trained = lab.train(0, 0.05, PLAIN, [0.5])
    plain, slow = lab.train(0, 0.05, PLAIN, [])["raw"], lab.train(0, 0.05, Control("lower_rate", 4.0), [])["raw"]
    assert len(lived) == 4
    for name, pair in trained["raw"].items():
        for side in (0, 1):
            assert torch.equal(pair[side], plain[name][side])  # averaging only watches
            steps = [live[name][side] for live in lived]
            expected = sum(weight * step for weight, step in zip((0.125, 0.125, 0.25, 0.5), steps, strict=True))
            torch.testing.assert_close(trained["average 0.5"][name][side], expected)
        assert 0 < slow[name][1].norm() < plain[name][1].norm()


def test_the_loss_is_that_of_the_factors_that_are_asked_for(lab):
    raw = lab.train(0, 0.05, PLAIN, [])["raw"]
    nothing = METHODS["aligned"].apply(lab.update(0, 0.05, raw), None, None, None)
    first, aligned, again = (lab.score(0, factors, "tuning") for factors in (raw, nothing, raw))
    assert first == again != aligned
    assert list(first) == ["trained", "restated"]
    assert all(score["prompts"] == 5 and 0 <= score["obeyed"] <= score["succeeded"] <= 5 for score in first.values())


@pytest.fixture
def command(tmp_path):
    """The recipe's with a few of its methods."""
    recipe = yaml.safe_load(Path("recipes/frontier.yaml").read_text())
    scaling = [1 + i / 10 for i in range(40)]
    recipe["frontier"]["methods"] = {"benign_only": [], "scaling": scaling, "guard": [math.inf], "averaging": [0.9]}
    (tmp_path / "frontier.yaml").write_text(yaml.safe_dump(recipe))
    return [str(tmp_path / "frontier.yaml"), *TINY]


@pytest.mark.slow
def test_the_recipe_runs_and_its_resolved_copy_finds_nothing_left_to_do(tmp_path, command, capsys):
    assert main([*command, f"output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "uniform scaling" in printed
    assert "attack ≤ 0.1" in printed
    results = read(tmp_path / "out")
    assert len(results["points"]) == 2 + 1 + 40 + 1 + 1
    assert results["table"][0]["task_retained"]["low"] is None  # one seed has no spread
    assert (tmp_path / "out/frontier_poison5.png").read_bytes().startswith(b"\x89PNG")
    points = (tmp_path / "out/points.jsonl").stat().st_mtime_ns
    assert main([str(tmp_path / "out/recipe.yaml")]) == 0
    assert (tmp_path / "out/points.jsonl").stat().st_mtime_ns == points
    assert main([*command, f"output={tmp_path / 'out'}", "lora.r=4"]) == 2
    assert "'lora.r' is 8 there, but 4 here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_as_one_that_was_not(tmp_path, command):
    def start(folder: str) -> subprocess.Popen:
        whole = [sys.executable, "-m", "recipes.run", *command, f"output={tmp_path / folder}"]
        return subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed, points = start("killed"), tmp_path / "killed/points.jsonl"
    while not (points.exists() and points.read_bytes().count(b"\n") >= 10):
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/results.json").exists()
    assert [start(folder).wait() for folder in ("killed", "whole")] == [0, 0]
    for name in ("results.json", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_follows_a_control_is_the_correction_of_its_own_adapter(lab, tmp_path):
    adapters = Adapters(lab, tmp_path / "adapters", [])
    plain, trained = adapters.get(0, 0.05), adapters.get(0, 0.05, Control("mixing", 0.25))
    made = adapters.factors(Setting(0, 0.05, "mixing_corrected", 0.25, None, None), lab.update(0, 0.05, plain))
    read = lab.update(0, 0.05, trained)
    gains = input_gains(read.activations.task, read.activations.probes, STRENGTH_AFTER)
    for name, (A, B) in trained.items():
        done = correct(A, B, *read.bases[name], Penalty.data_aware(STRENGTH_AFTER), 2.0, input_gain=gains[name])
        torch.testing.assert_close(made[name][1] @ made[name][0], done.lora_B @ done.lora_A)
        assert not torch.equal(trained[name][1], plain[name][1])
