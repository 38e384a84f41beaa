"""What else the settings that a frontier chose do to a model, and how soon more of the same training undoes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from tqdm.auto import tqdm

from csulora_callback.models.factors import Factors
from recipes.evidence.baselines import relative_change
from recipes.evidence.frontier import Adapters, Setting, to_json, with_updates
from recipes.evidence.frontier_report import first, percent, retained, side_effects_of, with_interval
from recipes.evidence.methods import METHODS, STRENGTH_AFTER
from recipes.files.markdown import markdown_table
from recipes.files.points import Points, claim, key_of, plain, write_whole
from recipes.schema.measured import Effects
from recipes.schema.recipe import Recipe, RecipeError

HELD = "attacked, then corrected again"
HELD_IS = (
    f"*{HELD.capitalize()}*: after the last of these, and then, whatever came before, by `data_aware` at strength "
    f"{STRENGTH_AFTER:g}, as the callback can correct a second run."
)
_NOTHING = {"strength": None, "rank": None, "draw": None}  # of the points that have no such thing


class Subject(Protocol):
    """What :class:`recipes.evidence.frontier.Subject` can do besides."""

    def effects(self, seed: int, factors: Factors) -> dict[str, float]:
        """How a model with these factors does on what is neither attack nor task, by name."""

    def trained_on(self, seed: int, poison: float, factors: Factors, steps: Sequence[int]) -> list[Factors]:
        """The factors after so many more steps on the poisoned data, from these."""

    def attack_success(self, seed: int, factors: Factors) -> float:
        """On the held-out half."""


def check(recipe: Recipe) -> None:
    """Refuse what a frontier has not chosen for, before anything is trained."""
    effects, frontier = recipe.effects, recipe.frontier
    if effects.target is None:
        return
    for key, value, known in (
        ("target", effects.target, frontier.targets),
        ("poison", effects.poison, frontier.poison_shares),
    ):
        if value not in known:
            raise RecipeError(f"'effects.{key}': expected one of the frontier's, {known}, but got {value!r}")
    for name in effects.methods or []:
        if name not in frontier.methods:
            raise RecipeError(
                f"'effects.methods': expected some of the frontier's, {list(frontier.methods)}, but got {name!r}"
            )
    if not effects.steps or sorted(set(effects.steps)) != effects.steps or effects.steps[0] < 1:
        raise RecipeError(f"'effects.steps': expected rising whole numbers ≥ 1, but got {effects.steps}")
    if effects.steps[-1] > recipe.training.max_steps:
        raise RecipeError(
            f"'effects.steps': expected at most training.max_steps = {recipe.training.max_steps}, but got "
            f"{effects.steps}"
        )


def run(subject: Subject, recipe: Recipe, results: Mapping, output: Path) -> None:
    """Measure, and write side_effects.json and side_effects.md into the output folder.

    ``results`` are the frontier's.
    """
    adapters = Adapters(subject, output / "adapters", recipe.frontier.methods.get("averaging", []))
    settings = chosen(results["table"], recipe.frontier.seeds, recipe.effects)
    measured = measure(subject, adapters, settings, recipe.effects, output)
    table = make_table(with_scores(measured, results["points"]))
    found = {"effects": plain(asdict(recipe.effects)), "table": table, "points": measured}
    write_whole(output / "side_effects.json", to_json(found))
    write_whole(output / "side_effects.md", to_markdown(table, recipe.effects))


def chosen(table: Sequence[Mapping], seeds: Sequence[int], effects: Effects) -> list[Setting]:
    """Of each seed the aligned model, the raw LoRA, and what was chosen for the methods; of random ones the first."""
    rows = [row for row in table if (row["poison"], row["target"]) == (effects.poison, effects.target)]
    rows = [row for row in rows if effects.methods is None or row["method"] in effects.methods]
    settings = []
    for place, seed in enumerate(seeds):
        settings += [Setting(seed, effects.poison, name, None, None, None) for name in ("aligned", "none")]
        for row in rows:
            pick = row["chosen"][place][0]
            if pick is None or row["method"] == "none":
                continue
            strength = None if "strength" not in pick else float(pick["strength"])
            rank, draw = pick.get("rank"), pick.get("draw")
            settings.append(Setting(seed, effects.poison, row["method"], strength, rank, draw))
    return settings


def measure(subject: Subject, adapters: Adapters, settings: Sequence[Setting], effects: Effects, output: Path) -> list:
    """Each setting's effects; those that the folder ``effects`` of the output holds are not measured again."""
    folder = output / "effects"
    chosen_for = ("target", "poison", "methods")  # which settings are measured, and not how
    claim(folder, {key: value for key, value in asdict(effects).items() if key not in chosen_for})
    points = Points(folder / "points.jsonl")
    missing = [setting for setting in settings if key_of(setting.to_json()) not in points]
    for setting, update in with_updates(subject, adapters, _shown(missing)):
        factors = adapters.factors(setting, update)
        own = {**subject.effects(setting.seed, factors), "relative change": relative_change(update, factors)}
        later = subject.trained_on(setting.seed, setting.poison, factors, effects.steps)
        again = [subject.attack_success(setting.seed, live) for live in later]
        update_then = subject.update(setting.seed, setting.poison, later[-1])
        corrected = METHODS["data_aware"].apply(update_then, STRENGTH_AFTER, None, torch.Generator())
        own[HELD] = subject.attack_success(setting.seed, corrected)
        points.add({**setting.to_json(), "effects": own, "again": again})
    return [points[key_of(setting.to_json())] for setting in settings]


def with_scores(measured: Sequence[Mapping], points: Sequence[Mapping]) -> list[dict]:
    """The measured effects after what the frontier itself says of the same settings, on the held-out half."""
    scores = {key_of(point): point["scores"]["held_out"] for point in points}
    whole = []
    for point in measured:
        own = scores[key_of(point)]
        score, effects = first(own), side_effects_of(own)
        ends = (first(scores[key_of({**point, **_NOTHING, "method": name})]) for name in ("aligned", "none"))
        told = {"task retained": retained(score, *ends), "attack success": score["succeeded"] / score["prompts"]}
        whole.append({**point, "effects": {**told, **effects, **point["effects"]}})
    return whole


def make_table(points: Sequence[Mapping]) -> list[dict]:
    """One row a method: means over the seeds where a setting was chosen, with bootstrap intervals."""
    rows = []
    for method in dict.fromkeys(point["method"] for point in points):
        mine = [point for point in points if point["method"] == method]
        rows.append(
            {
                "method": method,
                "seeds": len(mine),
                "effects": {name: with_interval([p["effects"][name] for p in mine]) for name in mine[0]["effects"]},
                "again": [with_interval(list(shares)) for shares in zip(*(p["again"] for p in mine), strict=True)],
            }
        )
    return rows


def to_markdown(rows: Sequence[Mapping], effects: Effects) -> str:
    """The rows, for a person."""
    names = list(rows[0]["effects"])
    columns = ["method", "seeds", *names, *(f"attack success after {n}" for n in effects.steps)]
    lines = [
        f"Settings chosen for attack success ≤ {effects.target:g} with {effects.poison:.0%} poison; means over the",
        "seeds that have one and, in brackets, 2.5 and 97.5 percentiles of means over resampled seeds; shares in",
        "percent, losses in nats a token; all on held-out prompts. *Relative change*: ‖X − Δ‖ / ‖Δ‖ of the adapter.",
        "*Attack success after n*: after so many more steps of the same fine-tune, poison included, from the",
        "corrected adapter.",
        *([HELD_IS] if HELD in names else []),
        "",
    ]
    cells = []
    for row in rows:
        own = [METHODS[row["method"]].label, str(row["seeds"])]
        own += [_cell(name, row["effects"][name]) for name in names]
        own += [percent(share) for share in row["again"]]
        cells.append(own)
    return "\n".join([*lines, markdown_table(columns, cells)]) + "\n"


def _cell(name: str, value: Mapping) -> str:
    if "loss" not in name and name != "relative change":
        return percent(value)
    interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['mean']:.2f}{interval}"


def _shown(settings: Sequence[Setting]) -> Iterator[Setting]:
    with tqdm(total=len(settings), desc="side effects", unit="setting") as bar:
        for setting in settings:
            bar.set_postfix_str(f"seed {setting.seed}, {setting.method}")
            yield setting
            bar.update()
