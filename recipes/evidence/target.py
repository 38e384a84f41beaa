"""What a target does in the place of a strength, and what refusals kept say of attack success, over seeds and poison.

On the trained adapters of a frontier; how it is looked for: :class:`recipes.evidence.bench.Bench`. Everything that was
trained or measured is kept in the output folder, and a run that is started again goes on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from csulora_callback.behaviour import Refusals
from csulora_callback.method.token_space import MAX_STRENGTH
from csulora_callback.models.factors import Factors
from recipes.evidence import bench as benches
from recipes.evidence import target_report, target_tables
from recipes.evidence.bench import PRESETS, READINGS, Bench
from recipes.evidence.frontier import Adapters, shown, to_json
from recipes.evidence.methods import METHODS
from recipes.files.points import Points, claim, plain, write_whole
from recipes.schema.recipe import Recipe, RecipeError

_ENDS = {"aligned": 0.0, "none": 1.0}  # how much of the raw update is in them


class Subject(benches.Subject, Protocol):
    """What :class:`recipes.evidence.frontier.Subject` can do besides."""

    def judge(self, seed: int, factors: Factors) -> dict[str, dict]:
        """As ``score`` on the held-out split; the first template has the ``side_effects``, over-refusal among them."""


@dataclass(frozen=True)
class Setting:
    """One point to measure: a method at a strength, or at the one that keeps ``share`` by what ``probes`` read.

    ``reading`` says of what, see ``READINGS``. ``aligned`` and ``none`` have none of these, nor has a fixed strength;
    they are measured by all sets of probes.
    """

    seed: int
    poison: float
    method: str
    strength: float | None = None
    probes: str | None = None
    reading: str | None = None
    share: float | None = None


KEY = tuple(Setting.__dataclass_fields__)


def grid(recipe: Recipe) -> list[Setting]:
    """All points in order, one seed's models after the other."""
    frontier, target = recipe.frontier, recipe.target
    settings = []
    for seed in frontier.seeds:
        for poison in frontier.poison_shares:
            settings += [Setting(seed, poison, name) for name in _ENDS]
            settings += [
                Setting(seed, poison, name, s) for name, strengths in target.strengths.items() for s in strengths
            ]
            settings += [
                Setting(seed, poison, name, None, probes, reading, share)
                for probes, names in target.found.items()
                for name in names
                for reading, shares in target.shares.items()
                for share in shares
            ]
    return settings


def check(recipe: Recipe) -> None:
    """Refuse what cannot be measured, before anything is trained."""
    target, frontier = recipe.target, recipe.frontier

    def refuse(key: str, expected: str, got: object) -> None:
        raise RecipeError(f"'{key}': expected {expected}, but got {got!r}")

    if not target.shares or not set(target.shares) <= set(READINGS):
        refuse("target.shares", f"some of {list(READINGS)}", list(target.shares))
    for reading, shares in target.shares.items():
        if not shares or not all(0.0 < share <= 1.0 for share in shares):
            refuse(f"target.shares.{reading}", "shares in (0, 1], at least one", shares)
    for key, value in (("margin", target.margin), ("attack_success", target.attack_success)):
        if not 0.0 <= value <= 1.0:
            refuse(f"target.{key}", "a share in [0, 1]", value)
    if recipe.smollm2.weights is None and list(target.found) != ["lab"]:
        refuse("target.found", "the probes 'lab' alone, as the toy lab can be asked no texts", list(target.found))
    if len(frontier.ranks) != 1:
        refuse("frontier.ranks", "one rank", frontier.ranks)
    named = {f"target.found.{probes}": names for probes, names in target.found.items()}
    for key, names in {"target.strengths": target.strengths, **named}.items():
        for name in names:
            if name not in PRESETS:
                near = difflib.get_close_matches(name, PRESETS, n=1)
                refuse(key, f"some of {list(PRESETS)}{f', such as {near[0]!r}' if near else ''}", name)
    for name, strengths in target.strengths.items():
        if not strengths or not all(0.0 < strength <= MAX_STRENGTH for strength in strengths):
            expected = f"strengths > 0 and of at most {MAX_STRENGTH:g}, at least one"
            refuse(f"target.strengths.{name}", expected, strengths)


def point_of(bench: Bench, setting: Setting, sets: Sequence[str]) -> dict:
    """The point of a setting."""
    method, probes = setting.method, setting.probes
    if probes is not None:
        found = bench.found(method, probes, setting.reading, setting.share)
        factors, by = bench.corrected(method, found.strength, probes), {probes: bench.measuring(method, probes)}
        tried = {"strength": found.strength, "is_enough": found.is_enough, "trials": len(found.tried)}
        return {**_told(bench, setting, factors, by), "found": tried}
    if method in _ENDS:
        factors = {name: (A, _ENDS[method] * B) for name, (A, B) in bench.raw.items()}
    else:
        factors = bench.corrected(method, setting.strength, sets[0])
    return {**_told(bench, setting, factors, {name: bench.held_back(name) for name in sets}), "found": None}


def _told(bench: Bench, setting: Setting, factors: Factors, measuring: Mapping[str, Refusals]) -> dict:
    kept = {name: {**asdict(bench.read(by, factors)), "prompts": len(by)} for name, by in measuring.items()}
    point = {**plain(asdict(setting)), "refusing": kept, "scores": bench.subject.judge(setting.seed, factors)}
    preset = PRESETS.get(setting.method)  # of the ends there is none
    if preset is not None and METHODS[preset].reads:
        point["rows"] = bench.rows_told()
    return point


def measure(subject: Subject, recipe: Recipe, output: Path) -> list[dict]:
    """All points of the grid, in its order; those that the output folder holds are not measured again."""
    (rank,), first = recipe.frontier.ranks, next(iter(recipe.target.found))
    claim(output, {**subject.describe(), "frontier.rank": rank, "target.found": first})
    points, settings = Points(output / "points.jsonl", KEY), grid(recipe)
    adapters, at, bench = Adapters(subject, output / "adapters", []), None, None
    for setting in _missing(settings, points):
        if at != (setting.seed, setting.poison):
            at = (setting.seed, setting.poison)
            bench = Bench(subject, *at, adapters.get(*at), output / "answers", rank)
        points.add(point_of(bench, setting, list(recipe.target.found)))
    return [points[tuple(asdict(setting).values())] for setting in settings]


def run(subject: Subject, recipe: Recipe, output: Path) -> dict:
    """Measure, and write results.json and table.md into the output folder; returns the results."""
    points = measure(subject, recipe, output)
    tables = target_tables.make_tables(points, recipe.target)
    grid_of = {"frontier": {key: getattr(recipe.frontier, key) for key in ("seeds", "poison_shares", "ranks")}}
    grid_of["target"] = asdict(recipe.target)
    results = {"measured_on": subject.describe(), "grid": plain(grid_of), **tables, "points": points}
    write_whole(output / "results.json", to_json(results))
    write_whole(output / "table.md", target_report.to_markdown(results))
    return results


def _missing(settings: list[Setting], points: Points) -> Iterator[Setting]:
    missing = [setting for setting in settings if tuple(asdict(setting).values()) not in points]
    return shown(settings, missing, "target")
