"""What cannot be calibrated is refused here, before anything is loaded."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from csulora_callback.adapter_source import RawAdapter
from csulora_callback.method.token_space import MAX_STRENGTH
from csulora_callback.models.factors import all_finite
from csulora_callback.presets import DATA_AWARE
from recipes.calibration.choice import candidates
from recipes.calibration.report import FILES, RESULTS
from recipes.schema.recipe import Calibrate, Preset, Recipe, RecipeError


def check(recipe: Recipe) -> None:
    """Refuse settings that mean nothing, and an output folder that holds something else than a calibration."""
    settings = recipe.calibrate
    _check_presets(settings)
    if settings.ranks is not None and (not settings.ranks or min(settings.ranks) < 1):
        _refuse("ranks", "whole numbers ≥ 1, at least one, or null", settings.ranks)
    for key in ("target", "newly_refused"):
        if not 0.0 <= getattr(settings, key) <= 1.0:
            _refuse(key, "a share in [0, 1]", getattr(settings, key))
    if recipe.model.base is not None and settings.attacks is None:
        _refuse("attacks", "a .txt or .jsonl file or a Hub dataset of prompts that are to be refused", None)
    seen = recipe.data.probes if settings.reads_probes else None
    if seen is not None and seen == settings.attacks:
        _refuse("attacks", "other prompts than data.probes, which the correction has seen", settings.attacks)
    for key in ("attacks", "harmless"):
        if recipe.model.base is None and getattr(settings, key) is not None:
            _refuse(key, "nothing, as the toy lab has its own", getattr(settings, key))
    if recipe.data.harmless is not None:
        raise RecipeError(
            f"'data.harmless': expected nothing in a calibration, but got {recipe.data.harmless!r}; name those to "
            "judge by as calibrate.harmless"
        )
    if recipe.model.base is None and recipe.toy.eval_prompts < 2:
        raise RecipeError(
            f"'toy.eval_prompts': expected 2 at least, one for each half, but got {recipe.toy.eval_prompts}"
        )
    _check_output(Path(recipe.output))


def has_adapter(settings: Calibrate) -> bool:
    """Whether there is an adapter in the folder of the checkpoint."""
    return settings.checkpoint is not None and (Path(settings.checkpoint) / "adapter_config.json").is_file()


def checkpoint_folder(recipe: Recipe) -> Path:
    """The checkpoint's folder, if an adapter is there that can be corrected, and the output does not lie there too."""
    settings = recipe.calibrate
    if not has_adapter(settings):
        raise RecipeError(
            "'calibrate.checkpoint': expected the folder of a trained adapter (adapter_config.json), such as the "
            f"quickstart leaves, but got {settings.checkpoint!r}"
        )
    checkpoint, output = Path(settings.checkpoint).resolve(), Path(recipe.output).resolve()
    if checkpoint.is_relative_to(output) or output.is_relative_to(checkpoint):
        raise RecipeError(
            f"'output': expected a folder apart from the checkpoint's, {settings.checkpoint}, as that is never "
            f"written to, but got {recipe.output}"
        )
    try:
        saved = RawAdapter.find(Path(settings.checkpoint), "checkpoint").read()
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(f"'calibrate.checkpoint': {error}") from error
    if not all_finite(saved.factors):
        _refuse("checkpoint", "an adapter with finite factors", settings.checkpoint)
    return Path(settings.checkpoint)


def describe(settings: Calibrate) -> dict[str, str]:
    """For a person: what would be calibrated, by key."""
    there = "" if has_adapter(settings) else " (no adapter there yet)"
    per_rank = len(candidates(settings, settings.ranks or [1]))
    return {
        "calibrate.checkpoint": f"{settings.checkpoint}{there}",
        "calibrate.ranks": "from the modules' sizes" if settings.ranks is None else str(settings.ranks),
        "calibrate": f"{per_rank} settings{' at each rank' if settings.ranks is None else ''}",
    }


def _refuse(key: str, expected: str, got: object) -> None:
    raise RecipeError(f"'calibrate.{key}': expected {expected}, but got {got!r}")


def _check_presets(settings: Calibrate) -> None:
    for preset, strengths in settings.presets.items():
        if preset not in Preset.__members__:
            near = difflib.get_close_matches(preset, Preset.__members__, n=1)
            _refuse("presets", f"presets of Penalty{f' such as {near[0]!r}' if near else ''}", preset)
        if preset == "projection" and strengths:
            _refuse("presets.projection", "no strengths, as this preset has none", strengths)
        if preset != "projection" and not (strengths and all(strength > 0 for strength in strengths)):
            _refuse(f"presets.{preset}", "strengths > 0, at least one", strengths)
        if preset in DATA_AWARE and max(strengths) > MAX_STRENGTH:
            _refuse(f"presets.{preset}", f"strengths of at most {MAX_STRENGTH:g}", strengths)


def _check_output(folder: Path) -> None:
    """An older calibration is replaced as a whole; nothing else is ever removed."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RecipeError(f"'output': expected a folder, but {folder} is a file")
    others = sorted({path.name for path in folder.iterdir()} - set(FILES))
    if others or (any(folder.iterdir()) and not _holds_calibration(folder)):
        found = f"{others[0]!r}" if others else "files of something else"
        raise RecipeError(
            f"'output': expected a new folder, or one that holds nothing but a calibration, which is replaced, but "
            f"{folder} holds {found}; use another output folder"
        )


def _holds_calibration(folder: Path) -> bool:
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and {"target", "without", "tuning"} <= results.keys()
