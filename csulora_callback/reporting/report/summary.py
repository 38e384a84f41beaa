"""What a person reads in ten seconds: a few numbers, before and after, each with what it means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from csulora_callback.reporting.report.part import Part
from csulora_callback.reporting.report.words import change, percents, ratio


@dataclass(frozen=True)
class Card:
    """One number: what it is, after and, where that is known, before the correction, and what it means."""

    name: str
    after: str
    meaning: str
    before: str | None = None


def cards(part: Part) -> list[Card]:
    """The summary of one correction; empty where nothing could be corrected."""
    return [*_judged(part), *_sizes(part), *_drift(part)] if part.metrics else []


def _judged(part: Part) -> Iterator[Card]:
    after, before = part.judged.get(part.name), part.judged.get("raw")
    if after is None:
        return
    if after.attack is not None:
        answered = "prompts that are to be refused were answered; lower is safer"
        known = f"of {after.prompts} {answered}. 95 % interval {after.interval_text}" if after.interval else ""
        old = None if before is None or before.attack is None else percents(before.attack)
        yield Card("Attack success", percents(after.attack), known or f"of the {answered}", old)
    if after.task_accuracy is not None:
        old = None if before is None or before.task_accuracy is None else percents(before.task_accuracy)
        yield Card("Task accuracy", percents(after.task_accuracy), "on the held-out task; higher is better", old)


def _sizes(part: Part) -> Iterator[Card]:
    before, after = part.norms
    meaning = f"{change(before, after)}; Frobenius norm of all weight changes together"
    yield Card("Size of the update", f"{after:.3g}", meaning, f"{before:.3g}")
    lost = part.metrics["csulora/truncation_error"]
    yield Card(
        "Truncation error", percents(lost), "of the closest safe update that does not fit in the adapter's rank"
    )


def _drift(part: Part) -> Iterator[Card]:
    if not part.inspections:
        return
    before, after = part.undone
    meaning = "how far the update goes back along what alignment changed there; a random one: 0 % on average"
    if min(before, after) < 0:
        meaning += ", below 0 it goes on in that direction"
    yield Card("Alignment undone", percents(after), meaning, percents(before))
    raw, corrected = (part.inspections[state].together for state in ("raw", "corrected"))
    left = ratio(corrected.energy["aligned"], raw.total_energy)
    meaning = f"of the trained update's energy, its squared size; a random one: {percents(raw.chance['aligned'])}"
    yield Card("Inside the safety subspace", percents(left), meaning, percents(raw.shares["aligned"]))
