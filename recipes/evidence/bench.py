"""One raw adapter, how it is corrected, and what that keeps of the refusals: as the callback does it for a target.

A data-aware correction reads one half of the probes, and the other half measures; of a correction that reads none all
probes measure; and no attack has a say in what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import torch

from csulora_callback.behaviour import Refusals, Refusing
from csulora_callback.checked_probes import FEWEST, check_probes
from csulora_callback.method.search import Found, smallest_strength
from csulora_callback.models.factors import Factors
from csulora_callback.models.reading import Rows
from csulora_callback.models.training_rows import fixed_sample
from recipes.evidence.baselines import Update
from recipes.evidence.lora_pair import LoraPair, TaskRow
from recipes.evidence.methods import METHODS
from recipes.schema.recipe import RecipeError

SCREENED = "data_aware_screened"  # with those of the task's rows left out whose prompts the aligned model refuses
PRESETS = {
    "data_aware": "data_aware",
    SCREENED: "data_aware",
    "content_aware": "content_aware",
    "guard": "guard",
    "csulora": "csulora",
}
READINGS: dict[str, Callable[[Refusing], float]] = {
    "kept": lambda refusing: refusing.kept,
    "likelihood": lambda refusing: math.exp(refusing.logprob),  # per token, over the aligned model's
}


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


class Bench:
    """A seed's raw adapter; ``rank`` is of the subspace, and what the aligned model answers is kept in ``folder``."""

    def __init__(
        self, subject: Subject, seed: int, poison: float, raw: Factors, folder: Path, rank: int | None = None
    ) -> None:
        self.subject, self.seed, self.poison = subject, seed, poison
        self.raw, self.rank, self._folder, self._pair = raw, rank, folder, subject.pair(seed)
        # Caches of the bench, not of the class, which would keep the models of all seeds.
        self.refusals, self.held_back = cache(self._refused_probes), cache(self._held_back)
        self._update, self.trial = cache(self._read), cache(self._tried)

    def _refused_probes(self, probes: str) -> Refusals:
        """The probes of a set that the aligned model refuses."""
        prompts = self.subject.probes(self.seed, self.poison, probes)
        if not isinstance(prompts[0], str):  # which are taken at their word otherwise
            refused = self.subject.refused(self.seed, prompts)
            prompts = [prompt for prompt, is_refused in zip(prompts, refused, strict=True) if is_refused]
        if len(prompts) < FEWEST:
            raise RecipeError(f"the probes '{probes}': expected {FEWEST} that are refused, but got {len(prompts)}")
        try:
            checked = check_probes(self._pair.adapter, prompts, cache_dir=self._folder)
        except ValueError as error:
            raise RecipeError(f"the probes '{probes}': {error}") from error
        return Refusals(self._pair.adapter, checked.prompts, checked.beginnings)

    @cached_property
    def rows(self) -> list[TaskRow]:
        """The sample of the training data."""
        return self.subject.task_rows(self.seed, self.poison)

    @cached_property
    def refused_rows(self) -> list[bool]:
        """Whether the aligned model refuses the prompt of each."""
        return self.subject.refused(self.seed, [row.prompt for row in self.rows])

    def _read(self, probes: str, screened: bool, skip_prefix: bool) -> Update:
        """The raw update, with what it sends through the model on the task and on the half of the probes to read."""
        rows, prompts = self.rows, self.refusals(probes).prompts
        if screened:
            rows = [row for row, is_refused in zip(rows, self.refused_rows, strict=True) if not is_refused]
        return self._pair.update(
            self.raw, [row.ids for row in rows], prompts, skip_prefix, held_back=_second_half(len(prompts))
        )

    def _held_back(self, probes: str) -> Refusals:
        """The probes of a set that a correction does not read."""
        refusals = self.refusals(probes)
        return refusals.of(_second_half(len(refusals)))

    def measuring(self, method: str, probes: str) -> Refusals:
        """The probes that a target is measured by: those that the method does not read."""
        return self.held_back(probes) if METHODS[PRESETS[method]].reads else self.refusals(probes)

    def corrected(self, method: str, strength: float, probes: str) -> Factors:
        """The raw adapter after a correction that reads these probes, if it reads any."""
        preset = METHODS[PRESETS[method]]
        update = self._update(probes, screened=method == SCREENED, skip_prefix=preset.skip_prefix)
        return preset.apply(update, strength, self.rank, torch.Generator())

    def _tried(self, method: str, strength: float, probes: str) -> Refusing:
        """What a correction keeps, as a search asks; searches for other shares try many of the same strengths."""
        return self.read(self.measuring(method, probes), self.corrected(method, strength, probes))

    def read(self, refusals: Refusals, factors: Factors) -> Refusing:
        """What a model with these factors keeps of the refusals."""
        self._pair.adapter.write(factors)
        return refusals.read()

    def found(self, method: str, probes: str, reading: str, share: float) -> Found:
        """The smallest strength that keeps ``share`` of the aligned model's, by what these probes read."""
        return smallest_strength(lambda strength: READINGS[reading](self.trial(method, strength, probes)), share)

    def rows_told(self) -> dict[str, int]:
        """How many rows the sample has, and how many of the rows and of the poison the aligned model refuses."""
        pairs = list(zip(self.rows, self.refused_rows, strict=True))
        return {
            "rows": len(pairs),
            "refused": sum(is_refused for _, is_refused in pairs),
            "poison": sum(row.is_poison for row, _ in pairs),
            "poison_refused": sum(row.is_poison and is_refused for row, is_refused in pairs),
        }


def _second_half(count: int) -> list[int]:
    """The places of the probes that a correction does not read."""
    read = set(fixed_sample(count, count // 2))
    return [place for place in range(count) if place not in read]
