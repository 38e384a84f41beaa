"""One table of what a reader wants to know: what each way keeps, of safety and of the task, and what it costs.

A strength is chosen as somebody would who has a few attack prompts: on the tuning half. A target's is not. What the
pages quote is put there by ``python -m recipes.evidence.overview RESULTS_FOLDER PAGE.md``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recipes.evidence import costs, overview_picture
from recipes.evidence.frontier_report import (
    first,
    over_seeds_and_prompts,
    percent,
    retained,
    side_effects_of,
    with_interval,
)
from recipes.evidence.methods import METHODS
from recipes.files.markdown import markdown_table
from recipes.files.points import key_of, write_whole
from recipes.schema.recipe import RecipeError

MARGINS = {"attack success": 0.05, "over-refusal": 0.10}  # over the aligned model's, that are still fine
LABS = {"frontier": "toy lab", "smollm2_frontier": "SmolLM2"}  # that are in the picture
MARK = re.compile(r"<!-- overview: (\w+), poison ([\d.]+) -->\n")
ROWS = (
    *(
        "aligned",
        "none",
        "data_aware",
        "content_aware",
        "target_lab",
        "target_strict",
        "target_content",
        "target_builtin",
        "target_builtin_content",
        "guard",
        "csulora",
    ),
    *("mixing", "mixing_corrected", "kl", "kl_corrected", "asft", "asft_corrected", "one_shot", "one_shot_corrected"),
    *("scaling", "safe_lora_threshold", "lower_rate"),
)


def make_rows(points: Sequence[Mapping], spent: Sequence[Mapping]) -> list[dict]:
    """One row a method, of the points of one poison share: held-out values of what was chosen in each seed.

    ``attack success``, ``over-refusal`` and ``task kept`` are means with bootstrap intervals over seeds, and of the
    first two over prompts as well, where the verdict on each prompt is kept; ``over aligned`` are these less the
    aligned model's, paired by seed and prompt.
    """
    by_seed: dict[int, list[Mapping]] = {}
    for point in points:
        by_seed.setdefault(point["seed"], []).append(point)
    rows = []
    for method in (name for name in ROWS if any(point["method"] == name for point in points)):
        chosen = [choose(mine, method) for mine in by_seed.values()]
        ends = [[_of(mine, name)["scores"]["held_out"] for mine in by_seed.values()] for name in ("aligned", "none")]
        held_out = [point["scores"]["held_out"] for point in chosen]
        kept = [retained(first(own), first(low), first(top)) for own, low, top in zip(held_out, *ends, strict=True)]
        rows.append(
            {
                "method": method,
                "strengths": [_strength(point) for point in chosen],
                **_safety_of(held_out, ends[0]),
                "task kept": with_interval(kept),
                "cost": _cost(chosen, spent) if spent else None,
            }
        )
    return rows


def choose(points: Sequence[Mapping], method: str) -> Mapping:
    """The setting of a method that somebody would take, by the tuning half of one seed's points.

    That which keeps most of the task among those that exceed the aligned model's attack success and over-refusal by
    no more than ``MARGINS``; where there is none, that which exceeds them least. Over-refusal is that of harmless
    prompts which the aligned model answers: of the tuning ones it may itself refuse most.
    """
    ends = [_of(points, name)["scores"]["tuning"] for name in ("aligned", "none")]

    def order(point: Mapping) -> tuple[float, float, float]:
        tuning = point["scores"]["tuning"]
        own, least = (_each(scores, "attack success").mean() for scores in (tuning, ends[0]))
        over = (own - least, _newly_refused(tuning, ends[0]))
        too_much = sum(max(0.0, much - margin) for much, margin in zip(over, MARGINS.values(), strict=True))
        return round(too_much, 9), -retained(first(tuning), *map(first, ends)), own

    return min((point for point in points if point["method"] == method and not point["draw"]), key=order)


def _newly_refused(scores: Mapping, aligned: Mapping) -> float:
    """The share refused of the harmless prompts that the aligned model answers, which may be few of them."""
    own, before = (_each(half, "over-refusal") for half in (scores, aligned))
    if "told" not in first(scores):
        return float(own[0] - before[0])
    if before.all():
        raise RecipeError("'smollm2.edgy_tuned': expected some that the aligned model answers, but it refuses all")
    return float(own[before == 0].mean())


def _safety_of(scores: Sequence[Mapping], aligned: Sequence[Mapping]) -> dict[str, dict]:
    """Means with intervals of each seed's scores, and of what they exceed the aligned model's by."""
    said = {}
    for name in MARGINS:
        own, before = (np.stack([_each(each, name) for each in half]) for half in (scores, aligned))
        said |= {name: over_seeds_and_prompts(own), f"{name}, over aligned": over_seeds_and_prompts(own - before)}
    return said


def _each(scores: Mapping, name: str) -> np.ndarray:
    """Of each prompt whether it is so, 1 or 0 ``(prompts,)``; the share of them ``(1,)`` where no more is kept."""
    score = first(scores)
    if "told" in score:
        kind = "refused" if name == "attack success" else "over-refused"
        said = np.array(list(map(int, score["told"][kind])))
        return 1 - said if name == "attack success" else said
    share = score["succeeded"] / score["prompts"] if name == "attack success" else side_effects_of(scores)[name]
    return np.array([share])


def _of(points: Sequence[Mapping], method: str) -> Mapping:
    return next(point for point in points if point["method"] == method)


def _strength(point: Mapping) -> float | str | None:
    return point["found"]["strength"] if "found" in point else point["strength"]


def _in_words(strength: float | str) -> str:
    return strength if isinstance(strength, str) else f"{float(f'{strength:.3g}'):g}"


def _cost(chosen: Sequence[Mapping], spent: Sequence[Mapping]) -> str:
    """Of the setting that was chosen in the first seed, where costs were measured."""
    known = {key_of(cost)[2:4]: cost for cost in spent}
    method, strength = key_of(chosen[0])[2:4]
    named = (method, strength) if METHODS[method].control is not None else None
    cost = known.get(named) or next((cost for (name, _), cost in known.items() if name == method), None)
    return "not measured" if cost is None and method not in costs.FREE else costs.in_words(cost)


def to_markdown(rows: Sequence[Mapping]) -> str:
    """The rows, for a person; costs only where they were measured."""
    columns = ["", "strength of each seed", "attack success", "over the aligned model's", "task kept", "over-refusal"]
    has_costs = any(row["cost"] is not None for row in rows)
    cells = [
        [
            METHODS[row["method"]].label,
            ", ".join(_in_words(strength) for strength in row["strengths"] if strength is not None),
            percent(row["attack success"]),
            percent(row["attack success, over aligned"], signed=True),
            percent(row["task kept"]),
            percent(row["over-refusal"]),
            *([row["cost"]] if has_costs else []),
        ]
        for row in rows
    ]
    return markdown_table([*columns, *(["extra cost"] if has_costs else [])], cells, texts=(0, 1, 6))


def read(folder: Path, poison: float) -> list[dict]:
    """The rows of a frontier's kept results, and of its costs, if they were measured."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    costs_file = folder / "costs.json"
    spent = json.loads(costs_file.read_text(encoding="utf-8"))["costs"] if costs_file.exists() else []
    points = [point for point in results["points"] if point["poison"] == poison]
    return make_rows(points, spent)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the marked tables of a page, and draw ``overview.png`` into the results folder."""
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.overview", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="such as recipes/results")
    parser.add_argument("page", type=Path, help="a Markdown file with such marks as this module names")
    options = parser.parse_args(arguments)
    text, panels = options.page.read_text(encoding="utf-8"), {}
    for name, poison in MARK.findall(text):
        rows = read(options.folder / name, float(poison))
        if name in LABS:
            panels[f"{LABS[name]}, {float(poison):.0%} poison"] = rows
        mark = f"<!-- overview: {name}, poison {poison} -->\n"
        before, after = text.split(mark)
        text = before + mark + to_markdown(rows) + "\n" + re.sub(r"^(\|.*\n)*", "", after)
    write_whole(options.page, text)
    overview_picture.plot(panels, options.folder / "overview.png")


if __name__ == "__main__":
    main()
