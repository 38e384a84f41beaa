"""Which figures a report has of a run, drawn from its record and its logs; of what is not there, none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from csulora_callback.method.measure import Drift
from csulora_callback.reporting.inspection import short_kinds, short_layers
from csulora_callback.reporting.report import figures
from csulora_callback.reporting.report.evaluation import Judged
from csulora_callback.reporting.report.figures import AMBER, BLUE, GREEN, GREY, RED, Curve, Interval
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
    """Loss and drift over steps, as far as they were logged.

    Args:
        name: begins the names of the figures.
        of: the run, in their titles.
        history: its log records.
    """
    history = [{**log, **_saved_norm(log)} for log in history]
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
    inspection = part.inspections["raw"]
    raw, corrected = (part.inspections[state].by_layer_and_kind() for state in ("raw", "corrected"))
    layers, kinds = short_layers(inspection.by_layer()), short_kinds(inspection.by_kind())
    whole = inspection.together.total_energy
    drawn = []
    for key, (heading, caption, color, value) in _MAPS.items():
        panels = {
            state: {(layers[at[0]], kinds[at[1]]): value(drift, raw[at], whole) for at, drift in drifts.items()}
            for state, drifts in (("before", raw), ("after", corrected))
        }
        title = f"{heading}, by layer and kind of module, {part.name}: {_spans(panels)}."
        axes = (list(layers.values()), list(kinds.values()))
        svg = figures.draw_heat_maps(f"{name}-{key}", title, *panels.values(), *axes, color)
        drawn.append(Picture(svg, heading, caption))
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


def _points(history: Sequence[dict], key: str) -> list[tuple[int, float | None]]:
    return [(log["step"], log[key]) for log in history if key in log]


def _ends(curve: Curve, unit: str) -> str:
    values = [value for _, value in curve.points if value is not None]
    first, last = (percents(v) if unit.startswith("%") else f"{v:.3g}" for v in (values[0], values[-1]))
    return f"{curve.label} from {first} to {last}"


def _spans(panels: dict[str, dict]) -> str:
    return ", ".join(f"{p} {percents(min(c.values()))} to {percents(max(c.values()))}" for p, c in panels.items())


def _energy(*blocks: str) -> Callable[[Drift, Drift, float], float]:
    """Energy of some blocks, as a share of what was trained in the same place."""
    return lambda drift, trained, whole: ratio(sum(drift.energy[block] for block in blocks), trained.total_energy)


_IN_PLACE = "in % of the trained update's energy in each place."
_MAPS = {
    "aligned": (
        "Aligned",
        f"Energy inside the safety subspace on both sides, {_IN_PLACE}",
        RED,
        _energy("aligned"),
    ),
    "partial": (
        "Partially aligned",
        f"Energy inside it on one side, {_IN_PLACE}",
        AMBER,
        _energy("output", "input"),
    ),
    "off": (
        "Off the subspace",
        f"Energy outside it on both sides, {_IN_PLACE}",
        BLUE,
        _energy("off"),
    ),
    "undone": (
        "Alignment undone",
        "How far the update goes back along what alignment changed there; blue where it goes on in its direction.",
        RED,
        lambda drift, trained, whole: drift.undone,
    ),
    "large": (
        "Where the update is large",
        "Energy in each place, in % of the whole trained update's.",
        GREEN,
        lambda drift, trained, whole: ratio(drift.total_energy, whole),
    ),
}
