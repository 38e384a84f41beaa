"""Runs of ``transformers.Trainer`` on the tiny model, with and without the callback."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer

from csulora_callback import CSULoRACallback
from tests.helpers.lab import PENALTY, RANK, make_trainer, with_lora


def callback(pair, **arguments) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair[0], **{"rank": RANK, "penalty": PENALTY, **arguments})


def fresh_model(pair, **lora) -> PeftModel:
    # Dropout draws from the global generator at every step: one stray draw by the callback would show.
    return with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1, **lora)


def train(pair, output: Path, callbacks: list, resume=None, **arguments) -> Trainer:
    trainer = make_trainer(fresh_model(pair), output, callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]
