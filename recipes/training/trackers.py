"""Where else a run is reported to: the trackers that a trainer knows by name. Nothing is reported unless asked for."""

from __future__ import annotations

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from recipes.schema.recipe import Recipe, RecipeError, TrainerKind

IN_LIGHTNING = ("tensorboard", "wandb", "mlflow")
IN_TRANSFORMERS = tuple(name for name in INTEGRATION_TO_CALLBACK if name != "flyte")  # only inside of its own platform

_PACKAGES = {"mlflow": "mlflow-skinny", "azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}  # others: as the tracker


def check(recipe: Recipe) -> None:
    """Refuse trackers that the recipe's trainer does not know, or that are not installed."""
    in_lightning = recipe.trainer is TrainerKind.lightning
    known, installed = IN_LIGHTNING if in_lightning else IN_TRANSFORMERS, get_available_reporting_integrations()
    for name in recipe.training.trackers():
        if name not in known:
            also = " (and metrics.csv is always there)" if in_lightning else ""
            raise RecipeError(
                f"'training.report_to': expected trackers of the trainer {recipe.trainer.value}, "
                f"{', '.join(known)}{also}, but got {name!r}"
            )
        if name not in installed:
            raise RecipeError(
                f"'training.report_to': {name} is not installed; pip install -c constraints.txt "
                f"{_PACKAGES.get(name, name)}"
            )


def finish(recipe: Recipe) -> None:
    """End what a training run leaves open; the next one would be reported into it."""
    if "wandb" in recipe.training.trackers():
        import wandb

        wandb.finish()
