"""What a report may be about: each kind of folder that holds corrections, and what is said of all others."""

import json
import shutil
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from csulora_callback import SafetyCorrector, write_report
from csulora_callback.reporting.report.runs import find_material
from tests.helpers import lightning
from tests.helpers.command_line import run, run_process
from tests.helpers.huggingface import checkpoints, train
from tests.helpers.lab import PENALTY, TARGETS, saved
from tests.helpers.reports import recipe_output

LORA = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)


@pytest.fixture(scope="module")
def output(pair, subspace, tmp_path_factory) -> Path:
    return recipe_output(tmp_path_factory.mktemp("sources") / "output", pair, subspace)


def steps(history: list[dict], key: str) -> list[int]:
    return [log["step"] for log in history if key in log]


def test_the_output_of_a_recipe(output):
    material = find_material(output)
    assert [found.name for found in material.runs] == ["csulora", "guard"]
    assert [found.folder.name for found in material.runs] == ["checkpoint-8", "checkpoint-8"]
    assert [row["method"] for row in material.results] == ["aligned", "raw", "csulora", "guard"]
    trained, made = (found.history for found in material.runs)
    assert steps(trained, "loss") == steps(trained, "csulora/update_norm") == list(range(1, 9))
    assert steps(trained, "eval_loss") == steps(made, "csulora/update_norm") == [4, 8]
    assert steps(made, "loss") == []
    assert material.recipe.startswith("training:")


def test_one_correction_of_a_recipe_has_its_results(output, monkeypatch):
    monkeypatch.chdir(output / "guard")
    for name in (output / "guard", "."):
        material = find_material(name)
        assert [found.name for found in material.runs] == ["guard"]
        assert [row["method"] for row in material.results] == ["aligned", "raw", "guard"]


def test_a_checkpoint_and_a_trainers_output(output):
    (found,) = find_material(output / "csulora/checkpoint-4").runs
    assert (found.name, found.state["global_step"], steps(found.history, "loss")) == ("checkpoint-4", 4, [1, 2, 3, 4])
    (found,) = find_material(output / "csulora").runs
    assert (found.folder.name, found.state["global_step"]) == ("checkpoint-8", 8)


def test_what_was_saved_after_training_is_what_is_described(pair, subspace, output, tmp_path):
    shutil.copytree(output / "csulora", tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoint-4/csulora", tmp_path / "run/csulora")  # as save_model would
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(tmp_path / f"run/checkpoint-4/{name}", tmp_path / f"run/{name}")
    (found,) = find_material(tmp_path / "run").runs
    assert found.folder == tmp_path / "run"
    assert found.record == json.loads((tmp_path / "run/csulora/correction.json").read_text())
    assert steps(found.history, "loss") == list(range(1, 9))


def test_points_that_were_not_logged_come_from_the_checkpoints(output, tmp_path):
    shutil.copytree(output / "guard", tmp_path / "guard")  # no logs lie beside it here
    (found,) = find_material(tmp_path / "guard").runs
    for log, step in zip(found.history, (4, 8), strict=True):
        record = json.loads((tmp_path / f"guard/checkpoint-{step}/csulora/correction.json").read_text())
        assert log == {"step": step, **record["metrics"]}


def test_an_adapter_with_a_name_of_its_own(pair, subspace, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LORA, adapter_name="own")
    with SafetyCorrector(model, subspace, PENALTY).corrected() as adapter:
        model.save_pretrained(tmp_path / "made")
    adapter.sidecar.save(tmp_path / "made", LORA)
    for name in ("made", "made/own"):
        (found,) = find_material(tmp_path / name).runs
        assert (found.folder, found.config["r"]) == (tmp_path / "made", 4)


@pytest.mark.slow
def test_lightnings_checkpoints(pair, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.fit(pair, tmp_path, [lightning.callback(pair), saver])
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    names = sorted(path.name for path in tmp_path.glob("*.adapter"))
    assert names == ["best.adapter", "epoch=0-step=4.adapter", "epoch=1-step=8.adapter"]
    runs = {found.name: found for found in find_material(tmp_path).runs}
    assert set(runs) == {tmp_path.name, "best.adapter"}
    assert runs[tmp_path.name].folder.name == "epoch=1-step=8.adapter"
    assert steps(runs[tmp_path.name].history, "csulora/update_norm") == [4, 8]
    for name in ("best.ckpt", "best.adapter"):
        assert write_report(tmp_path / name, tmp_path / "report.html") == ["best.adapter"]


def damaged(output: Path, folder: Path, kind: str) -> Path:
    """A copy in which one thing is wrong."""
    copy = folder / "copy"
    if kind == "nothing there":
        return copy
    shutil.copytree(output, copy)
    last = copy / "guard/checkpoint-8"
    if kind == "a file":
        return copy / "results.json"
    if kind == "no record":
        for record in copy.rglob("correction.json"):
            record.unlink()
    elif kind == "damaged results":
        (copy / "results.json").write_text("[{")
    elif kind == "damaged metrics":
        with open(copy / "metrics.jsonl", "a") as file:
            file.write('{"run": ')
    elif kind == "metrics of no run":
        with open(copy / "metrics.jsonl", "a") as file:
            file.write('{"step": 3}')
    elif kind == "damaged state":
        (copy / "csulora/checkpoint-8/trainer_state.json").write_text('{"log_history": 3}')
    elif kind == "damaged record":
        record = last / "csulora/correction.json"
        record.write_text(record.read_text().replace("guard", "gourd"))
    elif kind == "another adapter":
        shutil.copyfile(copy / "csulora/checkpoint-8/adapter_model.safetensors", last / "adapter_model.safetensors")
    return copy


DAMAGES = {
    "nothing there": "expected a folder with a PEFT adapter or a Hub id",
    "a file": "but got the file {copy}/results.json",
    "no record": "`run`: expected a corrected checkpoint, or a folder with some below it, but there is no csulora/",
    "damaged results": "{copy}/results.json: expected JSON, but it cannot be read",
    "damaged metrics": "{copy}/metrics.jsonl, line 16: expected JSON",
    "metrics of no run": "{copy}/metrics.jsonl, line 16: expected the name of a `run`, but got None",
    "damaged state": "{copy}/csulora/checkpoint-8/trainer_state.json: expected `log_history` to be a list",
    "damaged record": "{copy}/guard/checkpoint-8/csulora/correction.json: expected the content that its sha256 states",
    "another adapter": "expected the record of the adapter in {copy}/guard/checkpoint-8, but that is another one",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(output, tmp_path, kind):
    page = tmp_path / "report.html"
    page.write_text("older")
    status, said, error = run("report", damaged(output, tmp_path, kind), "-o", page)
    assert DAMAGES[kind].format(copy=tmp_path / "copy") in error
    assert (status, said) == (1, "")
    assert error.startswith("csulora: ")
    assert error.count("\n") == 1
    assert page.read_text() == "older"


def test_wrong_arguments_have_a_status_of_their_own(output, tmp_path):
    status, said, error = run("report", output, "-o", tmp_path)
    assert (status, said) == (2, "")
    assert error == f"csulora: `--output`: expected the name of a file, but got the folder {tmp_path}.\n"
    for arguments in (["report"], ["report", output], ["report", "-o", tmp_path / "page.html"]):
        assert run(*arguments)[0] == 2
    for output_file in (tmp_path, "", 3):
        with pytest.raises(ValueError, match="`output`: expected the name of a file"):
            write_report(output, output_file)
    assert not list(tmp_path.iterdir())


def test_a_run_without_the_callback_is_told_from_a_corrected_one(pair, tmp_path):
    train(pair, tmp_path / "run", [], max_steps=4)
    assert saved(checkpoints(tmp_path / "run")[-1])
    with pytest.raises(FileNotFoundError, match="Train with CSULoRACallback, or correct the adapter with `csulora"):
        find_material(tmp_path / "run")


@pytest.mark.slow
def test_the_command(output, tmp_path):
    page = tmp_path / "new/report.html"
    done = run_process("report", output, "-o", page)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (f"A report of csulora, guard was written to {page}.\n", "")
    done = run_process("report", output, "-o", tmp_path / "other.html", "--json")
    assert json.loads(done.stdout) == {"output": str(tmp_path / "other.html"), "corrections": ["csulora", "guard"]}
    assert (tmp_path / "other.html").read_bytes() == page.read_bytes()
    done = run_process("report", tmp_path, "-o", page)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
