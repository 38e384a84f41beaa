"""``save_pretrained`` of a model that is being trained: what it writes is the correction of what it would write.

The model is left alone: a state dict with corrected factors is passed along, and the sidecar follows into the same
folder, so that an upload carries it.
"""

from __future__ import annotations

import inspect
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from csulora_callback import sidecar
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.adapters import holder_of

logger = logging.getLogger(__name__)

_SAVING_THEIR_MODULES = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")


class SavingRun(Protocol):
    """What a run of either trainer says of a save."""

    corrector: SafetyCorrector

    def is_saving(self) -> bool: ...

    def renew_alone(self) -> None: ...

    def record(self, adapter: CorrectedAdapter) -> None: ...

    def checkpoint_folder(self) -> Path | None: ...


def saver_of(model: nn.Module) -> nn.Module | None:
    """The model whose ``save_pretrained`` writes the adapter when a Trainer saves ``model``; None where none does.

    Those of sentence-transformers save each of their modules, the transformer among them.

    Example:
        >>> saver_of(nn.Linear(2, 2)) is None
        True
    """
    if any(kind.__name__ in _SAVING_THEIR_MODULES for kind in type(model).__mro__):
        return holder_of(model)
    return model if isinstance(model, PeftModel | PreTrainedModel) else None


def saving_corrected(run: SavingRun, model: nn.Module) -> Callable[[Callable], Callable]:
    """What to make of ``model.save_pretrained`` while a run lasts."""

    def wrap(original: Callable) -> Callable:
        def save_pretrained(target: nn.Module, save_directory: str | os.PathLike, *args, **kwargs) -> object:
            if target is not model:  # a deep copy took the attribute along
                return type(target).save_pretrained(target, save_directory, *args, **kwargs)
            named = _named(target, save_directory, args, kwargs)
            if not run.is_saving() or not _saves(named, run.corrector.adapter.name):
                return original(save_directory, *args, **kwargs)
            return _Save(run, model, original, named).run()

        return types.MethodType(save_pretrained, model)

    return wrap


def _named(model: nn.Module, save_directory: str | os.PathLike, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name, wherever they stood."""
    bound = inspect.signature(type(model).save_pretrained).bind(model, save_directory, *args, **kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    return {**arguments.pop("kwargs", {}), **arguments}


def _saves(named: dict, name: str) -> bool:
    """Whether the adapter is among those that are saved."""
    selected = named.get("selected_adapters")
    return selected is None or name in selected


class _Save:
    """One call of ``save_pretrained``."""

    def __init__(self, run: SavingRun, model: nn.Module, original: Callable, named: dict) -> None:
        self.corrector, self.training = run.corrector, run
        self.model, self.original, self.named = model, original, dict(named)
        self.folder = self.named.pop("save_directory")
        self.given = self.named.pop("state_dict", None)
        self.writes = named.get("is_main_process", True)

    def run(self) -> object:
        if self.given is None and self.corrector.adapter.is_sharded:
            with self.corrector.corrected() as adapter:  # the state dict of this process is but a part
                return self._write(adapter, None)
        if self.given is None:
            self.training.renew_alone()
        model = self.model
        state, factors = self.corrector.taken(model.state_dict if self.given is None else lambda: self.given, model)
        # Gathered from all processes, while only the one that writes is here: nothing collective may follow.
        adapter = self.corrector.inside() if factors is None else self.corrector.compute(factors)
        if adapter is None:
            logger.warning("A state_dict without LoRA factors is saved outside a checkpoint: it is not corrected.")
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
        return self.original(self.folder, state_dict=state, **self.named)

    def _is_checkpoint(self) -> bool:
        checkpoint = self.training.checkpoint_folder()
        return checkpoint is not None and Path(self.folder).resolve() == checkpoint.resolve()
