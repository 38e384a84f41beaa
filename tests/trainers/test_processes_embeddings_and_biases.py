"""LoRA on embeddings and biases on two processes over gloo; each worker process runs this file."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from csulora_callback import CSULoRACallback
from tests.helpers.dense import closest, displacement_of, matrices, updates
from tests.helpers.lab import PENALTY, RANK, assert_same, raw, saved, saved_pair, with_biases, with_lora
from tests.helpers.two import leave, run_on_two
from tests.trainers.test_processes_trainer import Probe, assert_sharded, logged, make

pytestmark = pytest.mark.filterwarnings("ignore")
WORKER = "tests.trainers.test_processes_embeddings_and_biases"
KINDS = {"embedding": {"target_modules": ["v_proj", "embed_tokens"]}, "biases": {"lora_bias": True}}


def train(engine: str, kind: str, pair: Path, output: Path, callbacks: list, resume: Path | None = None) -> Trainer:
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"), **KINDS[kind])
    trainer = make(engine, model, output, callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert torch.distributed.get_world_size() == 2
    if kind == "biases":
        assert_sharded(engine, trainer.model)
    return trainer


def worker(engine: str, kind: str, pair: Path, folder: Path) -> None:
    def callback() -> CSULoRACallback:
        return CSULoRACallback(base_model=pair / "base", rank=RANK, penalty=PENALTY, cache_dir=pair / "cache")

    probe, plain_probe, again = Probe(), Probe(), Probe()
    without = train(engine, kind, pair, folder / "without", [plain_probe])
    trainer = train(engine, kind, pair, folder / "with", [callback(), probe])
    assert logged(trainer, "loss") == logged(without, "loss")
    train(engine, kind, pair, folder / "with", [callback(), again], folder / "with/checkpoint-4")
    for step, (values, trained) in probe.seen.items():
        assert_same(values, plain_probe.seen[step][0])
        assert_same(trained, plain_probe.seen[step][1])
        if step >= 4:
            assert_same(values, again.seen[step][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full", "zero3"])
def test_engine(engine, kind, tmp_path):
    pair = tmp_path / "pair"
    saved_pair(pair, with_biases())
    environment = {"DS_ACCELERATOR": "cpu"} if "zero" in engine else {}
    done = run_on_two(WORKER, engine, kind, pair, tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-6000:]
    base, aligned = (matrices(pair / side) for side in ("base", "aligned"))
    for step in (4, 8):
        with_, without = (tmp_path / run / f"checkpoint-{step}" for run in ("with", "without"))
        assert_same(raw(with_), saved(without))
        before, after = (updates(pair / "aligned", folder) for folder in (without, with_))
        for name, update in before.items():
            expected = closest(displacement_of(name, base, aligned), update, RANK, 4)
            assert (after[name] - expected).norm() < 1e-5 * expected.norm(), name


if __name__ == "__main__":
    engine, kind, *places = sys.argv[1:]
    worker(engine, kind, *map(Path, places))
    leave()
