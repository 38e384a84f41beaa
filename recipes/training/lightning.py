"""The fine-tune in Lightning's Trainer."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import lightning as L
import torch
from accelerate import PartialState
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from csulora_callback import CSULoRACallback
from recipes.schema import Recipe, Training
from recipes.training.task import Task, batches


class FineTune(L.LightningModule):
    """A PeftModel with the optimizer, schedule and clipping that the Hugging Face Trainer has by default."""

    def __init__(self, model: PeftModel, settings: Training) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("eval_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> dict:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.settings.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, self.settings.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(task: Task, recipe: Recipe, callback: CSULoRACallback, folder: Path) -> tuple[list[dict], Path, DataLoader]:
    """Train a fresh adapter with the callback.

    Returns:
        The log records, the adapter folder of the last checkpoint, and batches of the held-out data.
    """
    settings = recipe.training
    model = FineTune(task.with_fresh_lora(recipe), settings).train()  # transformers loads models for evaluation
    L.seed_everything(settings.seed, verbose=False)
    train, held_out = batches(task, recipe, task.train, shuffle=True), batches(task, recipe, task.held_out)
    logger = CSVLogger(folder, name="", version="logs")
    processes = PartialState()
    trainer = L.Trainer(
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if processes.use_distributed else 1,
        num_nodes=processes.num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy="ddp" if processes.use_distributed else "auto",
        default_root_dir=folder,
        max_steps=settings.max_steps,
        max_epochs=None if settings.max_steps > 0 else int(settings.epochs),
        accumulate_grad_batches=settings.gradient_accumulation_steps,
        gradient_clip_val=1.0,
        precision="bf16-mixed" if settings.bf16 else "32-true",
        log_every_n_steps=settings.logging_steps,
        val_check_interval=settings.eval_steps * settings.gradient_accumulation_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger,
        enable_model_summary=False,
        callbacks=[
            callback,
            ModelCheckpoint(
                folder,
                filename="{step}",
                every_n_train_steps=settings.save_steps,
                monitor="step",
                mode="max",
                save_top_k=settings.save_total_limit or -1,
                enable_version_counter=False,  # a second run replaces the first one's files
            ),
        ],
    )
    trainer.fit(model, train, held_out)
    last = folder / f"step={trainer.global_step}.ckpt"
    if not last.exists():  # the number of steps is no multiple of save_steps
        trainer.save_checkpoint(last)
    records = _records(Path(logger.log_dir) / "metrics.csv") if trainer.is_global_zero else []
    return records, last.with_suffix(".adapter"), held_out


def _records(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"]) + 1} for row in rows]  # Lightning counts from zero
