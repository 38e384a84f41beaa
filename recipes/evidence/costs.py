"""What the methods of a frontier take beside the plain training, in CPU time of this machine.

Other than the points it differs from run to run, and is kept in a file of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from recipes.evidence.baselines import Update
from recipes.evidence.controls import Control
from recipes.evidence.frontier import Adapters, Setting, Subject, grid
from recipes.evidence.methods import METHODS, STRENGTH_AFTER
from recipes.files.points import key_of, write_whole
from recipes.schema import Frontier


def measure(subject: Subject, frontier: Frontier, steps: int, output: Path) -> list[dict]:
    """The cost of each method, of each training where they differ, for the first seed and the most poison.

    What ``costs.json`` of the output folder has is not measured again.

    Args:
        subject: the frontier's, which is measured.
        frontier: its methods.
        steps: of the plain training.
        output: the frontier's folder.

    Returns:
        Of each setting what is spent ``during`` the training, growing with it, and ``after`` it, once a correction: in
        as many steps of the plain one as take that CPU time. The estimate of the subspace, once a pair of models, is
        not in it.
    """
    path = output / "costs.json"
    known = {key_of(cost): cost for cost in json.loads(path.read_text())["costs"]} if path.exists() else {}
    adapters = Adapters(subject, output / "adapters", [])
    seed, poison = frontier.seeds[0], max(frontier.poison_shares)
    settings, seen = [], set()
    for setting in grid(frontier):
        method = METHODS[setting.method]
        trained = setting.strength if method.control is not None else None
        if (setting.seed, setting.poison) == (seed, poison) and (setting.method, trained) not in seen:
            seen.add((setting.method, trained))
            settings.append(setting)
    update, costs = None, []
    for setting in settings:
        key = key_of(setting.to_json())
        if key not in known:
            update = update or subject.update(seed, poison, adapters.get(seed, poison))
            during, after = _seconds(subject, adapters, setting, update)
            of_step = adapters.seconds(seed, poison) / steps
            known[key] = {**setting.to_json(), "during": during / of_step, "after": after / of_step}
        costs.append(known[key])
    body = ",\n".join(json.dumps(cost) for cost in costs)
    write_whole(path, f'{{"training_steps": {steps}, "costs": [\n{body}\n]}}\n')
    return costs


def in_words(cost: Mapping, training_steps: int) -> str:
    """What is spent in training as a share of it, and what is spent after it in its steps."""
    parts = [f"{cost['during'] / training_steps:+.0%} of the training"] if cost["during"] else []
    parts += [f"{cost['after']:.2g} steps once"] if cost["after"] else []
    return ", ".join(parts) or "none"


def _seconds(subject: Subject, adapters: Adapters, setting: Setting, update: Update) -> tuple[float, float]:
    """During training, and after it."""
    method, at = METHODS[setting.method], (setting.seed, setting.poison)
    if method.probes is not None:
        bench = adapters.bench(*at)
        return 0.0, _timed(lambda: bench.found("data_aware", method.probes, "likelihood", setting.strength))
    extra = after = 0.0
    if method.control is not None:
        extra = adapters.seconds(*at, Control(method.control, setting.strength)) - adapters.seconds(*at)
    if method.apply is not None:
        strength = setting.strength if method.control is None else STRENGTH_AFTER

        def correction() -> None:
            read = subject.update(*at, update.factors) if method.reads else update
            method.apply(read, strength, setting.rank, torch.Generator().manual_seed(0))

        after = _timed(correction)
    return (0.0, extra + after) if method.control == "one_shot" else (extra, after)


def _timed(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun
