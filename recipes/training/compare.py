"""Adapters side by side, on the data of a recipe: ``python -m recipes.training.compare RECIPE.yaml ADAPTER ...``.

What is judged is what whoever loads a folder gets: the raw adapter, or a corrected one as it ships.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import transformers
from peft import PeftModel
from rich.console import Console

from csulora_callback.adapter_source import find_adapter_folder
from csulora_callback.reporting.terminal import make_console, make_table, print_section
from recipes.files.recipe import load_recipe
from recipes.schema.recipe import Recipe, RecipeError
from recipes.training.report import share
from recipes.training.task import Score, Task, batches, build_task, device


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 with one line on stderr for what cannot be judged."""
    parser = argparse.ArgumentParser(prog="python -m recipes.training.compare", description="Judge adapters.")
    parser.add_argument("recipe", help="whose models, data and prompts they are judged by")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder or a Hub id")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own making
    try:
        scores = compare(load_recipe(options.recipe, []), options.adapters)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    print_scores(make_console(), scores)
    return 0


def compare(recipe: Recipe, adapters: list[str]) -> dict[str, Score]:
    """How each of them does, after the model that they sit on."""
    task = build_task(recipe)
    held_out = batches(task, recipe, task.held_out)
    where = device()
    scores = {"(aligned model)": task.judge(task.aligned_model().to(where), held_out)}
    for adapter in adapters:
        scores[adapter] = task.judge(_with_adapter(task, adapter).to(where), held_out)
    return scores


def print_scores(console: Console, scores: dict[str, Score]) -> None:
    """One row an adapter."""
    has_harmless = any(score.harmless_answers for score in scores.values())
    over = ["harmless refused"] if has_harmless else []
    table = make_table(console, ["adapter", "attack success", *over, "task loss", "task accuracy"])
    for name, score in scores.items():
        cells = [share(score.succeeded, score.prompts)]
        cells += [share(score.over_refused, len(score.harmless_answers))] if has_harmless else []
        table.add_row(name, *cells, f"{score.task_loss:.3f}", f"{score.task_accuracy:.1%}")
    print_section(console, "What ships", table)


def _with_adapter(task: Task, adapter: str) -> PeftModel:
    try:
        return PeftModel.from_pretrained(task.aligned_model(), find_adapter_folder(adapter))
    except (RuntimeError, ValueError, OSError) as error:
        raise RecipeError(f"{adapter}: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
