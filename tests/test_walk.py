"""The first page's walk, run as it stands there, and what it leaves behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetySubspace, correct_adapter, wilson_interval
from recipes.run import main as run_recipe
from recipes.training.compare import main as compare
from recipes.training.plain import main as plain
from tests.helpers.lab import assert_same, raw, saved
from tests.helpers.recipes import SMALL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> tuple[str, Path]:
    """What the walk printed, in a copy of this clone whose environment is this one, and the folder that it made."""
    clone = tmp_path_factory.mktemp("clone")
    for room in ("csulora_callback", "recipes"):
        shutil.copytree(ROOT / room, clone / room, ignore=shutil.ignore_patterns("__pycache__"))
    commands = clone / ".venv/bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f"export PATH={commands}:$PATH\n")
    for name, program in (("python", ""), ("csulora", "-m csulora_callback")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
        (commands / name).chmod(0o755)
    (block,) = re.findall(
        r"^<!-- ci: walk -->\n```bash\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, clone / "walk"


@pytest.mark.slow
def test_what_is_corrected_redone_and_undone(walked, tmp_path):
    _, walk = walked
    subspace = SafetySubspace.load(walk / "subspace.safetensors")
    truth = SafetySubspace.estimate(walk / "base", walk / "aligned", rank=4, progress=False)  # of sides from 49 to 128
    assert subspace.fingerprint == truth.fingerprint
    for name, strength in (("safe", 10.0), ("safer", 30.0)):
        correct_adapter(walk / "adapter", truth, tmp_path / name, Penalty.guard(strength))
        assert_same(saved(walk / name), saved(tmp_path / name))
        assert_same(raw(walk / name), saved(walk / "adapter"))
    assert_same(saved(walk / "undone"), saved(walk / "adapter"))
    assert not (walk / "undone/csulora").exists()


@pytest.mark.slow
@torch.no_grad()
def test_what_is_shipped_and_merged(walked):
    _, walk = walked
    tokens = torch.arange(16).reshape(2, 8)
    shipped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(walk / "aligned"), walk / "safe")
    merged = AutoModelForCausalLM.from_pretrained(walk / "merged")
    torch.testing.assert_close(merged(tokens).logits, shipped(tokens).logits, rtol=1e-4, atol=1e-4)
    with shipped.disable_adapter():
        assert (merged(tokens).logits - shipped(tokens).logits).abs().max() > 0.1


@pytest.mark.slow
def test_what_is_compared(walked):
    """That the raw adapter is unsafe is what the lab is for; what a correction makes of it is shown, not asserted."""
    printed, _ = walked
    rows = dict(re.findall(r"^(\S+|\(aligned model\)) +(\d+\.\d)% \(\d+–\d+\) +\d", printed, re.MULTILINE))
    assert list(rows) == ["(aligned model)", "walk/adapter", "walk/safe", "walk/safer"]
    assert float(rows["(aligned model)"]) < 10
    assert float(rows["walk/adapter"]) > 50


@pytest.mark.slow
def test_plain_training_is_that_of_the_quickstart(tmp_path, capsys):
    small = [*SMALL, f"toy.cache_dir={tmp_path / 'cache'}"]
    assert plain([str(tmp_path / "walk"), *small]) == 0
    assert run_recipe(["recipes/quickstart.yaml", *small, f"output={tmp_path / 'out'}"]) == 0
    checkpoint = tmp_path / "out/guard/checkpoint-4"
    assert_same(saved(tmp_path / "walk/adapter"), raw(checkpoint))
    config = json.loads((tmp_path / "walk/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "walk/aligned")
    capsys.readouterr()

    # And adapters are judged as the recipe judges its own.
    places = [str(tmp_path / "walk/adapter"), str(checkpoint)]
    assert compare([str(tmp_path / "out/recipe.yaml"), *places]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    results = {row["method"]: row for row in json.loads((tmp_path / "out/results.json").read_text())}
    for place, method in zip(places, ("raw", "guard"), strict=True):
        row = results[method]
        shares = []
        for count, prompts in ((row["succeeded"], row["prompts"]), (row["over_refused"], row["harmless_prompts"])):
            low, high = wilson_interval(count, prompts)
            shares += [f"{count / prompts:.1%}", f"({100 * low:.0f}–{100 * high:.0f})"]
        assert lines[place] == [*shares, f"{row['task_loss']:.3f}", f"{row['task_accuracy']:.1%}"]


def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys):
    assert plain([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: is there already. Name a folder to be made, or remove it.\n"
    assert plain([str(tmp_path / "walk"), "toy.sed=1"]) == 2
    assert "unknown key 'toy.sed'; did you mean 'toy.seed'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert compare(["recipes/none.yaml", "adapter"]) == 2
    assert capsys.readouterr().err.startswith("recipes/none.yaml: no such file")


@pytest.mark.slow
def test_an_adapter_that_cannot_be_judged_is_named(tmp_path, capsys):
    small = [*SMALL, f"toy.cache_dir={tmp_path / 'cache'}"]
    assert run_recipe(["recipes/quickstart.yaml", *small, f"output={tmp_path / 'out'}"]) == 0
    recipe = str(tmp_path / "out/recipe.yaml")
    assert plain([str(tmp_path / "wider"), *small, "toy.hidden_size=40"]) == 0
    capsys.readouterr()
    for adapter, message in (("none", "expected a folder"), ("wider/adapter", "Error(s) in loading state_dict")):
        assert compare([recipe, str(tmp_path / adapter)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{tmp_path / adapter}: ")
        assert error.count("\n") == 1
        assert message in error
