"""The toy lab's models are the same, bit for bit, whatever the machine's arithmetic."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.labs import steady, toy
from recipes.schema.measured import Toy

SMALL = {"hidden_size": 16, "layers": 2, "base_steps": 20, "align_steps": 5, "eval_prompts": 10}


def digests(folder: str) -> dict[str, str]:
    lab = toy.build_lab(Toy(cache_dir=folder, **SMALL))
    files = {path.parent.name: path / "model.safetensors" for path in (lab.base, lab.aligned)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


@pytest.mark.slow
def test_other_arithmetic_gives_the_same_weights(tmp_path):
    # The instruction set of an old machine: other orders of sums, other exponentials, no fused operations.
    other = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}
    environment = {**os.environ, **other, "OMP_WAIT_POLICY": "passive"}  # two threads on a shared core must not spin
    command = [sys.executable, "-m", "tests.recipes.test_steady", str(tmp_path / "there")]
    there = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert json.loads(there.splitlines()[-1]) == digests(str(tmp_path / "here"))


def test_it_is_llama(tmp_path):
    lab = toy.build_lab(Toy(cache_dir=str(tmp_path), **SMALL))
    model = AutoModelForCausalLM.from_pretrained(lab.aligned)
    ours = steady.llama(model.config, seed=0)
    ours.load_state_dict(model.state_dict())
    batch = {key: column[:8] for key, column in toy.Samples(lab.task).columns().items()}
    with torch.no_grad():
        expected = model.double()(**batch).loss  # of transformers, whose norms, angles and losses are float32
        assert steady.loss(ours, **batch).item() == pytest.approx(expected.item(), abs=1e-5)


def test_saved_weights_are_those_that_were_trained(tmp_path):
    base = toy.build_lab(Toy(cache_dir=str(tmp_path), **SMALL)).base
    model = steady.llama(AutoModelForCausalLM.from_pretrained(base).config, seed=1)
    steady.save(model, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").double().state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(steady.GRID / 3)
    steady.settle(model)
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(digests(sys.argv[1])))
