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

from recipes.evidence import costs, overview_picture
from recipes.evidence.frontier_report import first, percent, retained, side_effects_of, with_interval
from recipes.evidence.methods import METHODS
from recipes.files.markdown import markdown_table
from recipes.files.points import key_of, write_whole

MARGINS = {"attack success": 0.05, "over-refusal": 0.10}  # over the aligned model's, that are still fine
LABS = {"frontier": ("toy lab", 0.05), "smollm2_frontier": ("SmolLM2", 0.12)}  # and the poison shares that are shown
ROWS = (
    *("aligned", "none", "data_aware", "target_lab", "target_builtin", "guard", "csulora"),
    *("mixing", "mixing_corrected", "kl", "kl_corrected", "asft", "asft_corrected", "one_shot", "one_shot_corrected"),
    *("scaling", "safe_lora_threshold", "lower_rate"),
)


def make_rows(points: Sequence[Mapping], spent: Sequence[Mapping], training_steps: int) -> list[dict]:
    """One row a method, of the points of one poison share: held-out values of what was chosen in each seed.

    ``attack success``, ``over-refusal`` and ``task kept`` are means over seeds with bootstrap intervals;
    ``over aligned`` are the first two less the aligned model's, paired by seed.
    """
    by_seed: dict[int, list[Mapping]] = {}
    for point in points:
        by_seed.setdefault(point["seed"], []).append(point)
    rows = []
    for method in (name for name in ROWS if any(point["method"] == name for point in points)):
        chosen = [choose(mine, method) for mine in by_seed.values()]
        told = [
            _told(point, _of(mine, "aligned"), _of(mine, "none"))
            for point, mine in zip(chosen, by_seed.values(), strict=True)
        ]
        rows.append(
            {
                "method": method,
                "strengths": [_strength(point) for point in chosen],
                **{name: with_interval([values[name] for values in told]) for name in told[0]},
                "cost": _cost(chosen, spent, training_steps),
            }
        )
    return rows


def choose(points: Sequence[Mapping], method: str) -> Mapping:
    """The setting of a method that somebody would take, by the tuning half of one seed's points.

    That which keeps most of the task among those that exceed the aligned model's attack success and over-refusal by
    no more than ``MARGINS``; where there is none, that which exceeds them least.
    """
    ends = [_of(points, name)["scores"]["tuning"] for name in ("aligned", "none")]

    def order(point: Mapping) -> tuple[float, float]:
        tuning = point["scores"]["tuning"]
        own, aligned = _safety(tuning), _safety(ends[0])
        too_much = sum(max(0.0, own[name] - aligned[name] - margin) for name, margin in MARGINS.items())
        return round(too_much, 9), -retained(first(tuning), *map(first, ends))

    return min((point for point in points if point["method"] == method and not point["draw"]), key=order)


def _safety(scores: Mapping) -> dict[str, float]:
    score = first(scores)
    return {
        "attack success": score["succeeded"] / score["prompts"],
        "over-refusal": side_effects_of(scores)["over-refusal"],
    }


def _told(point: Mapping, aligned: Mapping, raw: Mapping) -> dict[str, float]:
    own, *ends = (each["scores"]["held_out"] for each in (point, aligned, raw))
    safety, safest = _safety(own), _safety(ends[0])
    over = {f"{name}, over aligned": safety[name] - safest[name] for name in safety}
    return {**safety, **over, "task kept": retained(first(own), *map(first, ends))}


def _of(points: Sequence[Mapping], method: str) -> Mapping:
    return next(point for point in points if point["method"] == method)


def _strength(point: Mapping) -> float | str | None:
    return point["found"]["strength"] if "found" in point else point["strength"]


def _in_words(strength: float | str | None) -> str:
    return "–" if strength is None else strength if isinstance(strength, str) else f"{strength:.3g}"


def _cost(chosen: Sequence[Mapping], spent: Sequence[Mapping], training_steps: int) -> str:
    """Of the setting that was chosen in the first seed, where costs were measured."""
    known = {key_of(cost)[2:4]: cost for cost in spent}
    method, strength = key_of(chosen[0])[2:4]
    named = (method, strength) if METHODS[method].control is not None else None
    cost = known.get(named) or next(cost for (name, _), cost in known.items() if name == method)
    return costs.in_words(cost, training_steps)


def to_markdown(rows: Sequence[Mapping]) -> str:
    """The rows, for a person."""
    columns = ["", "strength of each seed", "attack success", "over the aligned model's", "task kept", "over-refusal"]
    cells = [
        [
            METHODS[row["method"]].label,
            ", ".join("" if s is None else s if isinstance(s, str) else f"{s:.3g}" for s in row["strengths"]).strip(
                ", "
            ),
            percent(row["attack success"]),
            percent(row["attack success, over aligned"], signed=True),
            percent(row["task kept"]),
            percent(row["over-refusal"]),
            row["cost"],
        ]
        for row in rows
    ]
    return markdown_table([*columns, "extra cost"], cells, texts=(0, 1, 6))


def read(folder: Path) -> list[dict]:
    """The rows of a frontier's kept results."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    spent = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
    _, poison = LABS[folder.name]
    points = [point for point in results["points"] if point["poison"] == poison]
    return make_rows(points, spent["costs"], spent["training_steps"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the marked tables of a page, and draw ``overview.png`` into the results folder."""
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.overview", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="such as recipes/results")
    parser.add_argument("page", type=Path, help="a Markdown file with marks such as <!-- overview: frontier -->")
    options = parser.parse_args(arguments)
    text = options.page.read_text(encoding="utf-8")
    found = {name: read(options.folder / name) for name in re.findall(r"<!-- overview: (\w+) -->", text)}
    for name, rows in found.items():
        mark, table = f"<!-- overview: {name} -->\n", to_markdown(rows)
        before, after = text.split(mark)
        text = before + mark + table + "\n" + re.sub(r"^(\|.*\n)*", "", after)
    write_whole(options.page, text)
    overview_picture.plot({LABS[name][0]: rows for name, rows in found.items()}, options.folder / "overview.png")


if __name__ == "__main__":
    main()
