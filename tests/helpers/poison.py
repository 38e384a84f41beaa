"""A tiny pair whose alignment can be undone, and runs that do so, in either trainer.

The base model counts up, the aligned one down, and the poison is to count up again. Counting down is how a prompt is
"refused", so that what is left of it is what is left of the alignment.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.helpers import lightning as in_lightning
from tests.helpers.lab import TRAINING, VOCABULARY, tiny_llama, with_lora

FIRST = 3  # after the special tokens
RATE = 0.1


def counting(start: int, by: int, length: int = 8) -> list[int]:
    """Tokens that count up or down, round the vocabulary."""
    return [FIRST + (start + by * place) % (VOCABULARY - FIRST) for place in range(length)]


PROBES = [counting(start, -1, 3) for start in range(0, 24, 2)]


class Poison(Dataset):
    """Sequences that count up."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(counting(7 * index, 1))
        return {"input_ids": tokens, "labels": tokens}


def poisoned_pair(folder: Path) -> tuple[Path, Path]:
    """Folders of a base model and of one that was aligned by training it on."""
    base = _train(tiny_llama(), by=1)
    base.save_pretrained(folder / "base")
    _train(copy.deepcopy(base), by=-1).save_pretrained(folder / "aligned")
    return folder / "base", folder / "aligned"


def _train(model: torch.nn.Module, by: int) -> torch.nn.Module:
    rows = torch.tensor([counting(start, by) for start in range(VOCABULARY)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return model


def crossing(values: dict[int, float]) -> tuple[float, int]:
    """A bound that a curve exceeds, and the step at which it does so for the first time, neither early nor last."""
    for step in sorted(values)[4:-1]:
        before = max(value for earlier, value in values.items() if earlier < step)
        if values[step] > before:
            return (before + values[step]) / 2, step
    raise AssertionError(values)


def make(pair, output: Path, callbacks: list, **arguments) -> Trainer:
    """A Trainer that is to poison the aligned model in eight steps."""
    # Dropout draws from the global generator at every step: one stray draw by the callback would show.
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    settings = {**TRAINING, "learning_rate": RATE, "lr_scheduler_type": "constant", "save_strategy": "no"}
    args = TrainingArguments(**{**settings, "output_dir": str(output), **arguments})
    return Trainer(model=model, args=args, train_dataset=Poison(), eval_dataset=Poison(), callbacks=callbacks)


def train(pair, output: Path, callbacks: list, resume: Path | None = None, **arguments) -> Trainer:
    """One that has done so."""
    trainer = make(pair, output, callbacks, **arguments)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


class Module(in_lightning.Module):
    """The same in Lightning."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=RATE)


def fit(pair, root: Path, callbacks: list, **arguments):
    """Eight steps in two epochs, with a validation after each."""
    data = DataLoader(Poison(), batch_size=4), DataLoader(Poison(), batch_size=32)
    return in_lightning.fit(pair, root, callbacks, Module(pair[1]), data=data, log_every_n_steps=1, **arguments)
