"""Training on the tests' device, bit for bit as without the callback, under deterministic settings."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.huggingface import losses
from tests.helpers.lab import DEVICE, RANK, assert_same, make_trainer, raw, saved, with_lora

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
PENALTIES = {"weights": Penalty.guard(5.0), "data-aware": Penalty.data_aware(4.0)}


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def callback(pair, penalty: str) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair[0], rank=RANK, penalty=PENALTIES[penalty], probes=PROBES)


def train(pair, output: Path, callbacks: list, dtype: torch.dtype, checkpointing: bool):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1], dtype=dtype), lora_dropout=0.1)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(model, output, callbacks, gradient_checkpointing=checkpointing, **evaluated)
    trainer.train()
    assert model.device.type == DEVICE
    return trainer


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, False), (torch.bfloat16, True)])
def test_in_the_trainer(pair, tmp_path, penalty, dtype, checkpointing):
    without = train(pair, tmp_path / "a", [], dtype, checkpointing)
    trainer = train(pair, tmp_path / "b", [callback(pair, penalty)], dtype, checkpointing)
    assert losses(trainer) == losses(without)
    for step in (4, 8):
        folder = tmp_path / f"b/checkpoint-{step}"
        assert_same(raw(folder), saved(tmp_path / f"a/checkpoint-{step}"))
        changed = [key for key, factor in saved(folder).items() if not torch.equal(factor, raw(folder)[key])]
        assert changed
        texts = Sidecar.load(folder).texts
        assert (texts.seen, texts.probes) == (4 * step, PROBES)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_in_lightning(pair, tmp_path, penalty):
    runs = {}
    for kind, own in (("without", []), ("with", [callback(pair, penalty)])):
        kept = ModelCheckpoint(dirpath=tmp_path / kind, filename="{epoch}", save_top_k=-1)
        runs[kind] = in_lightning.fit(pair, tmp_path, [*own, kept])
    assert runs["with"].losses == runs["without"].losses
    for epoch in (0, 1):
        there, raw_there = in_lightning.factors_in(tmp_path / f"with/epoch={epoch}.ckpt")
        assert_same(raw_there, in_lightning.factors_in(tmp_path / f"without/epoch={epoch}.ckpt")[0])
        assert any(not torch.equal(there[key].cpu(), raw_there[key].cpu()) for key in there)
