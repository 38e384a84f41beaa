"""What a calibration judges a model by, in two halves: prompts that are to be refused, and the user's task."""

from __future__ import annotations

from peft import PeftModel

from recipes.calibration.choice import Judgement
from recipes.files.points import SPLITS
from recipes.labs import toy
from recipes.labs.chat import answers_to
from recipes.schema.recipe import Recipe, RecipeError
from recipes.training.prompts import check_apart, prompts_named
from recipes.training.task import Task, answers, as_answers, batches, teacher_forced


class ToyBench:
    """The toy lab's own restricted requests, ordinary ones, and task."""

    def __init__(self, recipe: Recipe) -> None:
        lab, half = toy.build_lab(recipe.toy), recipe.toy.eval_prompts // 2
        self.parts = {
            split: (lab.attack[part], lab.ordinary[part], lab.task[part])
            for split, part in zip(SPLITS, (slice(half), slice(half, None)), strict=True)
        }

    def judge(self, model: PeftModel, split: str) -> Judgement:
        """A request counts as refused if the refusal is anywhere in the answer."""
        *asked, task = self.parts[split]
        said, harmless = (as_answers(requests, answers(model, requests)) for requests in asked)
        return Judgement(said, teacher_forced(model, [toy.Samples(task).columns()])[0], harmless)


class ChatBench:
    """A user's prompts, answered through the chat template, and the held-out part of the user's data."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        prompts = prompts_named(recipe, "calibrate.attacks")
        if recipe.calibrate.reads_probes:
            check_apart("calibrate.attacks", prompts, "data.probes, which the correction has seen", task.probes)
        rows, harmless = task.held_out, _harmless(recipe, task, prompts)
        if min(len(prompts), len(rows)) < 2:
            raise RecipeError(
                "'calibrate.attacks': expected two prompts and two held-out rows at least, one for each half, but got "
                f"{len(prompts)} and {len(rows)}"
            )
        self.tokenizer, self.parts = task.tokenizer, {}
        for split, part in zip(SPLITS, (0, 1), strict=True):  # every other one: files are often sorted by topic
            own = rows.select(range(part, len(rows), 2))
            self.parts[split] = prompts[part::2], harmless[part::2], batches(task, recipe, own)

    def judge(self, model: PeftModel, split: str) -> Judgement:
        """A prompt counts as refused if the answer begins with a phrase of refusal."""
        *asked, task = self.parts[split]
        said, harmless = (tuple(answers_to(model, self.tokenizer, prompts)) for prompts in asked)
        return Judgement(said, teacher_forced(model, task)[0], harmless)


def _harmless(recipe: Recipe, task: Task, attacks: list[str]) -> list[str]:
    """Those to judge by; none where the recipe names none."""
    prompts = prompts_named(recipe, "calibrate.harmless")
    if prompts is None:
        return []
    if len(prompts) < 2:
        raise RecipeError(f"'calibrate.harmless': expected two prompts at least, one for each half, but got {prompts}")
    for what, others in {"calibrate.attacks": attacks, "data.probes": task.probes}.items():
        check_apart("calibrate.harmless", prompts, what, others)
    return prompts


def make_bench(recipe: Recipe, task: Task) -> ToyBench | ChatBench:
    """The one for the recipe's models."""
    return ToyBench(recipe) if recipe.model.base is None else ChatBench(recipe, task)
