"""What a benchmark's numbers are asked to be, and whether they are; ratios are of one round of the run each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from recipes.benchmarks.timing import spread


def judge(results: Mapping) -> list[dict]:
    """One row a goal: what is asked, what came out, and whether the median of it is within that."""
    start, correction = results["start"]["times"], results["correction"]
    step = median(run["step"] for run in results["training"]["with"])
    slower = max(correction["agreement"], key=lambda name: median(seconds(correction["times"][name])))
    worst = max(max(errors["guard"], errors["csulora"]) for errors in results["quality"].values())
    peak = [one["resident"] / results["model"]["bytes"] for one in results["start"]["peaks"]["start"]]
    return [
        _row(
            "estimation / reading both checkpoints, from the disk", 3, _ratios(start, "cold estimate", "cold reading")
        ),
        _row("estimation / reading both, from the page cache", 3, _ratios(start, "estimate", "reading")),
        _row("estimation / exact SVD", 0.1, _ratios(start, "estimate", "svd")),
        _row("estimation / the dense way", 0.1, _ratios(start, "estimate", "dense")),
        _row("largest error of `X*` / size of the update", 1e-3, [worst]),
        _row("second start / first start", 0.05, _ratios(start, "again", "estimate")),
        _row("second start, exponent of the checkpoints' size", 0.1, [results["growth"]["slopes"]["cache"]["again"]]),
        _row("peak memory while estimating / one checkpoint", 0.15, peak),
        _row("dense correction / correction", 300, _ratios(correction["times"], "dense", slower), at_least=True),
        _row("correction less the dense one / size of the update", 1e-5, [max(correction["agreement"].values())]),
        _row("drift at a log / training step", 0.003, [one / step for one in seconds(correction["times"]["log"])]),
        _row("what a save adds / training step", 0.05, [one / step for one in added_by_the_callback(results, "save")]),
    ]


def seconds(series: Sequence[Mapping]) -> list[float]:
    """Of each round."""
    return [one["seconds"] for one in series]


def added_by_the_callback(results: Mapping, event: str) -> list[float]:
    """Seconds that a ``log``, ``save`` or ``evaluation`` takes more with the callback than without, round by round."""
    runs = results["training"]
    key = f"after {event}"
    return [one[key] - other[key] for one, other in zip(runs["with"], runs["without"], strict=True)]


def _ratios(times: Mapping, of: str, to: str) -> list[float]:
    return [one / other for one, other in zip(seconds(times[of]), seconds(times[to]), strict=True)]


def _row(goal: str, limit: float, values: Sequence[float], at_least: bool = False) -> dict:
    got = spread(values)
    reached = got["median"] >= limit if at_least else got["median"] <= limit
    return {"goal": goal, "asked": f"{'≥' if at_least else '≤'} {limit:g}", "got": got, "met": reached}
