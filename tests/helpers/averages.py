"""Other people's callbacks that write weights, and what a run writes and reads at every event."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.helpers.lab import live

STEPS = (1, 2, 8)  # one without a save, one with one, and the last


class MovingAverage(TrainerCallback):
    """Brings an average of the weights in before every second step's evaluation and save, and takes it out after.

    Args:
        back: the event at which it puts its own copy of the weights back.
    """

    def __init__(self, back: str) -> None:
        self.back, self.average, self.kept = back, None, None

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        weights = [p for p in model.parameters() if p.requires_grad]
        self.average = self.average or [p.clone() for p in weights]
        self.average = [0.7 * old + 0.3 * new for old, new in zip(self.average, weights, strict=True)]
        if state.global_step % 2 == 0:
            self.kept = [p.clone() for p in weights]
            self._write(model, self.average)

    def on_evaluate(self, args, state, control, model, **kwargs):
        if self.back == "on_evaluate":
            self._put_back(model)

    def on_save(self, args, state, control, model, **kwargs):
        if self.back == "on_save":
            self._put_back(model)

    def on_train_end(self, args, state, control, model, **kwargs):
        self._write(model, self.average)

    def _put_back(self, model) -> None:
        if self.kept is not None:
            self._write(model, self.kept)
            self.kept = None

    @torch.no_grad()
    def _write(self, model, values) -> None:
        for parameter, value in zip((p for p in model.parameters() if p.requires_grad), values, strict=True):
            parameter.copy_(value)


class Spy(TrainerCallback):
    """At every event saves the model, in this thread and another, and its own state dict; stands first in the list."""

    def __init__(self, output: Path) -> None:
        self.output, self.trainer = output, None
        self.evaluated: dict[int, dict] = {}

    def watch(self, trainer) -> None:
        """Look at the weights in every prediction step too."""
        self.trainer, original = trainer, trainer.prediction_step

        def prediction_step(model, *args, **kwargs):
            self.evaluated.setdefault(trainer.state.global_step, live(trainer.model))
            return original(model, *args, **kwargs)

        trainer.prediction_step = prediction_step

    def look(self, event: str, state, model) -> None:
        place = self.output / f"{event}-{state.global_step}"
        if state.global_step not in STEPS or place.exists():  # an event may come twice in a step
            return
        model.save_pretrained(place / "by hand")
        thread = threading.Thread(target=model.save_pretrained, args=(place / "by a thread",))
        thread.start()
        thread.join()
        self.trainer.save_model(place / "by the trainer")
        torch.save(get_peft_model_state_dict(model), place / "state.pt")
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        kept = {key: value.cpu() for key, value in merged.items() if key.endswith("proj.weight")}
        torch.save(kept, place / "merged.pt")

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.look("step_begin", state, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.look("step_end", state, model)

    def on_log(self, args, state, control, model, **kwargs):
        self.look("log", state, model)

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.look("evaluate", state, model)

    def on_save(self, args, state, control, model, **kwargs):
        self.look("save", state, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.look("train_end", state, model)


def saved_by_hand(place: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The adapters that :class:`Spy` saved at one event."""
    return {
        way: load_file(place / way / "adapter_model.safetensors")
        for way in ("by hand", "by a thread", "by the trainer")
    }


def merged_by_peft(model: PeftModel) -> dict[str, torch.Tensor]:
    """The merged weights of a model that PEFT loaded."""
    return {key: value for key, value in model.merge_and_unload().state_dict().items() if key.endswith("proj.weight")}
