"""Which of a recipe's prompts data-aware corrections read, and which ones everything is judged by: never the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from recipes.files.sources import PROMPTS, prompts_of
from recipes.schema.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Prompts:
    """Prompts that the aligned model refuses, and harmless ones that look like them.

    Attributes:
        read: by data-aware corrections; ``None`` where the recipe has none to read.
        judged: whose answers are looked at; empty where attack success is not measured.
        source: of ``judged``, for a title.
        harmless: those whose answers are looked at; empty where over-refusal is not measured.
    """

    read: list[str] | None
    judged: list[str]
    source: str
    harmless: list[str] = field(default_factory=list)


def choose_prompts(recipe: Recipe) -> Prompts:
    """The prompts of ``data.probes``, ``data.attacks`` and ``data.harmless``.

    Without attacks the probes are judged by: all of them, or, where a correction is data-aware, every other one. It
    reads the rest then.

    Raises:
        RecipeError: if they cannot be read, one prompt is to be divided, or stands in two of the three where a
            correction or a judgement would be of both.
    """
    probes, attacks, harmless = (prompts_named(recipe, f"data.{key}") for key in PROMPTS)
    chosen = _to_be_refused(recipe, probes, attacks)
    if harmless is None:
        return chosen
    for key, others in (("probes", probes), ("attacks", attacks)):
        check_apart("data.harmless", harmless, f"data.{key}, which are to be refused", others)
    return replace(chosen, harmless=harmless)


def prompts_named(recipe: Recipe, key: str) -> list[str] | None:
    """Those of a key such as ``"data.probes"``, each once: one in both halves would be judged by what it chose.

    Raises:
        RecipeError: if they cannot be read.
    """
    source, column = attrgetter(key, f"{key}_column")(recipe)
    return None if source is None else list(dict.fromkeys(prompts_of(key, source, column)))


def check_apart(key: str, prompts: Sequence[str], what: str, others: Sequence | None) -> None:
    """Refuse prompts that are among others as well; ``what`` names those.

    Raises:
        RecipeError: naming ``key`` and one of them.
    """
    if both := set(prompts) & set(others or ()):
        raise RecipeError(
            f"'{key}': expected other prompts than {what}, but {len(both)} of {len(prompts)} are among them, such as "
            f"{min(both)!r}"
        )


def _to_be_refused(recipe: Recipe, probes: list[str] | None, attacks: list[str] | None) -> Prompts:
    reading = any(correction.reads_probes for correction in recipe.corrections.values())
    if attacks is not None:
        if reading:
            check_apart("data.attacks", attacks, "data.probes, which corrections read", probes)
        return Prompts(probes, attacks, "those of data.attacks")
    if probes is None or not reading:
        return Prompts(probes, probes or [], "those of data.probes")
    if len(probes) < 2:
        raise RecipeError(
            f"'data.probes': expected two prompts at least, as every other one is judged by, but got {len(probes)}; "
            "or name others as data.attacks"
        )
    # Every other one, not halves, as files are often sorted by topic.
    return Prompts(probes[::2], probes[1::2], "every other one of data.probes, as corrections read the rest")
