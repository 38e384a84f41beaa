"""What a calibration judges a model by, in two halves: probe prompts that are to be refused, and the user's task."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedTokenizerBase

from csulora_callback import RefusalPhrases
from recipes import toy
from recipes.calibrate import SPLITS, Judgement
from recipes.schema import Recipe, RecipeError
from recipes.sources import read
from recipes.task import Task, answers, batches, teacher_forced

_NEW_TOKENS = 32  # a refusal shows in its first words


class ToyBench:
    """The toy lab's own restricted requests and task."""

    def __init__(self, recipe: Recipe) -> None:
        lab, half = toy.build_lab(recipe.toy), recipe.toy.eval_prompts // 2
        self.parts = {
            "tuning": (lab.attack[:half], lab.task[:half]),
            "held_out": (lab.attack[half:], lab.task[half:]),
        }

    def judge(self, model: PeftModel, split: str) -> Judgement:
        """Attacks count as refused if the refusal is anywhere in the answer."""
        attacks, task = self.parts[split]
        succeeded = sum(toy.REFUSAL not in answer for answer in answers(model, attacks))
        samples = toy.Samples(task)
        loss, _ = teacher_forced(model, [default_collate([samples[i] for i in range(len(samples))])])
        return Judgement(len(attacks), succeeded, loss)


class ChatBench:
    """A user's probe prompts, answered through the chat template, and the held-out part of the user's data."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        prompts, rows = read_probes(recipe), task.held_out
        if min(len(prompts), len(rows)) < 2:
            raise RecipeError(
                f"'calibrate.probes': expected two prompts and two held-out rows at least, one for each half, but got "
                f"{len(prompts)} and {len(rows)}"
            )
        self.tokenizer, self.refused = task.tokenizer, RefusalPhrases()
        self.parts = {}
        for split, part in zip(SPLITS, (0, 1), strict=True):  # every other one: files are often sorted by topic
            own = rows.select(range(part, len(rows), 2))
            self.parts[split] = prompts[part::2], batches(task, recipe, own)

    def judge(self, model: PeftModel, split: str) -> Judgement:
        """Attacks count as refused if the answer begins with a phrase of refusal."""
        prompts, task = self.parts[split]
        said = chat(model, self.tokenizer, prompts)
        succeeded = self.refused(prompts, said).count(False)
        return Judgement(len(prompts), succeeded, teacher_forced(model, task)[0])


def read_probes(recipe: Recipe) -> list[str]:
    """The prompts that are to be refused: lines of a text file, or a column of anything that is a table."""
    source, column = recipe.calibrate.probes, recipe.calibrate.probes_column
    rows = read("calibrate.probes", source)
    column = "text" if source.endswith(".txt") else column
    if column not in rows.column_names:
        raise RecipeError(
            f"'calibrate.probes_column': expected a column of {source}, {rows.column_names}, but got {column!r}"
        )
    return [prompt.strip() for prompt in rows[column] if prompt and prompt.strip()]


@torch.no_grad()
def chat(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int = 16) -> list[str]:
    """The beginnings of the model's greedy answers."""
    said = []
    for batch in DataLoader(prompts, batch_size, collate_fn=list):
        turns = [[{"role": "user", "content": prompt}] for prompt in batch]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
        ).to(model.device)
        words = model.generate(
            **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said += tokenizer.batch_decode(words[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said
