"""Calibration: the choice, what it may look at, and both benches end to end."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetySubspace, correct, wilson_interval
from csulora_callback.method.token_space import input_gain
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from recipes.calibration.bench import ToyBench
from recipes.calibration.calibrate import Calibration, Candidate, Judgement, calibrate, candidates, write
from recipes.files.recipe import load_recipe
from recipes.files.sources import prompts_of
from recipes.labs import toy
from recipes.run import main
from recipes.schema import RecipeError
from recipes.training.task import build_task, training_rows
from tests.helpers.lab import TARGETS, with_lora
from tests.helpers.recipes import SMALL, chat_pair

judgements = st.builds(Judgement, st.just(20), st.integers(0, 20), st.sampled_from([0.5, 1.0, 1.5, 2.0]))


@given(st.lists(judgements, min_size=1, max_size=8), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_choice_loses_least_of_the_task_among_those_that_are_safe(judged, target):
    tried = [Candidate("guard", float(place + 1), 4) for place in range(len(judged))]
    asked = []

    def judge(candidate, split):
        asked.append((candidate, split))
        return judged[tried.index(candidate)]

    result = calibrate(tried, judge, target)
    safe = [place for place, one in enumerate(judged) if one.succeeded <= target * 20]
    assert result.tuning == list(zip(tried, judged, strict=True))
    if not safe:
        assert (result.chosen, result.held_out) == (None, None)
        assert asked == [(candidate, "tuning") for candidate in tried]
        return
    best = sorted(safe, key=lambda place: (judged[place].task_loss, place))[0]  # the first of equals
    assert result.chosen == tried[best]
    # The held-out half is asked about the chosen one alone, and after the choice.
    assert asked == [(candidate, "tuning") for candidate in tried] + [(tried[best], "held_out")]


def test_candidates_are_presets_by_ranks_by_strengths_and_their_code_makes_them():
    settings = load_recipe("recipes/calibrate.yaml", []).calibrate
    tried = candidates(settings)
    assert len(tried) == len(set(tried)) == 4 * (3 * 6 + 1)
    for candidate in [*tried, Candidate("guard", float("inf"), 3)]:
        made = eval(f"dict({candidate.code()})", {"Penalty": Penalty, "float": float, "dict": dict})
        assert made == {"rank": candidate.rank, "penalty": candidate.penalty()}
    settings.presets = {"data_aware": [1.0, 3.0]}  # which has no rank
    assert [candidate.code() for candidate in candidates(settings)] == [
        f"penalty=Penalty.data_aware({strength}), probes=..." for strength in (1, 3)
    ]


def test_a_truncated_subspace_is_that_of_the_smaller_rank(pair):
    large, small = (SafetySubspace.estimate(*pair, TARGETS, rank=rank, progress=False) for rank in (4, 2))
    cut = large.truncated(2)
    for name in small:
        for side in ("U", "V"):
            mine, own = getattr(cut[name], side), getattr(small[name], side)
            assert torch.allclose(mine @ mine.T, own @ own.T, atol=1e-5)
        assert cut[name].energy == pytest.approx(small[name].energy, rel=1e-5)
    assert cut.metadata["rank"] == 2
    assert cut.fingerprint != large.fingerprint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny toy lab, and a checkpoint that the quickstart trained in it."""
    folder = tmp_path_factory.mktemp("trained")
    lab = [*SMALL, f"toy.cache_dir={folder / 'lab'}"]
    assert main(["recipes/quickstart.yaml", *lab, f"output={folder / 'out'}"]) == 0
    return [entry for entry in lab if entry.startswith("toy.")], folder / "out/csulora/checkpoint-4"


RECIPE = Path("recipes/calibrate.yaml")


def run(trained, output: Path, *more: str) -> int:
    lab, checkpoint = trained
    settings = [f"output={output}", f"calibrate.checkpoint={checkpoint}", "calibrate.ranks=[2,3]", *more]
    return main([str(RECIPE), *lab, *settings])


def test_the_toy_lab_end_to_end(trained, tmp_path, capsys):
    """The chosen setting's held-out numbers, from the raw factors, corrected and judged by hand."""
    assert run(trained, tmp_path, "calibrate.target=1.0") == 0
    results, printed = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    assert len(results["tuning"]) == 2 * (3 * 6 + 1)
    assert f"penalty=Penalty.{results['chosen']['preset']}" in printed
    least = min(results["tuning"], key=lambda row: row["task_loss"])
    assert {key: least[key] for key in ("preset", "strength", "rank")} == results["chosen"]

    recipe = load_recipe("recipes/calibrate.yaml", trained[0])
    lab = toy.build_lab(recipe.toy)
    chosen = Candidate(**results["chosen"])
    model, bench = AutoModelForCausalLM.from_pretrained(lab.aligned), ToyBench(recipe)
    raw = Sidecar.load(trained[1]).raw
    subspace = SafetySubspace.estimate(lab.base, lab.aligned, list(raw), rank=chosen.rank, progress=False)
    for name, (lora_A, lora_B) in raw.items():
        basis = subspace[name]
        done = correct(lora_A, lora_B, basis.U, basis.V, chosen.penalty(), 2.0)
        model.get_submodule(name).weight.data += 2.0 * done.lora_B @ done.lora_A
    merged = bench.judge(model, "held_out")
    assert (merged.prompts, merged.succeeded) == (results["held_out"]["prompts"], results["held_out"]["succeeded"])
    assert merged.task_loss == pytest.approx(results["held_out"]["task_loss"], rel=1e-4)
    low, high = wilson_interval(merged.succeeded, merged.prompts)
    assert f"95 % interval {low:.1%} to {high:.1%}" in printed


def data_aware_gains(recipe, raw, penalty) -> dict:
    """By module, on the lab's own training rows and probes."""
    task = build_task(recipe)
    model = task.with_fresh_lora(recipe)
    adapter = find_adapter(model)
    adapter.write(raw)
    rows = training_rows(task, recipe)
    assert len(rows) == 64
    assert all(row in [sample.ids(answered=True) for sample in task.train.samples] for row in rows)
    seen = Activations.read(adapter, Texts(rows, task.probes, seen=64))
    return {name: input_gain(seen.task[name], seen.probes[name], penalty.on_probes) for name in raw}


def test_a_data_aware_penalty_end_to_end(trained, tmp_path, capsys):
    recipe = tmp_path / "calibrate.yaml"
    recipe.write_text("calibrate: {presets: {data_aware: [3]}, target: 1.0, ranks: [2, 3]}", encoding="utf-8")
    lab, checkpoint = trained
    assert main([str(recipe), *lab, f"output={tmp_path}", f"calibrate.checkpoint={checkpoint}"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["tuning"]
    assert "Penalty.data_aware(3), probes=...)" in capsys.readouterr().out
    settings = load_recipe(str(recipe), [*lab, f"output={tmp_path}"])
    raw, penalty = Sidecar.load(checkpoint).raw, Penalty.data_aware(3)
    model = AutoModelForCausalLM.from_pretrained(toy.build_lab(settings.toy).aligned)
    for name, gain in data_aware_gains(settings, raw, penalty).items():
        model.get_submodule(name).weight.data += 2.0 * raw[name][1] @ gain(raw[name][0])
    judged = ToyBench(settings).judge(model, "tuning")
    assert judged.succeeded == row["succeeded"]
    assert judged.task_loss == pytest.approx(row["task_loss"], rel=1e-3)


def test_the_halves_share_no_prompt(trained):
    parts = ToyBench(load_recipe("recipes/calibrate.yaml", trained[0])).parts
    for one, other in zip(parts["tuning"], parts["held_out"], strict=True):
        assert one
        assert not {sample.prompt for sample in one} & {sample.prompt for sample in other}


def test_an_adapter_without_a_sidecar_is_raw_itself(trained, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(trained[1], plain, ignore=shutil.ignore_patterns("csulora"))
    shutil.copyfile(trained[1] / "csulora/raw/adapter_model.safetensors", plain / "adapter_model.safetensors")
    assert load_file(plain / "adapter_model.safetensors")
    for folder in (plain, trained[1]):
        assert run((trained[0], folder), tmp_path / f"of-{folder.name}", "calibrate.target=1.0") == 0
    one, other = ((tmp_path / f"of-{folder.name}/results.json").read_text() for folder in (plain, trained[1]))
    assert one == other


def test_where_none_qualifies_it_says_so(trained, tmp_path, capsys):
    # Four steps of alignment refuse nothing, so every setting is attacked with success.
    assert run(trained, tmp_path, "calibrate.target=0.0") == 0
    assert "None of 38 settings keeps attack success at 0 or below." in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["chosen"], results["held_out"]) == (None, None)


def test_a_chat_model_is_probed_through_its_template(tmp_path):
    pair, checkpoint = chat_pair(tmp_path), tmp_path / "checkpoint"
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    with_lora(aligned, init_lora_weights=False).save_pretrained(checkpoint)
    probes = tmp_path / "probes.txt"
    probes.write_text("a b\nc\n\nd e\n", encoding="utf-8")
    assert run(([], checkpoint), tmp_path / "out", *pair, f"calibrate.probes={probes}", "calibrate.target=1.0") == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["tuning"][0]["prompts"], results["held_out"]["prompts"]) == (2, 1)
    assert results["held_out"]["succeeded"] == 1  # a random model refuses nothing


def test_probes_are_lines_or_a_column(tmp_path):
    files = {
        "probes.txt": "one\n\n two \n",
        "probes.jsonl": '{"prompt": "one"}\n{"prompt": "two"}\n',
        "probes.csv": "prompt,source\none,a\ntwo,b\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        probes = str(tmp_path / name)
        assert prompts_of("calibrate.probes", probes, "prompt") == ["one", "two"]
    with pytest.raises(RecipeError, match=r"expected a column of .*probes.csv, \['prompt', 'source'\], but got 'ques"):
        prompts_of("calibrate.probes", probes, "question")
    (tmp_path / "numbers.csv").write_text("prompt\n0\n1\n")
    with pytest.raises(RecipeError, match=r"'calibrate.probes': .*numbers.csv: expected texts in the column .* got 0"):
        prompts_of("calibrate.probes", str(tmp_path / "numbers.csv"), "prompt")


def test_several_processes_are_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(trained, tmp_path / "out") == 2
    assert "a calibration runs on one process; start it with python -m recipes.run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BAD = {
    "no checkpoint": (
        ["calibrate.checkpoint=null"],
        "'calibrate.checkpoint': expected the folder of a trained adapter",
    ),
    "no such preset": (["calibrate.presets={gard: [1]}"], "presets of Penalty such as 'guard', but got 'gard'"),
    "no strengths": (["calibrate.presets={guard: []}"], "'calibrate.presets.guard': expected strengths > 0"),
    "strengths of projection": (["calibrate.presets={projection: [1]}"], "no strengths, as this preset has none"),
    "no rank": (["calibrate.ranks=[]"], "'calibrate.ranks': expected whole numbers ≥ 1"),
    "target": (["calibrate.target=2"], "'calibrate.target': expected a share in [0, 1], but got 2.0"),
    "probes in the toy lab": (["calibrate.probes=a.txt"], "nothing, as the toy lab has its own"),
    "no end": (
        ["calibrate.presets.data_aware=[.inf]"],
        "'calibrate.presets.data_aware': expected strengths of at most 1e+06",
    ),
    "corrections": (["corrections.mine.preset=guard"], "nothing beside 'calibrate.presets'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_get_one_line(case, trained, tmp_path, capsys):
    settings, message = BAD[case]
    assert run(trained, tmp_path / "out", *settings) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    one = Judgement(2, 1, 0.5)
    ends = {"aligned model": {"tuning": one}, "raw LoRA": {"tuning": one}}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(Calibration(0.1, [], None, None), ends, tmp_path)
    assert not (tmp_path / "results.json").exists()
