"""The output folder of a training run: whether it is free, holds this run already, or holds another one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from recipes.files import sources
from recipes.files.points import difference, plain, write_whole
from recipes.files.values import FOLDER_NAME
from recipes.schema.recipe import Recipe, RecipeError

RECIPE = "recipe.yaml"
RESULTS = ("results.json", "metrics.jsonl", "answers.jsonl", "drift.png", "report.html")

_CLAIM = "trained_on.json"
_POINTS = "measured_on.json"  # a frontier's, or a target's
_NOT_TRAINED_ON = ("output", "overwrite", "smoke", "smoke_overrides", "benchmark")


class Output:
    """The folder that ``recipe.output`` names.

    Args:
        recipe: as resolved.
        processes: how many train; as many have to go on.

    Raises:
        RecipeError: if the folder holds another run, or a frontier, and ``overwrite`` does not say that it may go.
    """

    def __init__(self, recipe: Recipe, processes: int) -> None:
        self.folder, self.recipe = Path(recipe.output), recipe
        self._described = plain({**_flat(recipe), **_contents(recipe), "processes": processes})
        if (self.folder / _POINTS).exists():
            raise RecipeError(
                f"'output': {self.folder} holds a frontier or a target's evidence; use another output folder"
            )
        self.continues = self._holds_a_run() and not recipe.overwrite
        if self.continues:
            self._check_same()

    def claim(self) -> None:
        """Make the folder this run's: what is not of it goes, and what is made again from its checkpoints."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (*RESULTS, *(() if self.continues else (*self._corrections(), _CLAIM))):
            _remove(self.folder / name)
        if not self.continues:
            write_whole(self.folder / _CLAIM, json.dumps(self._described, indent=2) + "\n")
        write_whole(self.folder / RECIPE, OmegaConf.to_yaml(OmegaConf.structured(self.recipe)))

    def _check_same(self) -> None:
        claim = self.folder / _CLAIM
        other = f"there is no {_CLAIM} that says which"
        if claim.exists():
            # What a version that did not know of a key has trained, it trained with what is now its default.
            there = {**plain(_flat(Recipe())), **json.loads(claim.read_text(encoding="utf-8"))}
            other = difference(there, self._described)
        if other is not None:
            raise RecipeError(
                f"'output': {self.folder} holds another run: {other}; use another output folder, or overwrite=true to "
                "remove that run"
            )

    def _holds_a_run(self) -> bool:
        """Whether there is a checkpoint, or files of the same names that something else has written.

        What was refused before its first checkpoint is no run.
        """
        places = [self.folder / name for name in self._corrections()]
        trained = any(path for place in places for kind in ("checkpoint-*", "*.ckpt") for path in place.glob(kind))
        others = any((self.folder / name).exists() for name in (*RESULTS, RECIPE))
        return trained or (others and not (self.folder / _CLAIM).exists())

    def _corrections(self) -> list[str]:
        """Names of the folders that are there, or will be."""
        try:
            there = yaml.safe_load((self.folder / RECIPE).read_text(encoding="utf-8"))["corrections"]
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
            there = ()
        return sorted({*filter(FOLDER_NAME.fullmatch, map(str, there)), *self.recipe.corrections})


def refuse_run(recipe: Recipe) -> None:
    """Refuse the output folder of a recipe that trains nothing, if it holds a training run.

    Raises:
        RecipeError: naming it.
    """
    if (Path(recipe.output) / _CLAIM).exists():
        raise RecipeError(f"'output': {recipe.output} holds a training run; use another output folder")


def _flat(recipe: Recipe) -> dict[str, object]:
    """All that a recipe says, by key, as JSON values."""
    said = OmegaConf.to_container(OmegaConf.structured(recipe), enum_to_str=True)
    return dict(_leaves({key: value for key, value in said.items() if key not in _NOT_TRAINED_ON}))


def _leaves(section: dict, prefix: str = "") -> list[tuple[str, object]]:
    leaves = []
    for key, value in section.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return leaves


def _contents(recipe: Recipe) -> dict[str, str]:
    """What tells the local files and folders that are read from others under the same names."""
    found = {}
    for key, source in sources.of_recipe(recipe).items():
        if source is not None and (path := Path(source) if os.path.exists(source) else sources.locate(key, source)):
            found[f"content of {key}"] = _digest(path)
    return found


def _digest(path: Path) -> str:
    if path.is_file():
        content = hashlib.sha256()
        with path.open("rb") as file:
            for part in iter(lambda: file.read(1 << 20), b""):
                content.update(part)
        return content.hexdigest()
    # A model of many gigabytes is not read for this; its files lie at the top, and below may be what is written here.
    files = [(file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    told = [(name, about.st_size, about.st_mtime_ns) for name, about in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
