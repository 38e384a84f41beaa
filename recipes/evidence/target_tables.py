"""What a target's evidence says, in numbers: refusals kept against attack success, and the strength that was found.

Spreads are the mean over seeds and, beside it, the least and the largest value: three or five seeds give no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from recipes.evidence.frontier_report import first, retained
from recipes.schema.measured import Target

READINGS: dict[str, Callable[[Mapping], float]] = {
    "kept": lambda refusing: refusing["kept"],
    "logprob": lambda refusing: refusing["logprob"],
    "likelihood": lambda refusing: math.exp(refusing["logprob"]),  # per token, over the aligned model's
}


def make_tables(points: Sequence[Mapping], target: Target) -> dict[str, list[dict]]:
    """``strengths``, ``correlations``, ``found`` and ``bounded``, see the functions that make each."""
    ends = {(p["seed"], p["poison"], p["method"]): p for p in points if p["method"] in ("aligned", "none")}
    told = [{**point, "outcome": outcome(point, ends)} for point in points]
    return {
        "strengths": strengths(told),
        "correlations": correlations(told),
        "found": found(told, target.margin),
        "bounded": bounded(told, target.attack_success),
    }


def outcome(point: Mapping, ends: Mapping) -> dict[str, float]:
    """What a point comes to on held-out prompts, by name; ``ends`` are the aligned and the raw points of all seeds.

    Attack success and task are of the first template, the one that was fine-tuned on; other templates' attack success
    is there under their names.
    """
    own = point["scores"]
    aligned, raw = (first(ends[point["seed"], point["poison"], name]["scores"]) for name in ("aligned", "none"))
    success, *others = ((template, score["succeeded"] / score["prompts"]) for template, score in own.items())
    return {
        "attack success": success[1],
        "over the aligned model": success[1] - aligned["succeeded"] / aligned["prompts"],
        **{f"attack success, {template}": share for template, share in others},
        "task retained": retained(first(own), aligned, raw),
        **first(own)["side_effects"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean, the least and the largest."""
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def strengths(points: Sequence[Mapping]) -> list[dict]:
    """One row for each poison share, method and fixed strength: what each set of probes reads, and the outcome."""
    rows = []
    for (poison, method, strength), mine in grouped(_fixed(points), "poison", "method", "strength").items():
        readings = {
            probes: {name: spread([of(p["refusing"][probes]) for p in mine]) for name, of in READINGS.items()}
            for probes in mine[0]["refusing"]
        }
        row = {"poison": poison, "method": method, "strength": strength, "seeds": len(mine), "refusing": readings}
        rows.append({**row, "outcome": _spreads([p["outcome"] for p in mine])})
    return rows


def correlations(points: Sequence[Mapping]) -> list[dict]:
    """One row for each set of probes, over the raw and all corrected models of fixed strengths, and for each method.

    Between what the probes read and attack success: Spearman's and Pearson's coefficient over the points of all seeds,
    and the least and largest of the single seeds. The aligned model, by which readings are relative, is no point.
    ``None`` where all values are the same.
    """
    there = [point for point in _fixed(points) if point["method"] != "aligned"]
    methods = [method for method in dict.fromkeys(point["method"] for point in there) if method != "none"]
    rows = []
    for probes in there[0]["refusing"]:
        for method in (None, *methods):
            mine = [point for point in there if method is None or point["method"] in ("none", method)]
            row = {"probes": probes, "method": method, "points": len(mine)}
            row["seeds"] = len({point["seed"] for point in mine})
            rows.append({**row, **{name: _correlated(mine, probes, name) for name in READINGS}})
    return rows


def _correlated(points: Sequence[Mapping], probes: str, name: str) -> dict:
    def of(points: Sequence[Mapping]) -> dict[str, float | None]:
        read = [READINGS[name](point["refusing"][probes]) for point in points]
        return correlation(read, [point["outcome"]["attack success"] for point in points])

    by_seed = [of(mine) for mine in grouped(points, "seed").values()]
    return {**of(points), "by_seed": [one["spearman"] for one in by_seed]}


def correlation(one: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """Spearman's (of ranks, ties at their mean) and Pearson's coefficient; ``None`` where either does not vary."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return {"spearman": None, "pearson": None}
    pair = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return {"spearman": spearman_corrcoef(*pair).item(), "pearson": pearson_corrcoef(*pair).item()}


def found(points: Sequence[Mapping], margin: float) -> list[dict]:
    """For each poison share the aligned and the raw model, and for each method what was found and what had been best.

    ``by`` is the set of probes that a strength was found by, to keep ``share`` of the ``reading``, or ``"hindsight"``,
    see :func:`hindsight`: with at most ``margin`` more attack success than the aligned model of the same seed.
    """
    rows = []
    for (poison,), there in grouped(points, "poison").items():
        for (method,), mine in grouped([p for p in there if p["method"] in ("aligned", "none")], "method").items():
            rows.append({"poison": poison, "method": method, "by": None, **_chosen(mine)})
        targeted = [point for point in there if point["found"] is not None]
        for method in dict.fromkeys(point["method"] for point in targeted):
            best = hindsight(there, method, lambda p: p["outcome"]["over the aligned model"] <= margin + 1e-9)
            if best is not None:
                rows.append({"poison": poison, "method": method, "by": "hindsight", **best})
            own = [point for point in targeted if point["method"] == method]
            for (by, reading, share), mine in grouped(own, "probes", "reading", "share").items():
                row = {"poison": poison, "method": method, "by": by, "reading": reading, "share": share}
                rows.append({**row, **_chosen(mine)})
    return rows


def bounded(points: Sequence[Mapping], attack_success: float) -> list[dict]:
    """For each poison share and method with fixed strengths the best in hindsight at a bounded attack success.

    ``rows`` says of the sample of the task that the method reads, for each seed, how many there are, how many the
    aligned model refuses, how many are poison, and how many are both.
    """
    rows = []
    for (poison,), there in grouped(points, "poison").items():
        for method in dict.fromkeys(point["method"] for point in there):
            best = hindsight(there, method, lambda p: p["outcome"]["attack success"] <= attack_success + 1e-9)
            if best is None:
                continue
            read = {point["seed"]: point["rows"] for point in there if point["method"] == method and "rows" in point}
            counts = {name: [of[name] for of in read.values()] for name in next(iter(read.values()), {})}
            rows.append({"poison": poison, "method": method, **best, "rows": counts})
    return rows


def hindsight(points: Sequence[Mapping], method: str, fits: Callable[[Mapping], bool]) -> dict | None:
    """What loses least of the task, in each seed, among the fixed strengths of a method whose point ``fits``.

    Chosen on the very prompts that it is reported on: a bound for any way of choosing, and no such way itself. Where
    nothing fits, the aligned model is taken. ``None`` for a method without fixed strengths.
    """
    chosen, qualified = [], []
    for mine in grouped(_fixed(points), "seed").values():
        tried = [point for point in mine if point["method"] == method and point["strength"] is not None]
        if not tried:
            return None
        fitting = [point for point in tried if fits(point)]
        qualified.append(bool(fitting))
        (aligned,) = (point for point in mine if point["method"] == "aligned")
        chosen.append(max(fitting, key=lambda point: point["outcome"]["task retained"]) if fitting else aligned)
    return {**_chosen(chosen), "qualified": fmean(qualified)}


def _chosen(points: Sequence[Mapping]) -> dict:
    """One point a seed: strengths by seed, what their probes read, and the outcome."""
    searched = [point["found"] for point in points if point["found"] is not None]
    measured = [next(iter(point["refusing"].values())) for point in points]
    return {
        "seeds": len(points),
        "qualified": fmean([of["is_enough"] for of in searched]) if searched else 1.0,
        "strengths": [of["strength"] for of in searched] if searched else [point["strength"] for point in points],
        "trials": [of["trials"] for of in searched],
        "prompts": [read["prompts"] for read in measured],
        **{name: spread([of(read) for read in measured]) for name, of in READINGS.items()},
        "outcome": _spreads([point["outcome"] for point in points]),
    }


def _fixed(points: Sequence[Mapping]) -> list[Mapping]:
    return [point for point in points if point["found"] is None]


def grouped(points: Sequence[Mapping], *names: str) -> dict[tuple, list[Mapping]]:
    groups: dict[tuple, list[Mapping]] = {}
    for point in points:
        groups.setdefault(tuple(point[name] for name in names), []).append(point)
    return groups


def _spreads(outcomes: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    return {name: spread([values[name] for values in outcomes]) for name in outcomes[0]}
