"""An output folder holds one run: it is gone on with to the bit, refused to every other one, or emptied by a key.

This module is also the script that is killed: ``python -m tests.recipes.test_output_folder STEP FILE RECIPE …``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.files.output import Output
from recipes.files.recipe import load_recipe
from recipes.run import main
from recipes.schema.recipe import RecipeError
from tests.helpers.recipes import SMALL, starter
from tests.helpers.two import torchrun

CLOCKS = ("_runtime", "_second", "total_flos", "train_loss")
RECIPES = {"huggingface": "recipes/quickstart.yaml", "lightning": "recipes/quickstart_lightning.yaml"}
TRAINED = "data_aware"  # the one of their corrections that is trained with: the others are made of its checkpoints


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> list[str]:
    """Eight batches an epoch, and dropout, so that another place in the data or in the randomness would show."""
    longer = ["training.batch_size=8", "training.max_steps=12", "training.save_steps=4", "training.logging_steps=1"]
    return [*SMALL, f"toy.cache_dir={tmp_path_factory.mktemp('lab')}", "lora.dropout=0.1", *longer]


def run(trainer: str, lab: list[str], output: Path, *more: str) -> int:
    return main([RECIPES[trainer], *lab, f"output={output}", *more])


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """Runs that nothing interrupted, by trainer."""
    done = {}

    def get(trainer: str) -> Path:
        if trainer not in done:
            done[trainer] = tmp_path_factory.mktemp(trainer) / "whole"
            assert run(trainer, lab, done[trainer]) == 0
        return done[trainer]

    return get


def adapters(folder: Path) -> dict[str, bytes]:
    """Corrected and raw ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("adapter_model.safetensors")}


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    said = [{k: v for k, v in json.loads(line).items() if not k.endswith(CLOCKS)} for line in lines]
    return [record for record in said if record.keys() - {"run", "step", "epoch"}]


def assert_as(folder: Path, whole: Path) -> None:
    assert adapters(folder) == adapters(whole)
    assert records(folder) == records(whole)
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def interrupt(monkeypatch, step: int) -> None:
    original, taken = torch.optim.AdamW.step, []

    def failing(*arguments, **named):
        if len(taken) == step:
            raise RuntimeError("power cut")
        taken.append(step)
        return original(*arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 9])  # from the middle of an epoch, and from the end of one
@pytest.mark.parametrize("trainer", RECIPES)
def test_an_interrupted_run_goes_on_to_the_bit(trainer, step, lab, whole, tmp_path, monkeypatch, capsys):
    expected = whole(trainer)  # which builds the lab
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises((RuntimeError, SystemExit)):
            run(trainer, lab, tmp_path / "out")
    assert not (tmp_path / "out/results.json").exists()
    capsys.readouterr()
    assert run(trainer, lab, tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "holds this run already: going on with it" in printed
    assert f"fine-tuning once with the callback: {TRAINED}, from step {step // 4 * 4} " in printed
    assert_as(tmp_path / "out", expected)


def deadly(step: int, file: str) -> None:
    """Let the process die when this file of the step's checkpoint is about to be written."""
    for owner, name in ((torch, "save"), (os, "rename")):
        original = getattr(owner, name)

        def die_or(*arguments, original=original, **named):
            paths = [str(argument) for argument in arguments if isinstance(argument, str | Path)]
            if any(
                (f"checkpoint-{step}" in path or f"step={step}." in path) and path.endswith(file) for path in paths
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, name, die_or)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "file"), [("huggingface", "optimizer.pt"), ("lightning", ".adapter"), ("huggingface", "/csulora")]
)
def test_a_run_that_is_killed_inside_of_a_save_goes_on_from_the_last_whole_one(trainer, file, lab, whole, tmp_path):
    command = [sys.executable, "-m", "tests.recipes.test_output_folder", "8", file, RECIPES[trainer], *lab]
    killed = subprocess.run(
        [*command, f"output={tmp_path / 'out'}"], cwd=Path(__file__).parents[2], capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    left = {path.name for path in (tmp_path / "out" / TRAINED).iterdir()}
    assert left & {"checkpoint-8", "step=8.ckpt"}
    assert run(trainer, lab, tmp_path / "out") == 0
    assert_as(tmp_path / "out", whole(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RECIPES)
def test_a_finished_run_is_not_trained_again(trainer, lab, whole, tmp_path, monkeypatch):
    folder = whole(trainer)
    before, logged = {path: path.stat().st_mtime_ns for path in (folder / TRAINED).rglob("*")}, records(folder)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    assert run(trainer, lab, folder) == 0
    kept = {path: when for path, when in before.items() if path.is_file() and f"{TRAINED}/logs" not in str(path)}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert records(folder) == logged


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RECIPES)
def test_two_processes_go_on_to_the_bit(trainer, lab, tmp_path):
    # Rows and steps that do not divide: by the processes, and by the steps between two saves.
    uneven = ["toy.train_samples=61", "training.batch_size=4", "training.max_steps=10"]
    for name in ("whole", "cut"):
        command = ["-m", "recipes.run", RECIPES[trainer], *lab, *uneven, f"output={tmp_path / name}"]
        done = torchrun(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        if name == "cut":
            for path in [*(tmp_path / "cut" / TRAINED).glob("*-[81]*"), *(tmp_path / "cut" / TRAINED).glob("*=[81]*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            done = torchrun(*command)
            assert done.returncode == 0, done.stderr[-3000:]
            assert f"{TRAINED}, from step 4 " in done.stdout
    assert len(adapters(tmp_path / "whole")) == 24  # three steps, four corrections, raw and corrected
    assert_as(tmp_path / "cut", tmp_path / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_another_run_is_refused_by_the_key_that_differs(lab, whole, capsys):
    folder = whole("huggingface")
    before = files(folder)
    for change, told in (
        ("training.seed=1", "'training.seed' is 0 there, but 1 here"),
        ("corrections.guard=null", "'corrections.guard.preset' is 'guard' there, but None here"),
        ("trainer=lightning", "'trainer' is 'huggingface' there, but 'lightning' here"),
    ):
        assert run("huggingface", lab, folder, change) == 2
        expected = f"'output': {folder} holds another run: {told}; use another output folder, or overwrite=true to"
        assert expected in capsys.readouterr().err
    assert files(folder) == before
    for other in ("calibrate", "frontier"):
        assert main([f"recipes/{other}.yaml", f"output={folder}"]) == 2
        assert "holds a training run; use another output folder" in capsys.readouterr().err
    assert files(folder) == before


@pytest.fixture
def claimed(tmp_path):
    """Claims a folder for a recipe of the toy lab, as a run does, without one; returns it and its folder."""

    def claim(*overrides: str, processes: int = 1) -> Output:
        recipe = load_recipe("recipes/quickstart.yaml", [f"output={tmp_path / 'out'}", *overrides])
        output = Output(recipe, processes)
        output.claim()
        return output

    return claim


def test_overwrite_removes_what_the_old_run_left_and_nothing_else(claimed, tmp_path):
    out = tmp_path / "out"
    assert not claimed("corrections.old.preset=guard").continues
    for name in ("old/checkpoint-2", "csulora/checkpoint-2", "mine"):
        (out / name).mkdir(parents=True)
    for name in ("results.json", "answers.jsonl", "report.html", "notes.txt"):
        (out / name).touch()
    with pytest.raises(RecipeError, match=r"holds another run: 'corrections\.old\.preset' is 'guard' there"):
        claimed()
    assert claimed("corrections.old.preset=guard").continues
    assert (out / "old/checkpoint-2").is_dir()
    assert not claimed("overwrite=true").continues
    assert {path.name for path in out.iterdir()} == {"mine", "notes.txt", "trained_on.json", "recipe.yaml"}


def test_another_number_of_processes_is_another_run(claimed, tmp_path):
    claimed()
    (tmp_path / "out/csulora/checkpoint-2").mkdir(parents=True)
    with pytest.raises(RecipeError, match="'processes' is 1 there, but 2 here"):
        claimed(processes=2)


def test_a_run_of_a_version_that_did_not_know_of_a_key_goes_on_with_its_default(claimed, tmp_path):
    claimed()
    (tmp_path / "out/csulora/checkpoint-2").mkdir(parents=True)
    claim = tmp_path / "out/trained_on.json"
    told = json.loads(claim.read_text())
    del told["data.harmless_column"], told["training.bf16"]
    claim.write_text(json.dumps(told))
    assert claimed().continues
    with pytest.raises(RecipeError, match=r"'training\.bf16' is False there, but True here"):
        claimed("training.bf16=true")


def test_what_was_refused_before_its_first_checkpoint_holds_no_folder(claimed):
    claimed()
    assert not claimed("training.seed=1").continues


def test_files_of_something_else_are_refused(claimed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").touch()
    with pytest.raises(RecipeError, match=r"holds another run: there is no trained_on\.json"):
        claimed()
    (tmp_path / "out/measured_on.json").touch()
    with pytest.raises(RecipeError, match="holds a frontier or a target's evidence; use another output folder"):
        claimed("overwrite=true")


def test_data_that_has_changed_under_its_name_is_another_run(tmp_path):
    pair = starter(tmp_path)
    recipe = load_recipe("recipes/llama32_1b_sft.yaml", [*pair, f"output={tmp_path / 'out'}"])
    Output(recipe, 1).claim()
    (tmp_path / "out/guard/checkpoint-2").mkdir(parents=True)
    assert Output(recipe, 1).continues
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RecipeError, match=r"'content of data\.source' is"):
        Output(recipe, 1)


if __name__ == "__main__":
    deadly(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[3:]))
