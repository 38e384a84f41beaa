"""The fine-tune in the Hugging Face Trainer, or in TRL's SFTTrainer for chat data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from csulora_callback import CSULoRACallback
from recipes.schema import Recipe
from recipes.training.task import Task


def fit(task: Task, recipe: Recipe, callback: CSULoRACallback, folder: Path) -> tuple[list[dict], Path, DataLoader]:
    """Train a fresh adapter with the callback.

    Returns:
        The Trainer's log records, the folder of the last checkpoint, and batches of the held-out data.
    """
    settings = recipe.training
    arguments = {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "max_steps": settings.max_steps,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "warmup_steps": settings.warmup_steps,
        "logging_steps": settings.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "save_steps": settings.save_steps,
        "save_total_limit": settings.save_total_limit,
        "bf16": settings.bf16,
        "seed": settings.seed,
        "report_to": [],
        "dataloader_pin_memory": False,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise processes on CPUs would not train together
    }
    common = {"train_dataset": task.train, "eval_dataset": task.held_out, "callbacks": [callback]}
    if task.tokenizer is None:
        trainer = Trainer(
            task.with_fresh_lora(recipe), TrainingArguments(**arguments), default_data_collator, **common
        )
    else:
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            task.with_fresh_lora(recipe),
            SFTConfig(max_length=recipe.data.max_length, **arguments),
            processing_class=task.tokenizer,
            **common,
        )
    trainer.train()
    last = folder / f"checkpoint-{trainer.state.global_step}"
    part = trainer.get_eval_dataloader()  # of this process; the judge wants all of it
    held_out = DataLoader(part.dataset, settings.batch_size, collate_fn=part.collate_fn)
    return trainer.state.log_history, last, held_out
