"""When the correction runs in Lightning's ``Trainer``: its events translated into calls of the corrector.

A checkpoint is corrected in the dictionary that Lightning is about to write, by wrapping the module's
``on_save_checkpoint``: unlike the callback's own, it is called for weights-only checkpoints too. Validation sees the
corrected factors in the model itself. Nothing here imports Lightning.
"""

from __future__ import annotations

import logging
import shutil
import types
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csulora_callback.corrector import CorrectedAdapter, SafetyCorrector
from csulora_callback.models import sharding
from csulora_callback.models.activations import Texts
from csulora_callback.models.factors import from_peft_state_dict, save_as_peft_adapter, to_peft_state_dict
from csulora_callback.trainers.engines import is_strategy, refuse_strategy
from csulora_callback.trainers.recorder import ActivationRecorder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "csulora"
_IN_PROGRESS_BAR = ("csulora/off_energy", "csulora/attenuation")  # seven numbers would push the loss out of sight


class LightningEvents:
    """The half of :class:`~csulora_callback.CSULoRACallback` that listens to Lightning's ``Trainer``."""

    every_n_steps: int | None
    evaluate_corrected: bool
    log_every_n_steps: int | None
    export_adapter: bool
    _corrector: SafetyCorrector | None
    _recorder: ActivationRecorder | None

    @abstractmethod
    def _prepare(self, model: nn.Module, verbose: bool) -> SafetyCorrector: ...

    @abstractmethod
    def _renew(self, if_doubled: bool = False) -> None: ...

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew: the adapter may only be made later, in ``configure_model``."""
        if stage == "fit":
            refuse_strategy(trainer)
            self._corrector = None
            self._last_step = trainer.global_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resuming loaded the corrected factors: put the raw ones back. Evaluating a checkpoint keeps what ships."""
        if trainer.state.fn != "fit":
            return
        self._begin(trainer, pl_module)
        if CHECKPOINT_KEY in checkpoint:
            adapter, saved = self._corrector.adapter, checkpoint[CHECKPOINT_KEY]
            adapter.write(from_peft_state_dict(saved["raw"], list(adapter.layers), "checkpoint"))
            if self._recorder is not None and "texts" in saved:
                self._recorder.resume(Texts(**saved["texts"]))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the subspace and refuse what cannot be corrected, before the first step."""
        self._begin(trainer, pl_module)
        self._renew()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A data-aware penalty looks at the batches."""
        if self._recorder is not None:
            self._recorder.begin_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Correct the live weights if asked to, and log the drift in the step that Lightning logs."""
        if self._recorder is not None:
            self._recorder.end_step()
        step = trainer.global_step
        if step == self._last_step:  # accumulating gradients
            return
        self._last_step = step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._renew()
            self._corrector.step()
        every = self.log_every_n_steps or trainer.log_every_n_steps
        if every and step % every == 0:
            self._renew(if_doubled=True)
            for name, value in self._corrector.measure().items():
                pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in _IN_PROGRESS_BAR)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation inside a fit sees the corrected weights, because those ship."""
        if trainer.state.fn == "fit" and self.evaluate_corrected:
            self._renew()
            self._corrector.swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is trained is raw."""
        if trainer.state.fn == "fit":
            self._corrector.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An interrupted run is left with the weights it was training.

        Where they are sharded they stay as they are: this may be the only process that raised, and putting them back
        would wait for the others.
        """
        if self._recorder is not None:
            self._recorder.end_step()
        if self._corrector is not None and not self._corrector.adapter.is_sharded:
            self._corrector.restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the corrected model in memory; checkpoints written after this find it corrected already."""
        self._renew()
        self._corrector.apply()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._corrector is None:
            self._corrector = self._prepare(pl_module, verbose=trainer.is_global_zero)
            _wrap_saves(trainer, pl_module, self._corrector, self._recorder, self.export_adapter)


def _wrap_saves(
    trainer: Trainer,
    pl_module: LightningModule,
    corrector: SafetyCorrector,
    recorder: ActivationRecorder | None,
    export: bool,
) -> None:
    """Correct the dictionary that Lightning is about to write, and give each checkpoint a PEFT folder beside it."""
    strategy, saving = trainer.strategy, None
    on_save = _unwrapped(pl_module.on_save_checkpoint)
    save, remove = _unwrapped(strategy.save_checkpoint), _unwrapped(strategy.remove_checkpoint)

    def on_save_checkpoint(target: LightningModule, checkpoint: dict[str, Any]) -> None:
        nonlocal saving
        if target is not pl_module:  # a deep copy took the attribute along
            return type(target).on_save_checkpoint(target, checkpoint)
        on_save(checkpoint)
        if recorder is not None:
            recorder.renew(corrector)
        saving = corrector.compute()
        _put_into(checkpoint, saving, corrector, pl_module)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        nonlocal saving
        # DeepSpeed writes the live model, whatever the dictionary holds.
        live = saving is not None and is_strategy(strategy, "DeepSpeedStrategy")
        with corrector.corrected() if live else nullcontext():
            save(checkpoint, filepath, storage_options)
        if export and saving is not None and trainer.is_global_zero and _is_local(filepath):
            save_as_peft_adapter(saving.corrected, corrector.adapter.config, _folder(filepath))
            saving.sidecar.save(_folder(filepath))
        saving = None

    def remove_checkpoint(filepath: str | Path) -> None:
        remove(filepath)
        if trainer.is_global_zero and _is_local(filepath):
            shutil.rmtree(_folder(filepath), ignore_errors=True)

    on_save_checkpoint.uncorrected, save_checkpoint.uncorrected, remove_checkpoint.uncorrected = on_save, save, remove
    pl_module.on_save_checkpoint = types.MethodType(on_save_checkpoint, pl_module)
    strategy.save_checkpoint, strategy.remove_checkpoint = save_checkpoint, remove_checkpoint


def _put_into(
    checkpoint: dict[str, Any], adapter: CorrectedAdapter, corrector: SafetyCorrector, pl_module: LightningModule
) -> None:
    # The dictionary holds the live tensors themselves: it gets other ones, they keep their values.
    state = dict(checkpoint["state_dict"])
    for key, factor in corrector.adapter.to_state_dict(adapter.corrected, pl_module).items():
        if key in state:
            state[key] = sharding.like(state[key], factor)
        elif state:  # with a full state dict of a sharded model, only one process holds it
            logger.warning(
                "on_save_checkpoint of %s took '%s' out of the checkpoint's state_dict: whatever it saved "
                "instead is not corrected.",
                type(pl_module).__name__,
                key,
            )
    checkpoint["state_dict"] = state
    checkpoint[CHECKPOINT_KEY] = {"raw": to_peft_state_dict(adapter.raw), "record": adapter.record}
    if adapter.texts is not None:
        checkpoint[CHECKPOINT_KEY]["texts"] = asdict(adapter.texts)


def _unwrapped(method: Callable) -> Callable:
    """The method as it was before a callback of an earlier fit wrapped it: correct once, not twice."""
    return method.uncorrected if hasattr(method, "uncorrected") else method


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)


def _folder(path: str | Path) -> Path:
    return Path(path).with_suffix(".adapter")
