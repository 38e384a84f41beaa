"""The fine-tune in the Hugging Face Trainer, or in TRL's SFTTrainer for chat data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments, default_data_collator

from csulora_callback import CSULoRACallback
from recipes.schema.recipe import Recipe
from recipes.training import trackers
from recipes.training.fitted import Fitted, has_record
from recipes.training.task import Task

STATE = "trainer_state.json"  # the last file of a checkpoint


def fit(task: Task, recipe: Recipe, callback: CSULoRACallback, folder: Path) -> Fitted:
    """Train a fresh adapter with the callback, or go on from the last complete checkpoint in the folder."""
    trainer = _trainer(task, recipe, callback, folder)
    there = checkpoints(folder)
    last = there[max(there)] if there else None
    state = None if last is None else _state_of(last)
    if state is not None and state.global_step >= state.max_steps:  # train() would make another step
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trackers.finish(recipe)
    part = trainer.get_eval_dataloader()  # of this process; the judge wants all of it
    held_out = DataLoader(part.dataset, recipe.training.batch_size, collate_fn=part.collate_fn)
    return Fitted(trainer.model, trainer.state.log_history, checkpoints(folder), held_out)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a run's folder, by step."""
    places = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return {step: path for step, path in sorted(places.items()) if has_record(path) and _state_of(path) is not None}


def texts_in(checkpoint: Path) -> dict[str, list]:
    """What ``correct_adapter`` does not find by itself of the texts that a data-aware correction read: nothing."""
    return {}


def _state_of(checkpoint: Path) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, ValueError):  # killed before or while it was written
        return None


def _trainer(task: Task, recipe: Recipe, callback: CSULoRACallback, folder: Path) -> Trainer:
    settings = recipe.training
    arguments = {
        "output_dir": str(folder),
        "run_name": f"{folder.parent.name}-{folder.name}",
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
        "report_to": settings.trackers(),
        "dataloader_pin_memory": False,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise processes on CPUs would not train together
    }
    common = {"train_dataset": task.train, "eval_dataset": task.held_out, "callbacks": [callback]}
    if task.tokenizer is None:
        return Trainer(task.with_fresh_lora(recipe), TrainingArguments(**arguments), default_data_collator, **common)
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        task.with_fresh_lora(recipe),
        SFTConfig(max_length=recipe.data.max_length, **arguments),
        processing_class=task.tokenizer,
        **common,
    )
