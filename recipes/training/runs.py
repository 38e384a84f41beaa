"""From a recipe's corrections to their checkpoints: a training run for those that it takes, and the rest from it."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from csulora_callback import CSULoRACallback, SafetySubspace, correct_adapter
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.under_adapter import weights_under
from csulora_callback.subspace_cache import default_cache_dir
from recipes.schema.recipe import Correction, Recipe, RecipeError
from recipes.training.fitted import Fitted
from recipes.training.task import Task


@dataclass(frozen=True, eq=False)
class Corrected:
    """A correction's checkpoints: the log records, the last folder, and batches of the held-out data."""

    records: list[dict]
    last: Path
    held_out: DataLoader


def trained_runs(corrections: dict[str, Correction]) -> dict[str, list[str]]:
    """The corrections that are in the callback of a training run, each with those that are made from its checkpoints.

    Those that correct the live weights train something else, each in a run of its own. All others train the same, and
    once is enough: with one that reads prompts and the task, if there is any, as its checkpoints hold the texts that
    others need; with one of a given strength, if there is any, as it reads all of them.
    """
    own = [name for name, correction in corrections.items() if correction.every_n_steps is not None]
    shared = [name for name in corrections if name not in own]
    # Stable: of those that are alike the first one of the recipe leads.
    shared.sort(key=lambda name: _order(corrections[name]))
    runs = {name: [] for name in own}
    return {shared[0]: shared[1:], **runs} if shared else runs


def _order(correction: Correction) -> tuple[bool, bool, bool]:
    return not correction.reads_probes, not correction.reads_task, correction.target is not None


def load_trainer(recipe: Recipe) -> ModuleType:
    """The training loop that the recipe names; nothing of the other one is imported."""
    try:
        return importlib.import_module(f"recipes.training.{recipe.trainer.value}")
    except ModuleNotFoundError as error:
        if error.name != "lightning":
            raise
        raise RecipeError(
            "'trainer': lightning is not installed; pip install -c constraints.txt -e '.[recipes,lightning]'"
        ) from error


def correct_all(
    task: Task, recipe: Recipe, trainer: ModuleType, output: Path, console: Console
) -> dict[str, Corrected]:
    """All of a recipe's corrections, by name, in its order; those that are not trained are of the first process only.

    Args:
        task: what is trained.
        recipe: whose corrections are made.
        trainer: of :func:`load_trainer`.
        output: gets a folder for each; where one holds checkpoints of this run, it is gone on with.
        console: for what is done at the moment.
    """
    processes, done = PartialState(), {}
    for name, others in trained_runs(recipe.corrections).items():
        folder = output / name
        step = max(trainer.checkpoints(folder), default=None)
        console.rule(f"fine-tuning once with the callback: {name}" + (f", from step {step}" if step else ""))
        with _about(name):
            run = trainer.fit(task, recipe, make_callback(task, recipe.corrections[name]), folder)
        if processes.is_main_process:
            done[name] = Corrected(run.records, run.last, run.held_out)
            for other in others:
                console.rule(f"correcting its checkpoints: {other}")
                done[other] = correct_again(task, trainer, run, other, recipe.corrections[other], output / other)
        processes.wait_for_everyone()
    return {name: done[name] for name in recipe.corrections if name in done}


def make_callback(task: Task, correction: Correction) -> CSULoRACallback:
    """The callback that a correction section describes."""
    return CSULoRACallback(
        base_model=task.base,
        rank=correction.rank,
        energy=correction.energy,
        penalty=correction.penalty(),
        target=correction.target,
        probes=task.probes if correction.reads_probes else None,
        every_n_steps=correction.every_n_steps,
    )


def correct_again(
    task: Task, trainer: ModuleType, run: Fitted, name: str, correction: Correction, folder: Path
) -> Corrected:
    """Correct the raw adapters of a run's checkpoints in another way, as the callback would have done.

    Raises:
        RecipeError: naming the correction and the checkpoint that cannot be.
    """
    shutil.rmtree(folder, ignore_errors=True)  # made anew, whatever an interrupted run has left
    adapter = find_adapter(run.module)
    subspace = SafetySubspace.estimate(
        task.base,
        weights_under(adapter),  # as the callback does, on the weights in memory
        target_modules=list(adapter.layers),
        rank=correction.rank,
        energy=correction.energy,
        cache_dir=default_cache_dir(),
    )
    records = []
    for step, checkpoint in tqdm(run.checkpoints.items(), desc=name, unit="checkpoint"):
        place = folder / f"checkpoint-{step}"
        texts = {"target": correction.target, **(trainer.texts_in(checkpoint) if correction.reads_probes else {})}
        if not correction.reads_task:
            texts = {key: value for key, value in texts.items() if key != "task"}
        with _about(name):
            made = correct_adapter(checkpoint, subspace, place, correction.penalty(), **texts)
        records.append({**made.metrics, "step": step})
    return Corrected(records, place, run.held_out)


@contextmanager
def _about(name: str) -> Iterator[None]:
    """An error that names an argument of the library's is one of the recipe."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("`"):
            raise
        raise RecipeError(f"'corrections.{name}': {error}") from error
