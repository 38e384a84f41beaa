"""Calibration: of many penalties and ranks, the one that costs least of the task and keeps attacks below a target.

Settings are chosen on one half of the prompts, *tuning*; the chosen one alone is then judged on the other, *held out*.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from csulora_callback import Penalty, wilson_interval
from csulora_callback.method.token_space import MAX_STRENGTH
from recipes.files.points import plain, write_whole
from recipes.schema import Calibrate, Preset, Recipe, RecipeError, make_penalty


@dataclass(frozen=True)
class Candidate:
    """A setting of the callback; ``strength`` is ``None`` for a preset that has none."""

    preset: str
    strength: float | None
    rank: int

    def penalty(self) -> Penalty:
        """The penalty that it names."""
        return make_penalty(self.preset, self.strength)

    def code(self) -> str:
        """The arguments that give it to :class:`csulora_callback.CSULoRACallback`."""
        strength = "" if self.strength is None else f"{self.strength:g}"
        strength = 'float("inf")' if strength == "inf" else strength
        before, after = (f"rank={self.rank}, ", "") if self.preset != "data_aware" else ("", ", probes=...")
        return f"{before}penalty=Penalty.{self.preset}({strength}){after}"


@dataclass(frozen=True)
class Judgement:
    """How a model does on one half of the prompts: attacks that were not refused, and the loss of the user's task."""

    prompts: int
    succeeded: int
    task_loss: float

    @property
    def attack_success(self) -> float:
        """Share of the prompts that were not refused."""
        return self.succeeded / self.prompts

    def interval(self) -> tuple[float, float]:
        """Wilson's for the attack success."""
        return wilson_interval(self.succeeded, self.prompts)


@dataclass(frozen=True)
class Calibration:
    """All candidates on the tuning half, and the chosen one on the other; ``None`` where none met the target."""

    target: float
    tuning: list[tuple[Candidate, Judgement]]
    chosen: Candidate | None
    held_out: Judgement | None


def check(recipe: Recipe) -> None:
    """Refuse what cannot be calibrated, before anything is loaded."""
    settings = recipe.calibrate

    def refuse(key: str, expected: str, got: object) -> None:
        raise RecipeError(f"'calibrate.{key}': expected {expected}, but got {got!r}")

    for preset, strengths in settings.presets.items():
        if preset not in Preset.__members__:
            near = difflib.get_close_matches(preset, Preset.__members__, n=1)
            refuse("presets", f"presets of Penalty{f' such as {near[0]!r}' if near else ''}", preset)
        if preset == "projection" and strengths:
            refuse("presets.projection", "no strengths, as this preset has none", strengths)
        if preset != "projection" and not (strengths and all(strength > 0 for strength in strengths)):
            refuse(f"presets.{preset}", "strengths > 0, at least one", strengths)
        if preset == "data_aware" and max(strengths) > MAX_STRENGTH:
            refuse(f"presets.{preset}", f"strengths of at most {MAX_STRENGTH:g}", strengths)
    if not settings.ranks or min(settings.ranks) < 1:
        refuse("ranks", "whole numbers ≥ 1, at least one", settings.ranks)
    if not 0.0 <= settings.target <= 1.0:
        refuse("target", "a share in [0, 1]", settings.target)
    if recipe.model.base is not None and settings.probes is None:
        refuse("probes", "a .txt or .jsonl file or a Hub dataset of prompts that are to be refused", None)
    if recipe.data.probes is not None and recipe.data.probes == settings.probes:
        refuse("probes", "other prompts than data.probes, which the correction has seen", settings.probes)
    if recipe.model.base is None and settings.probes is not None:
        refuse("probes", "nothing, as the toy lab has its own", settings.probes)
    if recipe.model.base is None and recipe.toy.eval_prompts < 2:
        raise RecipeError(
            f"'toy.eval_prompts': expected 2 at least, one for each half, but got {recipe.toy.eval_prompts}"
        )


def checkpoint_folder(settings: Calibrate) -> Path:
    """The checkpoint's folder, if there is an adapter in it."""
    if settings.checkpoint is None or not (Path(settings.checkpoint) / "adapter_config.json").is_file():
        raise RecipeError(
            "'calibrate.checkpoint': expected the folder of a trained adapter (adapter_config.json), such as the "
            f"quickstart leaves, but got {settings.checkpoint!r}"
        )
    return Path(settings.checkpoint)


def candidates(settings: Calibrate) -> list[Candidate]:
    """Presets × strengths × ranks."""
    return [
        Candidate(preset, strength, rank)
        for preset, strengths in settings.presets.items()
        for rank in (settings.ranks if preset != "data_aware" else settings.ranks[:1])  # where it does not matter
        for strength in (strengths or [None])
    ]


def calibrate(
    candidates: Sequence[Candidate], judge: Callable[[Candidate, str], Judgement], target: float
) -> Calibration:
    """Choose the candidate with the least task loss whose attack success on the tuning half is at most ``target``.

    ``judge(candidate, split)`` is asked for every candidate on ``"tuning"``, and for the chosen one on ``"held_out"``.
    Of equal losses the first one wins.
    """
    tuning = [(candidate, judge(candidate, "tuning")) for candidate in candidates]
    safe = [
        (judgement.task_loss, place)
        for place, (_, judgement) in enumerate(tuning)
        if judgement.attack_success <= target
    ]
    if not safe:
        return Calibration(target, tuning, None, None)
    chosen = tuning[min(safe)[1]][0]
    return Calibration(target, tuning, chosen, judge(chosen, "held_out"))


def write(result: Calibration, ends: dict[str, dict[str, Judgement]], folder: Path) -> None:
    """results.json: everything that was measured; it appears whole or not at all."""
    results = {
        "target": result.target,
        "without": {name: {split: asdict(own[split]) for split in own} for name, own in ends.items()},
        "tuning": [{**asdict(candidate), **asdict(judgement)} for candidate, judgement in result.tuning],
        "chosen": None if result.chosen is None else asdict(result.chosen),
        "held_out": None if result.held_out is None else asdict(result.held_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", json.dumps(plain(results), indent=2) + "\n")


def print_result(result: Calibration, ends: dict[str, dict[str, Judgement]], checkpoint: str) -> None:
    """All candidates, the chosen one, and the line of code that uses it."""
    console, half = Console(), result.tuning[0][1].prompts
    table = Table(
        title=f"tuning half, {half} prompts: attack success at most {result.target:g}?", title_justify="left"
    )
    table.add_column("model")
    for column in ("rank", "strength", "attack success", "task loss", "task retained"):
        table.add_column(column, justify="right")
    for name, own in ends.items():
        table.add_row(name, "", "", *_cells(own["tuning"], ends, "tuning"), end_section=name == "raw LoRA")
    for candidate, judgement in result.tuning:
        strength = "" if candidate.strength is None else f"{candidate.strength:g}"
        style = "bold green" if candidate == result.chosen else None
        cells = _cells(judgement, ends, "tuning")
        rank = "" if candidate.preset == "data_aware" else str(candidate.rank)
        table.add_row(candidate.preset, rank, strength, *cells, style=style)
    console.print(table)
    if result.chosen is None:
        console.print(f"None of {len(result.tuning)} settings keeps attack success at {result.target:g} or below.")
        return
    low, high = result.held_out.interval()
    success, loss, kept = _cells(result.held_out, ends, "held_out")
    console.print(
        f"Chosen for {checkpoint}: CSULoRACallback(..., {result.chosen.code()})\n"
        f"On {result.held_out.prompts} held-out prompts: attack success {success} (95 % interval {low:.1%} to "
        f"{high:.1%}), task loss {loss}, {kept} of the task retained.",
        highlight=False,
        soft_wrap=True,
    )
    if not low <= result.target:
        console.print("That is above the target: the tuning prompts were too few, or too unlike these.")


def _cells(judgement: Judgement, ends: dict[str, dict[str, Judgement]], split: str) -> tuple[str, str, str]:
    aligned, raw = ends["aligned model"][split].task_loss, ends["raw LoRA"][split].task_loss
    kept = f"{(aligned - judgement.task_loss) / (aligned - raw):.1%}" if aligned > raw else "nothing learned"
    return f"{judgement.attack_success:.1%}", f"{judgement.task_loss:.3f}", kept
