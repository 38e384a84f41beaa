"""What a report is about: the corrected checkpoints in a folder, by run, with what was logged and judged there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME

from csulora_callback.adapter_source import find_adapter_folder, sidecar_place
from csulora_callback.models.peft_folder import adapter_folder
from csulora_callback.reporting.report.logs import read_json, read_metrics, read_results, read_trainer_state
from csulora_callback.sidecar import FOLDER, RAW, RECORD, places_below, read_own_record, read_record

_RECIPE = "recipe.yaml"
_STEP = re.compile(r"^checkpoint-(\d+)$|(?:^|-)step=(\d+)")  # the Trainer's name, and Lightning's


@dataclass(frozen=True)
class Run:
    """One correction: what came out of it last, and how it came there.

    Attributes:
        name: of its folder, below the one that the report is about.
        folder: the checkpoint that is described: what was saved after training, or else at the last step.
        record: its ``correction.json``.
        config: its ``adapter_config.json``; empty beside shards.
        history: log records, each with a ``step`` and finite numbers; those that were not finite are ``None``.
        state: the rest of ``trainer_state.json``; empty where there is none.
        can_undo: whether the raw adapter lies beside it.
    """

    name: str
    folder: Path
    record: dict
    config: dict
    history: list[dict]
    state: dict
    can_undo: bool


@dataclass(frozen=True)
class Material:
    """All that a report is made of.

    Attributes:
        root: the folder that it is about.
        runs: at least one.
        results: how the models of a recipe were judged, a row each; empty where that was not done.
        recipe: the text of a recipe, if it was one.
    """

    root: Path
    runs: list[Run]
    results: list[dict]
    recipe: str | None


def find_material(run: str | os.PathLike) -> Material:
    """Look for corrected checkpoints in a folder and below it, and for what lies beside them.

    Args:
        run: a checkpoint, the output folder of a trainer or of a recipe, a folder of several, or a Hub id.

    Raises:
        FileNotFoundError: if there is none of it, or no record of a correction in it.
        ValueError: if a file that counts is damaged, or a record is another adapter's.
    """
    root = find_adapter_folder(run, "run")
    root = sidecar_place(root) or root  # the record of an adapter with a name of its own lies above
    checkpoints = _checkpoints(root)
    if not checkpoints:
        raise FileNotFoundError(
            f"`run`: expected a corrected checkpoint, or a folder with some below it, but there is no "
            f"{FOLDER}/{RECORD} in {root}. Train with CSULoRACallback, or correct the adapter with `csulora correct`."
        )
    place = root.resolve()
    home = next((folder for folder in (place, place.parent) if (folder / _RECIPE).is_file()), None)
    logs = {} if home is None else read_metrics(home / "metrics.jsonl")
    results = [] if home is None else read_results(home / "results.json")
    runs = {_name(root, folder): _read_run(root, folder, steps, logs) for folder, steps in checkpoints.items()}
    if home == place:
        first = [name for name in logs if name in runs]
        runs = {name: runs[name] for name in (*first, *(name for name in runs if name not in first))}
    else:  # one correction of a recipe's: the others are not asked for
        results = [row for row in results if row["method"] in ("aligned", "raw", place.name)]
    recipe = None if home is None else (home / _RECIPE).read_text(encoding="utf-8")
    return Material(root, list(runs.values()), results, recipe)


def _checkpoints(root: Path) -> dict[Path, dict[int | None, Path]]:
    """By the folder of a run its checkpoints by their step; what was saved after training has none."""
    found: dict[Path, dict[int | None, Path]] = {}
    for folder in sorted(places_below(root)):
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue  # another process is writing it
        if not (folder / FOLDER / RECORD).is_file():
            continue
        step = _STEP.search(folder.name)
        if folder == root or step is None:
            found.setdefault(folder, {})[None] = folder
        else:
            found.setdefault(folder.parent, {})[int(step[1] or step[2])] = folder
    return found


def _read_run(root: Path, folder: Path, checkpoints: dict[int | None, Path], logs: dict[str, list[dict]]) -> Run:
    steps = sorted(step for step in checkpoints if step is not None)
    last = checkpoints[None] if None in checkpoints else checkpoints[steps[-1]]
    record = read_own_record(last)
    states = (place / "trainer_state.json" for place in (last, *(checkpoints[step] for step in reversed(steps))))
    state = next((read_trainer_state(path) for path in states if path.is_file()), {"log_history": []})
    history = state.pop("log_history") or logs.get(folder.resolve().name, [])
    measured = {log["step"] for log in history if "csulora/update_norm" in log}
    for step in steps:
        if step not in measured:
            history = [*history, {"step": step, **read_record(checkpoints[step])["metrics"]}]
    config = adapter_folder(last, record["adapter"]) / CONFIG_NAME
    return Run(
        _name(root, folder),
        last,
        record,
        read_json(config, dict) if config.is_file() else {},
        sorted(history, key=lambda log: log["step"]),
        state,
        can_undo=(last / FOLDER / RAW).is_dir(),
    )


def _name(root: Path, folder: Path) -> str:
    return root.resolve().name if folder == root else folder.relative_to(root).as_posix()
