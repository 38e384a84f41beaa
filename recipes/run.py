"""Run a recipe: ``python -m recipes.run RECIPE.yaml [key=value ...] [--dry-run]``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import PartialState
from omegaconf import OmegaConf
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from csulora_callback import sidecar, write_report
from csulora_callback.models.adapters import find_adapter
from csulora_callback.reporting.subspace import rank_rule
from recipes.benchmarks import benchmark, shapes
from recipes.calibration import calibrate, checks
from recipes.calibration.bench import make_bench
from recipes.calibration.choice import Calibration
from recipes.evidence import costs, frontier, frontier_report, side_effects, smollm2_frontier, target, target_report
from recipes.evidence.toy_frontier import ToySubject
from recipes.files import output as output_folder
from recipes.files import sources
from recipes.files.recipe import load_recipe
from recipes.schema.recipe import Recipe, RecipeError
from recipes.training import drift_picture, report, trackers
from recipes.training.preview import preview
from recipes.training.runs import Corrected, correct_all, load_trainer
from recipes.training.task import Task, build_task, device


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 with one line on stderr for a recipe that cannot run."""
    parser = argparse.ArgumentParser(prog="python -m recipes.run", description="Run a recipe.")
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as training.max_steps=100")
    parser.add_argument(
        "--dry-run", action="store_true", help="check what can be checked without training or downloads"
    )
    options = parser.parse_intermixed_args(arguments)  # flags may stand anywhere
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.dry_run:
            dry_run(recipe)
        elif recipe.frontier.methods:
            output_folder.refuse_run(recipe)
            run_frontier(recipe)
        elif recipe.target.found:
            output_folder.refuse_run(recipe)
            run_target(recipe)
        elif recipe.calibrate.presets:
            output_folder.refuse_run(recipe)
            run_calibrate(recipe)
        elif recipe.benchmark.layers:
            output_folder.refuse_run(recipe)
            run_benchmark(recipe, " ".join(["python -m recipes.run", options.recipe, *options.overrides]))
        else:
            run(recipe)
    except RecipeError as error:
        text = str(error)
        print(text if text.startswith(options.recipe) else f"{options.recipe}: {text}", file=sys.stderr)
        return 2
    return 0


def run(recipe: Recipe) -> list[report.Row]:
    """Fine-tune, correct in every way that the recipe names, judge it, and write it all into the output folder.

    Started by ``torchrun`` or ``accelerate launch``, all processes train; the first one judges, writes and prints.
    """
    sources.check(recipe)
    trackers.check(recipe)
    trainer = load_trainer(recipe)
    processes = PartialState(cpu=not torch.accelerator.is_available())
    _quiet()
    output, console = Path(recipe.output), Console(quiet=not processes.is_main_process)
    if not processes.is_main_process:
        transformers.utils.logging.disable_progress_bar()

    with processes.main_process_first():  # what it builds or downloads, the others find
        place = output_folder.Output(recipe, processes.num_processes)
        task = build_task(recipe)
        if processes.is_main_process:
            place.claim()
    if place.continues:
        console.print(f"{output} holds this run already: going on with it (overwrite=true begins anew).")
    done = correct_all(task, recipe, trainer, output, console)

    rows = []
    if processes.is_main_process:
        rows = judge(task, recipe, done)
        report.write_results(rows, output)
        report.write_answers(rows, output)
        logs = {name: corrected.records for name, corrected in done.items()}
        report.write_metrics(logs, output)
        drift_picture.plot(logs, output / "drift.png")
        write_report(output, output / "report.html")
        title = f"what the correction did, training seed {recipe.training.seed}"
        report.print_table(rows, title, task.judged_by)
        written = [name for name in (*output_folder.RESULTS, output_folder.RECIPE) if (output / name).exists()]
        console.print(f"Written to {output}: {', '.join(written)}, and the checkpoints.")
    processes.destroy_process_group()
    return rows


def judge(task: Task, recipe: Recipe, done: dict[str, Corrected]) -> list[report.Row]:
    """The rows of the corrections, and before them those of what they are compared with."""
    where, batches = device(), next(iter(done.values())).held_out
    rows = [report.Row("aligned", None, task.judge(task.aligned_model().to(where), batches))]
    # Where the live weights are corrected as well, what lies beside a checkpoint is no plain LoRA fine-tune.
    plain = [name for name, correction in recipe.corrections.items() if correction.every_n_steps is None]
    if plain:
        raw = load_checkpoint(task, done[plain[0]].last, raw=True).to(where)
        rows.append(report.Row("raw", None, task.judge(raw, batches)))
    for name in recipe.corrections:
        saved = task.judge(load_checkpoint(task, done[name].last).to(where), batches)
        strength = sidecar.Sidecar.load(done[name].last).record["penalty"].get("strength")  # maybe one that was found
        rows.append(report.Row(name, None if strength is None else float(strength), saved))
    return rows


def run_frontier(recipe: Recipe) -> None:
    """Draw the frontier of the toy lab or of SmolLM2, or go on with it, and print its table."""
    frontier.check(recipe.frontier)
    side_effects.check(recipe)
    sources.check(recipe)
    _check_alone("a frontier")
    _quiet()
    _disable_other_bars()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses a factor of ten on shared cores
    output, subject = Path(recipe.output), make_subject(recipe)
    results = frontier.run(subject, recipe.frontier, output)
    OmegaConf.save(OmegaConf.structured(recipe), output / "recipe.yaml")
    frontier_report.print_table(results["table"])
    short = replace(recipe, training=replace(recipe.training, max_steps=costs.STEPS))
    costs.measure(subject, make_subject(short), recipe.frontier, output)
    if recipe.effects.target is not None:
        side_effects.run(subject, recipe, results, output)
    Console().print(
        f"Written to {output}: results.json, table.md, frontier_poison*.png, costs.json, recipe.yaml, points.jsonl, "
        "adapters/."
    )


def run_target(recipe: Recipe) -> None:
    """Measure what a target does on the toy lab or on SmolLM2, or go on with it, and print its tables."""
    target.check(recipe)
    sources.check(recipe)
    _check_alone("a target's evidence")
    _quiet()
    _disable_other_bars()
    torch.set_num_threads(1)
    output = Path(recipe.output)
    results = target.run(make_subject(recipe), recipe, output)
    OmegaConf.save(OmegaConf.structured(recipe), output / "recipe.yaml")
    target_report.print_tables(results)
    Console().print(f"Written to {output}: results.json, table.md, recipe.yaml, points.jsonl, adapters/, answers/.")


def make_subject(recipe: Recipe) -> ToySubject | smollm2_frontier.SmolLM2Subject:
    """What the recipe of a frontier or of a target is about."""
    if recipe.smollm2.weights is None:
        return ToySubject(recipe)
    smollm2_frontier.check(recipe)
    return smollm2_frontier.SmolLM2Subject(recipe)


def run_calibrate(recipe: Recipe) -> Calibration:
    """Try all settings on the checkpoint that the recipe names, say which one to use, and write what it makes."""
    checks.check(recipe)
    sources.check(recipe)
    checkpoint = checks.checkpoint_folder(recipe)
    _check_alone("a calibration")
    _quiet()
    _disable_other_bars()
    task = build_task(recipe)
    bench = make_bench(recipe, task)
    return calibrate.run(recipe, task, bench, load_checkpoint(task, checkpoint, raw=True).to(device()))


def run_benchmark(recipe: Recipe, command: str) -> None:
    """Measure speed and memory on a pair that is made for it, and print what came out."""
    shapes.check(recipe.benchmark)
    _check_alone("a benchmark")
    _quiet()
    _disable_other_bars()
    benchmark.run(recipe, command)
    OmegaConf.save(OmegaConf.structured(recipe), Path(recipe.output) / "recipe.yaml")
    Console().print(f"Written to {recipe.output}: results.json, report.md, benchmark.png, recipe.yaml.")


def _check_alone(what: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError(f"{what} runs on one process; start it with python -m recipes.run")


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of its own making


def _disable_other_bars() -> None:
    """Libraries' progress bars would break into the recipe's own."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_checkpoint(task: Task, folder: Path, raw: bool = False) -> PeftModel:
    """A saved checkpoint as any user would load it, or its raw adapter.

    That is restored from the sidecar; an adapter without one was trained without the callback, and is raw itself.
    """
    try:
        model = PeftModel.from_pretrained(task.aligned_model(), folder)
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"{folder}: the adapter does not fit the model: {str(error).splitlines()[0]}") from error
    if raw and (folder / sidecar.FOLDER).is_dir():
        find_adapter(model).write(sidecar.Sidecar.load(folder).raw)
    return model


def dry_run(recipe: Recipe) -> None:
    """Check everything that can be checked without training or downloads, and say what was checked."""
    sources.check(recipe)
    trackers.check(recipe)
    _quiet()
    _disable_other_bars()
    if recipe.calibrate.presets:
        checks.check(recipe)
    if recipe.frontier.methods:
        frontier.check(recipe.frontier)
        side_effects.check(recipe)
        make_subject(recipe)
    if recipe.target.found:
        target.check(recipe)
        make_subject(recipe)
    if recipe.benchmark.layers:
        shapes.check(recipe.benchmark)
    table = Table(title="dry run: the recipe is valid", title_justify="left", show_header=False)
    for key, source in sources.of_recipe(recipe).items():
        kind = "model" if key.startswith("model.") or key == "smollm2.weights" else "dataset"
        table.add_row(key, sources.describe(key, source, kind))
    for line, text in preview(recipe).items():
        table.add_row(line, Text(text))
    if recipe.benchmark.layers:
        table.add_row("benchmark", f"writes {benchmark.describe(shapes.Shape.of(recipe.benchmark))}")
    else:
        table.add_row("trainer", recipe.trainer.value)
    if recipe.calibrate.presets:
        for key, what in checks.describe(recipe.calibrate).items():
            table.add_row(key, what)
    if recipe.frontier.methods:
        table.add_row("frontier", f"{len(frontier.grid(recipe.frontier))} points")
    if recipe.target.found:
        table.add_row("target", f"{len(target.grid(recipe))} points")
    for name, correction in recipe.corrections.items():
        table.add_row(f"corrections.{name}", f"{correction.in_words()}, rank: {rank_rule(vars(correction))}")
    table.add_row("output", recipe.output)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
