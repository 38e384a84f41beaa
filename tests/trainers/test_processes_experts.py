"""Experts of fused weights on two processes over gloo, whole or divided; each worker process runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch

from csulora_callback import CSULoRACallback
from csulora_callback.models.adapters import find_adapter
from tests.helpers.experts import LORA, closest, deltas, experts_pair, load, weights
from tests.helpers.lab import PENALTY, RANK, assert_same, raw, saved, with_lora
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import make

FAMILY = "mixtral"


def train(engine: str, pair: Path, output: Path, callbacks: list) -> torch.nn.Module:
    model = with_lora(load(pair / "aligned"), **LORA[FAMILY])
    trainer = make(engine, model, output, callbacks, max_steps=4, eval_strategy="no")
    trainer.train()
    parameter = find_adapter(trainer.model).parameters[0]
    assert isinstance(parameter, torch.distributed.tensor.DTensor) == engine.startswith("fsdp2")
    assert hasattr(parameter, "ds_id") == (engine == "zero3")
    return trainer.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-unwrapped", "zero3"])
def test_a_checkpoint_holds_the_correction_of_what_was_trained(engine, tmp_path):
    experts_pair(tmp_path, FAMILY)
    run_worker("tests.trainers.test_processes_experts", engine, tmp_path, tmp_path)
    checkpoint, without = tmp_path / "with/checkpoint-4", tmp_path / "without/checkpoint-4"
    assert_same(raw(checkpoint), saved(without))
    base, aligned = weights(tmp_path / "base"), weights(tmp_path / "aligned")
    got = deltas(tmp_path / "aligned", checkpoint)
    for name, (update, rank) in deltas(tmp_path / "aligned", without).items():
        wanted = closest(aligned[name] - base[name], update, rank)
        apart = torch.linalg.matrix_norm(got[name][0] - wanted)
        assert (apart <= 1e-5 * torch.linalg.matrix_norm(wanted)).all(), name


def work(engine: str, pair: Path, folder: Path) -> None:
    train(engine, pair, folder / "without", [])
    train(engine, pair, folder / "with", [CSULoRACallback(pair / "base", rank=RANK, penalty=PENALTY)])
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps({}))
    leave()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
