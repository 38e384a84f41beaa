"""What a training run leaves, in either trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from csulora_callback import sidecar


@dataclass(frozen=True, eq=False)
class Fitted:
    """A training run that has ended.

    Attributes:
        module: what the callback saw: the model, or the module that holds it.
        records: the log records.
        checkpoints: the folders of the corrected adapters that are still there, by step.
        held_out: batches of the data that was not trained on.
    """

    module: nn.Module
    records: list[dict]
    checkpoints: dict[int, Path]
    held_out: DataLoader

    @property
    def last(self) -> Path:
        """The folder of the last one."""
        return self.checkpoints[max(self.checkpoints)]


def has_record(adapter: Path) -> bool:
    """Whether a folder holds the record of a correction, and with it the raw adapter."""
    return (adapter / sidecar.FOLDER / sidecar.RECORD).is_file()
