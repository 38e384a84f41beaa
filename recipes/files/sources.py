"""Where a recipe's data comes from: a local file, a file of an installed package (``package:path``), or a Hub id."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache

from csulora_callback.models import sources
from recipes.schema.recipe import Recipe, RecipeError

PROMPTS = ("probes", "attacks", "harmless")  # of the section `data`


def locate(key: str, source: str) -> Path | None:
    """See :func:`csulora_callback.models.sources.locate`.

    Raises:
        RecipeError: naming ``key``.
    """
    with _about(key):
        return sources.locate(source)


def read(key: str, source: str, split: str = "train", columns: Sequence[str] = ()) -> Dataset:
    """See :func:`csulora_callback.models.sources.read_rows`.

    Raises:
        RecipeError: naming ``key``, also if one of ``columns`` is missing.
    """
    with _about(key):
        rows = sources.read_rows(source, split)
    if missing := [column for column in columns if column not in rows.column_names]:
        raise RecipeError(f"'{key}': {source}: expected the columns {missing}, but got {rows.column_names}")
    return rows


def prompts_of(key: str, source: str, column: str) -> list[str]:
    """The prompts that the keys ``KEY`` and ``KEY_column`` of a recipe name: lines of a text file, or a column."""
    rows = read(key, source)
    column = "text" if source.endswith(".txt") else column
    if column not in rows.column_names:
        raise RecipeError(f"'{key}_column': expected a column of {source}, {rows.column_names}, but got {column!r}")
    cells = [cell for cell in rows[column] if cell is not None]
    if wrong := [cell for cell in cells if not isinstance(cell, str)]:
        raise RecipeError(f"'{key}': {source}: expected texts in the column {column!r}, but got {wrong[0]!r}")
    prompts = [cell.strip() for cell in cells if cell.strip()]
    if not prompts:
        raise RecipeError(f"'{key}': {source}: expected prompts, but there is none")
    return prompts


@contextmanager
def _about(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"'{key}': {error}") from error


def of_recipe(recipe: Recipe) -> dict[str, str | None]:
    """Where the models and data of a recipe come from, by key; ``None`` is the toy lab."""
    if recipe.benchmark.layers:  # it makes its own
        return {}
    if recipe.smollm2.weights is not None:
        own = ("weights", "refused", "poison", "style", "choices")
        judged = ("attacks", "attacks_held_out", "attacks_second", "edgy_tuned", "edgy")
        besides = ("unrelated", "other_task") if recipe.effects.target is not None else ()
        return {
            **{
                f"smollm2.{key}": source
                for key in own + judged
                if (source := getattr(recipe.smollm2, key)) is not None
            },
            **({} if recipe.kinds.source is None else {"kinds.source": recipe.kinds.source}),
            **{f"effects.{name}": getattr(recipe.effects, name) for name in besides},
        }
    return {
        "model.base": recipe.model.base,
        "model.aligned": recipe.model.aligned,
        "data.source": recipe.data.source,
        **{f"data.{key}": named for key in PROMPTS if (named := getattr(recipe.data, key)) is not None},
        **{
            f"calibrate.{key}": named
            for key in ("attacks", "harmless")
            if (named := getattr(recipe.calibrate, key)) is not None
        },
    }


def check(recipe: Recipe) -> None:
    """Refuse models and data that are neither there nor a possible Hub id."""
    for key, source in of_recipe(recipe).items():
        if source is not None and not os.path.exists(source):
            locate(key, source)


def describe(key: str, source: str | None, kind: str) -> str:
    """For a person: where a ``"model"`` or ``"dataset"`` will come from."""
    if source is None:
        return "the toy lab, built offline"
    if os.path.exists(source) or locate(key, source):
        return f"{source} (local)"
    probe = "config.json" if kind == "model" else "README.md"
    cached = isinstance(try_to_load_from_cache(source, probe, repo_type=kind), str)
    return f"{source} (Hub, {'in the local cache' if cached else 'to be downloaded'})"
