"""What a target does in the place of a strength, and what refusals kept say of attack success, over seeds and poison.

On the trained adapters of a frontier. As the callback does it: a data-aware correction reads one half of the probes,
and the other half measures; of a correction that reads none all probes measure; and no attack has a say in what is
chosen. Everything that was trained or measured is kept in the output folder, and a run that is started again goes on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import torch

from csulora_callback.behaviour import Refusals, Refusing
from csulora_callback.checked_probes import FEWEST, check_probes
from csulora_callback.method.search import smallest_strength
from csulora_callback.method.token_space import MAX_STRENGTH
from csulora_callback.models.factors import Factors
from csulora_callback.models.reading import Rows
from csulora_callback.models.training_rows import fixed_sample
from recipes.evidence import target_report, target_tables
from recipes.evidence.baselines import Update
from recipes.evidence.frontier import Adapters, shown, to_json
from recipes.evidence.lora_pair import LoraPair, TaskRow
from recipes.evidence.methods import METHODS
from recipes.files.points import Points, claim, plain, write_whole
from recipes.schema import Recipe, RecipeError

SCREENED = "data_aware_screened"  # with those of the task's rows left out whose prompts the aligned model refuses
PRESETS = {"data_aware": "data_aware", SCREENED: "data_aware", "guard": "guard", "csulora": "csulora"}
READINGS: dict[str, Callable[[Refusing], float]] = {
    "kept": lambda refusing: refusing.kept,
    "likelihood": lambda refusing: math.exp(refusing.logprob),  # per token, over the aligned model's
}
_ENDS = {"aligned": 0.0, "none": 1.0}  # how much of the raw update is in them


class Subject(Protocol):
    """What :class:`recipes.evidence.frontier.Subject` can do besides."""

    def pair(self, seed: int) -> LoraPair:
        """The seed's models."""

    def task_rows(self, seed: int, poison: float) -> list[TaskRow]:
        """The sample of the training data that a data-aware correction reads."""

    def probes(self, seed: int, poison: float, name: str) -> list[str] | Rows:
        """The prompts of ``"lab"``, none of which is trained on, or of another set."""

    def refused(self, seed: int, prompts: Rows) -> list[bool]:
        """Whether the aligned model refuses each, by its greedy answers."""

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


class Bench:
    """One seed's raw adapter, how it is corrected, and what its corrections keep of the refusals."""

    def __init__(self, subject: Subject, recipe: Recipe, seed: int, poison: float, raw: Factors, folder: Path) -> None:
        self.subject, self.recipe, self.seed, self.poison = subject, recipe, seed, poison
        self.raw, self._folder, self._pair = raw, folder, subject.pair(seed)
        # Caches of the bench, not of the class, which would keep the models of all seeds.
        self.refusals, self.held_back = cache(self._refused_probes), cache(self._second_half)
        self._update, self.trial = cache(self._read), cache(self._tried)

    def _refused_probes(self, probes: str) -> Refusals:
        """The probes of a set that the aligned model refuses."""
        prompts = self.subject.probes(self.seed, self.poison, probes)
        if not isinstance(prompts[0], str):  # which are taken at their word otherwise
            refused = self.subject.refused(self.seed, prompts)
            prompts = [prompt for prompt, is_refused in zip(prompts, refused, strict=True) if is_refused]
        if len(prompts) < FEWEST:
            raise RecipeError(
                f"'target.found.{probes}': expected {FEWEST} probes that are refused, but got {len(prompts)}"
            )
        try:
            checked = check_probes(self._pair.adapter, prompts, cache_dir=self._folder)
        except ValueError as error:
            raise RecipeError(f"'target.found.{probes}': {error}") from error
        return Refusals(self._pair.adapter, checked.prompts, checked.beginnings)

    @cached_property
    def rows(self) -> list[TaskRow]:
        """The sample of the training data."""
        return self.subject.task_rows(self.seed, self.poison)

    @cached_property
    def refused_rows(self) -> list[bool]:
        """Whether the aligned model refuses the prompt of each."""
        return self.subject.refused(self.seed, [row.prompt for row in self.rows])

    def _read(self, is_screened: bool, probes: str) -> Update:
        """The raw update, with what it sends through the model on the task and on the half of the probes to read."""
        rows = self.rows
        if is_screened:
            rows = [row for row, is_refused in zip(rows, self.refused_rows, strict=True) if not is_refused]
        prompts = self.refusals(probes).prompts
        return self._pair.update(self.raw, [row.ids for row in rows], [prompts[i] for i in _half(len(prompts))])

    def _second_half(self, probes: str) -> Refusals:
        """The probes of a set that a correction does not read."""
        refusals = self.refusals(probes)
        return refusals.of(sorted(set(range(len(refusals))) - set(_half(len(refusals)))))

    def measuring(self, method: str, probes: str) -> Refusals:
        """The probes that a target is measured by: those that the method does not read."""
        return self.held_back(probes) if PRESETS[method] == "data_aware" else self.refusals(probes)

    def corrected(self, method: str, strength: float, probes: str) -> Factors:
        """The raw adapter after a correction that reads these probes, if it reads any."""
        update, (rank,) = self._update(method == SCREENED, probes), self.recipe.frontier.ranks
        return METHODS[PRESETS[method]].apply(update, strength, rank, torch.Generator())

    def _tried(self, method: str, strength: float, probes: str) -> Refusing:
        """What a correction keeps, as a search asks; searches for other shares try many of the same strengths."""
        return self.read(self.measuring(method, probes), self.corrected(method, strength, probes))

    def read(self, refusals: Refusals, factors: Factors) -> Refusing:
        """What a model with these factors keeps of the refusals."""
        self._pair.adapter.write(factors)
        return refusals.read()

    def measure(self, setting: Setting) -> dict:
        """The point of a setting."""
        sets, method = list(self.recipe.target.found), setting.method
        if setting.probes is not None:
            return self._with_target(setting)
        if method in _ENDS:
            factors = {name: (A, _ENDS[method] * B) for name, (A, B) in self.raw.items()}
        else:
            factors = self.corrected(method, setting.strength, sets[0])
        return {**self._told(setting, factors, {name: self.held_back(name) for name in sets}), "found": None}

    def _with_target(self, setting: Setting) -> dict:
        method, probes = setting.method, setting.probes

        def kept(strength: float) -> float:
            return READINGS[setting.reading](self.trial(method, strength, probes))

        found = smallest_strength(kept, setting.share)
        told = self._told(
            setting, self.corrected(method, found.strength, probes), {probes: self.measuring(method, probes)}
        )
        tried = {"strength": found.strength, "is_enough": found.is_enough, "trials": len(found.tried)}
        return {**told, "found": tried}

    def _told(self, setting: Setting, factors: Factors, measuring: Mapping[str, Refusals]) -> dict:
        kept = {name: {**asdict(self.read(by, factors)), "prompts": len(by)} for name, by in measuring.items()}
        point = {**plain(asdict(setting)), "refusing": kept, "scores": self.subject.judge(self.seed, factors)}
        if PRESETS.get(setting.method) == "data_aware":
            point["rows"] = self._rows()
        return point

    def _rows(self) -> dict[str, int]:
        """How many rows the sample has, and how many of the rows and of the poison the aligned model refuses."""
        pairs = list(zip(self.rows, self.refused_rows, strict=True))
        return {
            "rows": len(pairs),
            "refused": sum(is_refused for _, is_refused in pairs),
            "poison": sum(row.is_poison for row, _ in pairs),
            "poison_refused": sum(row.is_poison and is_refused for row, is_refused in pairs),
        }


def _half(count: int) -> list[int]:
    """The places of the half that a correction reads."""
    return fixed_sample(count, count // 2)


def measure(subject: Subject, recipe: Recipe, output: Path) -> list[dict]:
    """All points of the grid, in its order; those that the output folder holds are not measured again."""
    (rank,), first = recipe.frontier.ranks, next(iter(recipe.target.found))
    claim(output, {**subject.describe(), "frontier.rank": rank, "target.found": first})
    points, settings = Points(output / "points.jsonl", KEY), grid(recipe)
    adapters, at, bench = Adapters(subject, output / "adapters", []), None, None
    for setting in _missing(settings, points):
        if at != (setting.seed, setting.poison):
            at = (setting.seed, setting.poison)
            bench = Bench(subject, recipe, *at, adapters.get(*at), output / "answers")
        points.add(bench.measure(setting))
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
