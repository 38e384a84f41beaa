"""What a drift budget does in each trainer once it is exceeded: it says so, and ends training with a checkpoint.

Nothing is measured for it: it looks at what was measured to be logged, or for a save. Nothing here imports Lightning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from csulora_callback.budget import Budget
from csulora_callback.trainers.engines import is_kind

if TYPE_CHECKING:
    import lightning.pytorch as lightning
    import transformers

EXCEEDED = "csulora/exceeded"
"""The key of a record in the Trainer's state that says what was exceeded, and by how much."""


class StoppingTrainer:
    """The budget of one run of ``transformers.Trainer``."""

    def __init__(self, budget: Budget, trainer: transformers.Trainer) -> None:
        self.budget, self.trainer = budget, trainer
        self._stops, self._is_saved = False, True

    def check(self, measured: Mapping[str, float]) -> None:
        """Look at what was measured. Collective."""
        state = self.trainer.state
        reasons = self.budget.check(measured, state.global_step)
        for reason in reasons:  # into the state alone: trackers would take a text for a number
            state.log_history.append({EXCEEDED: reason, "epoch": state.epoch, "step": state.global_step})
        if reasons and self.budget.stops:
            self._stops, self._is_saved = True, False

    def saved(self) -> None:
        """A checkpoint was written: what was exceeded until now stands in it."""
        self._is_saved = True

    def look(self, original: Callable, *args: object, **kwargs: object) -> None:
        """The Trainer logs, evaluates and saves in ``original``; it saves at once where it is to stop, and ends.

        Not by setting its flags where something was exceeded: ``save_strategy="best"`` decides anew after the
        evaluation, and an evaluation before the first step is followed by one.
        """
        original(*args, **kwargs)
        if self._stops and not self._is_saved:
            self.trainer.control.should_save = True
            original(*args, **kwargs)  # has logged and evaluated
        if self._stops:
            self.trainer.control.should_training_stop = True


class StoppingFit:
    """The budget of one fit of Lightning's ``Trainer``."""

    def __init__(self, budget: Budget, trainer: lightning.Trainer) -> None:
        self.budget, self.trainer = budget, trainer
        self._is_saved = True

    def check(self, measured: Mapping[str, float], saving: bool = False) -> None:
        """Look at what was measured, maybe for a save that goes on and will hold what was exceeded. Collective."""
        if self.budget.check(measured, self.trainer.global_step) and self.budget.stops:
            self.trainer.should_stop = True
            self._is_saved &= saving

    def save(self) -> None:
        """Write a checkpoint if training is to stop, at an event at which ``ModelCheckpoint`` writes its own."""
        if not self._is_saved:
            self._is_saved = True
            name = f"csulora-exceeded-step={self.trainer.global_step}.ckpt"
            self.trainer.save_checkpoint(os.path.join(self._folder(), name))

    def _folder(self) -> str | os.PathLike:
        others = self.trainer.checkpoint_callbacks
        return next((c.dirpath for c in others if is_kind(c, "ModelCheckpoint")), self.trainer.default_root_dir)
