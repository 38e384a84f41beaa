"""Calibrates the adapter of a checkpoint: tries settings on its raw factors, and writes what the chosen one makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf
from peft import PeftModel
from tqdm.auto import tqdm

from csulora_callback import SafetyCorrector, SafetySubspace, correct_adapter
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.probes import tokenize
from csulora_callback.models.processes import Processes
from csulora_callback.models.whole_files import put_folder
from csulora_callback.refused_rows import RefusedRows
from csulora_callback.sidecar import Sidecar
from csulora_callback.subspace_cache import default_cache_dir
from recipes.calibration import report
from recipes.calibration.bench import ChatBench, ToyBench
from recipes.calibration.choice import ALIGNED, RAW, Calibration, Candidate, Judgement, candidates, choose, ranks_for
from recipes.files.points import SPLITS
from recipes.schema.recipe import Recipe, RecipeError
from recipes.training.task import Task, training_rows


def run(recipe: Recipe, task: Task, bench: ToyBench | ChatBench, model: PeftModel) -> Calibration:
    """Try all settings on the model, whose adapter is the checkpoint's raw one; fill the output folder, and print it.

    What was there of an older calibration is replaced, all of it at once.
    """
    trials, settings = Trials(recipe, task, bench, model), recipe.calibrate
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "calibration")
        folder.mkdir()
        result = choose(
            trials.candidates(),
            trials.ends(),
            settings.target,
            settings.newly_refused,
            trials.try_out,
            partial(trials.ship, folder=folder),
        )
        again = report.how_to_repeat(result.chosen, recipe, task.aligned)
        report.write(result, folder, again)
        OmegaConf.save(OmegaConf.structured(recipe), folder / report.RECIPE)
        put_folder(Path(recipe.output), lambda place: shutil.copytree(folder, place, dirs_exist_ok=True))
    report.print_result(result, recipe, again)
    return result


class Trials:
    """The raw adapter in its model, to be corrected in one way after the other."""

    def __init__(self, recipe: Recipe, task: Task, bench: ToyBench | ChatBench, model: PeftModel) -> None:
        self.recipe, self.task, self.bench, self.model = recipe, task, bench, model
        self.adapter = find_adapter(model)
        self._subspaces: dict[int, SafetySubspace] = {}
        self._activations = cache(self._read)  # of these trials, not of the class, which would keep their models

    def candidates(self) -> Iterator[Candidate]:
        """What the recipe asks for, with a progress bar; subspaces are estimated when the first one is."""
        settings, shapes = self.recipe.calibrate, [layer.shape for layer in self.adapter.layers.values()]
        tried = candidates(settings, settings.ranks or ranks_for(min(d_out, d_in) for d_out, _, d_in in shapes))
        for rank in dict.fromkeys(candidate.rank for candidate in tried):
            self._subspaces[rank] = self._estimate(rank)
        yield from tqdm(tried, desc="calibrating", unit="setting")

    def ends(self) -> dict[str, dict[str, Judgement]]:
        """What a correction lies between, judged on both halves."""
        with tqdm(total=2 * len(SPLITS), desc="without a correction", unit="half") as bar:

            def judge(split: str) -> Judgement:
                judgement = self.bench.judge(self.model, split)
                bar.update()
                return judgement

            with self.model.disable_adapter():
                aligned = {split: judge(split) for split in SPLITS}
            _check_answered(aligned)
            return {ALIGNED: aligned, RAW: {split: judge(split) for split in SPLITS}}

    def try_out(self, candidate: Candidate) -> Judgement:
        """How the model does on the tuning half with this correction."""
        penalty = candidate.penalty()
        activations = None if penalty.on_probes is None else self._activations(penalty.skips_prefix)
        corrector = SafetyCorrector(self.model, self._subspaces[candidate.rank], penalty, activations)
        with corrector.corrected():
            return self.bench.judge(self.model, "tuning")

    def ship(self, candidate: Candidate, folder: Path) -> Judgement:
        """Write the corrected adapter, and what it takes to make it again; judge it, as written, on the other half."""
        penalty, subspace = candidate.penalty(), self._subspaces[candidate.rank]
        texts = {}
        if penalty.on_probes is not None:
            rows, probes = self._texts.counted.rows, self._texts.probes
            texts = {"task": rows, "probes": probes, "aligned_model": self.task.aligned}
            _write_rows(folder / report.TASK, "input_ids", rows)
            _write_rows(folder / report.PROBES, "prompt", probes)
        subspace.save(folder / report.SUBSPACE)
        correct_adapter(self.recipe.calibrate.checkpoint, subspace, folder / report.ADAPTER, penalty, **texts)
        self.adapter.write(Sidecar.load(folder / report.ADAPTER).corrected)
        return self.bench.judge(self.model, "held_out")

    def _estimate(self, rank: int) -> SafetySubspace:
        """As the callback does at this rank: the first vectors of a larger one may differ in their last bits."""
        return SafetySubspace.estimate(
            self.task.base,
            self.task.aligned,  # not the model in memory: of another dtype, its rounding would count as displacement
            list(self.adapter.layers),
            rank=rank,
            cache_dir=default_cache_dir(),
        )

    @cached_property
    def _texts(self) -> Texts:
        task, sample = self.task, training_rows(self.task, self.recipe)
        texts = Texts(sample.rows, tokenize(task.probes, task.aligned), sample.seen, sample.starts)
        if task.tokenizer is None:
            return texts
        texts = RefusedRows(self.adapter, task.tokenizer, Processes()).mark(texts)
        if not texts.counted.rows:
            raise RecipeError(
                "'data.source': expected rows that the aligned model answers, to measure the task by for a data-"
                f"aware preset, but it refuses all {len(texts.task)} that were drawn"
            )
        return texts

    def _read(self, skip_prefix: bool) -> Activations:
        return Activations.read(self.adapter, self._texts, skip_prefix)


def _check_answered(aligned: Mapping[str, Judgement]) -> None:
    """Refuse harmless prompts of which the aligned model answers none, in either half: nothing is to be seen by them.

    Raises:
        RecipeError: naming the half.
    """
    for split, judgement in aligned.items():
        if judgement.harmless_answers and all(answer.refused for answer in judgement.harmless_answers):
            raise RecipeError(
                "'calibrate.harmless': expected some that the aligned model answers, in each half, but it refuses all "
                f"{len(judgement.harmless_answers)} of the {split.replace('_', '-')} half, such as "
                f"{judgement.harmless_answers[0].prompt!r}"
            )


def _write_rows(path: Path, column: str, rows: Sequence[Sequence[int]]) -> None:
    path.write_text("".join(json.dumps({column: list(row)}) + "\n" for row in rows), encoding="utf-8")
