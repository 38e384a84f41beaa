"""Which figures a report has of a run, drawn from its record and its logs; of what is not there, none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csulora_callback.reporting.heat_maps import heat_maps
from csulora_callback.reporting.report import figures
from csulora_callback.reporting.report.evaluation import Judged
from csulora_callback.reporting.report.figures import AMBER, BLUE, GREEN, GREY, RED, Curve, HeatMap, Interval
from csulora_callback.reporting.report.part import Part
from csulora_callback.reporting.report.words import percents, ratio


@dataclass(frozen=True)
class Picture:
    """A figure with what stands above and below it."""

    svg: str
    heading: str
    caption: str


@dataclass(frozen=True)
class _Chart:
    """What is drawn over steps in one figure: curves by the key of a log record, each with its label and color."""

    heading: str
    caption: str
    unit: str
    from_zero: bool
    lines: dict[str, tuple[str, str]]


_SAVED_NORM = "saved norm"  # no key of a log, but follows from two of them
_CHARTS = {
    "loss": _Chart(
        "Loss",
        "Lower is better. Training sees the raw weights; evaluations see the corrected ones, which are what ships.",
        "nats per token",
        False,
        {"loss": ("training", GREY), "eval_loss": ("held-out", BLUE)},
    ),
    "refusals": _Chart(
        "Refusals kept",
        "Probes that the model still begins to refuse as the aligned model does, as it is trained and as it is saved.",
        "% of the probes",
        True,
        {"csulora/refusal_kept": ("trained", GREY), "csulora/refusal_kept_corrected": ("saved", GREEN)},
    ),
    "task": _Chart(
        "Loss on the task",
        "On a sample of the training data, as it is trained and as it is saved: what the correction costs there.",
        "nats per token",
        False,
        {"csulora/task_loss": ("trained", GREY), "csulora/task_loss_corrected": ("saved", GREEN)},
    ),
    "undone": _Chart(
        "Alignment undone",
        "How far the update goes back along what alignment changed; below 0 it goes on in that direction.",
        "% of the alignment",
        True,
        {"csulora/alignment_undone": ("trained", GREY), "csulora/alignment_undone_corrected": ("saved", GREEN)},
    ),
    "size": _Chart(
        "Size of the update",
        "As it is trained, and what the correction leaves of it.",
        "Frobenius norm",
        True,
        {"csulora/update_norm": ("trained", GREY), _SAVED_NORM: ("saved", GREEN)},
    ),
    "drift": _Chart(
        "Where the trained update lies",
        "Shares of its energy before the correction: inside the safety subspace on both sides, on one, on none.",
        "% of the energy",
        True,
        {
            "csulora/aligned_energy": ("aligned", RED),
            "csulora/partial_energy": ("partial", AMBER),
            "csulora/off_energy": ("off-subspace", BLUE),
        },
    ),
    "change": _Chart(
        "What the correction does",
        "How far what is saved is from what is trained, and how much of the closest safe update does not fit in the "
        "adapter's rank.",
        "%",
        True,
        {
            "csulora/relative_change": ("relative change", GREEN),
            "csulora/truncation_error": ("truncation error", GREY),
        },
    ),
}


def curves(name: str, of: str, history: Sequence[dict]) -> list[Picture]:
    """Loss, behaviour and drift over steps, as far as they were logged.

    Args:
        name: begins the names of the figures.
        of: the run, in their titles.
        history: its log records.
    """
    history = [{**log, **_saved_norm(log)} for log in map(_under_own_keys, history)]
    drawn = []
    for key, chart in _CHARTS.items():
        lines = [Curve(*style, _points(history, logged)) for logged, style in chart.lines.items()]
        lines = [line for line in lines if any(value is not None for _, value in line.points)]
        if lines:
            ends = "; ".join(_ends(line, chart.unit) for line in lines)
            title = f"{chart.heading} over optimizer steps, {of}: {ends}."
            svg = figures.draw_curves(f"{name}-{key}", title, lines, chart.unit, chart.from_zero)
            drawn.append(Picture(svg, chart.heading, chart.caption))
    return drawn


def blocks(name: str, part: Part) -> Picture:
    """The four blocks before and after, and by chance."""
    raw, corrected = (part.inspections[state].together for state in ("raw", "corrected"))
    saved = {block: ratio(energy, raw.total_energy) for block, energy in corrected.energy.items()}
    bars = {"trained": raw.shares, "saved": saved, "chance": raw.chance}
    told = (f"{bar}: " + ", ".join(f"{b} {percents(share)}" for b, share in s.items()) for bar, s in bars.items())
    svg = figures.draw_blocks(f"{name}-blocks", f"Energy by block, {part.name}. {'; '.join(told)}.", bars)
    caption = "What was trained, what was saved of it, and how a random update of the same size would lie."
    return Picture(svg, "All modules together", caption)


def maps(name: str, part: Part) -> list[Picture]:
    """Layers × kinds of module: the blocks, the alignment undone and the size, before and after."""
    drawn = []
    for key, shown in heat_maps(**part.inspections).items():
        title = f"{shown.heading}, by layer and kind of module, {part.name}: {_spans(shown)}."
        drawn.append(Picture(figures.draw_heat_map(f"{name}-{key}", title, shown), shown.heading, shown.caption))
    return drawn


def evaluation(rows: Sequence[Judged]) -> list[Picture]:
    """Attack success and task accuracy of every model that was judged."""
    drawn = []
    attacked = [row for row in rows if row.attack is not None]
    if attacked:
        told = "; ".join(f"{row.name} {row.attack_text}" for row in attacked)
        shown = [Interval(row.name, row.attack, row.interval) for row in attacked]
        svg = figures.draw_intervals("attack", f"Attack success: {told}.", shown, "attack success, %", RED)
        drawn.append(Picture(svg, "Attack success", "Bars are 95 % intervals (Wilson). Lower is safer."))
    tried = [row for row in rows if row.task_accuracy is not None]
    if tried:
        told = "; ".join(f"{row.name} {percents(row.task_accuracy)}" for row in tried)
        shown = [Interval(row.name, row.task_accuracy, None) for row in tried]
        svg = figures.draw_intervals("task", f"Task accuracy: {told}.", shown, "task accuracy, %", GREEN)
        drawn.append(Picture(svg, "Task accuracy", "On the held-out task. Higher is better."))
    return drawn


def _saved_norm(log: dict) -> dict:
    size, lost = log.get("csulora/update_norm"), log.get("csulora/attenuation")
    return {} if size is None or lost is None else {_SAVED_NORM: size * (1.0 - lost)}


def _under_own_keys(log: dict) -> dict:
    """What is measured in the Trainer's evaluations stands there with the data set's name before it."""
    return {key[max(key.find("csulora/"), 0) :]: value for key, value in log.items()}


def _points(history: Sequence[dict], key: str) -> list[tuple[int, float | None]]:
    """One a step: an evaluation and a save of the same step say the same."""
    return list({log["step"]: log[key] for log in history if key in log}.items())


def _ends(curve: Curve, unit: str) -> str:
    values = [value for _, value in curve.points if value is not None]
    first, last = (percents(v) if unit.startswith("%") else f"{v:.3g}" for v in (values[0], values[-1]))
    return f"{curve.label} from {first} to {last}"


def _spans(shown: HeatMap) -> str:
    panels = {"before": shown.before.values(), "after": shown.after.values()}
    return ", ".join(f"{p} {percents(min(shares))} to {percents(max(shares))}" for p, shares in panels.items())
