"""Runs of Lightning's ``Trainer`` on the tiny model, with and without the callback, and what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, SafetySubspace
from tests.helpers.lab import DEVICE, PENALTY, RANK, Tokens, assert_same, corrected_by_hand, with_lora


class Module(L.LightningModule):
    """Holds its PeftModel under a name of its own; drops out, so that a stray random draw would show."""

    def __init__(self, aligned: Path, late: bool = False, manual: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.aligned, self.late, self.compiled = aligned, late, compiled
        self.automatic_optimization = not manual
        self.network = None
        if not late:
            self.build()

    def build(self) -> None:
        network = with_lora(AutoModelForCausalLM.from_pretrained(self.aligned), lora_dropout=0.1)
        self.network = torch.compile(network, backend="eager") if self.compiled else network

    def configure_model(self) -> None:
        if self.network is None:
            self.build()

    def training_step(self, batch, batch_idx):
        loss = self.network(**batch).loss
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.network(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-2)


def callback(pair, **arguments) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair[0], **{"rank": RANK, "penalty": PENALTY, **arguments})


class Losses(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def fit(
    pair, root: Path, callbacks: list, module: Module | None = None, ckpt_path=None, data=None, rows=None, **arguments
):
    """Eight steps in two epochs, on ``rows`` or with loaders of ``data``; the trainer, with the loss of every step."""
    torch.manual_seed(11)
    losses = Losses()
    settings = {
        "max_epochs": 2,
        "limit_train_batches": 4,
        "accelerator": DEVICE,
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
        "log_every_n_steps": 2,
    }
    trainer = L.Trainer(callbacks=[*callbacks, losses], **{**settings, **arguments})
    if data is None:
        parts = (rows, rows) if rows else (Tokens(), Tokens(count=8, seed=4))
        data = [DataLoader(part, batch_size=4) for part in parts]
    trainer.fit(module or Module(pair[1]), *data, ckpt_path=ckpt_path)
    trainer.losses = losses.seen
    return trainer


def factors_in(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Factors in a checkpoint's state_dict under PEFT's keys, and the raw ones beside them."""
    checkpoint = torch.load(path, weights_only=True)
    saved = {
        f"base_model.model.{key.split('base_model.model.', 1)[1].replace('.default', '')}": value
        for key, value in checkpoint["state_dict"].items()
        if ".lora_" in key
    }
    return saved, checkpoint.get("csulora", {}).get("raw")


def assert_corrected(path: Path, subspace: SafetySubspace) -> dict[str, torch.Tensor]:
    saved, raw = factors_in(path)
    assert_same(saved, corrected_by_hand(raw, subspace))
    return raw
