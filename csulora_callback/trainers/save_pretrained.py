"""``save_pretrained`` of a model that is being trained: what it writes is the correction of what it would write.

The model is left alone: a state dict with corrected factors is passed along, and the sidecar follows into the same
folder, so that an upload carries it.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from csulora_callback import sidecar
from csulora_callback.corrected import CorrectedAdapter

if TYPE_CHECKING:
    from csulora_callback.trainers.huggingface_run import HuggingFaceRun


def saving_corrected(run: HuggingFaceRun, model: nn.Module) -> Callable[[Callable], Callable]:
    """What to make of ``model.save_pretrained`` while a run lasts."""

    def wrap(original: Callable) -> Callable:
        def save_pretrained(target: nn.Module, save_directory: str | os.PathLike, *args, **kwargs) -> object:
            if target is not model:  # a deep copy took the attribute along
                return type(target).save_pretrained(target, save_directory, *args, **kwargs)
            if not run.is_saving() or not _saves(kwargs, run.corrector.adapter.name):
                return original(save_directory, *args, **kwargs)
            return _Save(run, original, save_directory, args, kwargs).run()

        return types.MethodType(save_pretrained, model)

    return wrap


def _saves(kwargs: dict, name: str) -> bool:
    """Whether the adapter is among those that are saved."""
    selected = kwargs.get("selected_adapters")
    return selected is None or name in selected


class _Save:
    """One call of ``save_pretrained``."""

    def __init__(
        self, run: HuggingFaceRun, original: Callable, folder: str | os.PathLike, args: tuple, kwargs: dict
    ) -> None:
        self.corrector, self.training = run.corrector, run
        self.original, self.folder, self.args = original, folder, args
        self.kwargs = dict(kwargs)
        self.given = self.kwargs.pop("state_dict", None)
        self.writes = kwargs.get("is_main_process", True)

    def run(self) -> object:
        if self.given is None and self.corrector.adapter.is_sharded:
            with self.corrector.corrected() as adapter:  # the state dict of this process is but a part
                return self._write(adapter, None)
        if self.given is None:
            self.training.renew_alone()
        model = self.corrector.adapter.model
        state, factors = self.corrector.taken(model.state_dict if self.given is None else lambda: self.given, model)
        # Gathered from all processes, while only the one that writes is here: nothing collective may follow.
        adapter = self.corrector.inside() if factors is None else self.corrector.compute(factors)
        if adapter is None:
            self.training.warn_not_corrected()
            return self._original(state)
        if factors is not None:
            state |= self.corrector.adapter.to_state_dict(adapter.corrected, model)
        return self._write(adapter, state)

    def _write(self, adapter: CorrectedAdapter, state: dict | None) -> object:
        if self.writes:
            sidecar.discard(self.folder)
        result = self._original(state)
        if self.writes:
            beside = adapter.sidecar_of_checkpoint if self._is_checkpoint() else adapter.sidecar
            beside.save(self.folder, self.corrector.adapter.config)
        self.training.record(adapter)
        return result

    def _original(self, state: dict | None) -> object:
        return self.original(self.folder, *self.args, state_dict=state, **self.kwargs)

    def _is_checkpoint(self) -> bool:
        return Path(self.folder).resolve() == self.training.checkpoint_folder().resolve()
