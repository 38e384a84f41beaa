"""Training killed by SIGKILL, between two saves and inside one, resumes as if nothing had happened.

This module is also the script that is killed: ``python -m tests.trainers.test_killed PAIR OUTPUT KILL``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft.peft_model
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState

from csulora_callback import CSULoRACallback
from csulora_callback.models import peft_folder
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import digest, from_peft_state_dict, to_peft_state_dict
from tests.helpers.lab import assert_same, make_trainer, saved_pair, with_lora

ROOT = Path(__file__).parents[2]
KILLED_AT = 4
BETWEEN_SAVES = "between saves"
EVALUATING = "while it evaluates"

# In the order of a save: the process dies right before this function writes, or renames to, this file of checkpoint-4.
INSIDE_A_SAVE = {
    "no adapter": (peft.peft_model, "safe_save_file", "adapter_model.safetensors"),
    "adapter without raw factors": (peft_folder, "save_file", "csulora/raw/adapter_model.safetensors"),
    "raw factors without record": (Path, "write_text", "csulora/correction.json"),
    "sidecar not yet renamed": (os, "rename", "checkpoint-4/csulora"),
    "sidecar without optimizer": (torch, "save", "optimizer.pt"),
    "optimizer without random state": (torch, "save", "rng_state.pth"),
    "no trainer state": (TrainerState, "save_to_json", "trainer_state.json"),
}


class Stop(TrainerCallback):
    """Stands still after the step, for the parent to kill, or dies by itself in an evaluation."""

    def __init__(self, kill: str) -> None:
        self.kill = kill

    def on_step_end(self, args, state, control, **kwargs):
        if self.kill == BETWEEN_SAVES and state.global_step == KILLED_AT + 1:
            (Path(args.output_dir) / "ready").touch()
            time.sleep(600)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.kill == EVALUATING and state.global_step == KILLED_AT:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner: object, function: str, file: str) -> None:
    """Let the process die when ``owner.function`` is called for ``file`` of the checkpoint."""
    original = getattr(owner, function)

    def deadly(*args, **kwargs):
        names = [str(argument) for argument in (*args, *kwargs.values()) if isinstance(argument, str | Path)]
        if any(f"checkpoint-{KILLED_AT}" in name and name.endswith(file) for name in names):
            die()
        return original(*args, **kwargs)

    setattr(owner, function, deadly)


def train(pair: Path, output: Path, callbacks: tuple = (), resume: Path | None = None):
    ours = CSULoRACallback(base_model=pair / "base", rank=3, strength=5.0, cache_dir=pair / "cache")
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"), lora_dropout=0.1)
    trainer = make_trainer(
        model,
        output,
        [*callbacks, ours],
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        lr_scheduler_type="cosine",
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def start(pair: Path, output: Path, kill: str) -> subprocess.Popen:
    # The same number of threads, so that sums are made in the same order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tests.trainers.test_killed", str(pair), str(output), kill]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed(pair: Path, output: Path, kill: str) -> None:
    with start(pair, output, kill) as child:
        while child.poll() is None:
            assert_sidecars_are_whole(output)  # as seen from outside at any moment
            if (output / "ready").exists():
                child.kill()
            time.sleep(0.005)
        assert child.returncode == -signal.SIGKILL, child.stderr.read().decode()


def assert_sidecars_are_whole(output: Path) -> list[Path]:
    """Every sidecar is there with all its files, and a record has the factors that it describes."""
    # os.walk passes over what vanishes while it looks: the trainer goes on writing and renaming.
    places = [Path(place) for place, folders, _ in os.walk(output) if "csulora" in folders]
    folders = [place / "csulora" for place in places if not place.name.endswith(".part")]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"correction.json", "raw"}
        content = json.loads((folder / "correction.json").read_text())
        raw = folder / "raw/adapter_model.safetensors"
        assert (
            digest(from_peft_state_dict(load_file(raw), list(content["modules"]), str(raw))) == content["raw_digest"]
        )
    return folders


def complete(output: Path) -> list[Path]:
    """The checkpoints whose last file was written, in order; the others are what a crash leaves."""
    return sorted(path.parent for path in output.glob("checkpoint-*/trainer_state.json"))


def history(trainer) -> list[dict]:
    """Losses, gradient norms, evaluations and drift: all that depends on weights, optimizer and random state."""
    clocks = ("_runtime", "_per_second")
    return [
        {key: value for key, value in record.items() if not key.endswith(clocks)}
        for record in trainer.state.log_history
        if "train_runtime" not in record
    ]


def assert_same_end(trainer, whole) -> None:
    assert history(trainer) == history(whole)
    live, expected = (to_peft_state_dict(find_adapter(t.model).read()) for t in (trainer, whole))
    assert_same(live, expected)
    output, reference = Path(trainer.args.output_dir), Path(whole.args.output_dir)
    for folder in complete(output):
        for file in ("adapter_model.safetensors", "csulora/raw/adapter_model.safetensors"):
            assert_same(load_file(folder / file), load_file(reference / folder.name / file))
    assert complete(output)[-1].name == "checkpoint-8"
    assert not list(output.glob("**/*.part"))
    assert_sidecars_are_whole(output)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return saved_pair(tmp_path_factory.mktemp("pair"))[0].parent


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The training that nobody interrupts."""
    trainer = train(pair, tmp_path_factory.mktemp("whole"))
    assert [folder.name for folder in complete(Path(trainer.args.output_dir))] == [
        f"checkpoint-{step}" for step in (2, 4, 6, 8)
    ]
    return trainer


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_every_checkpoint_leads_to_the_same_end(pair, whole, tmp_path, step):
    for folder in complete(Path(whole.args.output_dir))[: step // 2]:
        shutil.copytree(folder, tmp_path / folder.name)
    assert_same_end(train(pair, tmp_path, resume=tmp_path / f"checkpoint-{step}"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [BETWEEN_SAVES, EVALUATING, *INSIDE_A_SAVE])
def test_a_killed_training_resumes_from_its_last_complete_checkpoint(pair, whole, tmp_path, kill):
    killed(pair, tmp_path, kill)
    last = complete(tmp_path)[-1]
    assert last.name == ("checkpoint-4" if kill == BETWEEN_SAVES else "checkpoint-2")
    assert (tmp_path / "checkpoint-4").exists() == (kill != EVALUATING)
    assert_sidecars_are_whole(tmp_path)
    # This process has seen nothing of the one that died.
    assert_same_end(train(pair, tmp_path, resume=last), whole)


if __name__ == "__main__":
    pair, output, kill = sys.argv[1:]
    if kill in INSIDE_A_SAVE:
        die_before(*INSIDE_A_SAVE[kill])
    train(Path(pair), Path(output), (Stop(kill),))
