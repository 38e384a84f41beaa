"""Reads a recipe: the YAML file, overrides, and the checks of both before anything runs."""

from __future__ import annotations

import difflib
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from recipes.files.values import check_values
from recipes.schema.recipe import Correction, Recipe, RecipeError

SECTIONS = [name for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind)] + ["corrections"]
# Sections whose keys are names of the recipe's own.
ENTRIES = ("corrections", "frontier.methods", "target.strengths", "target.found", "target.shares", "calibrate.presets")
_RENAMED = {"calibrate.probes": "calibrate.attacks", "calibrate.probes_column": "calibrate.attacks_column"}


def load_recipe(path: str, overrides: list[str]) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides and check all of it.

    Raises:
        RecipeError: with one line that names the file or override, the full key, and the nearest valid name.
    """
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).name, [p.name for p in Path(path).parent.glob("*.yaml")], n=1)
        raise RecipeError(f"{path}: no such file{f'; did you mean {Path(path).with_name(near[0])}?' if near else ''}")
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"'{override}': expected key=value, such as training.max_steps=100")
    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise RecipeError(f"{path}: expected sections and keys, but got a {type(given).__name__}")
        whole = _typed(path, _overridden(given, overrides))
        if whole.smoke:
            if not whole.smoke_overrides:
                raise RecipeError(f"{path}: 'smoke': expected false, as this recipe has no smoke_overrides")
            whole = _typed(path, _overridden(given, [*whole.smoke_overrides, *overrides]))
        whole.smoke, whole.smoke_overrides = False, []  # applied: the resolved recipe says all by itself
        recipe = OmegaConf.to_object(whole)
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from error
    check_values(path, recipe)
    return recipe


def _typed(path: str, given: DictConfig) -> DictConfig:
    for section in SECTIONS:
        if section in given and not isinstance(given[section], DictConfig):
            raise RecipeError(f"{path}: '{section}': expected a section with keys, but got {given[section]!r}")
    for name, correction in given.get("corrections", {}).items():
        if not isinstance(correction, DictConfig):
            raise RecipeError(
                f"{path}: 'corrections.{name}': expected a section such as {{preset: guard, strength: 10}}, but got "
                f"{correction!r}"
            )
    return OmegaConf.merge(OmegaConf.structured(Recipe), given)


def _overridden(given: DictConfig, overrides: list[str]) -> DictConfig:
    """What is given, after overrides: a mapping takes the place of what is there, ``null`` removes it."""
    given = OmegaConf.create(given)  # a copy
    for override in overrides:
        key, one = override.partition("=")[0], OmegaConf.from_dotlist([override])
        value, (section, _, entry) = OmegaConf.select(one, key), key.rpartition(".")
        if isinstance(value, DictConfig):
            OmegaConf.update(given, key, value, merge=False)
        elif value is None and key in SECTIONS:
            given.pop(key, None)
        elif value is None and section in ENTRIES and isinstance(OmegaConf.select(given, section), DictConfig):
            _remove(OmegaConf.select(given, section), section, entry)
        else:
            given = OmegaConf.merge(given, one)
    return given


def _remove(entries: DictConfig, section: str, entry: str) -> None:
    if entry not in entries:
        raise RecipeError(f"'{section}.{entry}': expected an entry that is there, to remove it, of {list(entries)}")
    del entries[entry]


def _one_line(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    if isinstance(error, ConfigKeyError):
        near = _nearest(key)
        return f"unknown key '{key}'{f'; did you mean {near!r}?' if near else ''}"
    what = str(error.msg or error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return f"missing value: '{key}' has to be set, in the file or as {key}=…"
    return f"'{key}': {what}" if key else what


def _nearest(key: str) -> str | None:
    """The valid key closest to a wrong one: among its siblings first, then the same word in another section."""
    if key in _RENAMED:
        return _RENAMED[key]
    section, _, word = key.rpartition(".")
    if re.fullmatch(r"corrections\.[^.]+", section):
        siblings = [f"{section}.{name}" for name in get_type_hints(Correction)]
    else:
        siblings = [known for known in _keys(Recipe) if known.rpartition(".")[0] == section]
    near = difflib.get_close_matches(word, [sibling.rpartition(".")[2] for sibling in siblings], n=1)
    if near:
        return ".".join(filter(None, (section, near[0])))
    return next((known for known in _keys(Recipe) if known.rpartition(".")[2] == word), None)


def _keys(section: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in get_type_hints(section).items():
        keys.append(f"{prefix}{name}")
        if is_dataclass(kind):
            keys += _keys(kind, f"{prefix}{name}.")
    return keys
