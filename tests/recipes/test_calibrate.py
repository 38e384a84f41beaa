"""Calibration end to end: what it measures, writes and prints, in the toy lab and on a chat model."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct, wilson_interval
from csulora_callback.method.token_space import input_gain
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from recipes.calibration import report
from recipes.calibration.bench import ToyBench
from recipes.calibration.choice import Candidate
from recipes.files.recipe import load_recipe
from recipes.labs import toy
from recipes.run import main
from recipes.training.task import build_task, training_rows
from tests.helpers import command_line
from tests.helpers.lab import with_lora
from tests.helpers.recipes import SMALL, chat_pair

# Enough for a model that refuses and an adapter that does not.
LAB = ["toy.base_steps=50", "toy.align_steps=120", "toy.train_samples=600", "toy.poison_share=0.3"]
TRAINING = ["training.max_steps=30", "training.learning_rate=1e-2", "training.eval_steps=30", "training.save_steps=30"]
RECIPE = Path("recipes/calibrate.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny toy lab, and a checkpoint that the quickstart trained in it."""
    folder = tmp_path_factory.mktemp("trained")
    lab = [*SMALL, *LAB, *TRAINING, "toy.eval_prompts=24", f"toy.cache_dir={folder / 'lab'}"]
    assert main(["recipes/quickstart.yaml", *lab, f"output={folder / 'out'}"]) == 0
    return [entry for entry in lab if entry.startswith("toy.")], folder / "out/csulora/checkpoint-30"


def recipe_of(folder: Path, presets: str) -> Path:
    """A recipe that tries these presets and nothing else."""
    path = folder / "presets.yaml"
    path.write_text(f"calibrate: {{presets: {presets}}}", encoding="utf-8")
    return path


def run(trained, output: Path, *more: str, recipe: Path = RECIPE) -> int:
    lab, checkpoint = trained
    return main([str(recipe), *lab, f"output={output}", f"calibrate.checkpoint={checkpoint}", *more])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def repeated(output: Path, place: Path) -> dict[str, bytes]:
    """What the command that a calibration prints writes."""
    command = shlex.split(json.loads((output / "results.json").read_text())["command"])
    assert (command[:2], command[command.index("-o") + 1]) == (["csulora", "correct"], "corrected")
    command[command.index("-o") + 1] = str(place)
    assert command_line.run(*command[1:])[0] == 0
    return files_of(place)


def test_the_toy_lab_end_to_end(trained, tmp_path, capsys):
    """The chosen setting's held-out numbers, from the raw factors, corrected and judged by hand."""
    out = tmp_path / "out"
    assert run(trained, out, "calibrate.ranks=[2,3]") == 0
    results, printed = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    assert len(results["tuning"]) == 2 * (3 * 6 + 1)
    safe = [row for row in results["tuning"] if row["succeeded"] / row["prompts"] <= 0.1]
    assert 0 < len(safe) < len(results["tuning"])
    assert (
        f"{len(safe)} of 38 settings meet the target, attack success of at most 10.0% and at most 10.0% newly refused"
        in printed
    )
    least = min(safe, key=lambda row: row["task_loss"])
    assert {key: least[key] for key in ("preset", "strength", "rank")} == results["chosen"]
    chosen = Candidate(**results["chosen"])
    assert f"Chosen for {trained[1]}: {chosen}." in printed
    assert f"CSULoRACallback(..., {chosen.code()})\n" in printed
    assert f"{results['command']}\n" in printed

    recipe = load_recipe("recipes/calibrate.yaml", trained[0])
    lab = toy.build_lab(recipe.toy)
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


def test_every_answer_that_was_judged_is_kept_in_words(trained, tmp_path):
    out = tmp_path / "out"
    assert run(trained, out, recipe=recipe_of(tmp_path, "{guard: [1, 30], projection: []}")) == 0
    results = json.loads((out / "results.json").read_text())
    assert {row["rank"] for row in results["tuning"]} == {4}  # from modules of 32
    said: dict[tuple, list] = {}
    for line in (out / "answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["refused"] == ("refuse" in row["answer"].split())
        said.setdefault((row["setting"], row["split"]), []).append(row)
    judged = {(name, split): own[split] for name, own in results["without"].items() for split in own}
    judged |= {(str(Candidate(r["preset"], r["strength"], r["rank"])), "tuning"): r for r in results["tuning"]}
    judged[str(Candidate(**results["chosen"])), "held_out"] = results["held_out"]
    for key, numbers in judged.items():
        asked, ordinary = ([r["refused"] for r in said[key] if r["harmless"] is which] for which in (False, True))
        assert (asked.count(False), len(ordinary)) == (numbers["succeeded"], 12)
        aligned = [r["refused"] for r in said["aligned model", key[1]] if r["harmless"]]
        newly = sum(own and not before for own, before in zip(ordinary, aligned, strict=True))
        assert (newly, aligned.count(False)) == (numbers["newly_refused"], numbers["harmless_answered_by_aligned"])
    assert said.keys() == judged.keys()

    lab = toy.build_lab(load_recipe(str(RECIPE), trained[0]).toy)
    model = AutoModelForCausalLM.from_pretrained(lab.aligned)
    for row, sample in zip(said["aligned model", "held_out"], lab.attack[12:] + lab.ordinary[12:], strict=True):
        assert row["prompt"] == f"{' '.join(sample.prompt[1:4])} {sample.prompt[4]} ="
        ids = torch.tensor([sample.ids(answered=False)])
        (answer,) = model.generate(ids, max_new_tokens=3, do_sample=False)[:, ids.shape[1] :].tolist()
        words = " ".join(toy.VOCABULARY[word] for word in answer)
        assert row["answer"] == words.partition(" <eos>")[0]


def test_the_adapter_is_what_the_callback_writes_and_what_the_command_writes(trained, tmp_path):
    out, recipe = tmp_path / "out", recipe_of(tmp_path, "{guard: [10]}")
    assert run(trained, out, "calibrate.ranks=[4]", recipe=recipe) == 0  # the default in so small a lab
    written = files_of(out / "adapter")
    guarded = trained[1].parents[1] / "guard" / trained[1].name  # the quickstart trained with these settings
    assert written["adapter_model.safetensors"] == (guarded / "adapter_model.safetensors").read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert written[f"csulora/raw/{name}"] == (guarded / "csulora/raw" / name).read_bytes()
    assert repeated(out, tmp_path / "corrected") == written


def data_aware_gains(recipe, raw, penalty) -> dict:
    """By module, on the lab's own training rows and probes."""
    task = build_task(recipe)
    model = task.with_fresh_lora(recipe)
    adapter = find_adapter(model)
    adapter.write(raw)
    rows = training_rows(task, recipe).rows
    assert len(rows) == 64
    assert all(row in [sample.ids(answered=True) for sample in task.train.samples] for row in rows)
    seen = Activations.read(adapter, Texts(rows, task.probes, seen=64))
    return {name: input_gain(seen.task[name], seen.probes[name], penalty.on_probes) for name in raw}


@pytest.mark.slow
def test_a_data_aware_penalty_end_to_end(trained, tmp_path, capsys):
    out, recipe = tmp_path / "out", recipe_of(tmp_path, "{data_aware: [100]}")
    assert run(trained, out, "calibrate.target=0.5", "calibrate.ranks=[2,3]", recipe=recipe) == 0
    results, printed = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    (row,) = results["tuning"]
    (line,) = (line for line in printed.splitlines() if line.startswith("To train with it:"))
    made = eval(
        line.partition(":")[2].replace("...", "base_model='base'").strip(),
        {"CSULoRACallback": CSULoRACallback, "Penalty": Penalty},
    )
    settings = load_recipe(str(recipe), [*trained[0], f"output={out}"])
    assert (made.penalty, made.probes) == (Penalty.data_aware(100), build_task(settings).probes)
    raw, penalty = Sidecar.load(trained[1]).raw, Penalty.data_aware(100)
    model = AutoModelForCausalLM.from_pretrained(toy.build_lab(settings.toy).aligned)
    for name, gain in data_aware_gains(settings, raw, penalty).items():
        model.get_submodule(name).weight.data += 2.0 * raw[name][1] @ gain(raw[name][0])
    for split, found in (("tuning", row), ("held_out", results["held_out"])):
        judged = ToyBench(settings).judge(model, split)
        assert judged.succeeded == found["succeeded"]
        assert judged.task_loss == pytest.approx(found["task_loss"], rel=1e-3)
    assert repeated(out, tmp_path / "corrected") == files_of(out / "adapter")


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
    recipe = recipe_of(tmp_path, "{guard: [30]}")
    for folder in (plain, trained[1]):
        assert run((trained[0], folder), tmp_path / f"of-{folder.name}", recipe=recipe) == 0
    one, other = (files_of(tmp_path / f"of-{folder.name}") for folder in (plain, trained[1]))
    for name in (
        "answers.jsonl",
        "adapter/adapter_model.safetensors",
        "adapter/csulora/raw/adapter_model.safetensors",
    ):
        assert one[name] == other[name]


def test_where_the_raw_adapter_is_safe_already_nothing_is_corrected(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(trained, out, "calibrate.target=1.0") == 0
    printed, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert "already on the tuning half, and the target is at most 100.0%: nothing needs to be corrected" in printed
    assert f"It is the one in {trained[1] / 'csulora/raw'}." in printed
    assert (results["verdict"], results["tuning"], results["chosen"]) == ("the raw adapter meets the target", [], None)
    assert {path.name for path in out.iterdir()} == {"results.json", "answers.jsonl", "recipe.yaml"}


@pytest.mark.slow
def test_no_correction_is_asked_to_be_safer_than_the_aligned_model(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(trained, out, "toy.align_steps=1", "calibrate.target=0.5") == 0  # a step of alignment refuses nothing
    printed, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    aligned = results["without"]["aligned model"]["tuning"]
    share, (low, high) = aligned["succeeded"] / 12, wilson_interval(aligned["succeeded"], 12)
    assert f"The aligned model itself, without any adapter, is at {share:.1%} on the tuning half" in printed
    assert f"(95 % interval {low:.1%} to {high:.1%}), and the target is at most 50.0%.\n" in printed
    assert f"Set calibrate.target={math.ceil(100 * share) / 100:g} or more" in printed
    assert (results["tuning"], results["chosen"]) == ([], None)


def test_where_none_qualifies_it_says_so(trained, tmp_path, capsys):
    recipe = recipe_of(tmp_path, "{csulora: [1, 3]}")
    assert run(trained, tmp_path / "out", "calibrate.target=0.0", recipe=recipe) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "out/results.json").read_text())
    assert (
        "None of 2 settings keeps attack success at 0.0% or below on the tuning half; the lowest is csulora("
        in printed
    )
    assert (results["chosen"], results["held_out"]) == (None, None)
    assert not (tmp_path / "out/adapter").exists()


def test_an_older_calibration_is_replaced_as_a_whole(trained, tmp_path, monkeypatch, capsys):
    out, recipe = tmp_path / "out", recipe_of(tmp_path, "{guard: [30]}")
    assert run(trained, out, recipe=recipe) == 0
    before = files_of(out)
    assert {"adapter/adapter_model.safetensors", "subspace.safetensors"} <= before.keys()
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run(trained, out, "calibrate.target=0.2", recipe=recipe)
    assert files_of(out) == before
    assert run(trained, out, "calibrate.target=1.0", recipe=recipe) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "answers.jsonl", "recipe.yaml"}
    assert "target: 1.0" in (out / "recipe.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
    capsys.readouterr()
    (out / "notes.txt").write_text("mine")
    assert run(trained, out, recipe=recipe) == 2
    assert f"{out} holds 'notes.txt'; use another output folder" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_left_alone(trained, tmp_path, capsys):
    checkpoint = tmp_path / "mine/adapter"
    shutil.copytree(trained[1], checkpoint)
    before = files_of(tmp_path)
    for output, message in (
        (tmp_path / "mine", "holds files of something else"),
        (checkpoint / "calibrated", "apart from the checkpoint's"),
        (trained[1].parents[1], "holds a training run; use another output folder"),
    ):
        assert run((trained[0], checkpoint), output) == 2
        assert message in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_an_adapter_that_cannot_be_written_corrected_is_refused_at_once(trained, tmp_path, capsys):
    damaged, broken = tmp_path / "damaged", tmp_path / "nan"
    shutil.copytree(trained[1], damaged)
    (damaged / "csulora/raw/adapter_config.json").write_text("{}")
    shutil.copytree(trained[1], broken, ignore=shutil.ignore_patterns("csulora"))
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in weights.items()}, broken / "adapter_model.safetensors")
    for checkpoint, message in ((damaged, "one of them was changed"), (broken, "an adapter with finite factors")):
        assert run((trained[0], checkpoint), tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{RECIPE}: 'calibrate.checkpoint': ")
        assert message in error
        assert error.count("\n") == 1


def test_a_chat_model_is_asked_through_its_template(tmp_path, capsys):
    pair, checkpoint = chat_pair(tmp_path), tmp_path / "checkpoint"
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    with_lora(aligned, init_lora_weights=False).save_pretrained(checkpoint)
    attacks = tmp_path / "attacks.txt"
    attacks.write_text("a b\nc\n\nd e\nc\n", encoding="utf-8")
    named = [*pair, f"calibrate.attacks={attacks}"]
    assert run(([], checkpoint), tmp_path / "out", *named) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    # A random model refuses nothing; a prompt that is there twice is in one half only.
    assert results["without"]["aligned model"]["held_out"].items() >= {"prompts": 1, "succeeded": 1}.items()
    assert results["verdict"] == "the aligned model does not meet the target"
    said = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in said[:3]] == ["a b", "d e", "c"]
    capsys.readouterr()
    (tmp_path / "probes.txt").write_text("x\nd e\n", encoding="utf-8")
    seen = ["calibrate.presets.data_aware=[1]", f"data.probes={tmp_path / 'probes.txt'}"]
    assert run(([], checkpoint), tmp_path / "out", *named, *seen) == 2
    assert "which the correction has seen, but 1 of 3 are among them, such as 'd e'" in capsys.readouterr().err


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
    "attacks in the toy lab": (["calibrate.attacks=a.txt"], "nothing, as the toy lab has its own"),
    "the old name": (["calibrate.probes=a.txt"], "unknown key 'calibrate.probes'; did you mean 'calibrate.attacks'?"),
    "the old column": (["calibrate.probes_column=a"], "did you mean 'calibrate.attacks_column'?"),
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
