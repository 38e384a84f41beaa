"""The fine-tune in Lightning's Trainer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import lightning as L
import torch
from accelerate import PartialState
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from peft import PeftModel
from transformers import get_linear_schedule_with_warmup

from csulora_callback import CSULoRACallback
from csulora_callback.models.activations import Texts
from csulora_callback.models.peft_folder import adapter_beside
from csulora_callback.trainers.lightning_checkpoint import CHECKPOINT_KEY
from recipes.schema.recipe import Recipe, Training
from recipes.training import csv_records, trackers
from recipes.training.fitted import Fitted, has_record
from recipes.training.order import ResumableLoader
from recipes.training.task import Task, batches


class FineTune(L.LightningModule):
    """A PeftModel with the optimizer, schedule and clipping that the Hugging Face Trainer has by default."""

    def __init__(self, model: PeftModel, settings: Training) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Lightning's checkpoints hold no random states: a resumed run drops out what an uninterrupted one does.
        place = f"{self.settings.seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(random.Random(place).getrandbits(63))

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


def fit(task: Task, recipe: Recipe, callback: CSULoRACallback, folder: Path) -> Fitted:
    """Train a fresh adapter with the callback, or go on from the last complete checkpoint in the folder."""
    settings, there = recipe.training, checkpoints(folder)
    resumed = max(there, default=0)
    model = FineTune(task.with_fresh_lora(recipe), settings).train()  # transformers loads models for evaluation
    L.seed_everything(settings.seed, verbose=False)
    train, held_out = batches(task, recipe, task.train), batches(task, recipe, task.held_out)
    processes = PartialState()
    train = ResumableLoader(train, settings.seed, processes.num_processes, processes.process_index)
    trainer = _trainer(recipe, callback, folder, resumed)
    trainer.fit(model, train, held_out, ckpt_path=_file(folder, resumed) if there else None)
    # By numbers, not by looking whether the file is there: to save is collective, and another process may be faster.
    if trainer.global_step % settings.save_steps and trainer.global_step != resumed:
        trainer.save_checkpoint(_file(folder, trainer.global_step))
    trackers.finish(recipe)
    records = csv_records.read(folder) if trainer.is_global_zero else []
    return Fitted(model, records, checkpoints(folder), held_out)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The adapters of the complete checkpoints in a run's folder, by step."""
    steps = sorted(int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt"))
    places = {step: adapter_beside(_file(folder, step)) for step in steps}
    return {step: place for step, place in places.items() if has_record(place)}


def texts_in(checkpoint: Path) -> dict[str, list]:
    """The texts that a data-aware correction read: in the ``.ckpt``, not in the adapter that is shipped.

    Without the rows that the aligned model refuses.
    """
    saved = torch.load(checkpoint.with_suffix(".ckpt"), map_location="cpu", mmap=True, weights_only=True)
    texts = Texts.from_json(saved[CHECKPOINT_KEY]["texts"])
    return {"probes": texts.probes, "task": texts.counted.rows or None}


def _file(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"


def _trainer(recipe: Recipe, callback: CSULoRACallback, folder: Path, resumed: int) -> L.Trainer:
    settings, processes = recipe.training, PartialState()
    return L.Trainer(
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if processes.use_distributed else 1,
        num_nodes=processes.num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy="ddp" if processes.use_distributed else "auto",
        use_distributed_sampler=False,  # the loader divides the rows
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
        logger=[csv_records.logger(folder, resumed), *_loggers(settings, folder)],
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
                enable_version_counter=False,  # a resumed run replaces what an earlier one wrote after its checkpoint
            ),
        ],
    )


def _loggers(settings: Training, folder: Path) -> list[Logger]:
    make = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    return [make[tracker](folder, f"{folder.parent.name}-{folder.name}") for tracker in settings.trackers()]


def _tensorboard(folder: Path, name: str) -> Logger:
    return TensorBoardLogger(folder, name="", version="tensorboard")


def _wandb(folder: Path, name: str) -> Logger:
    return WandbLogger(name=name, save_dir=folder)


def _mlflow(folder: Path, name: str) -> Logger:
    import mlflow

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lightning_logs")
    return MLFlowLogger(experiment, name, tracking_uri=mlflow.get_tracking_uri())
