"""Which of a recipe's prompts data-aware corrections read, and which ones everything is judged by: never the same."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.files.sources import prompts_of
from recipes.schema import Recipe, RecipeError


@dataclass(frozen=True)
class Prompts:
    """Prompts that the aligned model refuses.

    Attributes:
        read: by data-aware corrections; ``None`` where the recipe has none to read.
        judged: whose answers are looked at; empty where attack success is not measured.
        source: of ``judged``, for a title.
    """

    read: list[str] | None
    judged: list[str]
    source: str


def choose_prompts(recipe: Recipe) -> Prompts:
    """The prompts of ``data.probes`` and ``data.attacks``.

    Without attacks the probes are judged by: all of them, or, where a correction is data-aware, every other one. It
    reads the rest then.

    Raises:
        RecipeError: if they cannot be read, one probe is to be divided, or a data-aware correction would read what it
            is judged by.
    """
    reading = any(correction.reads_probes for correction in recipe.corrections.values())
    probes, attacks = _of(recipe, "probes"), _of(recipe, "attacks")
    if attacks is not None:
        if reading and (both := set(attacks) & set(probes)):
            raise RecipeError(
                f"'data.attacks': expected other prompts than data.probes, which corrections read, but {len(both)} of "
                f"{len(attacks)} are among them, such as {min(both)!r}"
            )
        return Prompts(probes, attacks, "those of data.attacks")
    if probes is None or not reading:
        return Prompts(probes, probes or [], "those of data.probes")
    if len(probes) < 2:
        raise RecipeError(
            "'data.probes': expected two prompts at least, as every other one is judged by, but got "
            f"{len(probes)}; or name others as data.attacks"
        )
    # Every other one, not halves: files are often sorted by topic.
    return Prompts(probes[::2], probes[1::2], "every other one of data.probes, as corrections read the rest")


def _of(recipe: Recipe, key: str) -> list[str] | None:
    source, column = getattr(recipe.data, key), getattr(recipe.data, f"{key}_column")
    # Each once: one that stands in both halves would be read and judged by.
    return None if source is None else list(dict.fromkeys(prompts_of(f"data.{key}", source, column)))
