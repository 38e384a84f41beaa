"""Speed and memory of the library on a pair of a real model's shapes: ``recipes/benchmark.yaml`` from end to end."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from recipes.benchmarks import computed, correction, estimation, goals, growth, picture, report, training
from recipes.benchmarks.fresh import reading
from recipes.benchmarks.shapes import Shape
from recipes.benchmarks.synthetic import check_space, write_pair
from recipes.benchmarks.timing import resident_bytes
from recipes.files.points import write_whole
from recipes.schema.measured import Benchmark
from recipes.schema.recipe import Recipe
from recipes.training.task import device


def run(recipe: Recipe, command: str) -> dict:
    """Measure everything, write it into the output folder, and print its table; ``command`` is what started it.

    Raises:
        RecipeError: if the pair does not fit on the disk, or if memory cannot be measured on this system.
    """
    benchmark, output, console = recipe.benchmark, Path(recipe.output), Console()
    started, about = time.perf_counter(), {"command": command, "machine": _machine(), "versions": _versions()}
    shape = Shape.of(benchmark)
    resident_bytes("VmRSS")  # where memory cannot be measured it says so now
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=benchmark.scratch) as scratch:
        folder = Path(scratch)
        check_space(shape, folder)
        console.print(f"Writing a pair of {describe(shape)} to {folder}, which is removed at the end.", soft_wrap=True)
        measured = _measure(shape, benchmark, folder, console)
    results = {"benchmark": settings(benchmark), **about, **measured, "seconds": time.perf_counter() - started}
    results["computed"] = computed.larger_models(
        shape, benchmark.rank, benchmark.lora_rank, report.medians(results), results["growth"]["slopes"]
    )
    results["goals"] = goals.judge(results)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_whole(output / "report.md", report.to_markdown(results))
    picture.plot(results, output / "benchmark.png")
    report.print_tables(results, console)
    return results


def describe(shape: Shape) -> str:
    """What is written to the disk, for a person."""
    return (
        f"Llama checkpoints, {shape.parameters / 1e9:.2f} billion parameters and {len(shape.modules)} modules each, "
        f"together {2 * shape.checkpoint_bytes / 1e9:.1f} GB"
    )


def _measure(shape: Shape, benchmark: Benchmark, folder: Path, console: Console) -> dict:
    def stage(text: str) -> None:
        console.print(f"{text} …", highlight=False)

    pair = write_pair(shape, folder, benchmark.shards)
    for side in pair:
        reading([str(side)], list(shape.modules))  # from here on the files are in the page cache
    stage("Estimation, second start, exact SVD and the dense way")
    start = estimation.measure(shape, pair, benchmark.rank, benchmark.repeats, folder)
    subspace, subspace_bytes = estimation.kept_subspace(shape, pair, benchmark.rank, folder)
    stage("What the estimate is wrong by, against the SVD in float64")
    errors = estimation.quality(shape, pair, subspace, benchmark.lora_rank)
    stage("Correction of all modules")
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype="auto").to(device())
    adapted = correction.with_lora(model, benchmark.lora_rank)
    corrected = correction.measure(adapted, subspace, shape, benchmark.repeats)
    stage("Training steps, logs, saves and evaluations")
    trained = training.measure(adapted.unload(), subspace, benchmark, folder)
    del model, adapted
    stage("Growth")
    grown = growth.measure(benchmark, folder)
    return {
        "model": {"modules": len(shape.modules), "parameters": shape.parameters, "bytes": shape.checkpoint_bytes},
        "start": start,
        "quality": errors,
        "correction": corrected,
        "training": trained,
        "sizes": {"subspace": subspace_bytes, **trained.pop("sizes")},
        "growth": grown,
    }


def settings(benchmark: Benchmark) -> dict:
    """What was asked for, as it stands in the results; where the files were says nothing."""
    return {name: value for name, value in asdict(benchmark).items() if name != "scratch"}


def _machine() -> dict:
    found = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    where = torch.device(device())
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": 1024 * int(memory[1]) if memory else None,
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 2),  # processes that ran beside it when it began
        "device": "cpu" if where.type == "cpu" else torch.get_device_module(where).get_device_name(),
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if os.path.exists(path) else ""


def _versions() -> dict[str, str]:
    return {
        package: version(package) for package in ("csulora-callback", "torch", "transformers", "peft", "safetensors")
    }
