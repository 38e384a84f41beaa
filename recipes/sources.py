"""Where data comes from: a local file, a file of an installed package (``package:path``), or a Hub id."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from recipes.schema import Recipe, RecipeError

# What `datasets` calls them.
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def locate(key: str, source: str) -> Path | None:
    """The file that ``source`` names, or ``None`` for a Hub id; nothing of a package is imported or run.

    Raises:
        RecipeError: naming ``key``, if it is no such file, no installed package, or no possible Hub id.
    """
    if Path(source).is_file():
        return Path(source)
    if Path(source).is_dir():  # a data set in a folder, which `datasets` reads
        return None
    package, colon, inside = source.partition(":")
    if colon and package.isidentifier():
        return _in_package(key, package, inside)
    if source.endswith((*_READERS, ".gguf")):
        raise RecipeError(f"'{key}': no such file: {source!r}")
    _check_id(key, source)
    return None


def read(key: str, source: str, split: str = "train", columns: Sequence[str] = ()) -> Dataset:
    """The rows of a source: JSON, JSON lines, CSV, lines of text (column ``text``), or a split of a Hub dataset.

    Raises:
        RecipeError: as :func:`locate` does, for what cannot be read as a table, and if one of ``columns`` is missing.
    """
    rows = _rows(key, source, split)
    if missing := [column for column in columns if column not in rows.column_names]:
        raise RecipeError(f"'{key}': {source}: expected the columns {missing}, but got {rows.column_names}")
    return rows


def _rows(key: str, source: str, split: str) -> Dataset:
    file = locate(key, source)
    if file is None:
        try:
            return load_dataset(source, split=split)
        except OSError as error:  # not there, or not reached
            raise RecipeError(f"'{key}': {source} cannot be read from the Hub: {error}") from error
    if file.suffix not in _READERS:
        raise RecipeError(f"'{key}': expected a file that ends in one of {', '.join(_READERS)}, but got {source!r}")
    try:
        return load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    except DatasetGenerationError as error:
        raise RecipeError(f"'{key}': {source}: not {file.suffix[1:]} that can be read as a table") from error


def of_recipe(recipe: Recipe) -> dict[str, str | None]:
    """Where the models and data of a recipe come from, by key; ``None`` is the toy lab."""
    if recipe.smollm2.weights is not None:
        names = ("weights", "refused", "poison", "attacks", "attacks_held_out", "style", "edgy", "choices")
        return {f"smollm2.{name}": getattr(recipe.smollm2, name) for name in names}
    return {
        "model.base": recipe.model.base,
        "model.aligned": recipe.model.aligned,
        "data.source": recipe.data.source,
        **({} if recipe.calibrate.probes is None else {"calibrate.probes": recipe.calibrate.probes}),
    }


def check(recipe: Recipe) -> None:
    """Refuse models and data that are neither there nor a possible Hub id."""
    for key, source in of_recipe(recipe).items():
        if source is not None and not Path(source).exists():
            locate(key, source)


def describe(key: str, source: str | None, kind: str) -> str:
    """For a person: where a ``"model"`` or ``"dataset"`` will come from."""
    if source is None:
        return "the toy lab, built offline"
    if Path(source).exists() or locate(key, source):
        return f"{source} (local)"
    probe = "config.json" if kind == "model" else "README.md"
    cached = isinstance(try_to_load_from_cache(source, probe, repo_type=kind), str)
    return f"{source} (Hub, {'in the local cache' if cached else 'to be downloaded'})"


def _check_id(key: str, source: str) -> None:
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise RecipeError(f"'{key}': no such file or folder, and not a Hub id: {source!r}") from error


def _in_package(key: str, package: str, inside: str) -> Path:
    spec = find_spec(package)  # of a top-level package: finds it and runs none of its code
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(f"'{key}': no installed package {package!r}; install what ships it, then run this again")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / inside).is_file():
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in _READERS]
        near = difflib.get_close_matches(inside, names, n=1)
        raise RecipeError(
            f"'{key}': no file {inside!r} in the package {package!r}{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    return folder / inside
