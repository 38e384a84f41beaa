"""A benchmark as a page, on the terminal, and as the section of the library's own page."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from recipes.benchmarks.goals import added_by_the_callback, seconds
from recipes.benchmarks.growth import AXES
from recipes.benchmarks.timing import spread
from recipes.benchmarks.training import EVALUATED, EVENTS
from recipes.files.markdown import markdown_table

COUNTED = "of one module of each size, counted as often as the model has it"


def medians(results: Mapping) -> dict[str, float]:
    """What :func:`recipes.benchmarks.computed.larger_models` goes by."""
    start, correction = results["start"], results["correction"]["times"]
    peak = spread([one["resident"] for one in start["peaks"]["start"]])["median"]
    return {
        **{name: spread(seconds(start["times"][name]))["median"] for name in ("estimate", "again")},
        "correction": spread(seconds(correction["csulora"]))["median"],
        "log": spread(seconds(correction["log"]))["median"],
        "working_bytes": max(4096.0, peak - results["sizes"]["subspace"]),
        "subspace_bytes": results["sizes"]["subspace"],
    }


def goal_rows(results: Mapping) -> list[list[str]]:
    """As texts."""
    return [[row["goal"], row["asked"], ranged(row["got"]), "yes" if row["met"] else "no"] for row in results["goals"]]


def time_rows(results: Mapping) -> list[list[str]]:
    """What was measured, in seconds, and what each of it is."""
    start, correction, runs = results["start"]["times"], results["correction"]["times"], results["training"]
    modules = results["model"]["modules"]
    batch, length = results["benchmark"]["batch"], results["benchmark"]["length"]
    rows = [
        ("reading both checkpoints", seconds(start["cold reading"]), _READ.format("the disk")),
        ("the same", seconds(start["reading"]), _READ.format("the page cache")),
        ("estimation", seconds(start["cold estimate"]), _ESTIMATED.format("on the disk", "")),
        ("the same", seconds(start["estimate"]), _ESTIMATED.format("in the page cache", "; the result is kept")),
        ("second start", seconds(start["again"]), "in a fresh process, found in the cache"),
        ("exact SVD", seconds(start["svd"]), f"float32, {COUNTED}"),
        ("the dense way", seconds(start["dense"]), f"both models loaded, and `D` and `D·Dᵀ/‖D‖` {COUNTED}"),
        (
            "of which loading",
            seconds(start["load"]),
            "`AutoModelForCausalLM.from_pretrained`, which maps the files; a fresh process",
        ),
        *(
            (f"correction, {name}(10)", seconds(correction[name]), f"all {modules} modules, changed factors")
            for name in ("guard", "csulora")
        ),
        ("dense correction", seconds(correction["dense"]), f"dense projectors on dense updates, {COUNTED}"),
        ("drift at a log", seconds(correction["log"]), "`SafetyCorrector.measure()`, changed factors"),
        (
            "a training step",
            [run["step"] for run in runs["with"]],
            f"{batch} × {length} tokens, forward, backward and AdamW, bfloat16",
        ),
        *((f"{event}, added", added_by_the_callback(results, event), _EVENTS[event]) for event in EVENTS),
    ]
    return [[what, ranged(spread(values)), how] for what, values, how in rows]


_READ = "every target weight copied into memory of its own, from {}"
_ESTIMATED = "in a fresh process, files {}{}"
_EVENTS = {
    "log": "the Trainer's log with the callback less one without",
    "save": "the Trainer's checkpoint with the callback less one without, factors not yet corrected",
    "evaluation": f"an evaluation of {EVALUATED} batches with the callback less one without, likewise",
}


def memory_rows(results: Mapping) -> list[list[str]]:
    """Peaks above the interpreter with imports, and sizes on the disk, in MB."""
    peaks, sizes, model = results["start"]["peaks"], results["sizes"], results["model"]
    loaded = [one["resident"] + results["start"]["dense_bytes"] for one in peaks["load"]]
    rows = [
        ("one checkpoint", [model["bytes"]], "bfloat16, on the disk"),
        ("peak while estimating", [one["resident"] for one in peaks["start"]], "mapped files included"),
        ("peak of the dense way", loaded, "both models, measured, and all `D·Dᵀ` in float32, computed"),
        ("subspace", [sizes["subspace"]], "on the disk"),
        ("adapter", [sizes["adapter"]], "on the disk"),
        ("what lies beside it", [sizes["sidecar"]], "raw factors and record"),
    ]
    if any(one["accelerator"] for one in peaks["start"]):
        rows += [
            ("accelerator, estimating", [one["accelerator"] for one in peaks["start"]], "peak"),
            ("accelerator, training", [results["training"]["accelerator_peak"]], "peak, model and callback included"),
        ]
    return [[what, ranged(spread([value / 1e6 for value in values])), how] for what, values, how in rows]


def quality_rows(results: Mapping) -> list[list[str]]:
    """Errors of the estimate by size of module."""
    return [
        [size.replace("x", " × "), str(errors["rank"]), *(f"{errors[key]:.1e}" for key in _ERRORS)]
        for size, errors in results["quality"].items()
    ]


_ERRORS = ("energy_lost", "guard", "csulora")


def slope_rows(results: Mapping) -> list[list[str]]:
    """Exponents by cost and axis."""
    slopes = results["growth"]["slopes"]
    names = {"reading": "reading", "estimate": "estimation", "correction": "correction", "log": "log"}
    names["working_bytes"] = "peak memory beyond the subspace"
    return [[text, *(f"{slopes[axis][cost]:.2f}" for axis in AXES)] for cost, text in names.items()]


def computed_rows(results: Mapping) -> list[list[str]]:
    """Larger models; nothing of it was measured."""
    return [
        [
            row["model"],
            str(row["processes"]),
            *(number(row[cost]) for cost in ("estimate", "again", "correction", "log")),
            *(number(row[f"{what}_bytes"] / 1e9) for what in ("peak", "checkpoint", "subspace", "adapter")),
        ]
        for row in results["computed"]
    ]


GOALS = ("what", "asked", "came out", "met")
TIMES = ("seconds", "median (range)", "of what")
MEMORY = ("MB", "median (range)", "of what")
QUALITY = ("size", "rank", "energy lost", "error of X*, guard(10)", "csulora(10)")
SLOPES = ("exponent of", "the sides", "the rank", "the number of modules")
COMPUTED = (
    "computed, not measured", "processes", "estimation, s", "second start, s", "correction, s", "log, s",
    "peak, GB", "checkpoint, GB", "subspace, GB", "adapter, GB",
)  # fmt: skip


def to_markdown(results: Mapping) -> str:
    """The whole report."""
    met = sum(row["met"] for row in results["goals"])
    errors = "Against the exact float64 SVD of what lies in the files, of one module of each size"
    parts = [
        "# Speed and memory",
        _measured_on(results),
        f"{met} of {len(results['goals'])} goals are met. Times are medians, in brackets the least and the largest of "
        f"{results['benchmark']['repeats']} rounds in which everything took its turn; the run took "
        f"{results['seconds'] / 60:.1f} minutes.",
        markdown_table(GOALS, goal_rows(results)),
        "![Seconds of a start and of a correction beside what else one could do, and how they grow](benchmark.png)",
        markdown_table(TIMES, time_rows(results), texts=(0, 2)),
        markdown_table(MEMORY, memory_rows(results), texts=(0, 2)),
        f"{errors}; *energy lost* is a share of what the best subspace of the rank holds, errors are over `‖Δ‖`:",
        markdown_table(QUALITY, quality_rows(results)),
        _grown(results),
        markdown_table(SLOPES, slope_rows(results)),
        _COMPUTED,
        markdown_table(COMPUTED, computed_rows(results)),
    ]
    return "\n\n".join(parts) + "\n"


def readme_section(results: Mapping) -> str:
    """What stands between the marks in the library's own page."""
    parts = [
        _measured_on(results),
        markdown_table(GOALS, goal_rows(results)),
        markdown_table(TIMES, time_rows(results), texts=(0, 2)),
        markdown_table(MEMORY, memory_rows(results), texts=(0, 2)),
        _COMPUTED,
        markdown_table(COMPUTED, computed_rows(results)),
    ]
    return "\n\n".join(parts) + "\n"


_COMPUTED = (
    "For larger models, with ranks by the same rule, **computed** from these numbers and the exponents that were "
    "fitted on small runs, in which fixed costs count for more: times are rather lower bounds (the products of an "
    "estimate alone grow with the square of the sides and with the rank). Of eight processes each takes its part of "
    "the modules, and all else is each one's own:"
)


def _grown(results: Mapping) -> str:
    cache = results["growth"]["slopes"]["cache"]["again"]
    return (
        "Exponents, fitted on runs of a few layers in which one thing grows at a time. A second start with a subspace "
        f"of the same size grows with the checkpoints' size to the power of {cache:.2f}:"
    )


def _measured_on(results: Mapping) -> str:
    machine, model, benchmark = results["machine"], results["model"], results["benchmark"]
    memory = "" if machine["memory_bytes"] is None else f", {machine['memory_bytes'] / 1e9:.0f} GB"
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"`{results['command']}` on {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
        f"{memory}{device}, load {machine['load']:g} before it began; {versions}. A pair with the shapes of "
        f"{benchmark['name']}: {benchmark['layers']} layers, {model['parameters'] / 1e9:.2f} billion parameters, "
        f"{model['modules']} modules, LoRA of rank {benchmark['lora_rank']} on all of them."
    )


def ranged(values: Mapping[str, float]) -> str:
    """A median with the least and the largest value; one value alone where they are the same.

    Example:
        >>> ranged({"median": 12.34, "low": 0.012, "high": 1234.0})
        '12.3 (0.012–1230)'
        >>> ranged({"median": 1e-7, "low": 1e-7, "high": 1e-7})
        '1e-07'
    """
    median, low, high = (number(values[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}–{high})"


def number(value: float) -> str:
    """Three digits that count.

    Example:
        >>> number(0.012345), number(1234.5), number(2.0), number(0.0000123)
        ('0.0123', '1230', '2', '1.23e-05')
    """
    if abs(value) >= 1000:
        digits = len(f"{abs(value):.0f}") - 3
        return f"{round(value, -digits):.0f}"
    return f"{value:.3g}"


def print_tables(results: Mapping, console: Console) -> None:
    """For a person."""
    for columns, rows in ((TIMES, time_rows(results)), (MEMORY, memory_rows(results)), (GOALS, goal_rows(results))):
        table = Table(*columns)
        for row in rows:
            table.add_row(*(cell.replace("`", "") for cell in row))
        console.print(table)
    console.print(_measured_on(results), soft_wrap=True, highlight=False, markup=False)
