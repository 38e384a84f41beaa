"""One fit of Lightning's ``Trainer``: what is replaced in it while it lasts, and what that does when it is called.

As in the other trainer, nothing here remembers weights. Validation steps see the correction of what lies in the module
when they begin; a save corrects the dictionary that is about to be written. What is replaced in module, strategy and
checkpoint callbacks is put back when the fit ends; the Trainer's own ``save_checkpoint`` stays replaced, so that what
is saved by hand afterwards has its record and its adapter beside it. Nothing here imports Lightning.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from csulora_callback.behaviour import Behaviour
from csulora_callback.budget import UNMEASURED
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrected_config import forget, remember
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.activations import running_model
from csulora_callback.models.factors import Factors
from csulora_callback.models.peft_folder import adapter_beside
from csulora_callback.trainers import lightning_checkpoint as files
from csulora_callback.trainers.engines import is_kind
from csulora_callback.trainers.patches import Patches, is_running, surrounded
from csulora_callback.trainers.recorder import ActivationRecorder
from csulora_callback.trainers.save_pretrained import saving_corrected
from csulora_callback.trainers.stopping import StoppingFit
from csulora_callback.trainers.tracker_images import of_loggers, send_heat_maps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Saves come from other threads too, and each replaces a method of the strategy for its time.
_SAVING = threading.RLock()


class LightningRun:
    """A corrector at work in a Trainer, from ``setup`` to ``teardown``; saves by hand keep it after that."""

    def __init__(self, callback: object, trainer: Trainer, pl_module: LightningModule) -> None:
        self.callback, self.trainer, self.pl_module = callback, trainer, pl_module
        self.corrector: SafetyCorrector | None = None
        self.recorder: ActivationRecorder | None = None
        self.behaviour: Behaviour | None = None
        self.stopping = StoppingFit(callback.budget, trainer)
        self._measured: dict[str, float] = {}  # in the validation that goes on
        self._logged: tuple[int, dict[str, float]] | None = None
        self._validated: CorrectedAdapter | None = None  # in the validation that goes on, to be drawn
        self._fit, self._saves, self._optimizers = Patches(self), Patches(self), Patches(self)
        self._thread, self._writer = threading.get_ident(), None
        self._is_finished = False
        self._fit.replace(trainer.strategy, "load_checkpoint", self._surrounded(self._load))

    def open(
        self, corrector: SafetyCorrector, recorder: ActivationRecorder | None, behaviour: Behaviour | None
    ) -> None:
        """Replace what has to be replaced, now that there is something to correct."""
        self.corrector, self.recorder, self.behaviour = corrector, recorder, behaviour
        forget(corrector.adapter.config)
        if self.callback.evaluate_corrected or behaviour is not None or self.callback.heat_maps:
            self._fit.replace(self.trainer.strategy, "validation_step", self._surrounded(self._validate))
        if self.callback.export_adapter:
            self._fit.replace(self.trainer.strategy, "remove_checkpoint", self._surrounded(self._remove))
            for checkpoints in self.trainer.checkpoint_callbacks:
                if hasattr(checkpoints, "_link_checkpoint"):  # Lightning's own; others make no links
                    self._fit.replace(checkpoints, "_link_checkpoint", self._surrounded(self._link))
        self._saves.replace(self.trainer, "save_checkpoint", self._surrounded(self._save))
        model = running_model(corrector.adapter)
        self._fit.replace(model, "save_pretrained", saving_corrected(self, model))

    def follow_optimizers(self) -> None:
        """Those that keep other weights for evaluations, as schedule-free ones do, go there and back from raw ones."""
        for optimizer in self.trainer.optimizers:
            for name in ("train", "eval"):
                if hasattr(optimizer, name):
                    self._optimizers.replace(optimizer, name, self._surrounded(self._switch))

    def measure(self) -> dict[str, float]:
        """What the model does as it stands, and corrected; nothing without probes. Collective."""
        self._renew()
        return {} if self.behaviour is None else self.behaviour.measure(self.corrector)

    def measured_in_validation(self) -> dict[str, float]:
        """What was measured in the validation that ends now, and is to be logged."""
        measured, self._measured = self._measured, {}
        if measured:
            self._logged = self.trainer.global_step, measured
        return measured

    def draw_validated(self) -> None:
        """Heat maps of what was validated in the validation that ends now."""
        adapter, self._validated = self._validated, None
        if adapter is not None and self.trainer.is_global_zero:
            send_heat_maps(self.corrector, adapter, of_loggers(self.trainer.loggers), self._logged_step)

    @property
    def _logged_step(self) -> int:
        """As Lightning counts in its records: from zero. What comes before the first step is of it too."""
        return max(self.trainer.global_step - 1, 0)

    @property
    def is_training(self) -> bool:
        """Whether its fit goes on at the moment, and was not ended by an exception."""
        return self._fit.in_place and is_running(self.trainer, self._thread)

    def is_saving(self) -> bool:
        """Whether a ``save_pretrained`` that begins now is one of this fit."""
        return self._fit.in_place and self._is_listening()

    def renew_alone(self) -> None:
        """Before a ``save_pretrained`` by hand: of several processes one alone may be here, or another thread."""
        alone = self.recorder is not None and self.recorder.processes.size == 1
        if alone and threading.get_ident() == self._thread:
            self._renew()

    def record(self, adapter: CorrectedAdapter) -> None:
        """Lightning's checkpoints have their record in them, and no history that should say it too."""

    def checkpoint_folder(self) -> None:
        """What ``save_pretrained`` writes is never what a fit resumes from."""

    def apply(self) -> None:
        """Correct the weights in memory for good."""
        self.corrector.apply()
        self._is_finished = True

    def finish(self) -> None:
        """Leave the corrected model in memory, once. A sharded one cannot be touched after its strategy is gone."""
        if not self.corrector.adapter.is_sharded:
            self._renew()  # of an average that has come in; nothing where a corrected one is live
            self.apply()
            # Models of another kind save the config before the weights.
            if isinstance(running_model(self.corrector.adapter), PeftModel):
                remember(self.corrector.adapter.config, self.corrector.compute())

    def end(self) -> None:
        """The fit is over: put back what was replaced, except ``trainer.save_checkpoint``."""
        self._fit.undo()

    def _surrounded(self, call: Callable) -> Callable[[Callable], Callable]:
        return surrounded(call, self._is_listening)

    def _is_listening(self) -> bool:
        return any(callback is self.callback for callback in self.trainer.callbacks) and (
            self.trainer.lightning_module is self.pl_module
        )

    def _load(self, original: Callable, *args: object, **kwargs: object) -> dict[str, Any]:
        checkpoint = original(*args, **kwargs)
        if self.trainer.state.fn == "fit":  # evaluating a checkpoint keeps what ships
            self.callback.raw_is_loaded = files.put_raw_back(checkpoint)
        return checkpoint

    def _validate(self, original: Callable, *args: object, **kwargs: object) -> object:
        if self.trainer.state.fn != "fit":
            return original(*args, **kwargs)
        self._renew()
        if not self.trainer.sanity_checking:
            # Here, as averages that came in for the validation may be out again when it ends. Later batches cost
            # nothing.
            self._measured = self.measure()
            if self.callback.heat_maps and self._validated is None:
                self._validated = self.corrector.compute()
        with self.corrector.corrected() if self.callback.evaluate_corrected else nullcontext():
            return original(*args, **kwargs)

    def _remove(self, original: Callable, filepath: str | os.PathLike) -> None:
        original(filepath)
        if self._writes_beside(filepath):
            files.remove_adapter(filepath)

    def _link(self, original: Callable, trainer: Trainer, filepath: str, linkpath: str) -> None:
        if self._writes_beside(linkpath):
            files.remove_adapter(linkpath)
        original(trainer, filepath, linkpath)
        if self._writes_beside(linkpath):
            files.link_adapter(filepath, linkpath)

    def _save(self, original: Callable, *args: object, **kwargs: object) -> None:
        if self._writer == threading.get_ident():  # a save inside a save, from a hook
            return original(*args, **kwargs)
        with _SAVING:
            saving, self._writer = Patches(self), threading.get_ident()
            saving.replace(self.trainer.strategy, "save_checkpoint", self._surrounded(self._write))
            try:
                original(*args, **kwargs)
            finally:
                saving.undo()
                self._writer = None

    def _write(
        self, original: Callable, checkpoint: dict[str, Any], filepath: str | os.PathLike, storage_options: Any = None
    ) -> None:
        live = is_kind(self.trainer.strategy, "DeepSpeedStrategy")
        factors = files.factors_of(checkpoint, self.corrector, self.pl_module, live)
        behaviour = self._look_at(factors)
        adapter = None if factors is None else self._correction(factors)
        if self._is_own:
            self.stopping.check({} if adapter is None else {**UNMEASURED, **adapter.metrics, **behaviour}, saving=True)
        if adapter is not None:
            files.put_into(checkpoint, adapter, self.corrector, self.pl_module)
        exports = self.callback.export_adapter and factors is not None
        if exports:
            shipped = factors if adapter is None else adapter.corrected
            state = files.saved_by_peft(checkpoint, shipped, self.corrector, self.pl_module)
        if self._writes_beside(filepath):
            files.remove_adapter(filepath)
        with self.corrector.corrected() if live else nullcontext():
            original(checkpoint, filepath, storage_options)
        if exports and self._writes_beside(filepath):
            files.export(adapter_beside(filepath), state, self.corrector, adapter)

    @property
    def _is_own(self) -> bool:
        """Whether a save is one of this fit, and all processes are at it."""
        return self._fit.in_place and threading.get_ident() == self._thread

    def _look_at(self, factors: Factors | None) -> dict[str, float]:
        """Have the model read, and say what it does, with what is about to be written in it."""
        if self.recorder is None or not self._is_own:
            return {}
        # Sharded factors may be gathered on one process alone; nobody averages them.
        others = factors is not None and not self.corrector.adapter.is_sharded
        with self.corrector.holding(factors) if others else nullcontext():
            measured = self.measure()
        self._log_behaviour(measured)
        return measured

    def _log_behaviour(self, measured: dict[str, float]) -> None:
        """To the loggers: no hook of a save may log otherwise."""
        if self._logged != (self.trainer.global_step, measured):
            self._logged = self.trainer.global_step, measured
            for logger in self.trainer.loggers:
                logger.log_metrics(measured, step=self._logged_step)

    def _switch(self, original: Callable, *args: object, **kwargs: object) -> object:
        """Goes from the weights that are trained to others and back, relative to what they are."""
        with self.corrector.lifted(for_good=self._is_finished):
            return original(*args, **kwargs)

    def _correction(self, factors: dict) -> CorrectedAdapter | None:
        """While a fit lasts everything is corrected; after it what is known to be corrected, and nothing else."""
        return self.corrector.compute(factors) if self._fit.in_place else self.corrector.known(factors)

    def _renew(self) -> None:
        if self.recorder is not None and self._fit.in_place:
            self.recorder.renew(self.corrector)

    def _writes_beside(self, path: str | os.PathLike) -> bool:
        return self.callback.export_adapter and self.trainer.is_global_zero and "://" not in str(path)
