"""The quickstart's fine-tune without the callback, in plain PEFT and transformers: an adapter that needs repair.

``python -m recipes.training.plain FOLDER [key=value ...]`` makes ``FOLDER/base`` and ``FOLDER/aligned``, the toy lab's
pair, and ``FOLDER/adapter``, a LoRA on ``aligned``. Keys are those of ``recipes/quickstart.yaml``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path

import transformers
from transformers import Trainer, TrainingArguments, default_data_collator

from csulora_callback.models.whole_files import put_folder
from recipes.files.recipe import load_recipe
from recipes.schema.recipe import Recipe, RecipeError
from recipes.training.task import build_task

QUICKSTART = Path(__file__).parents[1] / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 with one line on stderr for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m recipes.training.plain", description="Fine-tune the toy lab.")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.seed=1")
    options = parser.parse_args(arguments)
    try:
        train(options.folder, load_recipe(str(QUICKSTART), options.overrides))
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Written to {options.folder}: base, aligned, adapter.")
    return 0


def train(folder: Path, recipe: Recipe) -> None:
    """Make the folder, whole or not at all."""
    if os.path.lexists(folder):
        raise RecipeError(f"{folder}: is there already. Name a folder to be made, or remove it.")
    if recipe.model.base is not None:
        raise RecipeError("'model.base': expected nothing, as this trains on the toy lab's pair")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own making
    task, settings = build_task(recipe), recipe.training
    model = task.with_fresh_lora(recipe)
    model.peft_config["default"].base_model_name_or_path = str(folder / "aligned")

    def make(unfinished: Path) -> None:
        shutil.copytree(task.base, unfinished / "base")
        shutil.copytree(task.aligned, unfinished / "aligned")
        options = TrainingArguments(
            output_dir=str(unfinished / "adapter"),
            learning_rate=settings.learning_rate,
            max_steps=settings.max_steps,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            logging_steps=settings.logging_steps,
            seed=settings.seed,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, options, default_data_collator, train_dataset=task.train)
        trainer.train()
        with warnings.catch_warnings():  # PEFT looks for `aligned` where it will lie, and does not need it
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            trainer.save_model()

    put_folder(folder, make)


if __name__ == "__main__":
    sys.exit(main())
