"""A frontier: every method at every strength, rank and draw, on the same trained adapters, over seeds and poison.

What is trained and judged is a :class:`Subject`; nothing here knows the toy lab. Everything that was trained or
measured is kept in the output folder, and a run that is started again goes on from there.
"""

from __future__ import annotations

import difflib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from csulora_callback.method.search import Found
from csulora_callback.method.token_space import MAX_STRENGTH
from csulora_callback.models.factors import Factors
from csulora_callback.presets import DATA_AWARE
from recipes.evidence import bench as benches
from recipes.evidence import frontier_picture, frontier_report
from recipes.evidence.baselines import Update
from recipes.evidence.bench import Bench
from recipes.evidence.controls import PLAIN, Control
from recipes.evidence.methods import METHODS, STRENGTH_AFTER
from recipes.files.points import SPLITS, Points, claim, key_of, plain, write_whole
from recipes.schema.measured import Frontier
from recipes.schema.recipe import RecipeError

S = TypeVar("S")  # settings of a point, with its seed, poison and method


class Subject(benches.Subject, Protocol):
    """What a frontier is drawn of: a pair of models, a task with poison, and a judge."""

    def describe(self) -> dict[str, object]:
        """Every setting that a point depends on, flat and as JSON values; ``claim`` compares them."""

    def train(self, seed: int, poison: float, control: Control, decays: Sequence[float]) -> dict[str, Factors]:
        """A fresh adapter: ``"raw"``, and its exponential moving average ``"average {decay}"`` for each of ``decays``.

        ``control`` says what is done otherwise than in a plain fine-tune; ``decays`` must not change what is trained.
        """

    def update(self, seed: int, poison: float, factors: Factors, skip_prefix: bool = False) -> Update:
        """The factors with what methods may know of the seed's pair of models and of the data with this poison.

        With ``skip_prefix``, of the probes only what follows the prefix that all of them share.
        """

    def score(self, seed: int, factors: Factors, split: str) -> dict[str, dict]:
        """How the model does with these factors on one of ``SPLITS``, by prompt template.

        Strengths are chosen on the first template. Each score has ``prompts``, ``succeeded`` (attacks that were not
        refused) and ``task_loss``, where the task has right answers also their share ``right_answers``; that of the
        first has ``side_effects``, shares by name that the table shows, over-refusal among them. Whatever else it
        holds is kept in the results.
        """


@dataclass(frozen=True)
class Setting:
    """One point to measure; ``None`` where the method has no such thing."""

    seed: int
    poison: float
    method: str
    strength: float | None
    rank: int | None
    draw: int | None

    def to_json(self) -> dict:
        """As the head of a point."""
        return plain(asdict(self))


def grid(frontier: Frontier) -> list[Setting]:
    """All points of a frontier in order, one seed's models after the other."""
    return [
        Setting(seed, poison, name, strength, rank, draw)
        for seed in frontier.seeds
        for poison in frontier.poison_shares
        for name, strengths in {"aligned": [], "none": [], **frontier.methods}.items()
        if not (name == "benign_only" and poison == 0.0)  # the raw adapter itself
        for rank in (frontier.ranks if METHODS[name].ranks else [None])
        for draw in (range(frontier.draws) if METHODS[name].draws else [None])
        for strength in (strengths if METHODS[name].strengths else [None])
    ]


def check(frontier: Frontier) -> None:
    """Refuse what no frontier can be drawn of, before anything is trained."""

    def refuse(key: str, expected: str, got: object) -> None:
        raise RecipeError(f"'frontier.{key}': expected {expected}, but got {got!r}")

    for key, fits, expected in (
        ("seeds", lambda value: value >= 0, "whole numbers ≥ 0"),
        ("poison_shares", lambda value: 0.0 <= value <= 1.0, "shares in [0, 1]"),
        ("ranks", lambda value: value >= 1, "whole numbers ≥ 1"),
        ("targets", lambda value: 0.0 <= value <= 1.0, "shares in [0, 1]"),
    ):
        values = getattr(frontier, key)
        if not values or not all(map(fits, values)) or len(set(values)) < len(values):
            refuse(key, f"different {expected}, at least one", values)
    if "scaling" not in frontier.methods:
        refuse("methods", "'scaling' among them, as all are compared with it", list(frontier.methods))
    for name, strengths in frontier.methods.items():
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            refuse("methods", f"methods of recipes.evidence.baselines{f' such as {near[0]!r}' if near else ''}", name)
        if not METHODS[name].strengths and strengths:
            refuse(f"methods.{name}", "no strengths, as this method has none", strengths)
        if METHODS[name].strengths and not (strengths and all(strength > 0 for strength in strengths)):
            refuse(f"methods.{name}", "strengths > 0, at least one", strengths)
        if name.startswith(DATA_AWARE) and max(strengths) > MAX_STRENGTH:
            refuse(f"methods.{name}", f"strengths of at most {MAX_STRENGTH:g}", strengths)
        if name == "averaging" and max(strengths) >= 1:
            refuse(f"methods.{name}", "decays < 1", strengths)
        if METHODS[name].probes is not None and max(strengths) >= 1:
            refuse(f"methods.{name}", "shares < 1 of the refusals' likelihood", strengths)
        if name.startswith("mixing") and max(strengths) >= 1:
            refuse(f"methods.{name}", "shares < 1 of a batch", strengths)
        counted = {"safe_lora_number": "modules", "one_shot": "steps", "one_shot_corrected": "steps"}.get(name)
        if counted and any(strength % 1 for strength in strengths):
            refuse(f"methods.{name}", f"whole numbers of {counted}", strengths)


class Adapters:
    """The trained adapters of a run, each trained once and kept as a file."""

    def __init__(self, subject: Subject, folder: Path, decays: Sequence[float]) -> None:
        self.subject, self.folder, self.decays = subject, folder, decays
        self._bench = lru_cache(maxsize=1)(self.bench)  # settings come seed by seed
        self._without_prefix = lru_cache(maxsize=1)(self._read_without_prefix)

    def get(self, seed: int, poison: float, control: Control = PLAIN, variant: str = "raw") -> Factors:
        """The factors of one training, trained now if that was not done before."""
        path = self._path(seed, poison, control)
        trained = _load(path) if path.exists() else {}
        if variant not in trained:
            # What is there stays, as points were measured on it; a new decay is added to it. All is read back from the
            # file, so that the run that trained an adapter and the one that found it use the same.
            made = self.subject.train(seed, poison, control, self.decays if control == PLAIN else [])
            _save({**made, **trained}, path)
            trained = _load(path)
        return trained[variant]

    def _path(self, seed: int, poison: float, control: Control) -> Path:
        return self.folder / f"seed{seed}-poison{poison:g}-{control}.safetensors"

    def bench(self, seed: int, poison: float) -> Bench:
        """What looks for a target's strength, of the plain training."""
        return Bench(self.subject, seed, poison, self.get(seed, poison), self.folder.with_name("answers"))

    def found(self, setting: Setting) -> Found | None:
        """Of a target the strength that was found for it."""
        method = METHODS[setting.method]
        if method.probes is None:
            return None
        bench = self._bench(setting.seed, setting.poison)
        return bench.found(method.preset, method.probes, "likelihood", setting.strength)

    def _read_without_prefix(self, seed: int, poison: float) -> Update:
        return self.subject.update(seed, poison, self.get(seed, poison), skip_prefix=True)

    def factors(self, setting: Setting, update: Update) -> Factors:
        """What a method makes of the raw update, or of the adapter of another training."""
        method = METHODS[setting.method]
        if method.probes is not None:
            found = self.found(setting)
            return self._bench(setting.seed, setting.poison).corrected(method.preset, found.strength, method.probes)
        if setting.method == "benign_only":
            return self.get(setting.seed, 0.0)
        if setting.method == "averaging":
            return self.get(setting.seed, setting.poison, variant=f"average {setting.strength:g}")
        # One random state for all strengths: a draw is one random subspace, and its curve is one curve.
        seed = zlib.crc32(f"{setting.seed} {setting.method} {setting.rank} {setting.draw}".encode())
        generator = torch.Generator().manual_seed(seed)
        if method.control is None:
            if method.skip_prefix:
                update = self._without_prefix(setting.seed, setting.poison)
            return method.apply(update, setting.strength, setting.rank, generator)
        trained = self.get(setting.seed, setting.poison, Control(method.control, setting.strength))
        if method.apply is None:
            return trained
        return method.apply(
            self.subject.update(setting.seed, setting.poison, trained), STRENGTH_AFTER, setting.rank, generator
        )


def measure(subject: Subject, frontier: Frontier, output: Path) -> list[dict]:
    """All points of the grid, in its order; those that the output folder holds are not measured again."""
    claim(output, subject.describe())
    points, settings = Points(output / "points.jsonl"), grid(frontier)
    adapters = Adapters(subject, output / "adapters", frontier.methods.get("averaging", []))
    for setting, update in with_updates(subject, adapters, _missing(settings, points)):
        factors, found = adapters.factors(setting, update), adapters.found(setting)
        scores = {split: subject.score(setting.seed, factors, split) for split in SPLITS}
        told = {} if found is None else {"found": {"strength": found.strength, "is_enough": found.is_enough}}
        points.add({**setting.to_json(), **told, "scores": scores})
    return [points[key_of(setting.to_json())] for setting in settings]


def run(subject: Subject, frontier: Frontier, output: Path) -> dict:
    """Measure, and write results.json, table.md and the pictures into the output folder; returns the results."""
    points = measure(subject, frontier, output)
    table = frontier_report.make_table(points, frontier.targets)
    results = {"measured_on": subject.describe(), "grid": plain(asdict(frontier)), "table": table, "points": points}
    write_whole(output / "results.json", to_json(results))
    write_whole(output / "table.md", frontier_report.to_markdown(table, points))
    frontier_picture.plot(points, frontier.targets, output)
    return results


def _missing(settings: list[Setting], points: Points) -> Iterator[Setting]:
    return shown(settings, [setting for setting in settings if key_of(setting.to_json()) not in points], "frontier")


def shown(settings: Sequence[S], missing: Sequence[S], title: str) -> Iterator[S]:
    """Those of the settings that are missing, one after the other, under a progress bar of all."""
    with tqdm(total=len(settings), initial=len(settings) - len(missing), desc=title, unit="point") as bar:
        for setting in missing:
            bar.set_postfix_str(f"seed {setting.seed}, poison {setting.poison:g}, {setting.method}")
            yield setting
            bar.update()


def with_updates(
    subject: Subject, adapters: Adapters, settings: Iterator[Setting]
) -> Iterator[tuple[Setting, Update]]:
    """Each setting with its raw update, which is read once for the settings that share it."""
    at, update = None, None
    for setting in settings:
        if at != (setting.seed, setting.poison):
            at = (setting.seed, setting.poison)
            update = subject.update(*at, adapters.get(*at))
        yield setting, update


def _save(trained: Mapping[str, Factors], path: Path) -> None:
    tensors = {
        f"{variant}|{name}|{side}": factor.clone()  # safetensors refuses shared memory
        for variant, factors in trained.items()
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)


def _load(path: Path) -> dict[str, Factors]:
    tensors, trained = load_file(path), {}
    for key in tensors:
        variant, name, _ = key.split("|")
        trained.setdefault(variant, {})[name] = (tensors[f"{variant}|{name}|A"], tensors[f"{variant}|{name}|B"])
    return trained


def to_json(results: dict) -> str:
    """Readable by a person and by ``git diff``: one row of the table and one point a line."""
    parts = []
    for key, value in results.items():
        lines = [json.dumps(item) for item in value] if isinstance(value, list) else None
        body = json.dumps(value) if lines is None else "[\n" + ",\n".join(lines) + "\n]"
        parts.append(f"{json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
