"""The log records of a run in Lightning, whose checkpoints hold none: a file for each time that it was begun."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from accelerate import PartialState
from lightning.pytorch.loggers import CSVLogger

_FOLDER = "logs"


def logger(folder: Path, resumed: int) -> CSVLogger:
    """The logger of a run that goes on from a step; what a killed one logged from there on is removed.

    Every record is on the disk as it is logged.
    """
    if PartialState().is_main_process:  # the one that logs
        for step, part in _parts(folder).items():
            if step >= resumed:
                shutil.rmtree(part)
    return CSVLogger(folder, name=_FOLDER, version=resumed, flush_logs_every_n_steps=1)


def read(folder: Path) -> list[dict]:
    """All records, of each part those up to where the next one goes on."""
    parts = _parts(folder)
    ends = [*list(parts)[1:], None]
    return [
        record
        for part, end in zip(parts.values(), ends, strict=True)
        for record in _records(part / "metrics.csv")
        if end is None or record["step"] <= end
    ]


def _parts(folder: Path) -> dict[int, Path]:
    parts = {int(path.name.rpartition("_")[2]): path for path in (folder / _FOLDER).glob("version_*")}
    return dict(sorted(parts.items()))


def _records(path: Path) -> list[dict]:
    if not path.is_file():  # nothing was logged after this step
        return []
    with open(path, encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"]) + 1} for row in rows]  # Lightning counts from zero
