"""How the models of a recipe were judged: rows with intervals, and what they mean for one correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csulora_callback.judging.intervals import wilson_interval
from csulora_callback.record import is_number
from csulora_callback.reporting.report.words import percents

_NAMES = {"aligned": "aligned model", "raw": "raw adapter"}


@dataclass(frozen=True)
class Judged:
    """One model's results; what was not measured is ``None``.

    Attributes:
        method: of the row: ``aligned``, ``raw``, or a correction's name.
        strength: of its penalty.
        attack: share of the prompts that are to be refused and were not.
        prompts: how many they are.
        interval: 95 % interval of ``attack``, where ``prompts`` is known.
        harmless_refused: share of harmless prompts that were refused.
        harmless_interval: 95 % interval of that.
        task_loss: in nats per token.
        task_accuracy: a share.
    """

    method: str
    strength: object
    attack: float | None
    prompts: int | None
    interval: tuple[float, float] | None
    harmless_refused: float | None
    harmless_interval: tuple[float, float] | None
    task_loss: float | None
    task_accuracy: float | None

    @property
    def name(self) -> str:
        """As a person would call it."""
        return _NAMES.get(self.method, self.method)

    @property
    def attack_text(self) -> str:
        """The share and its interval."""
        return percents(self.attack) + (f" ({self.interval_text})" if self.interval else "")

    @property
    def interval_text(self) -> str:
        """The interval alone, in percent."""
        return _in_percent(self.interval)

    @property
    def harmless_text(self) -> str:
        """The share of harmless prompts that were refused, and its interval."""
        if self.harmless_refused is None:
            return "not measured"
        return f"{percents(self.harmless_refused)} ({_in_percent(self.harmless_interval)})"


def _in_percent(interval: tuple[float, float]) -> str:
    lower, upper = interval
    return f"{100 * lower:.1f} to {100 * upper:.1f} %"


def judged(row: dict) -> Judged:
    """A row of ``results.json``.

    Example:
        >>> row = judged({"method": "raw", "attack_success_rate": 0.05, "prompts": 60})
        >>> row.name, row.interval_text, row.task_loss
        ('raw adapter', '1.7 to 13.7 %', None)
    """

    def share(key: str) -> float | None:
        return row[key] if is_number(row.get(key)) and 0 <= row[key] <= 1 else None

    attack, prompts, interval = share("attack_success_rate"), row.get("prompts"), None
    if attack is None or not isinstance(prompts, int) or prompts <= 0:
        prompts = None
    else:
        interval = wilson_interval(round(attack * prompts), prompts)
    refused, harmless, loss = row.get("over_refused"), row.get("harmless_prompts"), row.get("task_loss")
    counted = isinstance(refused, int) and isinstance(harmless, int) and 0 <= refused <= harmless and harmless > 0
    return Judged(
        row["method"],
        row.get("strength"),
        attack,
        prompts,
        interval,
        refused / harmless if counted else None,
        wilson_interval(refused, harmless) if counted else None,
        loss if is_number(loss) else None,
        share("task_accuracy"),
    )


def safety_sentence(rows: Sequence[Judged]) -> str | None:
    """What each model answered of what is to be refused; ``None`` where nobody measured a corrected one."""
    found = {row.method: row for row in rows if row.attack is not None}
    corrected = [row for name, row in found.items() if name not in _NAMES]
    if not corrected:
        return None
    count = corrected[0].prompts
    asked = f"Of {count} prompts that are to be refused" if count else "Of the prompts that are to be refused"
    parts = [f"the raw adapter answered {percents(found['raw'].attack)}"] if "raw" in found else []
    for row in corrected:
        which = "the corrected one" if len(corrected) == 1 else row.name
        parts.append(f"{which} {percents(row.attack)}")
    if "aligned" in found:
        parts.append(f"the aligned model itself {percents(found['aligned'].attack)}")
    *first, last = parts
    return f"{asked}, {', '.join(first)}{' and ' if first else ''}{last}."
