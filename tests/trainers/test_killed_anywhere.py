"""Training killed at random moments, in both trainers, resumes as if nothing had happened.

This module is also the script that kills: ``python -m tests.trainers.test_killed_anywhere TIMES FOLDER``. It trains in
forked children only, so that none of them pays for imports, and itself does nothing but kill and compare.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning  # noqa: F401 (before the callback is made, so that it is one of Lightning's too)
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from csulora_callback import CSULoRACallback, sidecar
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.lab import live, make_trainer, saved_pair, with_lora

ROOT = Path(__file__).parents[2]


class Started(TrainerCallback):
    """Tells the parent that training has begun."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_train_begin(self, args, state, control, **kwargs):
        (self.output / "started").touch()


class StartedToo(Callback):
    def __init__(self, output: Path) -> None:
        self.output = output

    def on_train_start(self, trainer, pl_module):
        (self.output / "started").touch()


class Module(in_lightning.Module):
    """Without dropout: Lightning does not restore the random state."""

    def build(self) -> None:
        self.network = with_lora(AutoModelForCausalLM.from_pretrained(self.aligned))


def ours(pair: Path) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair / "base", rank=3, strength=5.0, cache_dir=pair / "cache")


def train_in_transformers(pair: Path, output: Path, resume: Path | None) -> None:
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"), lora_dropout=0.1)
    settings = {
        "max_steps": 24,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "lr_scheduler_type": "cosine",
    }
    trainer = make_trainer(model, output, [Started(output), ours(pair)], **settings)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    save_file(live(trainer.model), output / "end.safetensors")


def train_in_lightning(pair: Path, output: Path, resume: Path | None) -> None:
    module = Module(pair / "aligned")
    saves = ModelCheckpoint(output, filename="{epoch}", save_top_k=-1, save_last="link")
    callbacks = [StartedToo(output), ours(pair), saves]
    settings = {"max_epochs": 12, "limit_train_batches": 2}
    in_lightning.fit((pair / "base", pair / "aligned"), output, callbacks, module, resume, **settings)
    save_file(live(module.network), output / "end.safetensors")


def last_of_transformers(output: Path) -> Path | None:
    complete = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def last_of_lightning(output: Path) -> Path | None:
    return max(output.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]), default=None)


KINDS = {
    "transformers": (train_in_transformers, last_of_transformers),
    "lightning": (train_in_lightning, last_of_lightning),
}


def start(work: Callable[[], None]) -> int:
    """Work in a forked child, quietly; its process id."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def finish(child: int) -> None:
    assert os.waitpid(child, 0)[1] == 0, "a child failed"


def whole_sidecars(output: Path) -> int:
    """How many records there are, each of which describes what lies beside it."""
    places = [place for place in output.glob(f"**/{sidecar.FOLDER}") if ".part" not in str(place)]
    for place in places:
        Sidecar.load(place.parent)
    return len(places)


def kill(kind: str, pair: Path, output: Path, moment: float) -> bool:
    """Kill one run so long after it began, resume it, and compare its end; whether it was killed before its end."""
    train, last = KINDS[kind]
    output.mkdir()
    child = start(lambda: train(pair, output, None))
    while not (output / "started").exists():
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    died = os.waitpid(child, 0)[1] == signal.SIGKILL
    whole_sidecars(output)
    resume = last(output)
    finish(start(lambda: train(pair, output, resume)))
    whole_sidecars(output)
    expected, found = (load_file(folder / "end.safetensors") for folder in (output.parent / kind, output))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected), f"{output} ends otherwise"
    return died


def main(times: int, folder: Path) -> None:
    torch.set_num_threads(1)
    saved_pair(folder / "pair")
    generator, figures = random.Random(0), {}
    for kind, (train, _) in KINDS.items():
        (folder / kind).mkdir()
        finish(start(lambda train=train, kind=kind: train(folder / "pair", folder / kind, None)))
        began = (folder / kind / "started").stat().st_mtime
        lasts = (folder / kind / "end.safetensors").stat().st_mtime - began
        died = 0
        for number in range(times):
            output = folder / f"{kind}-{number}"
            died += kill(kind, folder / "pair", output, generator.uniform(0.0, lasts))
            shutil.rmtree(output)
        figures[kind] = {"runs": times, "killed": died, "seconds of a whole run": round(lasts, 2)}
    print(json.dumps(figures))


@pytest.mark.slow
def test_runs_that_are_killed_anywhere_end_as_one_that_is_not(tmp_path):
    command = [sys.executable, "-m", "tests.trainers.test_killed_anywhere", "6", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(figure["killed"] >= 2 for figure in figures.values()), figures


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
