"""The pictures of a frontier: attack success against task retained, with intervals over seeds.

They are redrawn from results that are there by ``python -m recipes.evidence.frontier_picture FOLDER``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from recipes.evidence.frontier_report import first, retained, with_interval
from recipes.evidence.methods import METHODS
from recipes.files.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, PERCENT, PURPLE, SKY, YELLOW, drawn

MAIN = "The corrections"
PANELS = {
    MAIN: (
        "data_aware",
        "content_aware",
        "target_lab",
        "target_strict",
        "target_content",
        "target_builtin",
        "target_builtin_content",
        "guard",
        "csulora",
        "separable",
        "projection",
    ),
    "data-aware and its controls": (
        "data_aware",
        "content_aware",
        "data_aware_loose",
        "data_aware_tight",
        "data_aware_no_task",
        "data_aware_everywhere",
        "data_aware_shuffled",
    ),
    "guard and its controls": (
        "guard",
        "guard_input",
        "guard_output",
        "guard_random",
        "guard_shuffled",
        "guard_norm",
        "guard_gains",
        "guard_noise",
    ),
    "csulora and its controls": (
        "csulora",
        "csulora_random",
        "csulora_shuffled",
        "csulora_norm",
        "csulora_gains",
        "csulora_noise",
    ),
    "Published, and other training": ("safe_lora_threshold", "safe_lora_number", "lower_rate", "averaging"),
    "Trained otherwise with the same prompts or models, and then corrected": (
        "mixing",
        "mixing_corrected",
        "kl",
        "kl_corrected",
        "asft",
        "asft_corrected",
        "one_shot",
        "one_shot_corrected",
    ),
}
IN_ALL = {"scaling": "o", "aligned": "s", "none": "X", "benign_only": "*"}

# No two methods of a panel share a colour or a marker, and a method has its own in every panel.
_INDIGO, _ROSE, _SAND, _BROWN, _MAGENTA, _PALE = "#332288", "#CC6677", "#B79F2B", "#661100", "#AA4499", "#88CCEE"
_OLIVE, _TEAL, _FOREST = "#999933", "#44AA99", "#117733"
_LOOKS = {
    "data_aware": (BLUE, "o"),
    "guard": (GREEN, "s"),
    "csulora": (ORANGE, "D"),
    "target_lab": (PURPLE, "P"),
    "target_builtin": (_OLIVE, "p"),
    "separable": (SKY, "^"),
    "projection": (YELLOW, "v"),
    "content_aware": (_MAGENTA, "d"),
    "target_strict": (_INDIGO, "h"),
    "target_content": (_FOREST, "8"),
    "target_builtin_content": (_TEAL, "H"),
    "data_aware_loose": (_PALE, "<"),
    "data_aware_tight": (_INDIGO, ">"),
    "data_aware_no_task": (_SAND, "^"),
    "data_aware_everywhere": (_BROWN, "D"),
    "data_aware_shuffled": (_ROSE, "v"),
    "guard_input": (_PALE, "<"),
    "guard_output": (_MAGENTA, ">"),
    **{f"{kind}_random": (_INDIGO, "^") for kind in ("guard", "csulora")},
    **{f"{kind}_shuffled": (_ROSE, "v") for kind in ("guard", "csulora")},
    **{f"{kind}_norm": (_SAND, "P") for kind in ("guard", "csulora")},
    **{f"{kind}_gains": (_BROWN, "d") for kind in ("guard", "csulora")},
    **{f"{kind}_noise": (GREY, "x") for kind in ("guard", "csulora")},
    "safe_lora_threshold": (_SAND, "^"),
    "safe_lora_number": (_INDIGO, "v"),
    "lower_rate": (_ROSE, "<"),
    "averaging": (_BROWN, ">"),
    "mixing": (_ROSE, "v"),
    "mixing_corrected": (_MAGENTA, "^"),
    "kl": (_PALE, "<"),
    "kl_corrected": (_INDIGO, ">"),
    "asft": (_SAND, "P"),
    "asft_corrected": (_BROWN, "d"),
    "one_shot": (SKY, "D"),
    "one_shot_corrected": (BLUE, "o"),
}
_DASHES = ("-", "--", ":", "-.")  # of ranks
_TARGET = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.4, "zorder": 1}


@dataclass(frozen=True)
class Spot:
    """One setting: means and intervals over seeds."""

    retained: dict
    success: dict


Spots = Mapping[tuple[str, int | None], list[Spot]]  # by method and rank, a spot for each strength


def plot(points: Sequence[Mapping], targets: Sequence[float], folder: Path) -> list[Path]:
    """One picture for each poison share, ``frontier_poison{percent}.png``; returns their paths.

    Both axes are of the held-out half of the prompts and of the first template. A marker is a strength: the mean over
    seeds (of the mean over draws), with the 2.5 and 97.5 percentiles of means over resampled seeds. All that was
    measured is in sight; where few attacks succeed with any method the axis ends there.

    Args:
        points: of :func:`recipes.evidence.frontier.measure`.
        targets: attack success that was aimed at; each is a line.
        folder: where the pictures are put.
    """
    paths = []
    for poison in dict.fromkeys(point["poison"] for point in points):
        there = [point for point in points if point["poison"] == poison]
        seeds = len({point["seed"] for point in there})
        over = f"means and 95 % intervals over {seeds} seeds" if seeds > 1 else "of one seed"
        title = f"Poison {poison:.0%}: held-out prompts, {over}; each marker is a strength"
        paths.append(folder / f"frontier_poison{100 * poison:g}.png")
        _plot_one(spots_of(there), targets, title, paths[-1])
    return paths


def _plot_one(spots: Spots, targets: Sequence[float], title: str, path: Path) -> None:
    has = {method for method, _ in spots}
    panels = {name: own for name, own in PANELS.items() if name == MAIN or has & (set(own) - set(PANELS[MAIN]))}
    top = max(spot.success["high"] or spot.success["mean"] for group in spots.values() for spot in group) or 1.0
    with drawn(path, height=2.75 * len(panels) + 0.6) as figure:
        figure.suptitle(title, fontsize=11.5)
        axes = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axis, (name, methods) in zip(axes, panels.items(), strict=True):
            _draw(axis, name, methods, spots, [target for target in targets if target <= top])
            axis.tick_params(labelbottom=True)
        axes[-1].set_xlabel("task retained")
        axes[-1].set_ylim(-0.03 * top, 1.05 * top)


def spots_of(points: Sequence[Mapping]) -> Spots:
    """Of the points of one poison share."""
    ends = {(p["seed"], p["method"]): p["scores"]["held_out"] for p in points if p["method"] in ("aligned", "none")}
    groups: dict[tuple, dict] = {}
    for point in points:
        seed, score = point["seed"], first(point["scores"]["held_out"])
        both = (first(ends[seed, name]) for name in ("aligned", "none"))
        pair = retained(score, *both), score["succeeded"] / score["prompts"]
        by_seed = groups.setdefault((point["method"], point["rank"]), {}).setdefault(point["strength"], {})
        by_seed.setdefault(seed, []).append(pair)
    return {key: [_spot(by_seed.values()) for by_seed in strengths.values()] for key, strengths in groups.items()}


def _spot(draws_by_seed: Sequence[list[tuple[float, float]]]) -> Spot:
    seeds = [[sum(side) / len(side) for side in zip(*draws, strict=True)] for draws in draws_by_seed]
    return Spot(*(with_interval(list(side)) for side in zip(*seeds, strict=True)))


def _draw(
    axis: Axes,
    title: str,
    methods: Sequence[str],
    spots: Spots,
    targets: Sequence[float],
) -> None:
    axis.set_title(title)
    handles, dashes, shown = {}, {}, {method for method, _ in spots}
    for method in (*IN_ALL, *methods):
        style, ranks = style_of(method), [rank for name, rank in spots if name == method]
        for dash, rank in zip(_DASHES, ranks, strict=False):
            draw_line(axis, spots[method, rank], style if rank is None else {**style, "linestyle": dash})
            handles.setdefault(METHODS[method].label, Line2D([], [], **style))
            if rank is not None:
                dashes.setdefault(f"rank {rank}", Line2D([], [], color=GREY, linestyle=dash))
    axis.xaxis.set_major_formatter(PERCENT)
    axis.yaxis.set_major_formatter(PERCENT)
    axis.set_ylabel("attack success")
    for target in targets:
        axis.axhline(target, **_TARGET)
    if title == MAIN and targets:
        handles |= {"targets": Line2D([], [], **_TARGET)}
    elif title != MAIN:  # the others are named there
        handles = {METHODS[method].label: handles[METHODS[method].label] for method in methods if method in shown}
    handles |= dashes if len(dashes) > 1 else {}
    axis.legend(handles.values(), handles, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))


def style_of(method: str) -> dict:
    """Of its line and markers, as ``Axes.plot`` takes them: one for a method in all pictures."""
    if method in IN_ALL:
        line = "-" if method == "scaling" else "none"
        size = {"scaling": 4, "benign_only": 13}.get(method, 9)
        return {"color": BLACK, "marker": IN_ALL[method], "linestyle": line, "markersize": size, "zorder": 2.5}
    color, marker = _LOOKS[method]
    return {"color": color, "marker": marker, "linestyle": "-", "zorder": 3}


def draw_line(axis: Axes, spots: Sequence[Spot], style: Mapping[str, object]) -> None:
    """The spots of one method with their intervals."""
    means = [[getattr(spot, side)["mean"] for spot in spots] for side in ("retained", "success")]
    axis.plot(*means, **style)
    for spot in spots:
        for side, fixed in (("retained", "success"), ("success", "retained")):
            low, high, at = getattr(spot, side)["low"], getattr(spot, side)["high"], getattr(spot, fixed)["mean"]
            if low is not None:
                ends = ([low, high], [at, at]) if side == "retained" else ([at, at], [low, high])
                axis.plot(*ends, color=style["color"], linewidth=1.0, alpha=0.4, zorder=2)


def main(arguments: list[str] | None = None) -> None:
    """Redraw the pictures of a folder from its results.json, which is not changed."""
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.frontier_picture", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="such as recipes/results/frontier")
    folder = parser.parse_args(arguments).folder
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for path in plot(results["points"], results["grid"]["targets"], folder):
        print(path)


if __name__ == "__main__":
    main()
