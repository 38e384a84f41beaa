"""What the methods of a frontier take beside the plain training, in CPU time of this machine.

Other than the points it differs from run to run, and is kept in a file of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from recipes.evidence.controls import PLAIN, Control
from recipes.evidence.frontier import Adapters, Setting, Subject, grid, to_json
from recipes.evidence.methods import METHODS, STRENGTH_AFTER, Method
from recipes.files.points import key_of, write_whole
from recipes.schema.measured import Frontier

STEPS, REPEATS = 8, 3  # of trainings that are timed
FREE = ("aligned", "none")
"""The methods that do nothing."""


def measure(subject: Subject, short: Subject, frontier: Frontier, output: Path) -> list[dict]:
    """The cost of each method, of each training where they differ, for the first seed.

    What ``costs.json`` of the output folder has is not measured again.

    Args:
        subject: the frontier's, which is measured.
        short: the same with ``STEPS`` steps of training.
        frontier: its methods.
        output: the frontier's folder.

    Returns:
        Of each setting what is spent ``during`` the training, as a share of the plain one, and ``after`` it, once a
        correction, in steps of the plain one. The estimate of the subspace, once a pair of models, is not in it.
    """
    path = output / "costs.json"
    known = {key_of(cost): cost for cost in json.loads(path.read_text())["costs"]} if path.exists() else {}
    settings = {key_of(setting.to_json()): setting for setting in settings_of(frontier)}
    if missing := settings.keys() - known.keys():
        meter = _Meter(subject, short, Adapters(subject, output / "adapters", []), next(iter(settings.values())))
        known |= {key: {**settings[key].to_json(), **meter.read(settings[key])} for key in settings if key in missing}
    costs = [known[key] for key in settings]
    write_whole(path, to_json({"costs": costs}))
    return costs


def settings_of(frontier: Frontier) -> list[Setting]:
    """One of each method that does something, and of each of its trainings."""
    seed, poison = frontier.seeds[0], max(frontier.poison_shares)
    found = {}
    for setting in grid(frontier):
        control = METHODS[setting.method].control
        if (setting.seed, setting.poison) == (seed, poison) and setting.method not in FREE:
            found.setdefault((setting.method, None if control is None else setting.strength), setting)
    return list(found.values())


class _Meter:
    """CPU seconds of trainings and corrections, in units of one plain step."""

    def __init__(self, subject: Subject, short: Subject, adapters: Adapters, first: Setting) -> None:
        self.subject, self.short, self.adapters = subject, short, adapters
        self.seed, self.poison = first.seed, first.poison
        self.raw = adapters.get(self.seed, self.poison)
        self.update = subject.update(self.seed, self.poison, self.raw)
        self.of_training = cache(self._trained)

    def read(self, setting: Setting) -> dict[str, float]:
        method, plain = METHODS[setting.method], self.of_training(PLAIN)
        during = after = 0.0
        if method.control is not None:
            more = self.of_training(Control(method.control, setting.strength)) - plain
            during, after = (0.0, more) if method.control == "one_shot" else (more, 0.0)
        if method.probes is not None:
            bench = self.adapters.bench(self.seed, self.poison)
            after += _timed(lambda: bench.found(method.preset, method.probes, "likelihood", setting.strength))
        elif method.apply is not None:
            strength = setting.strength if method.control is None else STRENGTH_AFTER
            after += _timed(lambda: self._correct(method, strength, setting.rank))
        return {"during": during / plain, "after": after / (plain / STEPS)}

    def _trained(self, control: Control) -> float:
        # Of several the fastest; without poison, as the number of rows is that of a batch with it and without.
        return min(_timed(lambda: self.short.train(self.seed, 0.0, control, [])) for _ in range(REPEATS))

    def _correct(self, method: Method, strength: float, rank: int) -> None:
        read = (
            self.subject.update(self.seed, self.poison, self.raw, method.skip_prefix) if method.reads else self.update
        )
        method.apply(read, strength, rank, torch.Generator().manual_seed(0))


def in_words(cost: Mapping | None) -> str:
    """What is spent in training as a share of it, and what is spent after it in its steps."""
    parts = [] if cost is None or abs(cost["during"]) < 0.03 else [f"{cost['during']:+.0%} of the training"]
    parts += [] if cost is None or cost["after"] < 0.05 else [f"{cost['after']:.2g} steps once"]
    return ", ".join(parts) or "none"


def _timed(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun
