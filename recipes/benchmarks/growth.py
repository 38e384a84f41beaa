"""How costs grow with the sides of the weights, the rank and the number of modules, on small runs of a few layers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from recipes.benchmarks.correction import corrected_and_logged, with_lora
from recipes.benchmarks.estimation import bytes_on_disk
from recipes.benchmarks.fresh import estimate, in_fresh_process
from recipes.benchmarks.shapes import Shape
from recipes.benchmarks.synthetic import write_pair
from recipes.schema.measured import Benchmark
from recipes.training.task import device

_VOCABULARY = 256
MEASURED = ("reading", "estimate", "correction", "log")
AXES = {"side": "factor", "rank": "rank", "modules": "modules"}
"""What is compared, and what says of a point where it lies."""


@dataclass(frozen=True)
class Point:
    """All sides of the model times ``factor``, ``layers`` of it, and a subspace of ``rank``."""

    factor: float
    layers: int
    rank: int


def points(benchmark: Benchmark) -> dict[str, list[Point]]:
    """Which are compared along each axis; ``cache`` are those whose subspaces have the same number of bytes."""
    factors, ranks, layers = sorted(benchmark.sizes), sorted(benchmark.ranks), sorted(benchmark.depths)
    largest = factors[-1]
    return {
        "side": [Point(factor, layers[0], ranks[0]) for factor in factors],
        "rank": [Point(factors[len(factors) // 2], layers[0], rank) for rank in ranks],
        "modules": [Point(factors[0], depth, ranks[0]) for depth in layers],
        "cache": [Point(factor, layers[0], round(ranks[0] * largest / factor)) for factor in factors],
    }


def measure(benchmark: Benchmark, folder: Path) -> dict:
    """Every point once, by axis, and the exponents that fit them."""
    by_axis = points(benchmark)
    every = dict.fromkeys(point for axis in by_axis.values() for point in axis)
    measured = {
        point: _measure(point, point in by_axis["cache"], benchmark, folder)
        for point in tqdm(every, desc="growth", unit="point")
    }
    axes = {axis: [measured[point] for point in some] for axis, some in by_axis.items()}
    return {"axes": axes, "slopes": slopes(axes)}


def slopes(axes: Mapping[str, Sequence[Mapping]]) -> dict[str, dict[str, float]]:
    """By axis the exponent of each cost: of the side, the rank and the number of modules, other things being equal.

    ``cache`` has that of a second start over the bytes of the checkpoints, with subspaces of the same size.
    """
    found = {
        axis: {
            cost: slope([(point[along], median(point[cost])) for point in axes[axis]])
            for cost in (*MEASURED, "working_bytes")
        }
        for axis, along in AXES.items()
    }
    again = [(point["checkpoint_bytes"], median(point["again"])) for point in axes["cache"]]
    return {**found, "cache": {"again": slope(again)}}


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """The exponent ``b`` of ``y = a·x^b``, by least squares of the logarithms; 0 where only one ``x`` is there.

    Example:
        >>> round(slope([(1.0, 3.0), (2.0, 12.0), (4.0, 48.0)]), 6)
        2.0
    """
    logs = [(math.log(x), math.log(y)) for x, y in pairs]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    squares = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / squares if squares else 0.0


def _measure(point: Point, with_cache: bool, benchmark: Benchmark, folder: Path) -> dict:
    shape = Shape.of(benchmark).scaled(point.factor, point.layers, _VOCABULARY)
    here = folder / "growth"
    base, aligned = write_pair(shape, here, shards=1)
    asked = {"base": str(base), "aligned": str(aligned), "names": list(shape.modules), "rank": point.rank}
    start = in_fresh_process("start", **asked, cache=None, repeats=benchmark.repeats)
    subspace = estimate(**asked, cache=str(here / "cache"))
    again = []
    if with_cache:
        second = [in_fresh_process("again", **asked, cache=str(here / "cache")) for _ in range(benchmark.repeats)]
        again = [one["again"][0]["seconds"] for one in second]
    subspace_bytes = bytes_on_disk(subspace, here)
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype="auto").to(device())
    live = corrected_and_logged(with_lora(model, benchmark.lora_rank), subspace, benchmark.repeats)
    shutil.rmtree(here)
    times = {**{name: start[name] for name in ("reading", "estimate")}, **live}
    return {
        **asdict(point),
        "modules": len(shape.modules),
        "checkpoint_bytes": sum(2 * rows * columns for rows, columns in shape.modules.values()),
        "subspace_bytes": subspace_bytes,
        # What lies beyond the result itself; one page at least, so that it has a logarithm.
        "working_bytes": [max(4096, start["peak"]["resident"] - subspace_bytes)],
        "again": again,
        **{name: [one["seconds"] for one in series] for name, series in times.items()},
    }
