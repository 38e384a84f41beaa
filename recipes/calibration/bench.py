"""What a calibration judges a model by, in two halves: probe prompts that are to be refused, and the user's task."""

from __future__ import annotations

from peft import PeftModel

from recipes.calibration.calibrate import Judgement
from recipes.files.points import SPLITS
from recipes.files.sources import prompts_of
from recipes.labs import toy
from recipes.labs.chat import attacked
from recipes.schema import Recipe, RecipeError
from recipes.training.task import Task, answers, batches, not_refused, teacher_forced


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
        loss, _ = teacher_forced(model, [toy.Samples(task).columns()])
        return Judgement(len(attacks), not_refused(answers(model, attacks)), loss)


class ChatBench:
    """A user's probe prompts, answered through the chat template, and the held-out part of the user's data."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        prompts = prompts_of("calibrate.probes", recipe.calibrate.probes, recipe.calibrate.probes_column)
        rows = task.held_out
        if min(len(prompts), len(rows)) < 2:
            raise RecipeError(
                f"'calibrate.probes': expected two prompts and two held-out rows at least, one for each half, but got "
                f"{len(prompts)} and {len(rows)}"
            )
        self.tokenizer, self.parts = task.tokenizer, {}
        for split, part in zip(SPLITS, (0, 1), strict=True):  # every other one: files are often sorted by topic
            own = rows.select(range(part, len(rows), 2))
            self.parts[split] = prompts[part::2], batches(task, recipe, own)

    def judge(self, model: PeftModel, split: str) -> Judgement:
        """Attacks count as refused if the answer begins with a phrase of refusal."""
        prompts, task = self.parts[split]
        obeyed = sum(not answer.refused for answer in attacked(model, self.tokenizer, prompts))
        return Judgement(len(prompts), obeyed, teacher_forced(model, task)[0])
