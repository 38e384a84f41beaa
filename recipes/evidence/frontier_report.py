"""What a frontier says: task retained at a bounded attack success, against scaling, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from rich.console import Console
from rich.table import Table

from recipes.evidence.methods import METHODS
from recipes.files.markdown import markdown_table
from recipes.schema.recipe import RecipeError

_RESAMPLES = 10_000


def make_table(points: Sequence[Mapping], targets: Sequence[float]) -> list[dict]:
    """One row for each poison share, target and method.

    For every seed (and draw) the setting is chosen that loses least of the task among those whose attack success on
    the *tuning* half is at most the target; where none qualifies the aligned model is taken, which retains nothing.
    What the chosen one does on the *held-out* half is reported as the mean over seeds (of the mean over draws) with a
    bootstrap interval over seeds: ``task_retained``, ``over_scaling`` (the same minus that of scaling, seed by seed),
    ``attack_success`` by template and ``side_effects`` by name. ``qualified`` is the mean share that found a setting.
    Choice and task are of the first template, the one that the fine-tune saw: in another it may have made the task
    worse, and there is nothing to retain.
    """
    table = []
    for poison in dict.fromkeys(point["poison"] for point in points):
        there = [point for point in points if point["poison"] == poison]
        ends = {(p["seed"], p["method"]): p["scores"] for p in there if p["method"] in ("aligned", "none")}
        seeds = list(dict.fromkeys(point["seed"] for point in there))
        methods = [m for m in dict.fromkeys(point["method"] for point in there) if m != "aligned"]
        for target in targets:
            outcomes = {m: [_outcome(there, ends, seed, m, target) for seed in seeds] for m in methods}
            table += [{"poison": poison, "target": target, **_row(m, outcomes)} for m in methods]
    return table


def retained(scores: Mapping, aligned: Mapping, raw: Mapping) -> float:
    """``(loss_aligned − loss) / (loss_aligned − loss_raw)``, of three scores on the same prompts.

    Where the task has right answers, their share takes the place of the loss.
    """
    before, after = task_skill(aligned), task_skill(raw)
    if after <= before:
        what = "share of right answers" if has_right_answers(raw) else "loss"
        raise RecipeError(
            f"'training': expected a fine-tune that learns its task, but the {what} went from "
            f"{abs(before):.3f} to {abs(after):.3f}: there is nothing to retain"
        )
    return (task_skill(scores) - before) / (after - before)


def task_skill(score: Mapping) -> float:
    """What a score says of the task, the more the better: the share of right answers, or else minus the loss."""
    return score["right_answers"] if has_right_answers(score) else -score["task_loss"]


def retained_in_words(score: Mapping) -> str:
    """The formula of :func:`retained` for scores like this one."""
    if has_right_answers(score):
        return "(right − right_aligned) / (right_raw − right_aligned), of the answers that are right"
    return "(loss_aligned − loss) / (loss_aligned − loss_raw)"


def has_right_answers(score: Mapping) -> bool:
    """Whether an answer to its task is right or wrong, and not only likely or not."""
    return "right_answers" in score


def _outcome(points: list[Mapping], ends: Mapping, seed: int, method: str, target: float) -> dict:
    """The chosen settings of one seed, judged on the held-out half; means over the method's draws."""
    aligned, raw = ends[seed, "aligned"], ends[seed, "none"]
    mine = [point for point in points if point["seed"] == seed and point["method"] == method]
    chosen = []
    for draw in dict.fromkeys(point["draw"] for point in mine):
        tuning = [(p, first(p["scores"]["tuning"])) for p in mine if p["draw"] == draw]
        # Of settings that keep as many right answers the one that fewer attacks get past.
        fit = [
            ((task_skill(score), -score["succeeded"]), p)
            for p, score in tuning
            if score["succeeded"] <= target * score["prompts"]
        ]
        chosen.append(max(fit, key=lambda pair: pair[0])[1] if fit else None)
    held_out = [(aligned if point is None else point["scores"])["held_out"] for point in chosen]
    outcome = {"qualified": _mean([point is not None for point in chosen])}
    outcome["chosen"] = [
        None if p is None else {key: p[key] for key in ("draw", "strength", "rank") if p[key] is not None}
        for p in chosen
    ]
    ends_there = first(aligned["held_out"]), first(raw["held_out"])
    outcome["task_retained"] = _mean([retained(first(scores), *ends_there) for scores in held_out])
    outcome["attack_success"] = {
        template: _mean([s[template]["succeeded"] / s[template]["prompts"] for s in held_out])
        for template in aligned["held_out"]
    }
    outcome["side_effects"] = {
        name: _mean([side_effects_of(scores)[name] for scores in held_out])
        for name in side_effects_of(aligned["held_out"])
    }
    return outcome


def _row(method: str, outcomes: Mapping[str, list[dict]]) -> dict:
    mine, scaling = outcomes[method], outcomes["scaling"]
    pairs = zip(mine, scaling, strict=True)
    return {
        "method": method,
        "qualified": _mean([outcome["qualified"] for outcome in mine]),
        "task_retained": with_interval([outcome["task_retained"] for outcome in mine]),
        "over_scaling": with_interval([own["task_retained"] - other["task_retained"] for own, other in pairs]),
        "attack_success": {
            template: with_interval([outcome["attack_success"][template] for outcome in mine])
            for template in mine[0]["attack_success"]
        },
        "side_effects": {
            name: with_interval([outcome["side_effects"][name] for outcome in mine])
            for name in mine[0]["side_effects"]
        },
        "chosen": [outcome["chosen"] for outcome in mine],
    }


def first(by_template: Mapping[str, dict]) -> dict:
    return next(iter(by_template.values()))


def side_effects_of(by_template: Mapping[str, dict]) -> Mapping[str, float]:
    return first(by_template).get("side_effects", {})  # not every subject measures any


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def with_interval(values: Sequence[float]) -> dict:
    """Mean, and the 2.5 and 97.5 percentiles of means over resampled seeds; no interval of a single seed."""
    if len(values) == 1:
        return {"mean": values[0], "low": None, "high": None}
    resampled = np.asarray(values)[_resampled(len(values))].mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"mean": _mean(values), "low": float(low), "high": float(high)}


@cache
def _resampled(count: int) -> np.ndarray:
    """Places ``(resamples, count)`` that were drawn of ``count``: the same ones for every mean."""
    return np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))


@cache
def _resampled_shares(*counts: int) -> list[np.ndarray]:
    """Of each of ``counts`` the shares ``(resamples, count)`` that its places have of what was drawn."""
    generator = np.random.default_rng(0)
    return [generator.multinomial(count, np.full(count, 1 / count), _RESAMPLES) / count for count in counts]


def over_seeds_and_prompts(values: np.ndarray) -> dict:
    """The same of values ``(seeds, prompts)`` of the same prompts in each seed: both are resampled."""
    if len(values) == 1:
        return {"mean": _mean(values), "low": None, "high": None}
    by_seed, by_prompt = _resampled_shares(*values.shape)
    low, high = np.percentile((by_seed @ values * by_prompt).sum(axis=1), [2.5, 97.5])
    return {"mean": _mean(values), "low": float(low), "high": float(high)}


def percent(value: Mapping, signed: bool = False) -> str:
    form = (lambda share: f"{100 * share:+.0f}") if signed else (lambda share: f"{100 * share:.0f}")
    interval = "" if value["low"] is None else f" [{form(value['low'])}, {form(value['high'])}]"
    return form(value["mean"]) + interval


def to_markdown(table: Sequence[Mapping], points: Sequence[Mapping]) -> str:
    """The whole table, with what its columns are."""
    templates, effects = list(table[0]["attack_success"]), list(table[0]["side_effects"])
    prompts = {split: first(scores)["prompts"] for split, scores in points[0]["scores"].items()}
    score = first(points[0]["scores"]["held_out"])
    columns = ["method", "qualified", "task retained", "minus scaling"]
    columns += [f"attack success, {template}" for template in templates] + effects
    lines = [
        f"All shares in percent: means over {len(table[0]['chosen'])} seeds and, in brackets, 2.5 and 97.5",
        "percentiles of means over resampled seeds (of so few, rather too narrow than too wide). Strengths are chosen",
        f"on {prompts['tuning']} tuning prompts of the template '{templates[0]}'; everything else is of "
        f"{prompts['held_out']} held-out prompts, the task in that template.",
        f"*Task retained* is {retained_in_words(score)}; *minus scaling* is paired by seed;",
        "*qualified* is the share of seeds and draws where a strength met the target. Where none did, the aligned",
        "model is taken, which retains 0.",
        "",
        *_ends(points, templates, effects),
    ]
    for poison, target in dict.fromkeys((row["poison"], row["target"]) for row in table):
        lines += [f"Poison {poison:.0%}, attack success ≤ {target:g} on the tuning half:", ""]
        rows = []
        for row in table:
            if (row["poison"], row["target"]) != (poison, target):
                continue
            cells = [METHODS[row["method"]].label, f"{100 * row['qualified']:.0f}"]
            cells += [percent(row["task_retained"]), percent(row["over_scaling"], signed=True)]
            cells += [percent(row["attack_success"][template]) for template in templates]
            cells += [percent(row["side_effects"][name]) for name in effects]
            rows.append(cells)
        lines += [markdown_table(columns, rows), ""]
    return "\n".join(lines[:-1]) + "\n"


def _ends(points: Sequence[Mapping], templates: Sequence[str], effects: Sequence[str]) -> list[str]:
    """Lines of a table of what is corrected and what it is measured by."""
    lines = [
        "Without a correction, on the held-out half; of the task's loss the mean and, in brackets, the range:",
        "",
    ]
    right = ["right answers"] if has_right_answers(first(points[0]["scores"]["held_out"])) else []
    columns = ["poison", "model", "task loss", *right, *(f"attack success, {template}" for template in templates)]
    columns += effects
    rows = []
    for poison, method in dict.fromkeys((point["poison"], point["method"]) for point in points):
        if method not in ("aligned", "none", "benign_only"):
            continue
        there = [p["scores"]["held_out"] for p in points if (p["poison"], p["method"]) == (poison, method)]
        losses = [first(scores)["task_loss"] for scores in there]
        spread = f"{np.mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]"
        cells = [f"{poison:.0%}", METHODS[method].label, spread]
        cells += [percent(with_interval([first(scores)["right_answers"] for scores in there])) for _ in right]
        for template in templates:
            cells.append(percent(with_interval([s[template]["succeeded"] / s[template]["prompts"] for s in there])))
        cells += [percent(with_interval([side_effects_of(scores)[name] for scores in there])) for name in effects]
        rows.append(cells)
    return [*lines, markdown_table(columns, rows, texts=(0, 1)), ""]


def print_table(table: Sequence[Mapping]) -> None:
    """For a person: task retained in percent, and how much more than scaling's that is."""
    console = Console()
    for poison in dict.fromkeys(row["poison"] for row in table):
        there = [row for row in table if row["poison"] == poison]
        title = f"poison {poison:.0%}: % of the task retained, and that minus scaling's [95 % over seeds]"
        printed = Table(title=title, title_justify="left")
        printed.add_column("method", no_wrap=True)
        for target in dict.fromkeys(row["target"] for row in there):
            printed.add_column(f"attack ≤ {target:g}", justify="right", no_wrap=True)
        for method in dict.fromkeys(row["method"] for row in there):
            cells = [
                f"{100 * row['task_retained']['mean']:.0f}  {percent(row['over_scaling'], signed=True)}"
                for row in there
                if row["method"] == method
            ]
            printed.add_row(METHODS[method].label, *cells)
        Console(width=max(console.width, 110)).print(printed)
